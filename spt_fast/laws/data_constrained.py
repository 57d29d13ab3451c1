"""Repeated data: the value of a token that is read again.

    L = A/N'^α + B/D'^β + E
    D' = U_D + U_D·R*_D·(1 − e^(−R_D/R*_D)),   R_D = D/U_D − 1
    N' = U_N + U_N·R*_N·(1 − e^(−R_N/R*_N)),   R_N = N/U_N − 1,   U_N = min(N, 0.051·U_D)

Muennighoff et al., arXiv 2305.16264: D tokens, U_D of them unique; the value of repeated tokens, and of parameters
beyond those that U_D tokens call for, decays exponentially. Repeats are clipped at 0: if only a part of the corpus is
read, U_D is that part. The law only levels off; it cannot show the overfitting that OverfittingLaw models. Huber loss
on log-losses. Decisions: the value of a repeated corpus, how often to repeat it, and size against epochs for given
FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from spt_fast.errors import DataError, invalid
from spt_fast.laws.base import FormulaLaw, Units, decision
from spt_fast.laws.chinchilla import FLOPS_PER_PARAMETER_AND_TOKEN, IRREDUCIBLE, coefficient, exponent
from spt_fast.laws.columns import POSITIVE, POSITIVE_SHARE, Array, Column, Columns, Rows, number
from spt_fast.laws.dcpt import lowest
from spt_fast.laws.fitting import Parameter

PARAMS_PER_UNIQUE_TOKEN = 0.051
FEWEST = {"params": 1e4, "tokens": 1e5}
"""A table whose largest is smaller is not in parameters and tokens, but in millions or billions of them."""

OVERFITTED = 0.05
"""A loss that lies by so much above another's, as a share of itself."""

PUBLISHED = {
    "E": 1.87,
    "A": 521.0,
    "alpha": 0.35,
    "B": 1488.0,
    "beta": 0.35,
    "R_star_D": 15.387756,
    "R_star_N": 5.309743,
}


def worth(unique: Array, repeats: Array, constant: Array) -> Array:
    """U + U·R*·(1 − e^(−R/R*))"""
    return unique * (1 + constant * (1 - np.exp(-repeats / constant)))


class DataConstrainedLaw(FormulaLaw):
    """Columns: `params` N, `tokens` D, `unique_tokens` U_D, `loss`.
    Parameters: E, A, alpha, B, beta, R_star_D, R_star_N (in repeats)."""

    inputs: ClassVar[dict[str, Column]] = {"params": POSITIVE, "tokens": POSITIVE, "unique_tokens": POSITIVE}
    parameters: ClassVar[tuple[Parameter, ...]] = (
        IRREDUCIBLE,
        coefficient("A"),
        exponent("alpha"),
        coefficient("B"),
        exponent("beta"),
        Parameter("R_star_D", 0.1, 1000),
        Parameter("R_star_N", 0.1, 1000),
    )
    units: ClassVar[Units] = {"A": {"params": "alpha"}, "B": {"tokens": "beta"}}

    def _prepare(self, rows: Rows) -> Rows:
        for name, least in FEWEST.items():
            most = float(rows.columns[name].max(initial=0))
            if 0 < most < least:
                expected = f"give {name} as they are, not in millions: {PARAMS_PER_UNIQUE_TOKEN} is a ratio of the two"
                raise DataError(invalid(name, most, expected))
        return rows

    def _doubts(self) -> str | None:
        """Runs that end above others with no more of anything: they overfit, and the law has no term for that."""
        columns, losses = [self._rows.columns[name] for name in self.inputs], self._rows.columns["loss"]
        above = 0
        for i in range(len(losses)):
            less = np.all([column <= column[i] for column in columns], axis=0)
            above += bool((losses[less] < (1 - OVERFITTED) * losses[i]).any())
        said = super()._doubts()
        if not above:
            return said
        says = (
            f"{above} of {len(losses)} rows have losses more than {OVERFITTED:.0%} above those of runs with no more "
            "params, tokens and unique_tokens; the law only falls, so leave out runs that overfitted"
        )
        return f"{said}; {says}" if said else says

    @classmethod
    def published(cls) -> Self:
        """The paper's own fit (to C4, its tokenizer): a prior without runs."""
        return cls.from_params(**PUBLISHED)

    def _features(self, columns: Columns, unit: dict[str, float]) -> Columns:
        unique_tokens = np.minimum(columns["unique_tokens"], columns["tokens"])
        unique_params = np.minimum(columns["params"], PARAMS_PER_UNIQUE_TOKEN * unique_tokens)
        return {
            "unique_tokens": unique_tokens / unit.get("tokens", 1.0),
            "unique_params": unique_params / unit.get("params", 1.0),
            "token_repeats": columns["tokens"] / unique_tokens - 1,
            "param_repeats": columns["params"] / unique_params - 1,
        }

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        E, A, alpha, B, beta, of_tokens, of_params = unknowns
        params = worth(columns["unique_params"], columns["param_repeats"], of_params)
        tokens = worth(columns["unique_tokens"], columns["token_repeats"], of_tokens)
        return E + A * params**-alpha + B * tokens**-beta

    @decision
    def effective_tokens(self, *, tokens: Any, unique_tokens: Any) -> Any:
        """D': the number of fresh tokens that `tokens` tokens read from `unique_tokens` are worth."""
        given = self._given(tokens=tokens, unique_tokens=unique_tokens)
        self._warn_beyond(**given)
        seen = np.minimum(given["tokens"], given["unique_tokens"])
        value = worth(seen, given["tokens"] / seen - 1, np.asarray(self.params_["R_star_D"]))
        return value if np.ndim(tokens) or np.ndim(unique_tokens) else float(value[0])

    @decision
    def epochs_until(self, *, marginal_worth: float) -> float:
        """Epochs after which one more token is worth only this share of a fresh one: e^(−R/R*_D) = marginal_worth."""
        self._require("params_", "fit it to a table")
        return 1 - self.params_["R_star_D"] * math.log(number("marginal_worth", marginal_worth, POSITIVE_SHARE))

    @decision
    def best_allocation(self, *, flops: float, unique_tokens: float) -> tuple[float, float]:
        """(params, tokens) with 6 · params · tokens = `flops` at which the loss is lowest, with `unique_tokens` to
        repeat."""
        (unique,) = self._number(unique_tokens=unique_tokens)
        product = number("flops", flops) / FLOPS_PER_PARAMETER_AND_TOKEN

        def loss(log_tokens: Array) -> Array:
            tokens = np.exp(log_tokens)
            given = np.broadcast_arrays(product / tokens, tokens, unique)
            return self._mean(dict(zip(self.inputs, given, strict=True)), "loss")

        middle = math.log(product) / 2
        tokens = math.exp(lowest(loss, np.linspace(middle - 12, middle + 12, 1201)))
        self._warn_beyond(params=product / tokens, tokens=tokens, unique_tokens=unique)
        return product / tokens, tokens

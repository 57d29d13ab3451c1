"""The loss after a finetune, by model size and unique finetuning tokens.

    L_ft = A/(N^α · (D_l + D_ft^β)) + E

With D_l = 0 it is the law of arXiv 2502.06042: losses at the minimum of the validation curve, nearly independent of the
injected share of general data. D_l (arXiv 2402.02314, there B/(D_l + D^β) + E for one model) is what the model knows of
the task before the finetune: until D_ft^β exceeds it, more data hardly helps, and a power law fitted to such a part
falls too slowly beyond it. Joining both in N is our reading. Huber loss on log-losses. Decision: the unique tokens that
a loss needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from spt_fast.errors import RecipeError
from spt_fast.laws.base import FormulaLaw, Units, decision
from spt_fast.laws.chinchilla import IRREDUCIBLE, coefficient, exponent
from spt_fast.laws.columns import POSITIVE, Array, Column, Columns, number
from spt_fast.laws.fitting import Fit, Parameter

NONE = 1e-5
"""A D_l this small, as a share of D_ft^β at the middle of the data, counts as 0."""


class FinetuneLaw(FormulaLaw):
    """Columns: `params` N, `unique_tokens` D_ft, `loss` (domain, after finetuning). Parameters: A, alpha, beta, E, and
    D_l, in the units of D_ft^β."""

    inputs: ClassVar[dict[str, Column]] = {"params": POSITIVE, "unique_tokens": POSITIVE}
    parameters: ClassVar[tuple[Parameter, ...]] = (
        coefficient("A"),
        exponent("alpha"),
        exponent("beta"),
        IRREDUCIBLE,
        Parameter("D_l", NONE, 1e3),
    )
    units: ClassVar[Units] = {
        "A": {"params": "alpha", "unique_tokens": "beta"},
        "D_l": {"unique_tokens": "beta"},
    }

    @classmethod
    def from_params(cls, **params: float) -> Self:
        """The law with known parameters; D_l is 0 unless given."""
        return super().from_params(**{"D_l": 0.0, **params})

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        A, alpha, beta, E, known = unknowns
        return A * columns["params"] ** -alpha / (known + columns["unique_tokens"] ** beta) + E

    @decision
    def unique_tokens_for(self, *, loss: float, params: float) -> float:
        """Unique finetuning tokens with which a model of `params` reaches `loss`; 0 if it has it before.

        Raises RecipeError for a loss at or below E, which no amount of data reaches.
        """
        (params,), loss = self._number(params=params), number("loss", loss)
        p = self.params_
        if not loss > p["E"]:
            raise RecipeError(f"no amount of data brings the loss to {loss:g}: this law's floor is E = {p['E']:.4g}")
        power = p["A"] / (params ** p["alpha"] * (loss - p["E"])) - p["D_l"]
        tokens = max(0.0, power) ** (1 / p["beta"])
        self._warn_beyond(params=params, unique_tokens=tokens)
        return float(tokens)

    def _named(self, fits: dict[Any, Fit]) -> dict[str, float]:
        params = super()._named(fits)
        return params | {"D_l": params["D_l"] if fits["loss"].values["D_l"] > 2 * NONE else 0.0}

    def _unsure(self, key: Any, fit: Fit) -> list[str]:
        return [name for name in super()._unsure(key, fit) if name != "D_l" or fit.values[name] > 2 * NONE]

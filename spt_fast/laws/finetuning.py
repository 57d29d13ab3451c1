"""The loss that a finetune reaches, by model size and unique finetuning tokens.

    L_ft = A/(N^α · D_ft^β) + E

arXiv 2502.06042: read at the bottom of the validation curve; nearly independent of the share of general data that is
injected. Huber loss on log-losses. Decision: how many unique tokens a loss takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from spt_fast.errors import RecipeError
from spt_fast.laws.base import FormulaLaw, Units
from spt_fast.laws.chinchilla import IRREDUCIBLE, coefficient, exponent
from spt_fast.laws.columns import POSITIVE, Array, Column, Columns
from spt_fast.laws.fitting import Parameter


class FinetuneLaw(FormulaLaw):
    """Columns: `params` N, `unique_tokens` D_ft, `loss` (domain, after finetuning). Parameters: A, alpha, beta, E."""

    inputs: ClassVar[dict[str, Column]] = {"params": POSITIVE, "unique_tokens": POSITIVE}
    parameters: ClassVar[tuple[Parameter, ...]] = (coefficient("A"), exponent("alpha"), exponent("beta"), IRREDUCIBLE)
    units: ClassVar[Units] = {"A": {"params": "alpha", "unique_tokens": "beta"}}

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        A, alpha, beta, E = unknowns
        return A * columns["params"] ** -alpha * columns["unique_tokens"] ** -beta + E

    def unique_tokens_for(self, *, loss: float, params: float) -> float:
        """Unique finetuning tokens with which a model of `params` reaches `loss`.

        Raises RecipeError for a loss at or below E, which no amount of data reaches.
        """
        self._given(params=params)
        p = self.params_
        if not loss > p["E"]:
            raise RecipeError(f"no amount of data brings the loss to {loss:g}: this law's floor is E = {p['E']:.4g}")
        tokens = (p["A"] / (params ** p["alpha"] * (loss - p["E"]))) ** (1 / p["beta"])
        self._warn_beyond(params=params, unique_tokens=tokens)
        return float(tokens)

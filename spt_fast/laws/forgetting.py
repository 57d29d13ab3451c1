"""Forgetting: how much a finetune raises the general loss, and how little general data in it prevents that.

    L_pt = L0_pt + A · D_ft^β / ((1 + B·p)·N)^α   (+ E in OffsetForgettingLaw)

arXiv 2502.06042: L0_pt is the general loss before finetuning, D_ft the unique finetuning tokens, p the injected share
of general data; measured at the minimum of the finetune's validation curve. Huber loss on log-losses. Known from the
paper: B ≈ 1e4 (mathematics), ≈ 829 (Wikipedia); p = 1% stops forgetting. E is our reading of an optional re-warming
offset. Decision: the injection with which the loss stays under a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from spt_fast.errors import RecipeError
from spt_fast.laws.base import FormulaLaw, Units, decision
from spt_fast.laws.chinchilla import coefficient, exponent
from spt_fast.laws.columns import POSITIVE, SHARE, Array, Column, Columns, number
from spt_fast.laws.fitting import Parameter


class ForgettingLaw(FormulaLaw):
    """Columns: `params` N, `unique_tokens` D_ft, `injected` p, `loss_before` and `loss` (general, before and after).
    Parameters: A, B, alpha, beta."""

    inputs: ClassVar[dict[str, Column]] = {
        "params": POSITIVE,
        "unique_tokens": POSITIVE,
        "injected": SHARE,
        "loss_before": POSITIVE,
    }
    parameters: ClassVar[tuple[Parameter, ...]] = (
        coefficient("A"),
        Parameter("B", 1, 1e7),
        exponent("alpha"),
        exponent("beta"),
    )
    units: ClassVar[Units] = {"A": {"params": "alpha", "unique_tokens": "-beta"}}

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        A, B, alpha, beta = unknowns[:4]
        held = (1 + B * columns["injected"]) * columns["params"]
        rise = A * columns["unique_tokens"] ** beta * held**-alpha
        return columns["loss_before"] + rise + sum(unknowns[4:])

    @decision
    def injection(self, *, params: float, unique_tokens: float, max_rise: float) -> float:
        """The smallest share p of general data with which the general loss rises by at most `max_rise` nats; 0 if none
        is needed.

        Raises RecipeError if no share in [0, 1] is enough.
        """
        params, unique_tokens = self._number(params=params, unique_tokens=unique_tokens)
        max_rise = number("max_rise", max_rise)
        p = self.params_
        room = max_rise - p.get("E", 0.0)
        size = (p["A"] * unique_tokens ** p["beta"] / room) ** (1 / p["alpha"]) if room > 0 else float("inf")
        share = max(0.0, (size / params - 1) / p["B"])
        if share > 1:
            raise RecipeError(
                f"no injected share keeps the rise within {max_rise:g} nats for {params:g} parameters and "
                f"{unique_tokens:g} unique tokens; allow more, or finetune on less"
            )
        self._warn_beyond(params=params, unique_tokens=unique_tokens, injected=share)
        return float(share)


class OffsetForgettingLaw(ForgettingLaw):
    """The same with E, a rise that neither size nor injection removes. Parameters: A, B, alpha, beta, E."""

    parameters: ClassVar[tuple[Parameter, ...]] = (*ForgettingLaw.parameters, Parameter("E", 1e-6, 5, linear=True))

"""One source, each token read once: the law that the others extend.

    L(N, D) = E + A/N^α + B/D^β

N parameters, D tokens. The form and the fit, Huber loss on log-losses from many starts, are those of arXiv 2203.15556.
Decision: how to split 6·N·D FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from spt_fast.laws.base import FormulaLaw, Units, decision
from spt_fast.laws.columns import POSITIVE, Array, Column, Columns, number
from spt_fast.laws.fitting import Parameter
from spt_fast.laws.powers import power

FLOPS_PER_PARAMETER_AND_TOKEN = 6

IRREDUCIBLE = Parameter("E", 1e-3, 20, linear=True)


def coefficient(name: str) -> Parameter:
    """A term's size, in nats, at the middle of the data."""
    return Parameter(name, 1e-6, 30, linear=True)


def exponent(name: str) -> Parameter:
    return Parameter(name, 0.01, 3)


class ChinchillaLaw(FormulaLaw):
    """Columns: `params`, `tokens`, `loss`. Parameters: E, A, alpha, B, beta."""

    inputs: ClassVar[dict[str, Column]] = {"params": POSITIVE, "tokens": POSITIVE}
    parameters: ClassVar[tuple[Parameter, ...]] = (
        IRREDUCIBLE,
        coefficient("A"),
        exponent("alpha"),
        coefficient("B"),
        exponent("beta"),
    )
    units: ClassVar[Units] = {"A": {"params": "alpha"}, "B": {"tokens": "beta"}}

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        E, A, alpha, B, beta = unknowns
        return E + A * power(columns["params"], -alpha) + B * power(columns["tokens"], -beta)

    @decision
    def best_allocation(self, *, flops: float) -> tuple[float, float]:
        """(params, tokens) with 6 · params · tokens = `flops` at which the loss is lowest."""
        self._require("params_", "fit it to a table")
        p = self.params_
        params, tokens = allocation(flops, p["A"], p["alpha"], p["B"], p["beta"])
        self._warn_beyond(params=params, tokens=tokens)
        return params, tokens


def allocation(flops: float, A: float, alpha: float, B: float, beta: float) -> tuple[float, float]:
    """The minimum of A/N^α + B/D^β on 6·N·D = flops: its derivative along that line vanishes at α·A/N^α = β·B/D^β."""
    product = number("flops", flops) / FLOPS_PER_PARAMETER_AND_TOKEN
    params = (alpha * A / (beta * B) * product**beta) ** (1 / (alpha + beta))
    return params, product / params

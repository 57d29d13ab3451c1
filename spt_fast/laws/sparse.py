"""Sparse pretraining: the parameter count averaged over the run decides the loss.

    L(N̄, D) = E + A/N̄^α + B/D^β,   N̄ = mean over steps of N_t, the parameters not pruned at step t

"The Journey Matters", arXiv 2501.12486: one law for dense and sparse pretraining. Decision: the dense model that is
equivalent to a pruning schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from spt_fast.errors import RecipeError
from spt_fast.laws.base import Units
from spt_fast.laws.chinchilla import ChinchillaLaw
from spt_fast.laws.columns import POSITIVE, Array, Column, Columns, check, numeric


def average_params(params: Any, steps: Any = None) -> float:
    """N̄ of a schedule: parameters at each step, or in each stretch of `steps` steps. It is also the size of the dense
    model that reaches the same loss with the same tokens and FLOPs."""
    counts = np.atleast_1d(numeric("params", params))
    lengths = np.ones_like(counts) if steps is None else np.atleast_1d(numeric("steps", steps))
    for name, values in (("params", counts), ("steps", lengths)):
        check(name, values, POSITIVE, RecipeError)
    if counts.shape != lengths.shape or not counts.size:
        raise RecipeError(f"params and steps must have one length, at least one; got {counts.size} and {lengths.size}")
    return float(np.average(counts, weights=lengths))


class SparsePretrainingLaw(ChinchillaLaw):
    """Columns: `average_params` (see `average_params()`), `tokens`, `loss`. Parameters: E, A, alpha, B, beta.

    `best_allocation(flops=)` gives average parameters and tokens.
    """

    inputs: ClassVar[dict[str, Column]] = {"average_params": POSITIVE, "tokens": POSITIVE}
    units: ClassVar[Units] = {"A": {"average_params": "alpha"}, "B": {"tokens": "beta"}}

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        return ChinchillaLaw.formula(unknowns, {"params": columns["average_params"], "tokens": columns["tokens"]})

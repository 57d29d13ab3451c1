"""The D-CPT law across domains: what was learned on some domains, carried over to one that has only a probe run.

    L(N, D, r, K) = E + A/N^α + B·r^η/D^β + C/(r + ε)^γ + F/K^μ,   K = w1/k1 + w2·k2

arXiv 2406.01375: K is the domain's learnability, from a probe run of about 1% of the cost: k1 its initial domain loss,
k2 how fast that declines. E and F/K^μ are told apart by the spread of K alone: fit three domains or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from spt_fast.errors import RecipeError
from spt_fast.laws.base import Units
from spt_fast.laws.chinchilla import coefficient, exponent
from spt_fast.laws.columns import POSITIVE, Array, Column, Columns
from spt_fast.laws.dcpt import DCPTLaw
from spt_fast.laws.fitting import Parameter


def learnability(losses: Any, w1: float = 1.0, w2: float = 1.0) -> float:
    """K = w1/k1 + w2·k2 of a probe run, from its domain losses at equally spaced evaluations, the first before
    training.

    Our reading: k2 is the mean decline from one evaluation to the next, so that probes of all domains must be evaluated
    at the same steps. Raises RecipeError for fewer than two losses, and where K is not positive.
    """
    probe = np.asarray(losses, dtype=float)
    if probe.ndim != 1 or len(probe) < 2 or not np.isfinite(probe).all() or (probe <= 0).any():
        raise RecipeError("learnability needs at least two finite losses above 0, the first before training")
    decline = (probe[0] - probe[-1]) / (len(probe) - 1)
    K = float(w1 / probe[0] + w2 * decline)
    if K <= 0:
        raise RecipeError(f"the learnability is {K:g}, not above 0: in its probe run the domain's loss rose")
    return K


class CrossDomainDCPTLaw(DCPTLaw):
    """Columns: those of DCPTLaw and `learnability` K (see `learnability()`). Parameters: those of DCPTLaw, F, mu.

    `best_ratio` takes `learnability` too.
    """

    inputs: ClassVar[dict[str, Column]] = {**DCPTLaw.inputs, "learnability": POSITIVE}
    parameters: ClassVar[tuple[Parameter, ...]] = (*DCPTLaw.parameters, coefficient("F"), exponent("mu"))
    units: ClassVar[Units] = DCPTLaw.units | {"F": {"learnability": "mu"}}

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        *own, F, mu = unknowns
        return DCPTLaw.formula(own, columns) + F * columns["learnability"] ** -mu

"""The D-CPT law across domains: parameters from some domains, applied to one that has only a probe run.

    L(N, D, r, K) = E + A/N^α + B·r^η/D^β + C/(r + ε)^γ + F/K^μ,   K = w1/k1 + w2·k2

arXiv 2406.01375: K is the domain's learnability, from a probe run of about 1% of the cost: k1 its initial domain loss,
k2 how fast that declines. With k1 and k2 in the table, w2 is fitted, and w1 is 1, since F takes its scale. Only the
spread of K distinguishes E from F/K^μ: fit three domains or more. The error for an unseen domain is measured by leaving
out each in turn.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from spt_fast.errors import DataError, RecipeError, invalid
from spt_fast.laws.base import LawWarning, Units
from spt_fast.laws.chinchilla import coefficient, exponent
from spt_fast.laws.columns import POSITIVE, Array, Column, Columns, Rows, number, numeric, read
from spt_fast.laws.dcpt import DCPTLaw
from spt_fast.laws.fitting import Parameter

FEWEST_DOMAINS = 3
SPAN = 2.0
"""A learnability may be this many times beyond the fitted ones."""


def learnability(losses: Any, w1: float = 1.0, w2: float = 1.0) -> float:
    """K = w1/k1 + w2·k2 of a probe run, from its domain losses at equally spaced evaluations, the first before
    training.

    Our reading: k2 is the mean decline from one evaluation to the next, so probes of all domains must be evaluated at
    the same steps. Raises RecipeError for fewer than two losses, and if K is not positive.
    """
    probe, w1, w2 = numeric("losses", losses), number("w1", w1, None), number("w2", w2, None)
    if probe.ndim != 1 or len(probe) < 2 or not np.isfinite(probe).all() or (probe <= 0).any():
        raise RecipeError(invalid("losses", losses, "give at least two losses above 0, the first before training"))
    decline = (probe[0] - probe[-1]) / (len(probe) - 1)
    K = float(w1 / probe[0] + w2 * decline)
    if K <= 0:
        raise RecipeError(f"the learnability is {K:g}, not above 0: in its probe run the domain's loss rose")
    return K


class CrossDomainDCPTLaw(DCPTLaw):
    """Columns: those of DCPTLaw and `learnability` K (see `learnability()`). Parameters: those of DCPTLaw, F, mu.

    `best_ratio` also needs `learnability`. A fit raises DataError for fewer than three domains; a prediction
    RecipeError for a domain more than twice as easy or hard to learn as the fitted ones.
    """

    inputs: ClassVar[dict[str, Column]] = {**DCPTLaw.inputs, "learnability": POSITIVE}
    parameters: ClassVar[tuple[Parameter, ...]] = (*DCPTLaw.parameters, coefficient("F"), exponent("mu"))
    units: ClassVar[Units] = DCPTLaw.units | {"F": {"learnability": "mu"}}
    of_domain: ClassVar[tuple[str, ...]] = ("learnability",)
    """The columns that identify a domain."""

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        *own, F, mu = unknowns
        return DCPTLaw.formula(own, columns) + F * columns["learnability"] ** -mu

    def leave_one_domain_out(self, table: Any) -> dict[tuple[float, ...], float]:
        """{a domain's learnability (or k1 and k2): mean relative error there of the law fitted to the other domains}.

        Raises DataError for fewer than four domains.
        """
        rows = read(table, self.inputs, self.outputs)
        found, domains = {}, self._domains(rows.columns)
        for domain in np.unique(domains, axis=0):
            here = (domains == domain).all(axis=1)
            law, rest, own = type(self)(), rows.where(~here), rows.where(here)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LawWarning)
                law.fit(rest.columns | {"run": rest.run})
                mean = law._mean({name: own.columns[name] for name in self.inputs}, "loss")
            found[tuple(domain.tolist())] = float(np.abs(own.columns["loss"] / mean - 1).mean())
        return found

    def _require_enough(self, rows: Rows) -> None:
        super()._require_enough(rows)
        domains = len(np.unique(self._domains(rows.columns), axis=0))
        if domains < FEWEST_DOMAINS:
            raise DataError(
                f"{type(self).__name__} identifies domains by {' and '.join(self.of_domain)}: fit {FEWEST_DOMAINS} "
                f"domains or more; the table has {domains}"
            )

    def _warn_beyond(self, **columns: Any) -> None:
        for name in self.of_domain if hasattr(self, "_rows") else ():
            seen, asked = self._rows.columns[name], np.asarray(columns.get(name, self._rows.columns[name]))
            low, high = seen.min() / SPAN, seen.max() * SPAN
            if asked.min() < low or asked.max() > high:
                beyond = float(asked.min() if asked.min() < low else asked.max())
                spans = f"the fitted domains span {seen.min():.3g} to {seen.max():.3g}; run one like it"
                raise RecipeError(invalid(name, beyond, spans))
        super()._warn_beyond(**columns)

    def _domains(self, columns: Columns) -> Array:
        return np.stack([columns[name] for name in self.of_domain], axis=1)


class ProbedDCPTLaw(CrossDomainDCPTLaw):
    """The same with the measurements of a probe run instead of K. Columns: those of DCPTLaw, `initial_loss` k1 and
    `decline` k2, in nats, of probes evaluated at the same steps. Parameters: those of DCPTLaw, F, mu, w2; w1 is 1."""

    inputs: ClassVar[dict[str, Column]] = {**DCPTLaw.inputs, "initial_loss": POSITIVE, "decline": POSITIVE}
    parameters: ClassVar[tuple[Parameter, ...]] = (*CrossDomainDCPTLaw.parameters, Parameter("w2", 1e-3, 1e3))
    units: ClassVar[Units] = DCPTLaw.units
    of_domain: ClassVar[tuple[str, ...]] = ("initial_loss", "decline")

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        *own, w2 = unknowns
        K = 1 / columns["initial_loss"] + w2 * columns["decline"]
        return CrossDomainDCPTLaw.formula(own, columns | {"learnability": K})

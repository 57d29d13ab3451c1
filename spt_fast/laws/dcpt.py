"""Continued pretraining on a mixture: the D-CPT law, and the mixture to use.

    L(N, D, r) = E + A/N^α + B·r^η/D^β + C/(r + ε)^γ

arXiv 2406.01375: N parameters, D tokens of continued pretraining, r the share of the corpus of the loss (`own_ratio`:
the general share for the general loss, the domain share for the domain loss); each loss has a separate law. All
parameters are positive; that L falls in r is checked on the range of the data after the fit. Huber loss on log-losses
from many starts. Its three uses: the most domain data that a limit on general loss allows (`best_ratio`); the share for
a given number of domain tokens (`DCPTLaw.best_ratio`); size and tokens for given FLOPs (`best_allocation`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from spt_fast.errors import RecipeError, invalid
from spt_fast.laws.base import FormulaLaw, Law, LawWarning, Units, decision, require_law, require_settled
from spt_fast.laws.chinchilla import IRREDUCIBLE, allocation, coefficient, exponent
from spt_fast.laws.columns import POSITIVE, SHARE, Array, Column, Columns, arguments, number, numbers
from spt_fast.laws.fitting import Parameter
from spt_fast.laws.powers import power

GRID = np.linspace(0, 1, 2001)


class DCPTLaw(FormulaLaw):
    """Columns: `params` N, `tokens` D, `own_ratio` r, `loss`. Parameters: E, A, alpha, B, eta, beta, C, epsilon,
    gamma."""

    inputs: ClassVar[dict[str, Column]] = {"params": POSITIVE, "tokens": POSITIVE, "own_ratio": SHARE}
    parameters: ClassVar[tuple[Parameter, ...]] = (
        IRREDUCIBLE,
        coefficient("A"),
        exponent("alpha"),
        coefficient("B"),
        exponent("eta"),
        exponent("beta"),
        coefficient("C"),
        Parameter("epsilon", 1e-3, 3),
        exponent("gamma"),
    )
    units: ClassVar[Units] = {"A": {"params": "alpha"}, "B": {"tokens": "beta"}}

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        E, A, alpha, B, eta, beta, C, epsilon, gamma = unknowns
        r = columns["own_ratio"]
        of_size = A * power(columns["params"], -alpha)
        read = np.exp(eta * np.log(np.where(r > 0, r, 1)) - beta * np.log(columns["tokens"]))
        of_tokens = B * np.where(r > 0, read, 0)
        return E + of_size + of_tokens + C * (r + epsilon) ** -gamma

    def fit(self, table: Any) -> Self:
        super().fit(table)
        rising = self._rises_with_ratio(self._rows.columns)
        if rising.any():
            r = np.unique(self._rows.columns["own_ratio"][rising])
            at = f"{r[0]:g} to {r[-1]:g}" if len(r) > 1 else f"{r[0]:g}"
            warnings.warn(
                f"{type(self).__name__}: the fitted loss rises with own_ratio in {rising.sum()} of {len(rising)} rows "
                f"({at}), but the law requires that it falls; add runs with other ratios",
                LawWarning,
                stacklevel=2,
            )
        return self

    def _rises_with_ratio(self, columns: Columns) -> Array:
        """[rows]: whether the loss is higher at the next larger ratio that was run; of the largest one, whether it is
        lower at the one before. The derivative would say so of every law at 0, where that of r^η has no bound."""
        r = columns["own_ratio"]
        ratios, index = np.unique(r, return_inverse=True)
        if len(ratios) == 1:
            return np.zeros(len(r), dtype=bool)
        below = np.minimum(index, len(ratios) - 2)
        lower, higher = (self._mean(columns | {"own_ratio": ratios[below + i]}, "loss") for i in (0, 1))
        return higher > lower

    @decision
    def best_ratio(self, *, params: float, domain_tokens: float, **other: float) -> float:
        """The domain share r, at least 0.05%, with the lowest domain loss for `domain_tokens` tokens of domain data,
        each read once: more general data (tokens = domain_tokens/r) against a purer mixture. As r approaches 0, so does
        the law's term in tokens, which can make the smallest share the answer."""

        self._require("params_", "fit it to a table")
        at, read = numbers({"params": params, **other}, self.inputs), number("domain_tokens", domain_tokens)

        def loss(r: Array) -> Array:
            return self._mean(arguments({**at, "tokens": read / r, "own_ratio": r}, self.inputs, {})[0], "loss")

        r = lowest(loss, GRID[1:])
        self._warn_beyond(**at, tokens=read / r, own_ratio=r)
        return r

    @decision
    def best_allocation(self, *, flops: float, own_ratio: float) -> tuple[float, float]:
        """(params, tokens) with 6 · params · tokens = `flops` at which the loss is lowest, for a fixed mixture."""
        (ratio,) = self._number(own_ratio=own_ratio)
        if ratio == 0:
            raise RecipeError(invalid("own_ratio", own_ratio, "give a share above 0; at 0 no number of tokens helps"))
        p = self.params_
        params, tokens = allocation(flops, p["A"], p["alpha"], p["B"] * ratio ** p["eta"], p["beta"])
        self._warn_beyond(params=params, tokens=tokens, own_ratio=ratio)
        return params, tokens


def best_ratio(
    *,
    domain: DCPTLaw,
    general: DCPTLaw,
    params: float,
    tokens: float,
    max_general_rise: float,
    general_before: float | None = None,
    **of_domain: float,
) -> float:
    """The domain share with the lowest domain loss whose general loss is at most (1 + `max_general_rise`) times its
    start.

    domain, general   the laws of the two losses
    max_general_rise  a fraction: 0.03 allows 3%
    general_before    the general loss at the start, in nats; by default the general law's value if all of `tokens` are
                      general, since the law has no value at tokens = 0
    of_domain         other columns of the domain's law: learnability

    Raises RecipeError if a law is of another kind, if no share is allowed, and if it depends on a parameter that the
    runs do not determine.
    """
    rise = number("max_general_rise", max_general_rise, SHARE)
    before = None if general_before is None else number("general_before", general_before)
    for name, law in (("domain", domain), ("general", general)):
        require_law(name, law, DCPTLaw)
    of_domain = numbers(of_domain, domain.inputs)
    for law in (domain, general):
        params, tokens = law._number(params=params, tokens=tokens)

    def best(domain: Law, general: Law) -> float:
        return _best_ratio(domain, general, params, tokens, rise, before, of_domain)

    r = best(domain, general)
    require_settled(r, domain, lambda other: best(other, general))
    require_settled(r, general, lambda other: best(domain, other))
    domain._warn_beyond(params=params, tokens=tokens, own_ratio=r, **of_domain)
    general._warn_beyond(params=params, tokens=tokens, own_ratio=1 - r)
    return r


def _best_ratio(
    domain: Law,
    general: Law,
    params: float,
    tokens: float,
    max_general_rise: float,
    general_before: float | None,
    of_domain: dict[str, float],
) -> float:
    def domain_loss(r: Any) -> Array:
        given = {"params": params, "tokens": tokens, "own_ratio": r, **of_domain}
        return domain._mean(arguments(given, domain.inputs, {})[0], "loss")

    def general_loss(r: Any) -> Array:
        given = {"params": params, "tokens": tokens, "own_ratio": 1 - np.asarray(r)}
        return general._mean(arguments(given, general.inputs, {})[0], "loss")

    start = general_loss(0.0)[0] if general_before is None else general_before

    def excess(r: Any) -> Array:
        return general_loss(r) - (1 + max_general_rise) * start

    allowed = excess(GRID) <= 1e-12
    if not allowed.any():
        raise RecipeError(
            f"at every share of domain data the general loss rises by more than {max_general_rise:.3g} of its start "
            f"({start:.4g}); the smallest rise is {excess(GRID).min() / start + max_general_rise:.3g}"
        )
    best = int(np.argmin(np.where(allowed, domain_loss(GRID), np.inf)))
    around = slice(max(best - 1, 0), best + 2)
    if allowed[around].all():
        r = lowest(domain_loss, GRID[around])
    else:
        r = _last_allowed(lambda x: excess(x)[0], GRID[best], GRID[around][~allowed[around]][-1])
    return float(r)


def _last_allowed(excess: Callable[[float], float], allowed: float, forbidden: float) -> float:
    return brentq(excess, allowed, forbidden) if excess(allowed) < 0 else allowed


def first_fall(of: Callable[[Array], Array], grid: Array) -> float | None:
    """The first zero at which `of` crosses from above, between two points of the grid; None without one."""
    above = of(grid) > 0
    turns = np.flatnonzero(above[:-1] & ~above[1:])
    return brentq(lambda x: of(np.array([x]))[0], grid[turns[0]], grid[turns[0] + 1]) if len(turns) else None


def lowest(loss: Callable[[Array], Array], grid: Array) -> float:
    """The minimum of a loss between the grid's ends: its least grid point, refined between its neighbours."""
    best = int(np.argmin(loss(grid)))
    if best in (0, len(grid) - 1):
        return float(grid[best])
    edges = (grid[best - 1], grid[best + 1])
    return float(minimize_scalar(lambda x: float(loss(np.array([x]))[0]), bounds=edges, options={"xatol": 1e-9}).x)

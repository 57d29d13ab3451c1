"""The critical mixture ratio: the most domain data in continued pretraining that does not cost general ability.

    ΔL_dom(T) = α1·T^s1 + β1,   ΔL_gen(T) = α2·T^s2 + α3·T^s3 + β2   for each domain share R, from T = 0
    ΔL(R) = α·R^s + β                                                 at a budget, through the ratios that were run
    R is feasible at T_max  ⇔  ΔL_gen(T_max) ≤ ε, ΔL_dom(T_max) < 0 and T0 ≤ T_max
    T0 solves dΔL_dom/dT + λ·dΔL_gen/dT = 0;   CMR = the largest feasible R
    R_CMR(T) = α4·T^s4 + β3                                           across budgets

CMR scaling law, arXiv 2407.17467 (ε = 0.05, λ from 100 to 7000). T0 ≤ T_max is tested as a falling sum at T_max. Least
squares for each R, and through the ratios.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from spt_fast.errors import DataError, RecipeError, invalid
from spt_fast.laws.base import ExtrapolationWarning, Law, OpenError, probability, require_points
from spt_fast.laws.columns import (
    NATURAL,
    POSITIVE,
    SHARE,
    Array,
    Column,
    Columns,
    Loss,
    Rows,
    check,
    number,
    numeric,
)
from spt_fast.laws.dcpt import first_fall
from spt_fast.laws.fitting import DRAWS, STEP, Curve, Fit, Parameter, solve
from spt_fast.laws.powers import in_tokens, offset_power, power_parameters, rising

DOMAIN = power_parameters(-2, 1, "alpha1", "s1", "beta1")
GENERAL = (
    *power_parameters(-2, 1, "alpha2", "s2", "beta2"),
    Parameter("alpha3", -20, 20, log=False, linear=True),
    Parameter("s3", 0.2, 2),
)
LOSSES = "general_loss", "domain_loss"


LEAST_MULTIPLIER = 100.0
"""The least λ in the paper: the larger it is, the more the general loss decides."""
EARLIER = 1.05
"""A loss is compared with the one at a budget shorter by this factor, to see whether it rises or falls."""
GRID = 2000
"""Number of ratios that are tried."""
EXPONENTS = np.geomspace(1 / 20, 20, 241)
"""Exponents of R that are tried."""


def joined(ratios: Sequence[float], values: Array, variance: Array, at: Array) -> Array:
    """α·R^s + β through values [draws, ratios] of the given variance [ratios], at other ratios: [draws, at]. s is 1 for
    two ratios."""
    known = np.array(ratios)
    exponents = EXPONENTS if len(known) > 2 else np.ones(1)
    weights = 1 / np.maximum(variance, 1e-3 * variance.max() + 1e-300)
    weights = weights / weights.sum()
    powers, asked = known ** exponents[:, None], at ** exponents[:, None]
    middle = powers @ weights
    centred = powers - middle[:, None]
    mean = values @ weights
    slope = ((values * weights) @ centred.T) / (np.square(centred) @ weights)
    error = np.square(values[:, None] - mean[:, None, None] - slope[..., None] * centred) @ weights
    best = error.argmin(axis=1)
    alpha = slope[np.arange(len(values)), best]
    return mean[:, None] + alpha[:, None] * (asked[best] - middle[best, None])


def _general(unknowns: Sequence[Array], columns: Columns) -> Array:
    """The second exponent is searched by its distance above the first."""
    *first, s3, apart = unknowns
    return offset_power(first, columns) + s3 * rising(first[2] + apart, columns["x"])


class CMRLaw(Law):
    """Columns: `tokens` T (0 is the start), `domain_ratio` R, `general_loss`, `domain_loss`. Increments are taken from
    the rows at tokens = 0, one model for all ratios; a table without them must hold increments already.
    Predicts general_loss, or domain_loss with `of="domain_loss"`, for any ratio.

    Parameters, for each R: alpha1[R], s1[R], beta1[R]; alpha2[R], s2[R], alpha3[R], s3[R], beta2[R] (T in tokens).
    """

    inputs: ClassVar[dict[str, Column]] = {"tokens": NATURAL, "domain_ratio": SHARE}
    outputs: ClassVar[dict[str, Loss]] = {"general_loss": Loss(signed=True), "domain_loss": Loss(signed=True)}

    @property
    def ratios_(self) -> list[float]:
        """The domain shares that were fitted."""
        self._require("_fits", "fit it to a table")
        return sorted({ratio for _, ratio in self._fits})

    def critical_ratio(
        self,
        *,
        tokens: float,
        tolerance: float = 0.05,
        multiplier: float = LEAST_MULTIPLIER,
        interval: float | None = None,
    ) -> Any:
        """The largest domain share with which, after `tokens`, the general loss is at most `tolerance` nats above its
        start, the domain loss has fallen, and the turning point T0 of λ = `multiplier` has passed.

        interval  e.g. 0.9: (ratio, low, high) instead, from the uncertainty of the fits at the ratios

        Raises RecipeError if no share is feasible, and if these runs do not determine the answer: its 90% interval is
        wider than half of the range of ratios that were run. Warns ExtrapolationWarning beyond that range.
        """
        interval = None if interval is None else probability("interval", interval)
        self._require("_fits", "fit it to a table")
        tokens, tolerance = number("tokens", tokens), number("tolerance", tolerance, None)
        multiplier = number("multiplier", multiplier)
        ratios = np.array(self.ratios_)
        self._warn_beyond(tokens=tokens)
        if len(ratios) < 2:
            raise RecipeError("a critical ratio needs runs at two domain ratios or more")
        now, before = (self._drawn_increments(T) for T in (tokens, tokens / EARLIER))
        found = self._largest_feasible(now, before, tolerance, multiplier)
        if np.isnan(found[0]):
            general, domain = (now[of][0][0] for of in LOSSES)
            ahead = f"; the turning point of multiplier {multiplier:g} comes later" * bool((general <= tolerance).any())
            raise RecipeError(
                f"no domain ratio from {ratios[0]:g} to {ratios[-1]:g} is feasible at {tokens:g} tokens: the general "
                f"loss rises by at least {general.min():.3g} (tolerance {tolerance:g}), the domain loss "
                f"changes by {domain.min():.3g}{ahead}"
            )
        drawn = np.nan_to_num(found[1:], nan=0.0)
        low, high = np.quantile(drawn, (0.05, 0.95))
        if high - low > np.ptp(ratios) / 2:
            raise OpenError(
                f"these runs do not determine the critical ratio at {tokens:g} tokens: it is {found[0]:.3g}, with a "
                f"90% interval from {low:.2g} to {high:.2g}; run more ratios, longer, or each with a second seed"
            )
        if not ratios[0] - 1e-9 <= found[0] <= ratios[-1] + 1e-9:
            warnings.warn(
                f"CMRLaw extrapolates: at {tokens:g} tokens the critical ratio, {found[0]:.3g}, is beyond the ratios "
                f"that were run ({ratios[0]:g} to {ratios[-1]:g})",
                ExtrapolationWarning,
                stacklevel=2,
            )
        if interval is None:
            return float(found[0])
        edges = np.quantile(drawn, ((1 - interval) / 2, (1 + interval) / 2))
        return float(found[0]), float(edges[0]), float(edges[1])

    def _drawn_increments(self, tokens: float) -> dict[str, tuple[Array, Array]]:
        """By loss: the increments after `tokens` at every ratio, [1 + DRAWS, ratios], first as fitted and then drawn;
        and their variance [ratios]. All budgets use the same draws."""
        found = {}
        for i, of in enumerate(LOSSES):
            mean = self._increments(tokens, of)[:, 0]
            at = self._scaled(np.atleast_1d(float(tokens)))
            variance = np.array([self._fits[of, ratio].variance(at)[:, 0] for ratio in self.ratios_]).T
            rng = np.random.default_rng([self.seed, i])
            order = rng.permuted(np.tile(np.arange(DRAWS)[:, None], len(mean)), axis=0)
            drawn = mean + np.sqrt(np.take_along_axis(variance, order, 0)) * rng.standard_normal((DRAWS, len(mean)))
            found[of] = np.concatenate([mean[None], drawn]), np.median(variance, axis=0)
        return found

    def _largest_feasible(
        self,
        now: dict[str, tuple[Array, Array]],
        before: dict[str, tuple[Array, Array]],
        tolerance: float,
        multiplier: float,
    ) -> Array:
        """[draws]; NaN if no ratio is feasible."""
        grid, at = np.linspace(1 / GRID, 1, GRID), self.ratios_
        rise, fall = (joined(at, *now[of], grid) for of in LOSSES)
        earlier_rise, earlier_fall = (joined(at, *before[of], grid) for of in LOSSES)
        slope = fall - earlier_fall + multiplier * (rise - earlier_rise)
        excess = np.maximum(np.maximum(rise - tolerance, fall), slope / multiplier)
        feasible = excess <= 0
        last = GRID - 1 - feasible[:, ::-1].argmax(axis=1)
        draws = np.arange(len(last))
        after = np.minimum(last + 1, GRID - 1)
        inside, outside = excess[draws, last], excess[draws, after]
        share = np.where(after > last, -inside / np.maximum(outside - inside, 1e-300), 0)
        return np.where(feasible.any(axis=1), grid[last] + share / GRID, np.nan)

    def critical_ratio_curve(self, *, tokens: Any, tolerance: float = 0.05) -> dict[str, float]:
        """{"alpha4", "s4", "beta3"} of R_CMR(T) = α4·T^s4 + β3 through the critical ratios at these budgets."""
        budgets = np.ravel(numeric("tokens", tokens))
        check("tokens", budgets, POSITIVE, RecipeError)
        require_points(budgets.size, len(DOMAIN), "The curve of critical ratios")
        ratios = np.array([self.critical_ratio(tokens=T, tolerance=tolerance) for T in budgets])
        middle = float(np.exp(np.log(budgets).mean()))
        curve = Curve(DOMAIN, offset_power, {"x": np.log(budgets / middle)}, ratios, np.arange(len(budgets)))
        c, s, b = Fit(curve, solve(curve, seed=self.seed)).values.values()
        alpha4, s4, shift = in_tokens(s, b, middle)
        return {"alpha4": alpha4, "s4": s4, "beta3": c + shift}

    def turning_tokens(self, *, domain_ratio: float, multiplier: float) -> float | None:
        """T0, where ΔL_dom + λ·ΔL_gen turns from rising to falling, λ = `multiplier`; None if it does not turn between
        a hundredth of the smallest and a hundred times the largest budget that was run."""
        (ratio,), weight = self._number(domain_ratio=domain_ratio), number("multiplier", multiplier)
        tokens = self._rows.columns["tokens"]
        grid = np.geomspace(tokens[tokens > 0].min() / 100, tokens.max() * 100, 2001)
        return first_fall(lambda T: self._between(self._slopes(T, weight), ratio), grid)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _groups(self, rows: Rows) -> Array:
        return np.unique(rows.columns["domain_ratio"], return_inverse=True)[1]

    def _require_enough(self, rows: Rows) -> None:
        if not (rows.columns["tokens"] > 0).any():
            raise DataError("CMRLaw needs rows with tokens above 0; the table has only starts")
        if (rows.columns["tokens"] > 0).all() and not (rows.columns["domain_loss"] < 0).any():
            raise DataError(
                "CMRLaw needs increments from tokens = 0, and the table has no row there; add the losses of the model "
                "that was continued, with tokens = 0"
            )
        for ratio in np.unique(rows.columns["domain_ratio"]):
            points = int(((rows.columns["domain_ratio"] == ratio) & (rows.columns["tokens"] > 0)).sum())
            if points:
                require_points(points, len(GENERAL), "CMRLaw", f" with tokens above 0 at each ratio (here {ratio:g})")

    def _fit(self, rows: Rows, weights: Array | None, warm: dict[Any, Fit] | None) -> dict[Any, Fit]:
        later = rows.columns["tokens"] > 0
        if warm is None:
            self._unit = float(np.exp(np.log(rows.columns["tokens"][later]).mean()))
        self._start = {of: float(rows.columns[of][~later].mean()) if (~later).any() else 0.0 for of in LOSSES}
        fits: dict[Any, Fit] = {}
        for ratio in np.unique(rows.columns["domain_ratio"][later]).tolist():
            mask = later & (rows.columns["domain_ratio"] == ratio)
            own, w = rows.where(mask), None if weights is None else weights[:, mask]
            for of, parameters, formula in (("general_loss", GENERAL, _general), ("domain_loss", DOMAIN, offset_power)):
                curve = Curve(
                    parameters, formula, self._scaled(own.columns["tokens"]), own.columns[of] - self._start[of], own.run
                )
                fits[of, ratio] = Fit(curve, solve(curve, w, [warm[of, ratio].x] if warm else None, self.seed))
        return fits

    def _scaled(self, tokens: Array) -> Columns:
        return {"x": np.log(tokens / self._unit)}

    def _named(self, fits: dict[Any, Fit]) -> dict[str, float]:
        params: dict[str, float] = {}
        for (of, ratio), fit in fits.items():
            c, s, b, *second = fit.values.values()
            a, b, shift = in_tokens(s, b, self._unit)
            if of == "domain_loss":
                named = {"alpha1": a, "s1": b, "beta1": c + shift}
            else:
                a3, b3, shift3 = in_tokens(second[0], b + second[1], self._unit)
                named = {"alpha2": a, "s2": b, "alpha3": a3, "s3": b3, "beta2": c + shift + shift3}
            params |= {f"{name}[{ratio:g}]": value for name, value in named.items()}
        return params

    def _unsure(self, key: Any, fit: Fit) -> list[str]:
        return [f"{name}[{key[1]:g}]" for name in fit.unidentified]

    def _increments(self, tokens: Any, of: str) -> Array:
        """[ratios, tokens]"""
        return np.array([self._fits[of, r].mean(self._scaled(np.atleast_1d(tokens))) for r in self.ratios_])

    def _slopes(self, tokens: Any, multiplier: float) -> Array:
        """d(ΔL_dom + λ·ΔL_gen)/d log T, [ratios, tokens]"""
        x = np.log(np.atleast_1d(tokens) / self._unit) + 1j * STEP

        def slopes(of: str) -> Array:
            return np.array([self._fits[of, r].mean({"x": x}).imag / STEP for r in self.ratios_])

        return slopes("domain_loss") + multiplier * slopes("general_loss")

    def _mean(self, columns: Columns, of: str) -> Array:
        losses = np.full(len(columns["tokens"]), self._start[of])
        asked = columns["domain_ratio"]
        for ratio in np.unique(asked):
            mask = (asked == ratio) & (columns["tokens"] > 0)
            losses[mask] += self._between(self._increments(columns["tokens"][mask], of), ratio)
        return losses

    def _variance(self, columns: Columns, of: str) -> Array:
        """Variance between two ratios: the larger of theirs; beyond them: the last one's, growing with the distance."""
        asked, ratios = columns["domain_ratio"], np.array(self.ratios_)
        started = columns["tokens"] > 0
        at = self._scaled(np.where(started, columns["tokens"], self._unit))
        above = np.searchsorted(ratios, asked).clip(max=len(ratios) - 1)
        below = np.where((ratios[above] == asked) | (asked < ratios[0]), above, np.maximum(above - 1, 0))
        widest = np.zeros((DRAWS, len(asked)))
        for i, ratio in enumerate(ratios):
            fit = self._fits[of, ratio]
            nothing = np.zeros((len(asked), len(fit.residual)))
            own = np.where(started, fit.variance(at), fit.noise.spread(nothing, fit.curve.run, observed=True))
            widest = np.where((above == i) | (below == i), np.maximum(own, widest), widest)
        beyond = np.maximum(asked - ratios[-1], ratios[0] - asked).clip(0)
        return widest * np.square(1 + beyond / max(float(np.ptp(ratios)) / max(len(ratios) - 1, 1), 1e-9))

    def _between(self, by_ratio: Array, ratio: float) -> Array:
        """Interpolation to a ratio of values at every ratio that was run [ratios, tokens]."""
        if ratio in self.ratios_:
            return by_ratio[self.ratios_.index(ratio)]
        if len(self.ratios_) == 1:
            raise RecipeError(invalid("domain_ratio", ratio, f"only {self.ratios_[0]:g} was run; run another"))
        return joined(self.ratios_, by_ratio.T, np.ones(len(self.ratios_)), np.array([ratio]))[:, 0]

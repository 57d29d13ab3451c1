"""The critical mixture ratio: the most domain data that continued pretraining takes without losing general ability.

    ΔL_dom(T) = α1·T^s1 + β1,   ΔL_gen(T) = α2·T^s2 + α3·T^s3 + β2   for each domain share R, from T = 0
    R is feasible at T_max  ⇔  ΔL_gen(T_max) ≤ ε and ΔL_dom(T_max) < 0;   CMR = the largest feasible R
    R_CMR(T) = α4·T^s4 + β3                                           across budgets

CMR scaling law, arXiv 2407.17467 (ε = 0.05). The paper states the same trade by a multiplier λ (100 to 7000): T0 solves
dΔL_dom/dT + λ·dΔL_gen/dT = 0, and R is feasible where T0 < T_max; with `multiplier` that is required too, as a falling
sum at T_max. Least squares for each R; between the ratios that were run, losses are interpolated in R.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from spt_fast.errors import DataError, RecipeError, invalid
from spt_fast.laws.base import ExtrapolationWarning, Law, require_points
from spt_fast.laws.columns import NATURAL, SHARE, Array, Column, Columns, Loss, Rows
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


def _general(unknowns: Sequence[Array], columns: Columns) -> Array:
    """The second exponent is searched by how far it lies above the first."""
    *first, s3, apart = unknowns
    return offset_power(first, columns) + s3 * rising(first[2] + apart, columns["x"])


class CMRLaw(Law):
    """Columns: `tokens` T (0 is the start), `domain_ratio` R, `general_loss`, `domain_loss`. Increments are taken from
    the rows at tokens = 0, one model for all ratios; a table without them must hold increments already.
    Predicts general_loss, or domain_loss with `of="domain_loss"`, for ratios among those of the table.

    Parameters, for each R: alpha1[R], s1[R], beta1[R]; alpha2[R], s2[R], alpha3[R], s3[R], beta2[R] (T in tokens).
    """

    inputs: ClassVar[dict[str, Column]] = {"tokens": NATURAL, "domain_ratio": SHARE}
    outputs: ClassVar[dict[str, Loss]] = {"general_loss": Loss(signed=True), "domain_loss": Loss(signed=True)}

    @property
    def ratios_(self) -> list[float]:
        """The domain shares that were fitted."""
        self._require("_fits", "fit it to a table")
        return sorted({ratio for _, ratio in self._fits})

    def critical_ratio(self, *, tokens: float, tolerance: float = 0.05, multiplier: float | None = None) -> float:
        """The largest domain share with which, after `tokens`, the general loss is at most `tolerance` nats above its
        start and the domain loss has fallen; between the smallest and the largest share that were run.

        Raises RecipeError where no share is feasible; warns ExtrapolationWarning where all are.
        """
        if tokens == 0:
            raise RecipeError(invalid("tokens", tokens, "give the budget; at 0 every ratio is feasible"))
        self._given(tokens=tokens)
        ratios = np.array(self.ratios_)
        self._warn_beyond(tokens=tokens)
        if len(ratios) < 2:
            raise RecipeError("a critical ratio needs runs at two domain ratios or more")
        general, domain = (self._increments(tokens, of)[:, 0] for of in LOSSES)
        limits = [PchipInterpolator(ratios, general - tolerance), PchipInterpolator(ratios, domain)]
        if multiplier is not None:
            limits.append(PchipInterpolator(ratios, self._slopes(tokens, multiplier)[:, 0]))

        def excess(r: Any) -> Array:
            return np.max([limit(r) for limit in limits], axis=0)

        grid = np.linspace(ratios[0], ratios[-1], 4001)
        feasible = np.flatnonzero(excess(grid) <= 0)
        if not len(feasible):
            raise RecipeError(
                f"no domain ratio from {ratios[0]:g} to {ratios[-1]:g} is feasible at {tokens:g} tokens: the general "
                f"loss rises by {general.min():.3g} at least (tolerance {tolerance:g}), the domain loss "
                f"changes by {domain.min():.3g}"
            )
        last = feasible[-1]
        if last == len(grid) - 1:
            warnings.warn(
                f"CMRLaw extrapolates: at {tokens:g} tokens even the largest ratio that was run ({ratios[-1]:g}) is "
                "feasible; the critical one lies beyond it",
                ExtrapolationWarning,
                stacklevel=2,
            )
            return float(ratios[-1])
        edges = grid[last], grid[last + 1]
        return float(brentq(lambda r: float(excess(r)), *edges)) if excess(edges[0]) < 0 else float(edges[0])

    def critical_ratio_curve(self, *, tokens: Any, tolerance: float = 0.05) -> dict[str, float]:
        """{"alpha4", "s4", "beta3"} of R_CMR(T) = α4·T^s4 + β3 through the critical ratios at these budgets."""
        budgets = np.asarray(tokens, dtype=float)
        require_points(budgets.size, len(DOMAIN), "The curve of critical ratios")
        ratios = np.array([self.critical_ratio(tokens=T, tolerance=tolerance) for T in budgets])
        middle = float(np.exp(np.log(budgets).mean()))
        curve = Curve(DOMAIN, offset_power, {"x": np.log(budgets / middle)}, ratios, np.arange(len(budgets)))
        c, s, b = Fit(curve, solve(curve, seed=self.seed)).values.values()
        alpha4, s4, shift = in_tokens(s, b, middle)
        return {"alpha4": alpha4, "s4": s4, "beta3": c + shift}

    def turning_tokens(self, *, domain_ratio: float, multiplier: float) -> float | None:
        """T0, where ΔL_dom + λ·ΔL_gen turns from rising to falling, λ = `multiplier`; None where it does not turn
        between a hundredth of the smallest and a hundred times the largest budget that was run."""
        tokens = self._rows.columns["tokens"]
        grid = np.geomspace(tokens[tokens > 0].min() / 100, tokens.max() * 100, 2001)
        ratio = float(self._within(np.array([domain_ratio]))[0])

        return first_fall(lambda T: self._between(self._slopes(T, multiplier), ratio), grid)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _groups(self, rows: Rows) -> Array:
        return np.unique(rows.columns["domain_ratio"], return_inverse=True)[1]

    def _prepare(self, rows: Rows) -> Rows:
        starts = rows.columns["tokens"] == 0
        if not starts.any() and not (rows.columns["domain_loss"] < 0).any():
            raise DataError(
                "CMRLaw takes increments from tokens = 0, and the table has no row there; add the losses of the model "
                "that was continued, with tokens = 0"
            )
        return rows

    def _require_enough(self, rows: Rows) -> None:
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

    def _within(self, ratios: Array) -> Array:
        for ratio in ratios[(ratios < self.ratios_[0] - 1e-9) | (ratios > self.ratios_[-1] + 1e-9)]:
            raise RecipeError(
                f"domain_ratio {ratio:g} lies outside of the runs that were fitted ({self.ratios_[0]:g} to "
                f"{self.ratios_[-1]:g}), and CMRLaw has no formula in it"
            )
        return np.clip(ratios, self.ratios_[0], self.ratios_[-1])

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
        asked = self._within(columns["domain_ratio"])
        for ratio in np.unique(asked):
            mask = (asked == ratio) & (columns["tokens"] > 0)
            losses[mask] += self._between(self._increments(columns["tokens"][mask], of), ratio)
        return losses

    def _variance(self, columns: Columns, of: str) -> Array:
        """Between two ratios, the larger of theirs."""
        asked, ratios = self._within(columns["domain_ratio"]), np.array(self.ratios_)
        started = columns["tokens"] > 0
        at = self._scaled(np.where(started, columns["tokens"], self._unit))
        above = np.searchsorted(ratios, asked)
        below = np.where(ratios[above] == asked, above, above - 1)
        widest = np.zeros((DRAWS, len(asked)))
        for i, ratio in enumerate(ratios):
            fit = self._fits[of, ratio]
            nothing = np.zeros((len(asked), len(fit.residual)))
            own = np.where(started, fit.variance(at), fit.noise.spread(nothing, fit.curve.run, observed=True))
            widest = np.where((above == i) | (below == i), np.maximum(own, widest), widest)
        return widest

    def _between(self, by_ratio: Array, ratio: float) -> Array:
        """Values at every ratio that was run [ratios, ...], interpolated."""
        return PchipInterpolator(self.ratios_, by_ratio)(ratio) if len(self.ratios_) > 1 else by_ratio[0]

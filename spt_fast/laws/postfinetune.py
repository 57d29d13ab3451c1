"""The domain loss after finetuning, by pretraining tokens, for each domain share.

    Δ(T) = L_test(PT) − L_test(PT + FT) = a·T^b + c   for each δ
    L_test(PT + FT)(T, δ) = L_test(T, δ) − Δ(T)

"The Finetuner's Fallacy", arXiv 2603.16177. L_test(T, δ) before finetuning comes from a law of it if one is given, else
from a curve of this table for each δ: the same shape, A·T^b + C, and if six budgets or more support it (by the Bayesian
information criterion) + G·T^g for overfitting. Δ is counted from the measured L_test for `gain` and where L_test is
given, else from the L_test of that law or curve, so that its error at one δ does not come back after finetuning. Least
squares. Decisions: the best δ at a budget, and the budget at which one δ overtakes another.

Assumed for intervals, and for the draws of `resampled` and `bootstrap`:

    noise        of losses after finetuning is as large at every δ, since one δ has too few runs to show it. (Before
                 finetuning it is each δ's own: a domain that was never read varies more.) If each δ has one run, runs
                 differ by about LIKELY times the noise of a point: in three stored studies of two seeds it was 0.3, 0.4
                 and 1.3 times (benchmarks/LOG.md)
    draws        are fits to the table with further errors of that size. Weights of runs, as other laws have them, would
                 spread by √((n − 1)/(n + 1)) of the error of n seeds, so not at all for one
    overfitting  that a curve A·T^b + C does not show may yet rise beyond its budgets. b_gap(δ) = δ·b_s + (1 − δ)·b_g of
                 OverfittingLaw is at most δ/10%, since b_gap < 1 up to δ = 10% and b_g < 0: g is drawn evenly up to
                 that. G·T^g is hardly more than what the loss fell by: more would show in the runs
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
from scipy.linalg import block_diag

from spt_fast.errors import RecipeError
from spt_fast.laws.base import Law, require_law, require_points
from spt_fast.laws.columns import LOSS, POSITIVE, SHARE, Array, Column, Columns, Loss, Rows, number
from spt_fast.laws.fitting import DIFFERS, DRAWS, QUANTILES, Curve, Fit, Noise, Parameter, solve
from spt_fast.laws.mixture_repetition import MixtureRepetitionLaw
from spt_fast.laws.overfitting import LARGEST_FRACTION, OverfittingLaw, overtaking
from spt_fast.laws.powers import in_tokens, offset_power, power_parameters

GAIN = power_parameters(-2, 1)
POWER = power_parameters(-3, -1e-3)
OVERFITTED = (*POWER, Parameter("G", 1e-6, 10, linear=True), Parameter("g", 0.05, 1))


def _overfitted(unknowns: Sequence[Array], columns: Columns) -> Array:
    *power, G, g = unknowns
    return offset_power(power, columns) + G * np.exp(g * columns["x"])


Before = OverfittingLaw | MixtureRepetitionLaw


@dataclass(frozen=True)
class _Drawn:
    """Draws of the law before finetuning, as one with losses [draws, predictions]."""

    laws: Sequence[Law]

    def _mean(self, columns: Columns, of: str) -> Array:
        return np.stack([law._mean(columns, of) for law in self.laws])


class PostFinetuneLaw(Law):
    """Columns: `tokens` T, `fraction` δ, `heldout_loss` and `finetuned_loss` (domain, before and after finetuning).
    Predicts finetuned_loss for a δ of the table; with `heldout_loss` measured, from that.

    heldout  an OverfittingLaw, or a MixtureRepetitionLaw of one corpus, for L_test(T, δ)

    Parameters, for each δ: a[δ], b[δ], c[δ] (T in tokens).
    """

    inputs: ClassVar[dict[str, Column]] = {"tokens": POSITIVE, "fraction": SHARE}
    optional: ClassVar[dict[str, Column]] = {"heldout_loss": POSITIVE}
    outputs: ClassVar[dict[str, Loss]] = {"finetuned_loss": LOSS, "heldout_loss": LOSS}

    heldout: Before | None

    def __init__(self, heldout: Before | None = None) -> None:
        """Raises RecipeError for anything but such a law with its parameters."""
        if heldout is not None:
            require_law("heldout", heldout, OverfittingLaw, MixtureRepetitionLaw)
            heldout._require("params_", "fit it to a table")
        self.heldout = heldout

    @property
    def fractions_(self) -> list[float]:
        """The fitted δ."""
        self._require("_rows", "fit it to a table")
        return np.unique(self._rows.columns["fraction"]).tolist()

    @property
    def between_seeds_(self) -> tuple[float, bool]:
        """The standard deviation of losses after finetuning between runs that differ only in their seed, as a share of
        the mean loss; and whether these runs show it. If not (one seed for each δ), it is assumed as said above."""
        self._require("_rows", "fit it to a table")
        noise = self._noise("below")
        deviation = float(np.sqrt(np.median(noise.point + noise.run)))
        return deviation / float(self._rows.columns["finetuned_loss"].mean()), noise.told

    def gain(self, *, tokens: Any, fraction: float) -> Any:
        """Δ(T): by how much finetuning lowers the held-out domain loss."""
        fit = self._fits["gain", self._known(fraction)]
        asked = self._given(tokens=tokens)["tokens"]
        if len(asked):
            self._warn_beyond(tokens=asked)
        gain = fit.mean(self._scaled(asked))
        return gain.reshape(np.shape(tokens)) if np.ndim(tokens) else float(gain[0])

    def best_fraction(self, *, tokens: float) -> float:
        """The fitted δ with the lowest loss after `tokens` of pretraining and then finetuning."""
        deltas = self.fractions_
        (tokens,) = self._number(tokens=tokens)
        self._warn_beyond(tokens=tokens)
        losses = self._mean({"tokens": np.full(len(deltas), tokens), "fraction": np.array(deltas)}, "finetuned_loss")
        return deltas[int(np.argmin(losses))]

    def overtaking_tokens(
        self, *, fraction: float, other: float, within: tuple[float, float] | None = None
    ) -> float | None:
        """The budget from which `fraction` has the lower loss after finetuning, if `other` had it before; None if that
        does not happen within these budgets (by default from the smallest fitted one to ten times the largest)."""
        pair = self._known(fraction), self._known(other, "other")
        T = self._rows.columns["tokens"]
        tokens = overtaking(
            lambda T, d: self._mean({"tokens": T, "fraction": np.full(len(T), d)}, "finetuned_loss"),
            *pair,
            (float(T.min()), 10 * float(T.max())) if within is None else within,
        )
        if tokens:
            self._warn_beyond(tokens=tokens)
        return tokens

    # ---------------------------------------------------------------------------------------------------------- inside

    def _resampled_to(self, rows: Rows, n: int, seed: int) -> Iterator[Self]:
        """The law before finetuning is drawn too, if it has runs, and the gain counted from each draw of it."""
        if self.heldout is None or not hasattr(self.heldout, "_rows"):
            yield from super()._resampled_to(rows, n, seed)
            return
        befores: list[Any] = list(self.heldout._resampled_to(self.heldout._rows, n, seed + 1))
        many = copy(self)
        many.heldout = cast(Before, _Drawn(befores))
        for law, before in zip(Law._resampled_to(many, rows, n, seed), befores, strict=True):
            law.heldout = before
            yield law

    def _drawn(self, rows: Rows, n: int, rng: np.random.Generator) -> tuple[Rows, Array]:
        columns, size = dict(rows.columns), (n, len(rows))
        for loss, curves in (("heldout_loss", "gain" if self.heldout else "heldout"), ("finetuned_loss", "below")):
            noise, which = self._noise(curves), rng.integers(DRAWS, size=(n, 1))
            by_run = rng.standard_normal((n, rows.run.max() + 1))[:, rows.run]
            by_point = rng.standard_normal(size)
            columns[loss] = columns[loss] + np.sqrt(noise.run[which]) * by_run + np.sqrt(noise.point[which]) * by_point
        return Rows(columns, rows.run), np.ones(size)

    def _noise(self, curves: str) -> Noise:
        """Of the `curves` of all shares together."""
        fits = [fit for (of, _), fit in self._fits.items() if of == curves]
        residual, run = (np.concatenate(parts) for parts in ([f.residual for f in fits], [f.curve.run for f in fits]))
        return Noise.of(residual, run, block_diag(*[fit.moved for fit in fits]))

    def _told(self, columns: Columns, of: str) -> bool:
        after = of == "finetuned_loss" and "heldout_loss" not in columns
        return self._noise("below").told if after else super()._told(columns, of)

    def _require_enough(self, rows: Rows) -> None:
        for delta in np.unique(rows.columns["fraction"]):
            points = int((rows.columns["fraction"] == delta).sum())
            require_points(points, len(GAIN), "PostFinetuneLaw", f" at each fraction (here {delta:g})")

    def _scaled(self, tokens: Array) -> Columns:
        return {"x": np.log(tokens / self._unit)}

    def _fit(self, rows: Rows, weights: Array | None, warm: dict[Any, Fit] | None) -> dict[Any, Fit]:
        if warm is None:
            self._unit = float(np.exp(np.log(rows.columns["tokens"]).mean()))
        fits: dict[Any, Fit] = {}
        for delta in np.unique(rows.columns["fraction"]).tolist():
            mask = rows.columns["fraction"] == delta
            own = rows.where(mask)
            w = None if weights is None else weights[:, mask]
            x, before = self._scaled(own.columns["tokens"]), own.columns["heldout_loss"]
            gain = Curve(GAIN, offset_power, x, before - own.columns["finetuned_loss"], own.run)
            fits["gain", delta] = Fit(gain, solve(gain, w, [warm["gain", delta].x] if warm else None, self.seed))
            if self.heldout is not None:
                fitted = self.heldout._mean(own.columns, "heldout_loss")
            else:
                known = warm["heldout", delta] if warm else None
                fits["heldout", delta] = self._fit_before(x, before, own.run, w, known)
                fitted = fits["heldout", delta].mean(x)
            below = Curve(GAIN, offset_power, x, fitted - own.columns["finetuned_loss"], own.run)
            fits["below", delta] = Fit(below, solve(below, w, [warm["below", delta].x] if warm else None, self.seed))
        return fits

    def _fit_before(self, x: Columns, before: Array, run: Array, w: Array | None, warm: Fit | None) -> Fit:
        """The curve before finetuning: with a term for overfitting if there are more budgets than it then has unknowns,
        since a curve through every budget keeps errors that the gain does not follow."""
        power, overfitted = (
            Curve(parameters, formula, x, before, run)
            for parameters, formula in ((POWER, offset_power), (OVERFITTED, _overfitted))
        )
        if warm:
            curve = power if len(warm.x) == len(POWER) else overfitted
            return Fit(curve, solve(curve, w, [warm.x]))
        choices = [power, overfitted] if len(np.unique(x["x"])) > len(OVERFITTED) else [power]
        return min((Fit(c, solve(c, seed=self.seed)) for c in choices), key=_criterion)

    def _refitted(self, rows: Rows) -> Self:
        """Of these rows, and the law before finetuning of its own up to their largest budget."""
        if self.heldout is None or not hasattr(self.heldout, "_rows"):
            return super()._refitted(rows)
        law, before = copy(self), self.heldout._rows
        kept = before.columns["tokens"] <= (1 + 1e-6) * rows.columns["tokens"].max()
        law.heldout = cast(Before, self.heldout._refitted(before.where(kept)))
        return Law._refitted(law, rows)

    def _named(self, fits: dict[Any, Fit]) -> dict[str, float]:
        params: dict[str, float] = {}
        for (of, delta), fit in fits.items():
            if of == "gain":
                c, s, b = fit.values.values()
                a, b, shift = in_tokens(s, b, self._unit)
                params |= {f"a[{delta:g}]": a, f"b[{delta:g}]": b, f"c[{delta:g}]": c + shift}
        return params

    def _unsure(self, key: Any, fit: Fit) -> list[str]:
        of, delta = key
        return [f"{name}[{delta:g}]" for name in fit.unidentified] if of == "gain" else []

    def _known(self, fraction: float, name: str = "fraction") -> float:
        fraction = number(name, fraction, SHARE)
        for delta in self.fractions_:
            if np.isclose(fraction, delta, rtol=1e-6, atol=1e-12):
                return delta
        known = ", ".join(f"{delta:g}" for delta in self.fractions_)
        raise RecipeError(f"no runs with fraction {fraction:g} were fitted; PostFinetuneLaw has {known}")

    def _by_delta(self, columns: Columns) -> list[tuple[float, Array, Columns]]:
        """(δ, mask, the curves' columns) for each δ among `columns`."""
        asked = np.array([self._known(d) for d in columns["fraction"]])
        return [(d, asked == d, self._scaled(columns["tokens"][asked == d])) for d in np.unique(asked).tolist()]

    def _mean(self, columns: Columns, of: str) -> Array:
        losses = np.empty(len(columns["fraction"]))
        for delta, mask, at in self._by_delta(columns):
            if "heldout_loss" in columns:
                before, gain = columns["heldout_loss"][mask], self._fits["gain", delta]
            elif self.heldout is not None:
                before = self.heldout._mean(_at(columns["tokens"][mask], delta), "heldout_loss")
                gain = self._fits["below", delta]
            else:
                before, gain = self._fits["heldout", delta].mean(at), self._fits["below", delta]
            losses[mask] = before if of == "heldout_loss" else before - gain.mean(at)
        return losses

    def _variance(self, columns: Columns, of: str) -> Array:
        variance, noise = np.empty((DRAWS, len(columns["fraction"]))), self._noise("below")
        for delta, mask, at in self._by_delta(columns):
            tokens = columns["tokens"][mask]
            if "heldout_loss" in columns:
                own = self._fits["gain", delta].variance(at)
            elif of == "finetuned_loss":
                own = self._variance_after(tokens, delta, noise)
            elif self.heldout is None:
                before = self._fits["heldout", delta]
                own = before.variance(at) + _unseen(before, delta, at)
            else:
                own = self._variance_by_law(tokens, delta)
            variance[:, mask] = own
        return variance

    def _variance_by_law(self, tokens: Array, delta: float) -> Array:
        """Of the loss before finetuning, in nats."""
        law, at = self._known_law(), _at(tokens, delta)
        own = law._variance(at, "heldout_loss")
        return own * np.square(law._mean(at, "heldout_loss")) if law._log_interval else own

    def _variance_after(self, tokens: Array, delta: float, noise: Noise) -> Array:
        """An error of the loss before finetuning moves the gain, which is counted from it at the runs' budgets: only
        what the gain does not follow is left at these tokens."""
        below = self._fits["below", delta]
        by_after, left_open = below.influence(self._scaled(tokens))
        spread = noise.spread(by_after, below.curve.run, observed=True) + left_open
        runs = self._rows.columns["tokens"][self._rows.columns["fraction"] == delta]
        budgets, sums = np.concatenate([tokens, runs]), np.concatenate([np.eye(len(tokens)), -by_after], axis=1)
        if self.heldout is not None:
            return spread + self._known_law()._variance_of_sums(_at(budgets, delta), sums)
        before = self._fits["heldout", delta]
        at = self._scaled(budgets)
        by_before, before_left_open = before.influence(at, sums)
        spread += before.noise.spread(by_before, before.curve.run, observed=False)
        return spread + before_left_open + _unseen(before, delta, at, sums)

    def _known_law(self) -> Before:
        """The law before finetuning, if it knows its own errors."""
        assert self.heldout is not None
        self.heldout._require("_fits", "an interval needs its runs: fit it to a table")
        return self.heldout


def _at(tokens: Array, delta: float) -> Columns:
    return {"tokens": tokens, "fraction": np.full(len(tokens), delta)}


def _unseen(fit: Fit, delta: float, columns: Columns, sums: Array | None = None) -> Array:
    """Variance [draws, predictions] from overfitting that the runs do not show yet, as in `influence`.

    Of a term G·T^g with the g of a draw, the power law takes up all but its curvature, and leaves the data an interval
    for G. Its largest value counts as DIFFERS does: as the edge of a 90% interval."""
    if len(fit.x) > len(POWER):
        return np.zeros((1, 1))
    g = np.random.default_rng(0).permutation(QUANTILES) * min(delta / LARGEST_FRACTION, 1)
    seen, asked = (np.exp(np.outer(at["x"], g)) for at in (fit.curve.columns, columns))
    power, term = fit._whitened(fit.moved), fit._whitened(seen)
    absorbed = np.linalg.lstsq(power, term)[0]
    left = term - power @ absorbed
    fell = np.ptp(fit.mean(fit.curve.columns)) + 1e-9
    precision = np.square(left).sum(axis=0) + np.square(seen.max(axis=0) / fell)
    G = (fit._whitened(fit.residual[:, None]).T @ left)[0] / precision
    G += np.sqrt(np.square(np.minimum(G, 0)) + DIFFERS / precision)
    moved = G * (asked - fit.curve.gradient(fit.x, columns)[:, ~fit._at_edge] @ absorbed)
    return np.square(moved if sums is None else sums @ moved).T / DIFFERS


def _criterion(fit: Fit) -> float:
    """The Bayesian information criterion."""
    points = len(fit.residual)
    return points * float(np.log(np.square(fit.residual).mean() + 1e-16)) + len(fit.x) * float(np.log(points))

"""Fits a formula with a handful of unknowns to observed losses, and measures the uncertainty of the result.

All laws use it. A formula is written once, in NumPy, and is analytic in its unknowns, so that its gradient comes from
complex steps, Im f(x + ih)/h: exact to rounding like automatic differentiation, without a second formula.

    search     positive unknowns are searched by their logarithm, all within bounds. Of many quasi-random points, with
               the linear coefficients solved for, the best few are refined by Levenberg and Marquardt's method: all of
               them at a time, as are the draws of a bootstrap, in arrays with one more dimension
    Huber      for residuals r: r² up to the threshold, linear beyond. Minimised as reweighted least squares, since the
               curvature of the Huber loss itself vanishes beyond the threshold
    intervals  to first order a prediction moves linearly with each observation's error: by its *influence*, a row of g
               (JᵀJ + P)⁻¹ Jᵀ. Errors have a part of each point and a part shared by all points of a run; their possible
               variances are drawn from the residuals, with as many degrees of freedom between runs as there are runs
               more than unknowns that distinguish them. P keeps undetermined unknowns within their bounds; their other
               values that fit the data as well widen a prediction too. A prediction interval adds the noise of a new
               run to that of the fit, and base.py adds the error of the law itself beyond its runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import chdtri, erf, ndtr, ndtri

from spt_fast.laws.columns import Array, Columns

Formula = Callable[[Sequence[Array], Columns], Array]
"""(unknowns, each broadcastable to [..., points]; columns) -> losses [..., points]; analytic in the unknowns."""

STEP = 1e-20
SCREENED, POLISHED = 64, 4
SEARCHED = 256
"""Points of a curve that are used to find the starts; the refinement uses all of them."""
LARGE = 500
"""From this many losses on, the gradient is computed one unknown at a time."""
ITERATIONS, ROUGH, DAMPING = 300, 40, 1e-3
LEAST_DAMPING = 1e-12
"""A smaller value would leave equations of undetermined unknowns without a solution."""
AHEAD = 0.1
"""Share of a step at which its curvature is measured."""
OUTLIER = 3
"""Residuals beyond this many standard deviations count as this many."""
LIKELY = 0.8
"""Standard deviation of runs over that of points, as a prior. In 41 arms of real runs it was 0.8 to 4.8
(benchmarks/LOG.md)."""
DIFFERS = 2.7
"""Squared standard deviations at the edge of a 90% interval."""
ELSEWHERE = 5
"""Values that are tried for an undetermined unknown."""
MANY_RUNS = 500
"""From this many runs on, the few unknowns take so little of each that runs are practically independent."""
VISIBLE = 0.1
"""Share of a run's error that the unknowns must leave, for it to show how much runs differ."""
DRAWS = 200
QUANTILES = (np.arange(DRAWS) + 0.5) / DRAWS
AT_ONCE = 2_000_000
"""Limit on points × unknowns × draws: complex numbers of 16 bytes, a few of each at a time."""


@dataclass(frozen=True)
class Parameter:
    """An unknown and its bounds; searched by its logarithm unless `log` is False. `linear`: the formula is linear in
    all of these together."""

    name: str
    low: float
    high: float
    log: bool = True
    linear: bool = False


@dataclass(frozen=True)
class Curve:
    """A formula, and the observations that it is fitted to. `huber`: the threshold, in units of the residual.

    `target` is [points], or [draws, points] where each draw of a bootstrap has its own."""

    parameters: tuple[Parameter, ...]
    formula: Formula
    columns: Columns
    target: Array
    run: Array
    log: bool = False
    huber: float | None = None

    @cached_property
    def bounds(self) -> tuple[Array, Array]:
        low, high = np.array([(p.low, p.high) for p in self.parameters]).T
        is_log = np.array([p.log for p in self.parameters])
        return tuple(np.where(is_log, np.log(np.where(is_log, edge, 1)), edge) for edge in (low, high))  # type: ignore[return-value]

    @cached_property
    def goal(self) -> Array:
        return np.log(self.target) if self.log else self.target

    def unknowns(self, x: Array) -> list[Array]:
        """Points of the search space [..., unknowns] in the units of the formula."""
        return [np.exp(x[..., i, None]) if p.log else x[..., i, None] for i, p in enumerate(self.parameters)]

    def point(self, values: Sequence[float]) -> Array:
        """The inverse, clipped to the bounds."""
        low, high = self.bounds
        x = [np.log(max(v, 1e-300)) if p.log else v for p, v in zip(self.parameters, values, strict=True)]
        return np.clip(x, low + 1e-6 * (high - low), high - 1e-6 * (high - low))

    def sample(self) -> Curve:
        """The curve with at most SEARCHED of its observations; a quarter of that where each takes many numbers."""
        points, wide = len(self.target), any(values.ndim > 1 for values in self.columns.values())
        most = SEARCHED // 4 if wide else SEARCHED
        if points <= most:
            return self
        return self.where(np.sort(np.random.default_rng(0).choice(points, most, replace=False)))

    def where(self, kept: Array) -> Curve:
        """The curve with these observations only."""
        columns = {name: values[kept] for name, values in self.columns.items()}
        return replace(self, columns=columns, target=self.target[kept], run=self.run[kept])

    def draws(self, which: int | slice) -> Curve:
        """The curve with the targets of these draws."""
        return self if self.target.ndim == 1 else replace(self, target=self.target[which])

    def value(self, x: Array, columns: Columns | None = None) -> Array:
        losses = self.formula(self.unknowns(x), self.columns if columns is None else columns)
        return np.log(losses) if self.log else losses

    def gradient(self, x: Array, columns: Columns | None = None) -> Array:
        """[..., points, unknowns] at x [..., unknowns]. In large arrays one unknown at a time, so that most of a
        formula uses real numbers."""
        columns = self.columns if columns is None else columns
        if x[..., 0].size * len(next(iter(columns.values()))) < LARGE:
            steps = x[..., None, :] + 1j * STEP * np.eye(x.shape[-1])
            return self.value(steps, columns).imag.swapaxes(-1, -2) / STEP
        values, slopes = self.unknowns(x), []
        for i, parameter in enumerate(self.parameters):
            moved = values[i] * (1 + 1j * STEP) if parameter.log else values[i] + 1j * STEP
            losses = self.formula([*values[:i], moved, *values[i + 1 :]], columns)
            slopes.append(losses.imag / losses.real if self.log else losses.imag)
        return np.stack(slopes, axis=-2).swapaxes(-1, -2) / STEP


def solve(curve: Curve, weights: Array | None = None, starts: list[Array] | None = None, seed: int = 0) -> Array:
    """The point of the search space that fits the observations best. `starts`: search only from these; if there is a
    Huber threshold, the solution of an earlier fit. With weights [draws, points] a point for each draw, searched from
    the first start."""
    (low, high), one = curve.bounds, np.ones(1)
    if weights is not None:
        assert starts
        at_once = max(1, AT_ONCE // (weights.shape[1] * len(low)))
        parts = [slice(i, i + at_once) for i in range(0, len(weights), at_once)]
        x = np.tile(np.clip(starts[0], low, high), (len(weights), 1))
        found = [_polish(curve.draws(part), x[part], weights[part], curve.huber, 1e-9)[0] for part in parts]
        return np.concatenate(found)
    if starts and curve.huber:
        return _polish(curve, np.clip(starts[:1], low, high), one, curve.huber)[0][0]
    x, cost = _polish(curve.sample(), np.clip(starts or promising(curve, seed), low, high), one, None, 1e-5, ROUGH)
    return _polish(curve, x[[cost.argmin()]], one, curve.huber)[0][0]


def promising(curve: Curve, seed: int) -> list[Array]:
    """Starts of the search: the even samples of the search space that fit the observations best with their best
    coefficients."""
    curve = curve.sample()
    low, high = curve.bounds
    x = low + spread_out(SCREENED * POLISHED, len(low), seed) * (high - low)
    with np.errstate(over="ignore", invalid="ignore"):
        x = _with_coefficients(curve, x)
        error = np.square(curve.value(x) - curve.goal).sum(axis=1)
    error[~np.isfinite(error)] = np.inf
    best = error.reshape(POLISHED, SCREENED).argmin(axis=1) + SCREENED * np.arange(POLISHED)
    return list(x[best])


def _with_coefficients(curve: Curve, x: Array) -> Array:
    """Points of the search space [n, unknowns] in which the linear unknowns minimise the squared errors (relative
    errors, if the curve is of logarithms), clipped to their bounds."""
    linear = [i for i, p in enumerate(curve.parameters) if p.linear]
    if not linear:
        return x
    values = curve.unknowns(x)

    def formula(one: int | None) -> Array:
        at = [np.full((1, 1), float(i == one)) if p.linear else values[i] for i, p in enumerate(curve.parameters)]
        return np.broadcast_to(curve.formula(at, curve.columns), (len(x), len(curve.goal)))

    unit = curve.target if curve.log else 1.0
    base = formula(None)
    basis = np.nan_to_num(np.stack([(formula(i) - base) / unit for i in linear], axis=1))
    normal, goal = (
        basis @ basis.swapaxes(1, 2),
        (basis @ np.nan_to_num((curve.target - base) / unit)[..., None])[..., 0],
    )
    normal += 1e-9 * normal * np.eye(len(linear)) + 1e-300 * np.eye(len(linear))
    x = x.copy()
    for i, best in zip(linear, np.linalg.solve(normal, goal[..., None])[..., 0].T, strict=True):
        parameter = curve.parameters[i]
        best = np.clip(best, parameter.low, parameter.high)
        x[:, i] = np.log(best) if parameter.log else best
    return x


def spread_out(points: int, dimensions: int, seed: int) -> Array:
    """Points [points, dimensions] of the unit cube, one in each of as many slices of every axis (a Latin hypercube)."""
    rng = np.random.default_rng(seed)
    slices = rng.permuted(np.tile(np.arange(points)[:, None], dimensions), axis=0)
    return (slices + rng.random(slices.shape)) / points


def _polish(
    curve: Curve, x: Array, weights: Array, huber: float | None = None, tolerance: float = 1e-12, most: int = ITERATIONS
) -> tuple[Array, Array]:
    """(the minima [n, unknowns] reached from x [n, unknowns], their costs [n]), by a projected Levenberg-Marquardt
    search of all n at a time. `weights`: [points], or of each [n, points]. Damping is relative to each unknown's
    curvature (Marquardt): without scaling the search would be very slow along valleys as flat as E's in a D-CPT law. A
    step follows the curvature of the residuals along it (geodesic acceleration, arXiv 1201.5885), since valleys are
    curved too."""
    low, high = curve.bounds
    goal, weights = (np.broadcast_to(given, (len(x), curve.goal.shape[-1])) for given in (curve.goal, weights))
    x = x.astype(float)
    unknowns = np.arange(x.shape[1])

    def at(x: Array, which: Array) -> tuple[Array, Array, Array]:
        """(residuals, weights of their squares, cost) of these searches"""
        w = weights[which]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            r = curve.value(x) - goal[which]
        size = np.abs(r)
        if huber is None:
            cost = (w * r * r).sum(1)
        else:
            cost = (w * np.where(size > huber, 2 * huber * size - huber**2, r * r)).sum(1)
            w = w * (huber / np.maximum(size, huber))
        return r, w, np.where(np.isfinite(cost), cost, np.inf)

    residual, weight, cost = map(np.array, at(x, np.arange(len(x))))
    jacobian = np.zeros((*goal.shape, len(unknowns)))
    normal = np.zeros((len(x), len(unknowns), len(unknowns)))
    slope = np.zeros_like(x)
    damping, growth = np.full(len(x), DAMPING), np.full(len(x), 2.0)
    moved = going = np.arange(len(x))
    for _ in range(most):
        if len(moved):
            J = curve.gradient(x[moved])
            weighted = J * weight[moved][..., None]
            jacobian[moved], normal[moved] = J, weighted.swapaxes(1, 2) @ J
            slope[moved] = (weighted * residual[moved][..., None]).sum(1)
        H, g, here = normal[going], slope[going], x[going]
        diagonal = H[:, unknowns, unknowns]
        scale = np.maximum(diagonal, 1e-12 * diagonal.max(1, keepdims=True))
        held = ((here <= low) & (g > 0)) | ((here >= high) & (g < 0))
        H[held] = 0
        H.swapaxes(1, 2)[held] = 0
        H[:, unknowns, unknowns] = np.where(held, 1, diagonal + damping[going, None] * scale)
        inverse = np.linalg.inv(H) * ~held[:, None]
        step = -(inverse @ g[..., None])[..., 0]
        J, r = jacobian[going], residual[going]
        with np.errstate(over="ignore", invalid="ignore"):
            ahead = at(here + AHEAD * step, going)[0]
            bend = 2 / AHEAD * ((ahead - r) / AHEAD - (J @ step[..., None])[..., 0])
            second = -(inverse @ (J.swapaxes(1, 2) @ (weight[going] * bend)[..., None]))[..., 0]
            gentle = (scale * second**2).sum(1) < (scale * step**2).sum(1)
        step = np.clip(here + np.where(gentle[:, None], step + second / 2, step), low, high) - here
        r, w, c = at(here + step, going)
        fell = cost[going] - c
        expected = -2 * (step * g).sum(1) - np.einsum("ni,nij,nj->n", step, normal[going], step)
        better = fell > 0
        share = np.where(better, fell, 0) / np.maximum(expected, 1e-300)
        damping[going] *= np.where(better, np.where(share > 0.75, 0.1, 1), growth[going])
        damping[going] = np.maximum(damping[going], LEAST_DAMPING)
        growth[going] = np.where(better, 2, 2 * growth[going])
        moved = going[better]
        x[moved], residual[moved], weight[moved], cost[moved] = (here + step)[better], r[better], w[better], c[better]
        small = np.sqrt(np.square(step).sum(1)) < tolerance * (tolerance + np.sqrt(np.square(here).sum(1)))
        settled = small | (better & (fell < tolerance * c) & (share > 0.25))
        moved, going = going[better & ~settled], going[~settled]
        if not len(going):
            break
    return x, cost


@dataclass(frozen=True)
class Noise:
    """Variances of the errors, of each point and of a run, shared by its points: DRAWS possible values."""

    point: Array
    run: Array
    told: bool
    """Whether the residuals show how much runs differ."""

    @classmethod
    def of(cls, residual: Array, run: Array, moved: Array) -> Noise:
        """From the squares within and between runs that the unknowns leave. Few runs say little about the variance
        between them, and no more runs than unknowns that distinguish them say nothing. The prior for its square root is
        a half-Cauchy distribution whose median is LIKELY times that of points. A tenth of the residuals may be
        outliers, which count as OUTLIER standard deviations."""
        size = np.abs(residual)
        most = max(OUTLIER * float(np.median(size)) / ndtri(0.75), float(np.quantile(size, 0.9)))
        basis = _basis(moved)
        rest = np.clip(residual, -most, most)
        rest = rest - basis @ (basis.T @ rest)
        index, sizes = np.unique(run, return_inverse=True, return_counts=True)[1:]
        points, unknowns = basis.shape
        shared = np.zeros(0)
        if len(sizes) < points:
            by_run = np.array([np.bincount(index, column) for column in basis.T]).reshape(unknowns, len(sizes)).T
            sums = np.bincount(index, rest)
            if len(sizes) < MANY_RUNS:
                shares, directions = np.linalg.eigh(np.diag(sizes.astype(float)) - by_run @ by_run.T)
                sums = directions.T @ sums
            else:
                shares = sizes - np.square(by_run).sum(axis=1)
            found = shares > VISIBLE * sizes.mean()
            shares, shared = shares[found], np.square(sums[found]) / shares[found]
        freedom = max(points - unknowns - len(shared), 1)
        within = max(float(rest @ rest - shared.sum()), 0.0)
        point = within / chdtri(freedom, QUANTILES)
        if len(sizes) == points:
            return cls(point, np.zeros(DRAWS), told=True)
        ratio = np.geomspace(1e-3, 1e3, 601)
        spread = 1 + shares * np.square(ratio)[:, None]
        likely = -(np.log(spread) + shared / spread / max(within / freedom, 1e-300)).sum(axis=1) / 2
        weight = np.cumsum(np.exp(likely - likely.max()) * ratio / (1 + np.square(ratio / LIKELY)))
        ratio = np.interp(QUANTILES, weight / weight[-1], ratio)
        point = np.random.default_rng(0).permutation(point)
        return cls(point, point * np.square(ratio), told=len(shared) > 1)

    def spread(self, influence: Array, run: Array, observed: bool) -> Array:
        """Variance [draws, predictions] of predictions that move by `influence` [predictions, points] with the points'
        errors; `observed`: for points of a new run there."""
        index = np.unique(run, return_inverse=True)[1]
        by_run = np.stack([np.bincount(index, row) for row in influence])
        own, shared = (np.square(by).sum(axis=1) + observed for by in (influence, by_run))
        return np.outer(self.point, own) + np.outer(self.run, shared)


def _basis(columns: Array) -> Array:
    """An orthonormal basis [points, rank] of columns [points, n]."""
    sized = columns / np.maximum(np.sqrt(np.square(columns).sum(axis=0)), 1e-300)
    left, singular, _ = np.linalg.svd(sized, full_matrices=False)
    return left[:, singular > 1e-6 * singular.max(initial=1.0)]


def _inverse(columns: Array) -> Array:
    """(CᵀC)⁻¹Cᵀ of columns C [rows, n] of any size, without CᵀC, which loses half of the digits."""
    size = np.maximum(np.linalg.norm(columns, axis=0), 1e-150)
    return np.linalg.pinv(columns / size) / size[:, None]


@dataclass(frozen=True)
class Fit:
    """A curve fitted at x."""

    curve: Curve
    x: Array

    def drawn(self, draw: int) -> Fit:
        """One of many fits, with x [draws, unknowns]."""
        return Fit(self.curve.draws(draw), self.x[draw])

    @property
    def values(self) -> dict[str, float]:
        return {p.name: float(v[0]) for p, v in zip(self.curve.parameters, self.curve.unknowns(self.x), strict=True)}

    def mean(self, columns: Columns) -> Array:
        """The value of the curve's formula, not its logarithm."""
        return self.curve.formula(self.curve.unknowns(self.x), columns)

    @cached_property
    def residual(self) -> Array:
        return self.curve.goal - self.curve.value(self.x)

    @property
    def scale(self) -> float:
        """Standard deviation of the residuals, from their median size, which outliers don't change."""
        freedom = max(len(self.residual) - len(self.x), 1)
        return float(np.median(np.abs(self.residual)) / ndtri(0.75) * np.sqrt(len(self.residual) / freedom))

    @cached_property
    def noise(self) -> Noise:
        return Noise.of(self.residual, self.curve.run, self.moved)

    @cached_property
    def jacobian(self) -> Array:
        return self.curve.gradient(self.x)

    @property
    def moved(self) -> Array:
        """The jacobian of the unknowns inside their bounds; an unknown at a bound absorbs no error."""
        return self.jacobian[:, ~self._at_edge]

    @cached_property
    def _prior(self) -> Array:
        """Inverse variance of a normal distribution as wide as the bounds; for the size of a part of the losses, as
        wide as the largest of them, since its logarithm may be at a bound without being far from the rest.
        """
        low, high = self.curve.bounds
        largest = np.abs(self.curve.target).max() or 1.0
        part = np.array([p.linear and p.log for p in self.curve.parameters])
        return np.square(2 * np.where(part, np.exp(np.where(part, self.x, 0)) / largest, 1 / (high - low)))

    def _whitened(self, columns: Array) -> Array:
        """Columns [points, n] whose errors have variance 1 and are independent, also within a run."""
        point, run = (float(np.median(of)) for of in (self.noise.point, self.noise.run))
        index, sizes = np.unique(self.curve.run, return_inverse=True, return_counts=True)[1:]
        shrink = (1 - np.sqrt(point / (point + sizes * run + 1e-300))) / sizes
        sums = np.stack([np.bincount(index, column) for column in columns.T], axis=1)
        return (columns - (shrink[:, None] * sums)[index]) / np.sqrt(max(point, 1e-16) * self._inefficiency)

    @cached_property
    def _covariance(self) -> Array:
        """Covariance of the unknowns, from the observations and their bounds."""
        inverse = _inverse(np.concatenate([self._whitened(self.jacobian), np.diag(np.sqrt(self._prior))]))
        return inverse @ inverse.T

    @cached_property
    def _inefficiency(self) -> float:
        """How much more a Huber estimate varies than least squares would, with normal errors."""
        new = float(np.median(self.noise.point + self.noise.run))
        if self.curve.huber is None or not new:
            return 1.0
        c = self.curve.huber / np.sqrt(new)
        inside = erf(c / np.sqrt(2))
        return float((inside - 2 * c * np.exp(-c * c / 2) / np.sqrt(2 * np.pi) + c**2 * (1 - inside)) / inside**2)

    def influence(self, columns: Columns, sums: Array | None = None) -> tuple[Array, Array]:
        """How predictions move with each observation's error [predictions, points], and their variance from what the
        observations do not determine [predictions]. `sums`: of weighted sums [sums, predictions] of them instead."""
        gradient = self.curve.gradient(self.x, columns)
        others = np.array([x for _, x in self.elsewhere]).reshape(-1, len(self.x))
        elsewhere = self.curve.value(others, columns) - self.curve.value(self.x, columns)
        if sums is not None:
            gradient, elsewhere = sums @ gradient, elsewhere @ sums.T
        left_open = np.maximum(
            np.square(gradient @ self._covariance) @ self._prior,
            np.square(elsewhere).max(axis=0, initial=0) / DIFFERS,
        )
        bounded = np.sqrt(max(float(np.median(self.noise.point)) * self._inefficiency, 1e-16) * self._prior)
        moved = gradient @ _inverse(np.concatenate([self.jacobian, np.diag(bounded)]))[:, : len(self.jacobian)]
        return np.sqrt(self._inefficiency) * moved, left_open

    @cached_property
    def elsewhere(self) -> list[tuple[str, Array]]:
        """Points of the search space, each with the unknown in which it differs, that fit the observations about as
        well, far from x along undetermined unknowns. The gradient at x does not show them, such as that of an exponent
        whose term has vanished."""
        found, (low, high) = [], self.curve.bounds
        for i, parameter in enumerate(self.curve.parameters):
            if parameter.name not in self.unidentified or parameter.linear:
                continue
            for place in np.linspace(low[i], high[i], ELSEWHERE + 2)[1:-1]:
                x = self._held(i, float(place))
                worse = self._misses(x) - self._misses(self.x)
                found += [(parameter.name, x)] if worse < DIFFERS else []
        return found

    @cached_property
    def off_bounds(self) -> list[tuple[str, Array]]:
        """For each unknown at a bound, the best point of the search space with it a step inside."""
        (low, high), found = self.curve.bounds, []
        for i, parameter in enumerate(self.curve.parameters):
            edge = np.argmin((self.x[i] - low[i], high[i] - self.x[i]))
            if parameter.name in self.unidentified and not parameter.linear and self._at_edge[i]:
                inside = (low[i], high[i])[edge] + (1, -1)[edge] * (high[i] - low[i]) / (ELSEWHERE + 1)
                found.append((parameter.name, self._held(i, float(inside))))
        return found

    def _held(self, i: int, place: float) -> Array:
        """The best point of the search space near this one with one unknown there."""
        parameter = self.curve.parameters[i]
        value = float(np.exp(place)) if parameter.log else place
        held = replace(parameter, low=value, high=value)
        curve = replace(self.curve, parameters=(*self.curve.parameters[:i], held, *self.curve.parameters[i + 1 :]))
        return _polish(curve, np.clip(self.x, *curve.bounds)[None], np.ones(1), curve.huber, 1e-6, ROUGH)[0][0]

    def _misses(self, x: Array) -> float:
        """Sum of the squared errors at x, scaled to variance 1 and made independent."""
        return float(np.square(self._whitened((self.curve.value(x) - self.curve.goal)[:, None])).sum())

    def variance(self, columns: Columns) -> Array:
        """[draws, predictions]: variance of a new run's observation (of its logarithm, if the curve is of
        logarithms)."""
        influence, left_open = self.influence(columns)
        return self.noise.spread(influence, self.curve.run, observed=True) + left_open

    @property
    def unidentified(self) -> list[str]:
        """Unknowns that the observations determine hardly better than the bounds."""
        open_share = np.diag(self._covariance) * self._prior
        bad = (open_share > 0.25) | self._at_edge
        return [p.name for p, is_bad in zip(self.curve.parameters, bad, strict=True) if is_bad]

    @property
    def _at_edge(self) -> Array:
        low, high = self.curve.bounds
        return np.minimum(self.x - low, high - self.x) < 1e-3 * (high - low)


def reach(variance: Array, interval: float) -> Array:
    """The distance of an observation from its prediction at this probability [predictions], with its variance one of
    [draws, predictions]."""
    low, high = np.zeros(variance.shape[1]), 40 * np.sqrt(variance.max(axis=0))
    for _ in range(50):
        middle = (low + high) / 2
        inside = ndtr(middle / np.sqrt(np.maximum(variance, 1e-300))).mean(axis=0) < (1 + interval) / 2
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return high

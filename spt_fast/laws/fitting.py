"""Fitting a formula with a handful of unknowns to observed losses, and how sure the result is.

Every law goes through here. A formula is written once, in NumPy, and is analytic in its unknowns, so that its gradient
is taken by complex steps, Im f(x + ih)/h: exact to rounding like automatic differentiation, without a second formula.

    search     positive unknowns are searched by their logarithm, all within bounds; of many quasi-random points, with
               the coefficients that the formula is linear in solved for, the best few are polished by Levenberg and
               Marquardt's method: all of them at a time, as are the draws of a bootstrap, in arrays with one more
               dimension
    Huber      on residuals r: r² up to the threshold, linear beyond. Minimised as reweighted least squares, since the
               curvature of the Huber loss itself vanishes beyond the threshold
    intervals  to first order a prediction moves linearly with each observation's error: by its *influence*, a row of
               g (JᵀJ + P)⁻¹ Jᵀ. Errors have a part of each point and a part that all points of a run share; their
               variances are estimated from the residuals. P keeps unknowns that the data say nothing about in their
               bounds. A prediction interval adds the noise of a new run to that of the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.special import erf, ndtri

from spt_fast.laws.columns import Array, Columns

Formula = Callable[[Sequence[Array], Columns], Array]
"""(unknowns, each broadcastable to [..., points]; columns) -> losses [..., points]; analytic in the unknowns."""

STEP = 1e-20
SCREENED, POLISHED = 64, 4
SEARCHED = 256
"""Points of a curve that the search for where to polish looks at; all of them are what is polished."""
LARGE = 500
"""Losses, from which on a gradient is taken one unknown at a time."""
ITERATIONS, ROUGH, DAMPING = 300, 40, 1e-3
AHEAD = 0.1
"""Of a step, at which its bend is measured."""
AT_ONCE = 2_000_000
"""Of points × unknowns × draws: complex numbers of 16 bytes, a few of each at a time."""


@dataclass(frozen=True)
class Parameter:
    """An unknown and its bounds; searched by its logarithm unless `log` is False. `linear`: the formula is, in all of
    these together."""

    name: str
    low: float
    high: float
    log: bool = True
    linear: bool = False


@dataclass(frozen=True)
class Curve:
    """A formula, and the observations that it must meet. `huber`: the threshold, in units of the residual."""

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
        """Points of the search space [..., unknowns] as the formula takes them."""
        return [np.exp(x[..., i, None]) if p.log else x[..., i, None] for i, p in enumerate(self.parameters)]

    def point(self, values: Sequence[float]) -> Array:
        """The inverse, held inside the bounds."""
        low, high = self.bounds
        x = [np.log(max(v, 1e-300)) if p.log else v for p, v in zip(self.parameters, values, strict=True)]
        return np.clip(x, low + 1e-6 * (high - low), high - 1e-6 * (high - low))

    def sample(self) -> Curve:
        """The curve with at most SEARCHED of its observations."""
        points = len(self.target)
        if points <= SEARCHED:
            return self
        kept = np.sort(np.random.default_rng(0).choice(points, SEARCHED, replace=False))
        columns = {name: values[kept] for name, values in self.columns.items()}
        return replace(self, columns=columns, target=self.target[kept], run=self.run[kept])

    def value(self, x: Array, columns: Columns | None = None) -> Array:
        losses = self.formula(self.unknowns(x), self.columns if columns is None else columns)
        return np.log(losses) if self.log else losses

    def gradient(self, x: Array, columns: Columns | None = None) -> Array:
        """[..., points, unknowns] at x [..., unknowns]. In large arrays one unknown after the other, so that most of a
        formula is of real numbers."""
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
    """The point of the search space that meets the observations best. `starts`: search from these only; the solution of
    an earlier fit, where there is a Huber threshold. With weights [draws, points] a point for each draw, searched from
    the first start."""
    (low, high), one = curve.bounds, np.ones(1)
    if weights is not None:
        assert starts
        at_once = max(1, AT_ONCE // (len(curve.goal) * len(low)))
        parts = [weights[i : i + at_once] for i in range(0, len(weights), at_once)]
        x = np.clip(starts[0], low, high)
        return np.concatenate([_polish(curve, np.tile(x, (len(w), 1)), w, curve.huber, 1e-9)[0] for w in parts])
    if starts and curve.huber:
        return _polish(curve, np.clip(starts[:1], low, high), one, curve.huber)[0][0]
    x, cost = _polish(curve.sample(), np.clip(starts or promising(curve, seed), low, high), one, None, 1e-5, ROUGH)
    return _polish(curve, x[[cost.argmin()]], one, curve.huber)[0][0]


def promising(curve: Curve, seed: int) -> list[Array]:
    """Where to search from: of even samples of the search space, those that meet the observations best with the
    coefficients that suit them."""
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
    """Points of the search space [n, unknowns] with the unknowns that the formula is linear in where the squared errors
    are least (relative errors, where the curve is of logarithms), moved inside of their bounds."""
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
    """(the minima [n, unknowns] that x [n, unknowns] leads to, their costs [n]), by a projected Levenberg-Marquardt
    search of all n at a time. `weights`: [points], or of each [n, points]. Damping is relative to each unknown's
    curvature (Marquardt): in its own units the search would creep along valleys as flat as E's in a D-CPT law. A step
    follows the bend of the residuals along it (geodesic acceleration, arXiv 1201.5885): valleys are curved too."""
    low, high = curve.bounds
    weights = np.broadcast_to(weights, (len(x), len(curve.goal)))
    x = x.astype(float)
    unknowns = np.arange(x.shape[1])

    def at(x: Array, w: Array) -> tuple[Array, Array, Array]:
        """(residuals, weights of their squares, cost)"""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            r = curve.value(x) - curve.goal
        size = np.abs(r)
        if huber is None:
            cost = (w * r * r).sum(1)
        else:
            cost = (w * np.where(size > huber, 2 * huber * size - huber**2, r * r)).sum(1)
            w = w * (huber / np.maximum(size, huber))
        return r, w, np.where(np.isfinite(cost), cost, np.inf)

    residual, weight, cost = map(np.array, at(x, weights))
    jacobian = np.zeros((len(x), len(curve.goal), len(unknowns)))
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
            ahead = at(here + AHEAD * step, weights[going])[0]
            bend = 2 / AHEAD * ((ahead - r) / AHEAD - (J @ step[..., None])[..., 0])
            second = -(inverse @ (J.swapaxes(1, 2) @ (weight[going] * bend)[..., None]))[..., 0]
            gentle = (scale * second**2).sum(1) < (scale * step**2).sum(1)
        step = np.clip(here + np.where(gentle[:, None], step + second / 2, step), low, high) - here
        r, w, c = at(here + step, weights[going])
        fell = cost[going] - c
        expected = -2 * (step * g).sum(1) - np.einsum("ni,nij,nj->n", step, normal[going], step)
        better = fell > 0
        share = np.where(better, fell, 0) / np.maximum(expected, 1e-300)
        damping[going] *= np.where(better, np.where(share > 0.75, 0.1, 1), growth[going])
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
    """Variances of the errors: of each point, and of a run, shared by its points. `freedom`: degrees left."""

    point: float
    run: float
    freedom: int

    @classmethod
    def of(cls, residual: Array, run: Array, unknowns: int) -> Noise:
        """By the mean squares within and between runs, both short by the share that the unknowns have taken up."""
        points, left = len(residual), max(len(residual) - unknowns, 1)
        kept = left / points
        _, index, sizes = np.unique(run, return_inverse=True, return_counts=True)
        if len(sizes) in (1, points):
            return cls(float(residual @ residual / left), 0.0, left)
        means = np.bincount(index, residual) / sizes
        within = np.square(residual - means[index]).sum() / (points - len(sizes)) / kept
        between = (sizes * means**2).sum() / len(sizes) / kept
        of_run = max(0.0, (between - within) / sizes.mean())
        return cls(float(within if of_run else residual @ residual / left), float(of_run), left)

    def spread(self, influence: Array, run: Array) -> Array:
        """Variance of predictions that move by `influence` [predictions, points] with the points' errors."""
        by_run = np.stack([influence[:, run == r].sum(axis=1) for r in np.unique(run)], axis=1) if self.run else 0.0
        return self.point * np.square(influence).sum(axis=1) + self.run * np.square(by_run).sum(-1)

    @property
    def new(self) -> float:
        """Variance of a point of a new run."""
        return self.point + self.run


@dataclass(frozen=True)
class Fit:
    """A curve met at x."""

    curve: Curve
    x: Array

    @property
    def values(self) -> dict[str, float]:
        return {p.name: float(v[0]) for p, v in zip(self.curve.parameters, self.curve.unknowns(self.x), strict=True)}

    def mean(self, columns: Columns) -> Array:
        """As the curve's formula gives it, not its logarithm."""
        return self.curve.formula(self.curve.unknowns(self.x), columns)

    @cached_property
    def residual(self) -> Array:
        return self.curve.goal - self.curve.value(self.x)

    @property
    def scale(self) -> float:
        """Standard deviation of the residuals, by their median size: outliers don't move it."""
        freedom = max(len(self.residual) - len(self.x), 1)
        return float(np.median(np.abs(self.residual)) / ndtri(0.75) * np.sqrt(len(self.residual) / freedom))

    @cached_property
    def noise(self) -> Noise:
        return Noise.of(self.residual, self.curve.run, len(self.x))

    @cached_property
    def _jacobian(self) -> Array:
        return self.curve.gradient(self.x)

    @cached_property
    def _prior(self) -> Array:
        """Inverse variance of a normal distribution as wide as the bounds."""
        low, high = self.curve.bounds
        return np.square(2 / (high - low))

    @cached_property
    def _covariance(self) -> Array:
        variance = max(self.noise.new * self._inefficiency, 1e-16)
        return np.linalg.inv(self._jacobian.T @ self._jacobian / variance + np.diag(self._prior))

    @cached_property
    def _inefficiency(self) -> float:
        """How much more a Huber estimate varies than least squares would, were the errors normal."""
        if self.curve.huber is None or not self.noise.new:
            return 1.0
        c = self.curve.huber / np.sqrt(self.noise.new)
        inside = erf(c / np.sqrt(2))
        return float((inside - 2 * c * np.exp(-c * c / 2) / np.sqrt(2 * np.pi) + c**2 * (1 - inside)) / inside**2)

    def influence(self, columns: Columns) -> tuple[Array, Array]:
        """How predictions move with each observation's error [predictions, points], and their variance by what the
        observations leave open [predictions]."""
        gradient = self.curve.gradient(self.x, columns)
        scale = max(self.noise.new * self._inefficiency, 1e-16)
        moved = gradient @ self._covariance
        left_open = np.square(moved) @ self._prior
        return np.sqrt(self._inefficiency) * moved @ self._jacobian.T / scale, left_open

    def variance(self, columns: Columns) -> Array:
        """Of a new observation (of its logarithm, where the curve is of logarithms)."""
        influence, left_open = self.influence(columns)
        return self.noise.spread(influence, self.curve.run) + left_open + self.noise.new

    @property
    def unidentified(self) -> list[str]:
        """Unknowns that the observations leave about as open as the bounds did."""
        open_share = np.diag(self._covariance) * self._prior
        low, high = self.curve.bounds
        at_edge = np.minimum(self.x - low, high - self.x) < 1e-3 * (high - low)
        return [p.name for p, bad in zip(self.curve.parameters, (open_share > 0.25) | at_edge, strict=True) if bad]

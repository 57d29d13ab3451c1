"""The interface of all laws: fit, predict with intervals, score, bootstrap, and warnings about unreliable results.

A table is a pandas DataFrame or a dict of columns (lists or arrays); other columns than a law's own are ignored.
Columns with a meaning to every law: `run` (points of one run share errors, and are resampled together); `tokenizer` and
`heldout` (refused when they hold more than one value). Losses are in nats per token, shares are fractions in [0, 1].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import wraps
from typing import Any, ClassVar, Self, TypeVar, cast

import numpy as np
from scipy.special import chdtri, ndtri

from spt_fast.errors import DataError, RecipeError, SptWarning, invalid, nearest
from spt_fast.laws.columns import (
    LOSS,
    POSITIVE_SHARE,
    Array,
    Column,
    Columns,
    Loss,
    Rows,
    arguments,
    number,
    numbers,
    read,
    whole,
)
from spt_fast.laws.fitting import DRAWS, LIKELY, QUANTILES, Curve, Fit, Parameter, reach, solve

HUBER = 1e-3
"""Threshold of the Huber loss on log-losses in the papers' fits, and the least that is used here."""
EFFICIENT = 1.345
"""Threshold in standard deviations of the noise, at which Huber's estimate varies 5% more than least squares if the
noise is normal. At 0.001, noise of 1% would make it one of least absolute deviations, which varies 57% more."""
REWEIGHTED = 3
"""Number of times that noise and threshold are taken from the last fit."""
GROSS, MOST_GROSS = 12.0, 0.03
"""Standard deviations of the noise beyond which a row is ignored, unless more rows than this share lie there. Huber's
estimate limits the effect of a loss, but not that of a row that alone holds the largest of one column and the least of
another."""


LEFT_OUT = 1 / 3, 1 / 2
"""Of the logarithm of a column's range, to measure how a law errs beyond its runs; the larger error counts."""
FACTOR, APART = 2.0, 0.05
"""Largest ratio of answers, and difference of shares, among laws that fit the runs equally well."""
MISFIT_FREEDOM = 2
"""Degrees of freedom of that measurement: the errors of one law are alike."""


class LawWarning(SptWarning):
    """The runs do not determine what a law was asked for."""


class ExtrapolationWarning(LawWarning):
    """A prediction is outside of the range of runs that the law was fitted to."""


class IdentificationWarning(LawWarning):
    """The runs do not determine a parameter: predictions among them may still be good, but its value means nothing."""


class Law:
    """A scaling law. Subclasses define its columns, its prediction and its fit.

    `params_` holds the parameters after a fit, {name: value}, in the units of the columns.
    """

    inputs: ClassVar[dict[str, Column]]
    optional: ClassVar[dict[str, Column]] = {}
    """Optional columns of a prediction."""
    outputs: ClassVar[dict[str, Loss]]
    """Losses in the table; the first is predicted by default."""
    names: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters, if they are the same for every table."""

    seed: int = 0
    params_: dict[str, float]
    unidentified_: list[str]
    """Parameters that the runs do not determine."""
    remedy_: str
    """What to run to identify them."""
    _fits: dict[Any, Fit]
    _rows: Rows
    _misfits: dict[tuple[tuple[str, ...], str], float]

    # -------------------------------------------------------------------------------------------- what a law defines

    def _fit(self, rows: Rows, weights: Array | None, warm: dict[Any, Fit] | None) -> dict[Any, Fit]:
        """Its curves, fitted. For resampling: with weights [draws, rows], starting from an earlier fit `warm`, so that
        each x is [draws, unknowns]."""
        raise NotImplementedError

    def _named(self, fits: dict[Any, Fit]) -> dict[str, float]:
        raise NotImplementedError

    def _mean(self, columns: Columns, of: str) -> Array:
        raise NotImplementedError

    def _variance(self, columns: Columns, of: str) -> Array:
        """[draws, predictions]: variance of a new run's observation, or of its logarithm if `_log_interval`."""
        raise NotImplementedError

    _log_interval: ClassVar[bool] = False

    def _unsure(self, key: Any, fit: Fit) -> list[str]:
        """Parameters of a curve that the runs do not identify."""
        return fit.unidentified

    def _remedy(self) -> str:
        return "add runs that differ in what these parameters act on"

    def _told(self, columns: Columns, of: str) -> bool:
        """Whether the runs show how much runs of one setting differ."""
        return all(fit.noise.told for fit in self._fits.values())

    def _doubts(self) -> str | None:
        """Which rows do not suit the law, after a fit."""
        return None

    def _prepare(self, rows: Rows) -> Rows:
        """The rows in the form that the law uses; refuses invalid losses."""
        return rows

    def _require_enough(self, rows: Rows) -> None:
        """Raise DataError for fewer rows than the parameters need."""

    def _groups(self, rows: Rows) -> Array:
        """Groups of rows that are fitted separately have different numbers."""
        return np.zeros(len(rows), dtype=int)

    def alternatives(self) -> Iterator[tuple[str, Self]]:
        """Other laws that fit the runs about as well, each with the parameter in which it differs."""
        for key, fit in getattr(self, "_fits", {}).items():
            for name, x in (*fit.elsewhere, *fit.off_bounds):
                law = copy(self)
                law._fits = {**self._fits, key: replace(fit, x=x)}
                law.params_ = {name: float(value) for name, value in law._named(law._fits).items()}
                yield name, law

    # ------------------------------------------------------------------------------------------------------ interface

    def fit(self, table: Any) -> Self:
        """Fit to runs; returns self. Deterministic.

        Raises DataError (a ValueError) for a table that cannot be fitted; warns IdentificationWarning.
        """
        rows = read(table, self.inputs, self.outputs)
        if not len(rows):
            raise DataError("the table has no rows to fit")
        rows = self._prepare(rows)
        self._require_enough(rows)
        fits = self._fit(rows, None, None)
        self._rows, self._fits, self._misfits = rows, fits, {}
        self.params_ = {name: float(value) for name, value in self._named(fits).items()}
        self.unidentified_ = [name for key, fit in fits.items() for name in self._unsure(key, fit)]
        self.remedy_ = self._remedy()
        if doubts := self._doubts():
            _warn(f"{type(self).__name__}: {doubts}", LawWarning)
        if self.unidentified_:
            _warn(
                f"{type(self).__name__}: these runs do not identify {', '.join(self.unidentified_)}; judge the law "
                f"by the intervals of its predictions, or {self.remedy_}",
                IdentificationWarning,
            )
        return self

    @classmethod
    def from_params(cls, **params: float) -> Self:
        """The law with known parameters; it can predict and decide, and gives no intervals."""
        if not cls.names:
            raise RecipeError(f"{cls.__name__} has separate parameters for each setting of the runs; fit it to a table")
        for name in params:
            if name not in cls.names:
                raise RecipeError(f"{cls.__name__} has no parameter {name!r}; {nearest(name, cls.names)}")
        missing = [name for name in cls.names if name not in params]
        if missing:
            raise RecipeError(f"{cls.__name__} needs the parameters {', '.join(missing)} too")
        law = cls()
        law.params_ = {name: number(name, params[name], None) for name in cls.names}
        return law

    def predict(self, *, interval: float | None = None, of: str | None = None, **columns: Any) -> Any:
        """The loss at `columns`, numbers or arrays: a float, or an array of their common shape.

        interval  e.g. 0.9: (mean, low, high) instead; a new run, its noise included, falls inside with this probability
        of        which of the law's losses, by its column's name; the first of its outputs by default

        Raises RecipeError; its subclass OpenError if the runs give no interval. Warns ExtrapolationWarning outside of
        the range of fitted runs.
        """
        of = self._output(of)
        self._require("params_", "fit it to a table")
        values, shape = arguments(columns, self.inputs, self.optional)
        interval = None if interval is None else probability("interval", interval)
        if 0 in shape:
            return np.zeros(shape) if interval is None else (np.zeros(shape), np.zeros(shape), np.zeros(shape))
        self._warn_beyond(**values)
        mean = self._mean(values, of)
        if interval is None:
            return _shaped(mean, shape)
        self._require("_fits", "an interval needs runs: fit it to a table")
        if len(self._rows) > 1 and not self._rows.run.any():
            raise OpenError(
                f"{type(self).__name__}: an interval needs two runs or more; all {len(self._rows)} points are from one "
                "run and share its error, so they do not show how far another run would differ; run a second seed"
            )
        error = reach(self._variance(values, of) + self._misfit(values, of), interval)
        if not self._told(values, of):
            _warn(
                f"{type(self).__name__}: these runs do not show how much two runs of one setting differ; the interval "
                f"assumes about {LIKELY:g} times the noise of a run's evaluations; run settings with two seeds or more",
                IdentificationWarning,
            )
        low, high = (
            (mean * np.exp(-error), mean * np.exp(error)) if self._log_interval else (mean - error, mean + error)
        )
        return tuple(_shaped(edge, shape) for edge in (mean, low, high))

    def score(self, table: Any, of: str | None = None) -> dict[str, float]:
        """How well predictions fit a table: `r2`; `huber`, the mean Huber loss of the log-loss (threshold 0.001);
        `mre`, the mean relative error."""
        of = self._output(of)
        self._require("params_", "fit it to a table")
        rows = self._prepare(read(table, self.inputs, self.outputs))
        if not len(rows):
            raise DataError("the table has no rows to score")
        known = np.isfinite(rows.columns[of])
        seen = rows.columns[of][known]
        mean = self._mean({name: rows.columns[name] for name in self.inputs}, of)[known]
        error = np.abs(np.log(seen / mean)) if (seen > 0).all() and (mean > 0).all() else np.full(len(seen), np.nan)
        huber = np.where(error <= HUBER, error**2 / 2, HUBER * (error - HUBER / 2))
        total = np.square(seen - seen.mean()).sum()
        return {
            "r2": float(1 - np.square(seen - mean).sum() / total) if total else float("nan"),
            "huber": float(huber.mean()),
            "mre": float(np.abs(seen / mean - 1).mean()),
        }

    def bootstrap(self, table: Any, n: int = 200, level: float = 0.9, seed: int = 0) -> dict[str, tuple[float, float]]:
        """{parameter: (low, high)} at `level`, over `n` fits to resampled runs, each starting from the law's own.

        A draw weights each run by an exponential variate instead of a count (the Bayesian bootstrap), so that no draw
        loses so many runs that the parameters are undefined. Curves with a single run are resampled by points, but
        PostFinetuneLaw draws errors instead.
        """
        level = probability("level", level)
        draws = [law.params_ for law in self.resampled(table, whole("n", n, least=2), seed)]
        tails = 100 * (1 - level) / 2, 100 * (1 + level) / 2
        edges = {name: np.percentile([draw[name] for draw in draws], tails) for name in draws[0]}
        return {name: (float(low), float(high)) for name, (low, high) in edges.items()}

    def resampled(self, table: Any, n: int = 200, seed: int = 0) -> Iterator[Self]:
        """The law in each of `n` draws of `bootstrap`: how a prediction, or a decision, varies with the runs.

        Raises RecipeError and DataError."""
        n, seed = whole("n", n, least=1), whole("seed", seed, least=0)
        if not hasattr(self, "_fits"):
            self.fit(table)
        return self._resampled_to(self._prepare(read(table, self.inputs, self.outputs)), n, seed)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _resampled_to(self, rows: Rows, n: int, seed: int) -> Iterator[Self]:
        self._require_enough(rows)
        drawn = self._fit(*self._drawn(rows, n, np.random.default_rng(seed)), self._fits)
        for i in range(n):
            law = copy(self)
            law._fits = {key: fit.drawn(i) for key, fit in drawn.items()}
            law.params_ = {name: float(value) for name, value in self._named(law._fits).items()}
            yield law

    def _drawn(self, rows: Rows, n: int, rng: np.random.Generator) -> tuple[Rows, Array]:
        """The rows of `n` draws, and their weights [draws, rows]."""
        run = self._resampled(rows)
        return rows, rng.exponential(size=(n, run.max() + 1))[:, run]

    def _resampled(self, rows: Rows) -> Array:
        """Units of resampling: a run, or a point if a group of rows has only one run."""
        run, groups = rows.run, self._groups(rows)
        alone = np.isin(groups, [g for g in np.unique(groups) if len(np.unique(run[groups == g])) == 1])
        points = np.arange(len(run)) + run.max() + 1
        return np.unique(np.where(alone, points, run), return_inverse=True)[1]

    def _misfit(self, columns: Columns, of: str) -> Array:
        """Variance [draws, predictions] from the law's own error beyond the runs, in each column and in all of them at
        once (the budget): per distance the same as for the largest runs when the law is fitted to the others."""
        scales = [n for n, c in self.inputs.items() if not c.share and len(np.unique(self._rows.columns[n])) > 1]
        variance = np.zeros((DRAWS, len(next(iter(columns.values())))))
        draws = MISFIT_FREEDOM / chdtri(MISFIT_FREEDOM, QUANTILES)
        for names in dict.fromkeys([*((name,) for name in scales), tuple(scales)]):
            seen, asked = _size(self._rows.columns, names), _size(columns, names)
            seen = seen[np.isfinite(seen)]
            distance = np.where(np.isfinite(asked), np.maximum(asked - seen.max(), seen.min() - asked).clip(0), 0)
            if (distance > 1e-6).any():
                if (names, of) not in self._misfits:
                    self._misfits[names, of] = self._misfit_of(names, of)
                variance += np.outer(draws, self._misfits[names, of] * np.square(distance))
        return variance

    def _misfit_of(self, names: tuple[str, ...], of: str) -> float:
        """Variance for a distance of 1; for several columns at once at least the sum over each column's part of the
        distance. Raises OpenError if there are too few points to leave any out."""
        if len(names) == 1:
            return self._measured_misfit(names, of)
        parts = [self._misfits.get(((name,), of)) for name in names]
        for i, name in enumerate(names):
            if parts[i] is None:
                with suppress(OpenError):
                    parts[i] = self._misfits[(name,), of] = self._measured_misfit((name,), of)
        return max(self._measured_misfit(names, of), sum(part or 0.0 for part in parts) / len(names) ** 2)

    def _measured_misfit(self, names: tuple[str, ...], of: str) -> float:
        size = _size(self._rows.columns, names)
        sizes = np.unique(size[np.isfinite(size)])
        edges = [float(sizes[-1] - share * np.ptp(sizes)) for share in LEFT_OUT]
        found = [self._misfit_beyond(size, edge, of) for edge in edges]
        if not any(found) and len(sizes) == 2 and self._takes_three(names[0]):
            raise OpenError(
                f"{type(self).__name__}: an interval beyond the range of {names[0]} needs the law's error there, "
                "which two values do not show; run a third"
            )
        if None in found:
            found.append(self._misfit_beyond(size, float(sizes[-2]), of))
        known = [variance for variance in found if variance is not None]
        if known:
            return max(known)
        raise OpenError(
            f"{type(self).__name__}: an interval beyond the {' and '.join(names)} that were run needs points to test "
            f"the law on, and its parameters need all of these {len(size)}; add runs"
        )

    def _misfit_beyond(self, size: Array, edge: float, of: str) -> float | None:
        """From the law's errors at sizes above `edge`, fitted to the others; 0 if these have one value of a column,
        which leaves the law undetermined and is no error of its own; None if they are too few."""
        kept, left = self._rows.where(size <= edge), self._rows.where(size > edge)
        for name in self.inputs:
            seen, asked = np.unique(kept.columns[name]), np.unique(left.columns[name])
            if len(seen) == 1 and not np.array_equal(seen, asked):
                return 0.0
        try:
            law = self._refitted(kept)
        except DataError:
            return None
        try:
            mean, expected = (f(left.columns, of) for f in (law._mean, law._variance))
        except RecipeError:
            return 0.0
        loss = left.columns[of]
        error = np.square(np.log(loss / mean) if self._log_interval else loss - mean)
        excess = float(np.median(error) / ndtri(0.75) ** 2 - np.median(expected))
        return max(excess, 0.0) / float(np.square(size[size > edge] - size[size <= edge].max()).mean())

    def _refitted(self, rows: Rows) -> Self:
        """The same law of other rows. Raises DataError if they are too few."""
        self._require_enough(rows)
        law = copy(self)
        law._rows, law._fits = rows, law._fit(rows, None, None)
        law.params_ = law._named(law._fits)
        return law

    def _takes_three(self, column: str) -> bool:
        """Whether two values of a column determine the law, so that no interval beyond them is wide."""
        return False

    def _given(self, **columns: Any) -> Columns:
        """The columns of a decision, checked and broadcast; the law must have its parameters."""
        self._require("params_", "fit it to a table")
        return arguments(columns, {name: self.inputs[name] for name in columns}, {})[0]

    def _number(self, **columns: Any) -> list[float]:
        """The same of columns with one number each."""
        self._require("params_", "fit it to a table")
        return list(numbers(columns, self.inputs).values())

    def _output(self, of: str | None) -> str:
        if of is None:
            return next(iter(self.outputs))
        if of not in tuple(self.outputs):
            raise RecipeError(f"of: {type(self).__name__} does not predict {of!r}; {nearest(str(of), self.outputs)}")
        return of

    def _require(self, attribute: str, remedy: str) -> None:
        if not hasattr(self, attribute):
            raise RecipeError(f"this {type(self).__name__} has not been fitted; {remedy}")

    def _range(self, column: str, otherwise: tuple[float, float]) -> tuple[float, float]:
        """The smallest and the largest fitted value; `otherwise` without a fit."""
        if not hasattr(self, "_rows"):
            return otherwise
        return float(self._rows.columns[column].min()), float(self._rows.columns[column].max())

    def _warn_beyond(self, **columns: Any) -> None:
        """Warn of inputs outside of the range of fitted runs."""
        if not hasattr(self, "_rows"):
            return
        for name in self.inputs.keys() & columns.keys():
            seen, asked = self._rows.columns[name], np.asarray(columns[name])
            above, below = (seen.max(), asked.max()), (seen.min(), asked.min())
            for edge, beyond, outside in ((*above, above[1] > above[0]), (*below, below[1] < below[0])):
                if outside and not np.isclose(beyond, edge, rtol=1e-6, atol=0):
                    _warn(
                        f"{type(self).__name__} extrapolates: {name} = {beyond:g} is outside of the range of runs it "
                        f"was fitted to ({seen.min():g} to {seen.max():g})",
                        ExtrapolationWarning,
                        stacklevel=4,
                    )


Decision = TypeVar("Decision", bound=Callable[..., Any])


def decision(decide: Decision) -> Decision:
    """A decorator: OpenError if a law's decision depends on a parameter that its runs do not determine."""

    @wraps(decide)
    def settled(self: Law, **given: Any) -> Any:
        answer = decide(self, **given)
        require_settled(answer, self, lambda law: decide(law, **given))
        return answer

    return cast(Decision, settled)


class OpenError(RecipeError):
    """A decision that the runs do not determine."""


def require_settled(answer: Any, law: Law, decide: Callable[[Law], Any]) -> None:
    """OpenError if laws that fit the runs about as well have no answer, or one that differs by more than FACTOR (and a
    share by more than APART)."""
    for name, other in law.alternatives():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LawWarning)
                theirs = np.ravel(decide(other))
        except RecipeError:
            theirs = np.full(np.size(answer), np.nan)
        for one, two in zip(np.ravel(answer).tolist(), theirs.tolist(), strict=True):
            low, high = sorted((one, two))
            if not high <= FACTOR * low and (high > 1 or not high - low <= APART):
                says = "nothing" if np.isnan(two) else f"{two:.3g}"
                raise OpenError(
                    f"these runs do not determine the answer of {type(law).__name__}: another value of {name} fits "
                    f"them as well and gives {says} instead of {one:.3g}; add runs that differ in what {name} acts on"
                )


Units = dict[str, dict[str, str]]
"""{coefficient: {column: the exponent with which the formula divides by it, "-beta" if it multiplies}}."""


class FormulaLaw(Law):
    """A law of one formula. During the fit, columns in `units` are in units of their geometric means, so that the
    unknown coefficients are losses at the middle of the data."""

    outputs: ClassVar[dict[str, Loss]] = {"loss": LOSS}
    parameters: ClassVar[tuple[Parameter, ...]]
    units: ClassVar[Units]
    _log_interval = True

    def __init_subclass__(cls) -> None:
        cls.names = tuple(p.name for p in cls.parameters)

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        raise NotImplementedError

    def _in_units(self, params: dict[str, float], unit: dict[str, float]) -> dict[str, float]:
        """Parameters for the columns as they are, from those fitted to columns in units of `unit`."""
        found = dict(params)
        for coefficient, powers in self.units.items():
            for column, name in powers.items():
                exponent = -params[name[1:]] if name.startswith("-") else params[name]
                found[coefficient] *= unit[column] ** exponent
        return found

    def _measured(self, rows: Rows) -> dict[str, float]:
        """The units."""
        names = {column for powers in self.units.values() for column in powers}
        return {name: float(np.exp(np.log(rows.columns[name]).mean())) for name in names}

    def _features(self, columns: Columns, unit: dict[str, float]) -> Columns:
        """The columns of the formula, in units of `unit`."""
        return {name: values / unit.get(name, 1.0) for name, values in columns.items()}

    def _require_enough(self, rows: Rows) -> None:
        require_points(len(rows), len(self.parameters), type(self).__name__)

    def _fit(self, rows: Rows, weights: Array | None, warm: dict[Any, Fit] | None) -> dict[Any, Fit]:
        if warm is None:
            self._unit = self._measured(rows)
        columns = self._features({name: rows.columns[name] for name in self.inputs}, self._unit)
        target = rows.columns[next(iter(self.outputs))]
        counted = self._counted(rows)
        curve = Curve(self.parameters, self.formula, columns, target, rows.run, log=True).where(counted)
        weights = None if weights is None else weights[:, counted]
        if warm:
            curve = replace(curve, huber=warm["loss"].curve.huber)
            kept = ~_gross(replace(warm["loss"], curve=curve), warm["loss"].scale)
            own = None if weights is None else weights[:, kept]
            curve = curve.where(kept)
            return {"loss": Fit(curve, solve(curve, own, [warm["loss"].x]))}
        fit = _reweighted(Fit(curve, solve(curve, seed=self.seed)))
        for _ in range(REWEIGHTED):
            kept = ~_gross(replace(fit, curve=curve), fit.scale)
            if kept.sum() == len(fit.residual):
                break
            fit = _reweighted(replace(fit, curve=curve.where(kept)))
        return {"loss": fit}

    def _counted(self, rows: Rows) -> Array:
        """[rows]: which the curve must meet."""
        return np.ones(len(rows), dtype=bool)

    def _doubts(self) -> str | None:
        """The number of rows that were left out of the fit, and the worst of them."""
        of = next(iter(self.outputs))
        rows, used = int(self._counted(self._rows).sum()), len(self._fits["loss"].residual)
        if used == rows:
            return None
        seen, mean = self._rows.columns[of], self._mean({n: self._rows.columns[n] for n in self.inputs}, of)
        worst = int(np.abs(np.log(seen / mean)).argmax())
        at = ", ".join(f"{name} = {self._rows.columns[name][worst]:.4g}" for name in self.inputs)
        return (
            f"{rows - used} of {rows} rows were left out of the fit, off by more than {GROSS:g} times the "
            f"noise; the worst is {seen[worst]:.4g} where the law predicts {mean[worst]:.4g} ({at}); check these runs"
        )

    def _named(self, fits: dict[Any, Fit]) -> dict[str, float]:
        return self._in_units(fits["loss"].values, self._unit)

    def _unsure(self, key: Any, fit: Fit) -> list[str]:
        """Two values of a column do not determine a floor, a coefficient and an exponent: none of the three is
        known."""
        found = set(fit.unidentified)
        for coefficient, exponent, _ in self._of_two_values():
            found |= {"E", coefficient, exponent} if found & {"E", exponent} else set()
        return [name for name in self.names if name in found]

    def _remedy(self) -> str:
        few = [column for *_, column in self._of_two_values()]
        needs = f"run a third value of {' and of '.join(few)}, which an exponent needs"
        return needs if few and self.unidentified_ else super()._remedy()

    def _takes_three(self, column: str) -> bool:
        exponents = {powers[column].removeprefix("-") for powers in self.units.values() if column in powers}
        return bool(exponents) and not exponents & set(self._unsure("loss", self._fits["loss"]))

    def _of_two_values(self) -> list[tuple[str, str, str]]:
        """(coefficient, exponent, column) of terms of one column that the runs have two values of."""
        features = self._features({name: self._rows.columns[name] for name in self.inputs}, {})
        two = {name for name, values in features.items() if len(np.unique(values)) == 2}
        return [
            (coefficient, exponent, column)
            for coefficient, powers in self.units.items()
            for column, exponent in powers.items()
            if len(powers) == 1 and column in two
        ]

    def _mean(self, columns: Columns, of: str) -> Array:
        return self.formula([np.array([self.params_[name]]) for name in self.names], self._features(columns, {}))

    def _variance(self, columns: Columns, of: str) -> Array:
        return self._fits["loss"].variance(self._features(columns, self._unit))

    def _variance_of_sums(self, columns: Columns, sums: Array) -> Array:
        """[draws, sums]: variance of weighted sums [sums, predictions] of the law's values, in nats."""
        fit, mean = self._fits["loss"], self._mean(columns, next(iter(self.outputs)))
        influence, left_open = fit.influence(self._features(columns, self._unit), sums * mean)
        return fit.noise.spread(influence, fit.curve.run, observed=False) + left_open


def _reweighted(fit: Fit) -> Fit:
    """A fit continued with Huber's loss."""
    for _ in range(REWEIGHTED):
        curve = replace(fit.curve, huber=max(HUBER, EFFICIENT * fit.scale))
        fit = Fit(curve, solve(curve, starts=[fit.x]))
    return fit


def _gross(fit: Fit, scale: float) -> Array:
    """[points]: whether a point is ignored. Part of a run's curve, or many points, are kept: there the law errs."""
    _, index, points = np.unique(fit.curve.run, return_inverse=True, return_counts=True)
    far = (np.abs(fit.residual) > GROSS * max(scale, HUBER)) & (points[index] == 1)
    return far & (far.mean() <= MOST_GROSS)


def probability(name: str, given: Any) -> float:
    """Between 0 and 1. Raises RecipeError."""
    with suppress(RecipeError):
        if (value := number(name, given, POSITIVE_SHARE)) < 1:
            return value
    raise RecipeError(invalid(name, given, "give a probability between 0 and 1, such as 0.9"))


def require_law(name: str, given: Any, *kinds: type[Law]) -> None:
    """Raise RecipeError unless an argument is a law of one of these kinds."""
    if not isinstance(given, kinds):
        known = " or ".join(kind.__name__ for kind in kinds)
        raise RecipeError(invalid(name, given, f"give {known}, such as {kinds[0].__name__}().fit(table)"))


def require_points(points: int, unknowns: int, law: str, where: str = "") -> None:
    """Raise DataError unless there are more points than unknowns."""
    if points <= unknowns:
        raise DataError(
            f"{law} has {unknowns} parameters and needs at least {unknowns + 1} runs or points{where}; "
            f"the table has {points}"
        )


def _size(columns: Columns, names: Sequence[str]) -> Array:
    """Sum of the columns' logarithms; -inf if one is 0."""
    with np.errstate(divide="ignore"):
        return np.sum([np.log(columns[name]) for name in names], axis=0)


def _shaped(values: Array, shape: tuple[int, ...]) -> Any:
    return values.reshape(shape) if shape else float(values[0])


def _warn(message: str, category: type[LawWarning], stacklevel: int = 3) -> None:
    """`stacklevel`: the distance of the user's own line from here."""
    warnings.warn(message, category, stacklevel=stacklevel)

"""Reads a table of runs: a pandas DataFrame, or a dict of columns. Unusable columns are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from spt_fast.errors import DataError, RecipeError, invalid, nearest

Array = np.ndarray
Columns = dict[str, Array]

ALIKE = ("tokenizer", "heldout")
"""Columns that must hold one value if a table has them: losses with different values are not comparable."""
MISSING = ("None", "nan", "<NA>")
"""A missing value of Python, NumPy and pandas as text."""


@dataclass(frozen=True)
class Column:
    """An input of a law: positive by default; zero is allowed if `zero`, and a share is in [0, 1]."""

    zero: bool = False
    share: bool = False


@dataclass(frozen=True)
class Loss:
    """An output: a positive number; `nan`: the law handles NaN itself; `signed`: it may be an increment."""

    nan: bool = False
    signed: bool = False


LOSS = Loss()
POSITIVE, NATURAL = Column(), Column(zero=True)
SHARE, POSITIVE_SHARE = Column(zero=True, share=True), Column(share=True)


@dataclass(frozen=True)
class Rows:
    """A table's columns as float64, and the run of each row (numbered from 0; each row its own without `run`). Columns
    are [rows], or [draws, rows] where each draw has its own."""

    columns: Columns
    run: Array

    def __len__(self) -> int:
        return len(self.run)

    def where(self, mask: Array) -> Rows:
        return Rows({name: values[..., mask] for name, values in self.columns.items()}, self.run[mask])


def read(table: Any, inputs: Mapping[str, Column], outputs: Mapping[str, Loss]) -> Rows:
    """Check and convert, without repeats of a run's rows. Raises DataError."""
    if not hasattr(table, "keys") or not hasattr(table, "__getitem__"):
        raise DataError(invalid("table", table, "give a pandas DataFrame or a dict of columns"))
    names = [str(name) for name in table.keys()]  # noqa: SIM118 - iterating a DataFrame does the same, a Mapping may not
    require_columns(names, (*inputs, *outputs), "the table")
    for name in (*inputs, *outputs, "run", *ALIKE):
        if names.count(name) > 1:
            raise DataError(f"the table has the column {name!r} {names.count(name)} times; keep one of them")
    columns = {name: _numbers(name, table[name]) for name in (*inputs, *outputs)}
    run = _runs(table["run"]) if "run" in names else None
    lengths = {name: len(values) for name, values in columns.items()} | ({} if run is None else {"run": len(run)})
    if len(set(lengths.values())) > 1:
        raise DataError(f"the table's columns differ in length: {lengths}")
    for name in ALIKE:
        found = sorted({str(value) for value in np.asarray(table[name])}) if name in names else []
        if len(found) > 1:
            raise DataError(
                f"the table mixes runs with different values of {name!r}: {', '.join(found)}; their losses are not "
                "comparable: fit each separately"
            )
    for name, column in inputs.items():
        check(name, columns[name], column, DataError)
    for name, loss in outputs.items():
        if (columns[name] <= 0).any() and not loss.signed:
            raise DataError(invalid(name, float(columns[name].min()), "a loss must be above 0 nats"))
        bad = ~np.isfinite(columns[name]) & ~(np.isnan(columns[name]) & loss.nan)
        if bad.any():
            raise DataError(
                f"{name} is {columns[name][bad][0]} in {bad.sum()} of {len(bad)} rows (the first is row "
                f"{np.flatnonzero(bad)[0]}); drop the runs that failed"
            )
    if run is None:
        return Rows(columns, np.arange(len(next(iter(columns.values())))))
    rows = Rows(columns, np.unique(run, return_inverse=True)[1])
    return rows.where(_first_of_each(rows))


def _first_of_each(rows: Rows) -> Array:
    """The places of the rows without repeats: a measurement that is there twice would look free of noise."""
    table = np.ascontiguousarray(np.stack([*rows.columns.values(), rows.run.astype(float)], axis=1))
    as_bytes = table.view(np.dtype((np.void, table.itemsize * table.shape[1])))
    return np.sort(np.unique(as_bytes.ravel(), return_index=True)[1])


def _runs(values: Any) -> Array:
    """The identifiers of runs: numbers, or text. Raises DataError if one is missing."""
    runs = np.asarray(values)
    if runs.dtype.kind in "iuf" and np.isfinite(runs).all():
        return runs
    names = [str(run) for run in runs.ravel().tolist()]
    missing = [i for i, name in enumerate(names) if name in MISSING]
    if missing:
        raise DataError(
            f"run is missing in {len(missing)} of {len(names)} rows (the first is row {missing[0]}); name the run of "
            "each, or leave the column out if each row is a separate run"
        )
    return np.array(names, dtype=str)


def require_columns(found: Iterable[Any], needed: Iterable[str], table: str) -> None:
    """Raise DataError for a table without one of the required columns. table: its name."""
    names = [str(name) for name in found]
    for name in needed:
        if name not in names:
            raise DataError(f"{table} has no column {name!r}; {nearest(name, names)}")


def _numbers(name: str, values: Any) -> Array:
    try:
        return np.atleast_1d(np.asarray(values, dtype=float))
    except (TypeError, ValueError):
        raise DataError(invalid(name, np.asarray(values).ravel()[:1].tolist(), "a column must hold numbers")) from None


def check(name: str, values: Array, column: Column, error: type[Exception]) -> None:
    """Raise `error` if an input is outside of its range."""
    bad = ~np.isfinite(values) | (values < 0) | ((values == 0) & (not column.zero))
    if bad.any():
        least = "at least 0" if column.zero else "above 0"
        raise error(invalid(name, float(values[bad][0]), f"{name} must be finite and {least}"))
    if column.share and (values > 1).any():
        given = values[values > 1][0]
        expected = f"a fraction between 0 and 1, not a percentage; {given:g}% is {given / 100:g}"
        raise error(invalid(name, float(given), expected))


def numeric(name: str, given: Any) -> Array:
    """A number, or an array of numbers, as float64. Raises RecipeError, also for text that holds a number."""
    try:
        values = np.asarray(given)
        if values.dtype.kind in "iuf" or all(_is_number(value) for value in values.ravel().tolist()):
            return values.astype(float)
    except (TypeError, ValueError, OverflowError):
        pass
    text = "; text is not read here" if isinstance(given, str) else ""
    raise RecipeError(invalid(name, given, f"give a number such as 1e9, or an array of numbers{text}"))


def _is_number(value: object) -> bool:
    return isinstance(value, Real | Decimal) and not isinstance(value, bool)


def number(name: str, given: Any, column: Column | None = POSITIVE) -> float:
    """One number, in the range of `column`; any finite one without. Raises RecipeError."""
    values = numeric(name, given)
    if values.ndim:
        raise RecipeError(invalid(name, given, "give one number, not an array"))
    if column is not None:
        check(name, values.ravel(), column, RecipeError)
    elif not np.isfinite(values):
        raise RecipeError(invalid(name, given, "give a finite number"))
    return float(values)


def numbers(given: Mapping[str, Any], columns: Mapping[str, Column]) -> dict[str, float]:
    """One number for each of the columns that are given. Raises RecipeError."""
    for name in given:
        if name not in columns:
            raise RecipeError(f"this law has no column {name!r}; {nearest(name, columns)}")
    return {name: number(name, value, columns[name]) for name, value in given.items()}


def span(name: str, given: Any, column: Column = POSITIVE) -> tuple[float, float]:
    """Two numbers in order, in the range of `column`. Raises RecipeError."""
    values = numeric(name, given)
    if values.shape != (2,) or not values[0] < values[1]:
        raise RecipeError(invalid(name, given, "give two numbers in order, the smaller one first"))
    check(name, values, column, RecipeError)
    return float(values[0]), float(values[1])


def whole(name: str, given: Any, least: int) -> int:
    """Raises RecipeError."""
    value = number(name, given, None)
    if not (value.is_integer() and least <= value < 2**31):
        raise RecipeError(invalid(name, given, f"give a whole number, at least {least} and below 2^31"))
    return int(value)


def arguments(
    given: Mapping[str, Any], inputs: Mapping[str, Column], optional: Mapping[str, Column]
) -> tuple[Columns, tuple[int, ...]]:
    """The arguments of a prediction, broadcast and flattened, and their shape. Raises RecipeError."""
    known = {**inputs, **optional}
    for name in given:
        if name not in known:
            raise RecipeError(f"this law has no column {name!r}; {nearest(name, known)}")
    missing = [name for name in inputs if name not in given]
    if missing:
        raise RecipeError(f"a prediction needs {', '.join(inputs)}; {', '.join(missing)} not given")
    try:
        arrays = np.broadcast_arrays(*[numeric(name, values) for name, values in given.items()])
    except RecipeError:
        raise
    except ValueError:
        raise RecipeError(f"{', '.join(inputs)} must be numbers or arrays of one shape") from None
    columns = {name: array.ravel() for name, array in zip(given, arrays, strict=True)}
    for name, values in columns.items():
        check(name, values, known[name], RecipeError)
    return columns, arrays[0].shape

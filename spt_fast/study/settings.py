"""Optimizer settings: their columns in the runs table, and the best of several settings of an arm.

A *setting* is the values of all optimizer fields in a stage. Fields of a phase's own grid are not part of it: the run
itself chose their values, which may differ between seeds. Several settings of one arm never count as more runs of the
arm: one is chosen, by the same rule for every arm, and the others are left out with a note.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spt_fast.config import Phase
from spt_fast.optimizers import OPTIMIZERS, AdamW, parse_optimizer

NUMBERS = ("lr", "weight_decay", "beta1", "beta2", "eps", "clip", "momentum")
SETTINGS = ("lr", "optimizer", *NUMBERS[1:])
"""Columns of the runs table. A number is NaN if the optimizer has no such field, or if the table is of an earlier
version; `clip` is infinite without clipping."""
_COLUMNS = {"name": ("optimizer",), "betas": ("beta1", "beta2")}
"""The columns of fields that have other names."""


def setting_of(phase: Phase, arm: int) -> dict[str, Any]:
    """The optimizer setting of one arm of a phase's grid: SETTINGS by name, and the grid's fields as `grid`."""
    found: dict[str, Any] = dict.fromkeys(SETTINGS, math.nan)
    for field, value in vars(phase.with_overrides(phase.arms()[arm]).optimizer).items():
        values = value if isinstance(value, tuple) else (math.inf if value is None else value,)
        found |= zip(columns_of_field(field), values, strict=True)
    return found | {"grid": " ".join(phase.grid or ())}


def usual(runs: pd.DataFrame) -> dict[str, Any]:
    """The most frequent setting of the runs, without the learning rate."""
    known = with_settings(runs)[list(SETTINGS[1:])]
    counts = known.groupby(list(SETTINGS[1:]), dropna=False).size()
    name, *numbers = counts.idxmax()
    return dict(zip(SETTINGS[1:], [name, *map(float, numbers)], strict=True))


def usual_batch(runs: pd.DataFrame) -> tuple[int, int] | None:
    """The most frequent batch of the runs: windows of a step, and tokens of a window. None if it is not recorded, as in
    tables of earlier versions."""
    known = runs.reindex(columns=["sequences", "window"]).dropna()
    if known.empty:
        return None
    sequences, window = known.value_counts(sort=False).idxmax()
    return int(sequences), int(window)


def fields_of(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A setting as a recipe's section: the weight decay and all fields that are not defaults; empty if unknown."""
    if pd.isna(setting["optimizer"]):
        return {}
    given: dict[str, Any] = {"name": setting["optimizer"]}
    for field in dataclasses.fields(OPTIMIZERS[setting["optimizer"]]):
        if field.name not in ("name", "lr"):
            *several, value = (setting[column] for column in columns_of_field(field.name))
            given[field.name] = [*several, value] if several else None if value == math.inf else value
    kind = parse_optimizer({**given, "lr": 1.0}, "optimizer")
    default = vars(type(kind)(lr=1.0)) | {"name": AdamW.name, "weight_decay": None}
    return {name: value for name, value in given.items() if vars(kind)[name] != default[name]}


def columns_of_field(field: str) -> tuple[str, ...]:
    return _COLUMNS.get(field, (field,))


def with_settings(table: pd.DataFrame) -> pd.DataFrame:
    """A runs table with all columns of SETTINGS; tables of earlier versions have only `lr`."""
    lacking = dict.fromkeys(SETTINGS, math.nan) | {"optimizer": None, "grid": ""}
    return table.assign(**{name: value for name, value in lacking.items() if name not in table})


def settings_of(runs: pd.DataFrame) -> pd.DataFrame:
    """SETTINGS of the runs, without the values that a run's own grid has chosen: NaN, or "" in the text column."""
    runs = with_settings(runs)
    chosen = runs["grid"].astype(object).fillna("").str.split()
    fields = {column: field for field in chosen.explode().dropna() for column in columns_of_field(field)}
    own = runs[list(SETTINGS)].copy()
    for column in fields.keys() & own.columns:  # the warm-up isn't a column
        own[column] = own[column].mask(chosen.map(lambda names, field=fields[column]: field in names))
    return own.assign(optimizer=own["optimizer"].astype(object).fillna(""))


def setting_ids(runs: pd.DataFrame) -> pd.Series:
    """A number for the setting of each run, ordered by the learning rate and then by the other fields."""
    return settings_of(runs).groupby(list(SETTINGS), dropna=False).ngroup()


def beaten(runs: pd.DataFrame, arm: Sequence[str], by: str = "domain_select") -> pd.Series:
    """For a row per run, whether another setting of the same arm has a lower mean of the column `by`; arm: the columns
    that identify it. If no seed has several settings, nothing was searched, and no setting is beaten. If some seeds
    have all settings, only these count: a setting without a hard seed would seem better."""
    runs = runs.assign(setting=setting_ids(runs))
    several = runs.groupby([*arm, "seed"], dropna=False)["setting"].transform("nunique")
    searched = runs[several.groupby([runs[name] for name in arm], dropna=False).transform("max") > 1]
    columns = [searched[name] for name in arm]
    shared = several[searched.index] == searched["setting"].groupby(columns, dropna=False).transform("nunique")
    counts = shared | ~shared.groupby(columns, dropna=False).transform("any")
    weighed = searched.assign(weighed=searched[by].where(counts))
    means = weighed.groupby([*arm, "setting"], dropna=False)["weighed"].transform("mean").fillna(np.inf)
    order = searched.assign(mean=means).sort_values(["mean", "setting"])
    best = order.groupby(list(arm), dropna=False)["setting"].transform("first")
    return searched["setting"].ne(best).reindex(runs.index, fill_value=False)


def varied(settings: pd.DataFrame) -> list[str]:
    """The columns in which settings differ."""
    return [name for name in SETTINGS if settings[name].nunique(dropna=False) > 1]


def in_words(setting: Mapping[str, Any], columns: Iterable[str]) -> str:
    """The given columns of a setting in words: "muon, lr 0.01, weight_decay 1, no clip"."""
    return ", ".join(_word(name, setting[name]) for name in columns if not pd.isna(setting[name]))


def _word(column: str, value: Any) -> str:
    if column == "optimizer":
        return str(value)
    return "no clip" if value == math.inf else f"{column} {value:g}"

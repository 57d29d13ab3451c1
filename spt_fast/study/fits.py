"""Fits every law that a study's runs allow, and tests its predictions.

A law is judged by its predictions and not by its fit: `holdout_error` fits it to a part of the runs and measures the
error on the rest. The parts are chosen as decisions extrapolate: to a larger share, a larger budget, or a share between
those that were run.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from spt_fast import laws
from spt_fast.errors import DataError, RecipeError, invalid, nearest, some
from spt_fast.files import write_text
from spt_fast.laws import IdentificationWarning, Law, LawWarning
from spt_fast.outputs import check_folder, check_output, is_json_with
from spt_fast.printing import as_json
from spt_fast.quantities import amount
from spt_fast.study import views
from spt_fast.study.behind import Behind
from spt_fast.study.crossover import Crossover, asks_for_crossover, crossovers
from spt_fast.study.usable import UsableRows, usable

Split = Callable[[pd.DataFrame], list[pd.Series]]
"""Returns masks of rows; the rows of each mask are predicted from all others."""

FIRST_PART = 0.6
"""The first part of the budget, which is fitted to predict the rest."""
MOST_ROWS = 6000
"""The most rows that a law is fitted to, drawn at random with about as many from each run: more take longer without
effect."""
BENT = 0.5
"""Runs without domain text are left out of a law if that reduces the error of the others to this share."""


def _largest(column: str) -> Split:
    return lambda table: [table[column] == table[column].max()]


def _between(column: str) -> Split:
    return lambda table: [table[column] == value for value in sorted(table[column].unique())[1:-1]]


def _outer(column: str) -> Split:
    return lambda table: [table[column] == table[column].min(), table[column] == table[column].max()]


def _every_other(column: str) -> Split:
    """Values between the smallest and the largest."""

    def split(table: pd.DataFrame) -> list[pd.Series]:
        values = sorted(table[column].unique())
        return [table[column].isin(part) for part in (values[1:-1:2], values[2:-1:2]) if part]

    return split


def _rest_of_budget(table: pd.DataFrame) -> list[pd.Series]:
    return [table["tokens"] > FIRST_PART * table["tokens"].max()]


@dataclass(frozen=True)
class Kind:
    """How a law is fitted to a study."""

    make: Callable[[], Law]
    view: Callable[[UsableRows], list[views.Group]]
    takes: str
    """The runs that the law needs, in words."""
    differ: tuple[str, ...] = ()
    settings: int = 0
    """The law needs at least this many combinations of the columns in `differ`."""
    apart: float = 0.0
    """The least difference between the smallest and the largest value of the first of these columns."""
    curves: str = ""
    unknowns: int = 0
    """Each value of the column `curves` is a separate curve with this many parameters."""
    rows: int | None = None
    """The law is fitted to about this many rows, evenly spaced in each run: more take longer and add little."""
    splits: dict[str, Split] = field(default_factory=dict)
    """The parts to leave out and predict, by their name in words."""


def _dcpt(of: Literal["domain", "general"]) -> Kind:
    return Kind(
        laws.DCPTLaw,
        partial(views.dcpt, of=of),
        "continued pretraining at four domain shares or more, 20% apart, with evaluations along the way",
        differ=("own_ratio",),
        settings=4,
        apart=0.2,
        rows=150,
        splits={"each inner ratio": _between("own_ratio"), "outer ratios": _outer("own_ratio")},
    )


LAWS = {
    "overfitting": Kind(
        laws.OverfittingLaw,
        views.overfitting,
        "pretraining from scratch at four domain shares or more (0 may be one), with evaluations along the way",
        splits={"largest fraction": _largest("fraction"), "last 40% of budget": _rest_of_budget},
    ),
    "mixture-repetition": Kind(
        laws.MixtureRepetitionLaw,
        views.mixture_repetition,
        "pretraining from scratch at three domain shares or more (0 may be one), with evaluations along the way",
        differ=("fraction",),
        settings=3,
        splits={"largest fraction": _largest("fraction"), "last 40% of budget": _rest_of_budget},
    ),
    "post-finetuning": Kind(
        laws.PostFinetuneLaw,
        views.post_finetuning,
        "finetunes on domain text alone, four or more of each domain share, from three pretraining budgets or more",
        curves="fraction",
        unknowns=3,
        splits={"largest budget": _largest("tokens")},
    ),
    "forgetting": Kind(
        laws.ForgettingLaw,
        views.forgetting,
        "finetunes that read their corpus once or more, of different model size, corpus size or injected share",
        differ=("params", "unique_tokens", "injected"),
        settings=4,
        splits={f"largest {column}": _largest(column) for column in ("params", "unique_tokens", "injected")},
    ),
    "finetuning": Kind(
        laws.FinetuneLaw,
        views.finetuning,
        "finetunes that read their corpus once or more, of different model size or corpus size",
        differ=("params", "unique_tokens"),
        settings=4,
        splits={f"largest {column}": _largest(column) for column in ("params", "unique_tokens")},
    ),
    "dcpt-domain": _dcpt("domain"),
    "dcpt-general": _dcpt("general"),
    "cmr": Kind(
        laws.CMRLaw,
        views.cmr,
        "continued pretraining at two domain shares or more, 20% apart, each with six evaluations or more",
        differ=("domain_ratio",),
        settings=2,
        apart=0.2,
        curves="domain_ratio",
        unknowns=5,
        rows=250,
        splits={"every other ratio": _every_other("domain_ratio"), "last 40% of budget": _rest_of_budget},
    ),
    "chinchilla": Kind(
        laws.ChinchillaLaw,
        views.chinchilla,
        "pretraining from scratch at two model sizes or more of one domain share, each with several budgets",
        splits={"largest params": _largest("params"), "last 40% of budget": _rest_of_budget},
    ),
    "data-constrained": Kind(
        laws.DataConstrainedLaw,
        views.data_constrained,
        "pretraining on the domain corpus alone (delta 1), of two corpus sizes or more, each with several budgets",
        differ=("unique_tokens",),
        settings=2,
        splits={"last 40% of budget": _rest_of_budget},
    ),
}


@dataclass(frozen=True)
class Score:
    """How well a law fits the rows that it was fitted to; mre is the mean relative error."""

    r2: float
    huber: float
    mre: float


@dataclass(frozen=True)
class Errors:
    """How well a law predicts rows that it was not fitted to; mre is the mean relative error."""

    mre: float
    r2: float
    rows: int


@dataclass(frozen=True)
class Estimate:
    """A parameter's value, and its 90% interval over fits to resampled runs."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fitted:
    """A law of one group of runs, or the reason why there is none."""

    law_name: str
    """A key of LAWS."""
    group: Mapping[str, float | None]
    """The properties that its runs have in common; see views."""
    table: pd.DataFrame
    """The rows that the law is fitted to."""
    problem: str | None = None
    """What the runs lack, if there is no law."""
    law: Law | None = None
    score: Score | None = None
    holdout: Mapping[str, Errors] = field(default_factory=dict)
    """See `holdout_error`."""
    parameters: Mapping[str, Estimate] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    @property
    def rows(self) -> int:
        return len(self.table)

    @property
    def runs(self) -> int:
        return len({*self.table["run"]} - {views.START}) if self.rows else 0

    def as_json(self) -> dict[str, Any]:
        return {
            "law": self.law_name,
            "group": self.group,
            "runs": self.runs,
            "rows": self.rows,
            "parameters": self.parameters,
            "score": self.score or {},
            "holdout": self.holdout,
            "unidentified": self.law.unidentified_ if self.law else [],
            "warnings": self.warnings,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Fits:
    """The laws of a runs table."""

    laws: list[Fitted]
    notes: list[str]
    """What was left out of the table and why, a sentence each."""
    behind: dict[str, Behind | None]
    """The held-out text of "domain" and "general" losses; None if it is not recorded."""
    crossover: list[Crossover]
    """The amount of domain text above which pretraining makes no difference, for each model size whose runs show it."""


def fit(table: pd.DataFrame | UsableRows, law: str | None = None) -> Fits:
    """The fits of `fit_laws` with notes, text behind the losses, and the crossover. Errors are those of `fit_laws`."""
    used = usable(table)
    asked = asks_for_crossover(used.rows)
    behind = {corpus: Behind.of_rows(used.rows, corpus) for corpus in ("domain", "general")}
    return Fits(fit_laws(used, law), used.notes, behind, crossovers(used.rows) if asked else [])


def fit_laws(table: pd.DataFrame | UsableRows, law: str | None = None, draws: int = 50) -> list[Fitted]:
    """Fit every law, or only `law` (a key of LAWS), to each group of a runs table. If the runs do not suffice, the
    result has a `problem` instead of a `law`.

    Groups of a law with the same problem are returned as one. draws: resamplings for the parameters' 90% intervals.

    Raises RecipeError for an unknown law, DataError for a table that cannot be used (see usable).
    """
    if law is not None and law not in LAWS:
        raise RecipeError(invalid("law", law, f"write the name of a law; {nearest(law, LAWS)}"), argument=True)
    fitted, rows = [], usable(table)
    for name in [law] if law else LAWS:
        groups = LAWS[name].view(rows)
        fitted += [_fitted(name, group, own, draws) for group, own in groups]
        if not groups:
            problem = f"needs {LAWS[name].takes}; there are no such runs"
            fitted.append(Fitted(name, {}, pd.DataFrame(), problem))
    return _without_repeats(fitted)


def _fitted(name: str, group: Mapping[str, float | None], table: pd.DataFrame, draws: int) -> Fitted:
    said: list[str] = []
    kind = LAWS[name]
    try:
        table = _thinned(_enough(kind, table, said), kind.rows)
        if kind.make is laws.OverfittingLaw:
            table = _without_npt(table, said)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            law = kind.make().fit(table)
            intervals = law.bootstrap(table, n=draws)
    except DataError as error:
        return Fitted(name, group, table, str(error), warnings=said)
    said += [
        str(warning.message)
        for warning in caught
        if issubclass(warning.category, LawWarning) and not issubclass(warning.category, IdentificationWarning)
    ]
    if law.unidentified_:
        said.append(
            f"these runs do not determine {some(law.unidentified_)}; judge the law by its predictions, or {law.remedy_}"
        )
    parameters = {key: Estimate(value, *intervals[key]) for key, value in law.params_.items()}
    score, holdout = Score(**law.score(table)), holdout_error(name, table)
    return Fitted(name, group, table, law=law, score=score, holdout=holdout, parameters=parameters, warnings=said)


def _without_npt(table: pd.DataFrame, said: list[str]) -> pd.DataFrame:
    """The rows for the overfitting law; without fraction 0, and with a note in `said`, if that fraction distorts the
    law for the others. The loss on text that a model never reads need not follow the law."""
    rest = table[table["fraction"] > 0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bent, alone = (laws.OverfittingLaw().fit(rows).score(rest)["mre"] for rows in (table, rest))
    except DataError:
        return table
    if alone > BENT * bent:
        return table
    said.append(
        f"left out fraction 0: with it the law is {100 * bent:.2f}% off at the other fractions, without it "
        f"{100 * alone:.2f}%"
    )
    return rest.reset_index(drop=True)


def _without_repeats(fitted: list[Fitted]) -> list[Fitted]:
    """The fits with groups of one law and problem merged into one group, which keeps their common properties."""
    kept: dict[Any, Fitted] = {}
    for i, one in enumerate(fitted):
        key = (one.law_name, one.problem) if one.problem else i
        if key in kept:
            first = kept[key]
            shared = {name: value for name, value in first.group.items() if one.group.get(name) == value}
            kept[key] = replace(first, group=shared, table=pd.concat([first.table, one.table], ignore_index=True))
        else:
            kept[key] = one
    return list(kept.values())


def _thinned(table: pd.DataFrame, rows: int | None) -> pd.DataFrame:
    if rows is not None and len(table) > rows:
        place = table.sort_values("tokens").groupby("run").cumcount()
        size = table.groupby("run")["run"].transform("size")
        kept = max(rows // table["run"].nunique(), 6)
        table = table[(place + 1) * kept // size > place * kept // size]
    if len(table) > MOST_ROWS:
        turn = table.sample(frac=1, random_state=0).groupby("run").cumcount()
        table = table.loc[turn.sort_values(kind="stable").index[:MOST_ROWS]].sort_index()
    return table.reset_index(drop=True)


def _enough(kind: Kind, table: pd.DataFrame, said: list[str]) -> pd.DataFrame:
    """The rows that can be fitted. Raises DataError, which names what is missing, if there are not enough."""
    _require_settings(kind, table)
    table = _whole_curves(kind, table, said)
    _require_settings(kind, table)
    return table


def _whole_curves(kind: Kind, table: pd.DataFrame, said: list[str]) -> pd.DataFrame:
    """The rows without curves that are too short, which a note in `said` names."""
    if not kind.curves:
        return table
    tokens = table[table["tokens"] > 0].groupby(kind.curves)["tokens"]
    short = (tokens.nunique() < kind.unknowns) | (tokens.size() <= kind.unknowns)
    if short.all():
        raise DataError(
            f"needs {kind.takes}; there are at most {tokens.size().max()}, at {tokens.nunique().max()} token counts"
        )
    if short.any():
        values = ", ".join(f"{value:g}" for value in short.index[short])
        said.append(f"left out {kind.curves} {values}: it has too few runs or evaluations")
    return table[(table["tokens"] == 0) | ~table[kind.curves].isin(short.index[short])]


def _require_settings(kind: Kind, table: pd.DataFrame) -> None:
    if not kind.differ:
        return
    later = table[table["tokens"] > 0] if "tokens" in table else table
    found = later[list(kind.differ)].drop_duplicates()
    first = found[kind.differ[0]]
    if len(found) < kind.settings or first.max() - first.min() < kind.apart - 1e-9:
        values = "; ".join(f"{name} {', '.join(map(amount, sorted(found[name].unique())))}" for name in kind.differ)
        raise DataError(f"needs {kind.takes}; the runs have {values}")


def holdout_error(name: str, table: pd.DataFrame) -> dict[str, Errors]:
    """The error of a law (a key of LAWS) on each part of its table, fitted to the rest.

    Parts without which the law cannot be fitted are left out of the result.
    """
    kind = LAWS[name]
    measured = {}
    for what, split in kind.splits.items():
        seen, predicted = [], []
        for left_out in split(table):
            try:
                loss, mean = _predicted(kind, table, left_out)
            except (DataError, RecipeError):
                continue
            seen.append(loss)
            predicted.append(mean)
        if seen:
            measured[what] = _errors(np.concatenate(seen), np.concatenate(predicted))
    return measured


def _predicted(kind: Kind, table: pd.DataFrame, left_out: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    law = kind.make()
    left_out = left_out & (table["tokens"] > 0) if "tokens" in table else left_out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = _enough(kind, table[~left_out], [])
        law.fit(kept)
        rest = table[left_out]
        if "fraction" in rest and kind.curves:
            rest = rest[rest["fraction"].isin(kept["fraction"])]
        if rest.empty:
            raise DataError("there are too few other runs of the fractions that were left out")
        for name in law.inputs:
            if kept[name].nunique() == 1 and (rest[name] != kept[name].iloc[0]).any():
                raise DataError(f"all other runs have one {name}, so they can't predict another")
        of = next(iter(law.outputs))
        mean = law.predict(**{name: rest[name].to_numpy(float) for name in law.inputs})
    return rest[of].to_numpy(float), np.atleast_1d(mean)


def _errors(seen: np.ndarray, predicted: np.ndarray) -> Errors:
    total = np.square(seen - seen.mean()).sum()
    r2 = float(1 - np.square(seen - predicted).sum() / total) if total else math.nan
    return Errors(float(np.abs(seen / predicted - 1).mean()), r2, len(seen))


def check_place(folder: Path) -> None:
    """Raises SptError if `write` would replace a file of others there."""
    check_folder(folder, "out")
    check_output(folder / "fits.json", "out", is_json_with("laws", "notes"))


def write(fits: Fits, folder: Path) -> None:
    """Write fits.json."""
    check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "fits.json", json.dumps(as_json(fits), indent=1, allow_nan=False))

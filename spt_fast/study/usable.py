"""The rows of a runs table that laws, comparisons and advice may use, as `UsableRows`.

failed runs, and losses that are not numbers   left out
runs whose mixture changes within a stage      left out, with all runs that started from them (SCPT): no law covers them
runs that differ only in optimizer fields      only the best setting is kept, by the same rule for every arm (see
                                               settings). Pretraining is judged by the best finetune after its largest
                                               budget if all runs of an arm have one, else by its own final loss
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from pandas.api.types import is_hashable

from spt_fast.errors import DataError, counted, invalid, some
from spt_fast.laws.columns import ALIKE, SHARE, check, require_columns
from spt_fast.study.settings import NUMBERS as SETTING_NUMBERS
from spt_fast.study.settings import beaten, in_words, settings_of, varied, with_settings

NUMBERS = (
    *("stage", "params", "seed", "lr", "anchor", "average", "tokens", "delta", "injected", "domain_tokens", "epochs"),
    *("pretrain_tokens", "pretrain_delta", "domain_train", "domain_heldout", "general_heldout", "domain_select"),
    *("domain_before", "general_before"),
    *(name for name in SETTING_NUMBERS if name not in ("lr", "clip")),
)
NEEDED = ("run", "after", "status", "start", "handed_on", *ALIKE, *NUMBERS)
TEXT = (
    *("run", "after", "status", "start", *ALIKE),
    "base",
    "optimizer",
    "grid",
    "other",
    "domain_text",
    "general_text",
)
IN_EVERY_ROW = ("run", "status")
IN_FINISHED_RUNS = ("stage", "params", "seed", "domain_tokens", "handed_on")
PRETRAINING = ["pretrain_tokens", "pretrain_delta"]
SHARES = ["delta", "injected", "pretrain_delta"]
STAGE = ["run", "stage"]
ARM = ["stage", "start", "base", "params", "domain_tokens", "anchor", "average", "delta", *PRETRAINING]
"""The columns that identify an arm; its runs differ by seed and, if searched, by optimizer fields."""

DIGITS = 9
"""Decimals that shares are rounded to: they are quotients of token counts, and laws distinguish arms by them."""


@dataclass(frozen=True)
class UsableRows:
    """A runs table, checked and divided by `usable`."""

    rows: pd.DataFrame
    left_out: pd.DataFrame
    """The other rows of finished runs. `beaten`: whether another setting is better, or was for their starting
    weights."""
    notes: list[str]
    """What was left out and why, a sentence each."""


def usable(table: pd.DataFrame | UsableRows) -> UsableRows:
    """The rows that laws may use; UsableRows are returned unchanged.

    Raises DataError for a table that lacks columns or values in them, holds shares above 1 or losses of 0, or mixes
    tokenizers or held-out texts.
    """
    if isinstance(table, UsableRows):
        return table
    table = _without_repeats(_check_columns(table))
    notes: list[str] = []
    failed = table["status"] != "done"
    if failed.any():
        notes.append(f"left out, because they failed: {some(table['run'][failed].unique())}")
    rows = table[~failed].reset_index(drop=True)
    rows = rows if "base" in rows else rows.assign(base=None)
    if rows.empty:
        raise DataError("runs: none of them is finished; train one, or give the folder of a finished run or study")
    for name in SHARES:
        check(name, rows[name].dropna().to_numpy(), SHARE, DataError)
    _check_alike(rows)
    notes += _other_texts(rows)
    for name in ("domain_heldout", "general_heldout"):
        if (nothing := rows[name] == 0).any():
            expected = f"a loss must be above 0 nats; leave out {some(rows['run'][nothing].unique())}"
            raise DataError(invalid(name, 0.0, expected))
        unknown = rows[name].isna()
        broken = unknown & ~unknown.groupby([rows[key] for key in STAGE]).transform("all")
        if broken.any():
            notes.append(
                f"left out, because {name} is not a number: {counted(int(broken.sum()), 'evaluation')} of "
                f"{some(rows['run'][broken].unique())}"
            )
    rows[SHARES] = rows[SHARES].round(DIGITS)
    unsteady = rows.groupby(STAGE)["delta"].transform("nunique") > 1
    rows, worse = rows.assign(late=unsteady), pd.Series(False, index=rows.index)
    orphaned = _descend(rows, unsteady)
    chosen: list[str] = []
    for stage in sorted(rows["stage"].unique()):
        among = (rows["stage"] == stage) & ~orphaned & (~unsteady if stage else True)
        beaten_here, kept = _other_setting(rows, among)
        worse |= beaten_here
        chosen += kept
        orphaned = _descend(rows, unsteady | worse)
    for which, why in (
        (unsteady, "the domain's share changes within a stage"),
        (worse, "another setting has the better mean domain_select over seeds"),
        (orphaned, "the pretraining that they started from is left out"),
    ):
        if which.any():
            notes.append(f"left out, because {why}: {some(rows['run'][which].unique())}")
    dropped = unsteady | worse | orphaned
    rows = rows.drop(columns="late").assign(beaten=worse | _descend(rows, worse))
    kept_rows, left_out = (rows[mask].reset_index(drop=True) for mask in (~dropped, dropped))
    return UsableRows(kept_rows.drop(columns="beaten"), left_out, notes + chosen)


def with_average(table: pd.DataFrame) -> pd.DataFrame:
    """A runs table with the column `average`, which tables of earlier versions lack."""
    return table.assign(average=table["average"].fillna(0.0) if "average" in table else 0.0)


def _check_columns(table: pd.DataFrame) -> pd.DataFrame:
    if not isinstance(table, pd.DataFrame):
        raise DataError(invalid("table", table, "give a pandas DataFrame, as read_table makes it"))
    given = table.columns
    table = with_settings(with_average(table)).assign(other=table.get("other", ""))
    require_columns(given, [name for name in NEEDED if name not in table], "the runs table")
    table = table.assign(**{name: numbers(table[name]).replace([np.inf, -np.inf], np.nan) for name in NUMBERS})
    done = table["status"] == "done"
    for name in (*IN_EVERY_ROW, *IN_FINISHED_RUNS):
        lacks = (table[name].isna() & (done | (name in IN_EVERY_ROW))).to_numpy()
        if lacks.any():
            raise DataError(
                f"{name} is missing in {lacks.sum()} of {len(table)} rows of the runs table (the first is row "
                f"{lacks.argmax()}); fill it in, or leave these rows out"
            )
    for name in (name for name in TEXT if name in table):
        if (wrong := _unhashable(table[name])).any():
            expected = "a column of the runs table holds text or numbers there"
            raise DataError(invalid(name, table[name][wrong].iloc[0], expected))
    other = table["handed_on"][done & ~table["handed_on"].isin([True, False])]
    if len(other):
        raise DataError(invalid("handed_on", other.iloc[0], "a row of the runs table has True or False there"))
    return table.assign(handed_on=table["handed_on"].astype(bool))


def _without_repeats(table: pd.DataFrame) -> pd.DataFrame:
    """The table without rows that are there twice. Other columns than ours may hold lists or dicts, which are not
    compared."""
    compared = [not any(_unhashable(column)) for _, column in table.items()]
    return table[~table.loc[:, compared].duplicated()].reset_index(drop=True)


def _unhashable(column: pd.Series) -> pd.Series:
    """Whether each value is a list, a dict or the like."""
    return ~column.map(is_hashable) if column.dtype == object else pd.Series(False, index=column.index)


def numbers(column: pd.Series) -> pd.Series:
    """The column as floats; DataError if it holds text."""
    try:
        return pd.to_numeric(column).astype(float)
    except (TypeError, ValueError) as error:
        raise DataError(invalid(str(column.name), str(error), "a column of the runs table must hold numbers")) from None


def _check_alike(rows: pd.DataFrame) -> None:
    """Raises DataError if runs differ in tokenizer, or within a stage in held-out text."""
    for name, part in (("tokenizer", rows), *(("heldout", own) for _, own in rows.groupby("stage"))):
        one = part.drop_duplicates(name)
        if len(one) > 1:
            (first, ours), (second, theirs) = one[["run", name]].astype(str).to_numpy()[:2].tolist()
            raise DataError(
                f"{first} and {second} differ in {name} ({ours} and {theirs}), so their losses are not comparable; "
                "give the runs of one study at a time"
            )


def _other_texts(rows: pd.DataFrame) -> list[str]:
    """Notes on runs that count as equal but were trained on different texts, as far as the table records them."""
    notes = []
    for column, alike in (("domain_text", ["domain_tokens"]), ("general_text", []), ("base", ["params"])):
        if column not in rows:
            continue
        of_stage = [rows["stage"] > 0, *(rows[name] for name in alike)]
        several = rows.groupby(of_stage)[column].transform("nunique") > 1
        if several.any():
            text = "base" if column == "base" else column.replace("_", " training ")
            notes.append(
                f"different {text}, so their losses may differ for that reason: {some(rows['run'][several].unique())}"
            )
    return notes


def _other_setting(rows: pd.DataFrame, among: pd.Series) -> tuple[pd.Series, list[str]]:
    """Whether each of the rows `among`, of one stage, belongs to a setting that another one of its arm beats; and notes
    on the choice."""
    ends = rows[among].sort_values(["handed_on", "tokens"]).groupby(STAGE).tail(1)
    length = rows.groupby(STAGE)["tokens"].max().loc[pd.MultiIndex.from_frame(ends[STAGE])].to_numpy()
    stopped_early = (ends["tokens"] < length).groupby([ends[key] for key in ARM], dropna=False).transform("any")
    ends = ends.assign(budget=np.where(stopped_early, 0, length))
    arm = [*ARM, "budget", "late"]
    ends = ends.assign(judged=_judged(rows, ends, arm))
    is_worse = beaten(ends, arm, by="judged")
    worse = ends[is_worse]
    found = among & pd.MultiIndex.from_frame(rows[STAGE]).isin(pd.MultiIndex.from_frame(worse[STAGE]))
    return found, _kept(ends, is_worse, arm)


def _judged(rows: pd.DataFrame, ends: pd.DataFrame, arm: list[str]) -> pd.Series:
    """The loss on the select half by which an arm's settings are judged: for pretraining that of the best finetune
    after it, if all runs of the arm have one, else its own final one."""
    tunes = rows[(rows["stage"] == 1) & rows["handed_on"] & (rows["start"] == "pretrained")]
    best = tunes.groupby(["after", "pretrain_tokens"])["domain_select"].min()
    after = pd.Series(best.reindex(pd.MultiIndex.from_frame(ends[["run", "tokens"]])).to_numpy(), index=ends.index)
    after = after.where(ends["stage"] == 0)
    all_have = after.notna().groupby([ends[key] for key in arm], dropna=False).transform("all")
    return after.where(all_have, ends["domain_select"])


def _kept(ends: pd.DataFrame, is_worse: pd.Series, arm: list[str]) -> list[str]:
    """A sentence on the kept settings, if there are several."""
    searched = is_worse.groupby([ends[key] for key in arm], dropna=False).transform("any")
    tried = settings_of(ends[searched])
    columns = varied(tried)
    if not columns:
        return []
    names = tried.apply(lambda setting: in_words(setting, columns), axis=1)
    arms = ends[searched].assign(setting=names, kept=~is_worse[searched])
    best = arms[arms["kept"]].groupby("setting", sort=False)["delta"].unique()
    of = "; ".join(f"{name} (delta {', '.join(f'{d:g}' for d in sorted(deltas))})" for name, deltas in best.items())
    what = "adaptation" if arms["stage"].iloc[0] else "pretraining"
    return [f"of {names.nunique()} settings of the optimizer in {what}, the best of each arm is kept: {of}"]


def _descend(rows: pd.DataFrame, dropped: pd.Series) -> pd.Series:
    """Whether each row belongs to a stage that started, directly or through others, from the weights of a dropped
    one."""
    found = pd.Series(False, index=rows.index)
    while True:
        gone = set(rows["run"][dropped | found])
        later = rows["after"].isin(gone) & (rows["stage"] > 0) & ~dropped
        if (later == found).all():
            return found
        found = later

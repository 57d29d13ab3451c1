"""The rows of a runs table that laws, comparisons and advice may take. Made once; everything after takes `UsableRows`.

failed runs, and losses that are not numbers      left out
runs whose mixture changes within a stage         left out, and what was trained from them (SCPT): no law has a
                                                  term for it
runs that differ in their learning rate only      the best rate is kept, the same rule for every arm; see finetunes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from spt_fast.errors import DataError, invalid, some
from spt_fast.laws.columns import ALIKE, SHARE, check, require_columns
from spt_fast.study.finetunes import beaten

NUMBERS = (
    *("stage", "params", "seed", "lr", "anchor", "average", "tokens", "delta", "injected", "domain_tokens", "epochs"),
    *("pretrain_tokens", "pretrain_delta", "domain_train", "domain_heldout", "general_heldout", "domain_select"),
    *("domain_before", "general_before"),
)
NEEDED = ("run", "after", "status", "start", "handed_on", *ALIKE, *NUMBERS)
PRETRAINING = ["pretrain_tokens", "pretrain_delta"]
SHARES = ["delta", "injected", "pretrain_delta"]
STAGE = ["run", "stage"]
ARM = ["stage", "start", "base", "params", "domain_tokens", "anchor", "average", "delta", *PRETRAINING]
"""What runs of one arm share; they differ by seed and, where it is searched, by learning rate."""

DIGITS = 9
"""Decimals of shares: they are quotients of token counts, and laws tell arms by them."""


@dataclass(frozen=True)
class UsableRows:
    """What `usable` makes of a runs table."""

    rows: pd.DataFrame
    left_out: pd.DataFrame
    """The other rows of runs that are done."""
    notes: list[str]
    """What was left out and why, a sentence each."""


def usable(table: pd.DataFrame | UsableRows) -> UsableRows:
    """The rows that laws may take; what is usable already stays as it is.

    Raises DataError for a table that lacks columns, holds shares above 1, or mixes tokenizers or held-out texts.
    """
    if isinstance(table, UsableRows):
        return table
    table = _check_columns(table)
    notes: list[str] = []
    failed = table["status"] != "done"
    if failed.any():
        notes.append(f"left out, as they failed: {some(table['run'][failed].unique())}")
    rows = table[~failed].reset_index(drop=True)
    rows = rows if "base" in rows else rows.assign(base=None)
    if rows.empty:
        raise DataError("the runs table has no finished run; train some first")
    rows = rows.assign(**{name: _numbers(rows[name]) for name in NUMBERS}, handed_on=rows["handed_on"].astype(bool))
    for name in SHARES:
        check(name, rows[name].dropna().to_numpy(), SHARE, DataError)
    _check_alike(rows)
    notes += _other_texts(rows)
    for name in ("domain_heldout", "general_heldout"):
        unknown = rows[name].isna()
        broken = unknown & ~unknown.groupby([rows[key] for key in STAGE]).transform("all")
        if broken.any():
            notes.append(
                f"left out, as {name} is not a number: {broken.sum()} evaluations of "
                f"{some(rows['run'][broken].unique())}"
            )
    rows[SHARES] = rows[SHARES].round(DIGITS)
    unsteady = rows.groupby(STAGE)["delta"].transform("nunique") > 1
    other_rate = _other_rate(rows, rows["stage"] == 0)
    orphaned = _descend(rows, unsteady | other_rate)
    other_rate |= _other_rate(rows, (rows["stage"] > 0) & ~unsteady & ~orphaned)
    for which, why in (
        (unsteady, "the domain's share changes within a stage"),
        (other_rate, "another learning rate has the better mean domain_select over seeds"),
        (orphaned, "the pretraining that they began with is"),
    ):
        if which.any():
            notes.append(f"left out, as {why}: {some(rows['run'][which].unique())}")
    dropped = unsteady | other_rate | orphaned
    return UsableRows(rows[~dropped].reset_index(drop=True), rows[dropped].reset_index(drop=True), notes)


def with_average(table: pd.DataFrame) -> pd.DataFrame:
    """A runs table with the column `average`, which those of earlier versions lack."""
    return table.assign(average=table["average"].fillna(0.0) if "average" in table else 0.0)


def _check_columns(table: pd.DataFrame) -> pd.DataFrame:
    if not isinstance(table, pd.DataFrame):
        raise DataError(invalid("table", table, "give a pandas DataFrame, as read_table makes it"))
    table = with_average(table)
    require_columns(table, NEEDED, "the runs table")
    return table


def _numbers(column: pd.Series) -> pd.Series:
    """As floats; what is infinite is NaN."""
    try:
        return pd.to_numeric(column).astype(float).replace([np.inf, -np.inf], np.nan)
    except (TypeError, ValueError) as error:
        raise DataError(invalid(str(column.name), str(error), "a column of the runs table must hold numbers")) from None


def _check_alike(rows: pd.DataFrame) -> None:
    """The tokenizer is one for all; pretraining and adaptation may be evaluated on texts of their own."""
    adapted = rows["stage"] > 0
    for name, part in (("tokenizer", rows), ("heldout", rows[~adapted]), ("heldout", rows[adapted])):
        one = part.drop_duplicates(name)
        if len(one) > 1:
            (first, ours), (second, theirs) = one[["run", name]].astype(str).to_numpy()[:2].tolist()
            raise DataError(
                f"{first} and {second} differ in {name} ({ours} and {theirs}), so their losses are not comparable; "
                "give the runs of one study at a time"
            )


def _other_texts(rows: pd.DataFrame) -> list[str]:
    """Notes where runs that count as alike were trained on different texts, as far as the table knows."""
    notes = []
    for column, alike in (("domain_text", ["domain_tokens"]), ("general_text", []), ("base", ["params"])):
        if column not in rows:
            continue
        of_stage = [rows["stage"] > 0, *(rows[name] for name in alike)]
        several = rows.groupby(of_stage)[column].transform("nunique") > 1
        if several.any():
            text = "base" if column == "base" else column.replace("_", " training ")
            notes.append(
                f"not of one {text}, so that their losses may differ for that reason: "
                f"{some(rows['run'][several].unique())}"
            )
    return notes


def _other_rate(rows: pd.DataFrame, among: pd.Series) -> pd.Series:
    """Which of these rows are of runs that the same arm beats with another learning rate."""
    ends = rows[among].sort_values(["handed_on", "tokens"]).groupby(STAGE).tail(1)
    length = rows.groupby(STAGE)["tokens"].max().loc[pd.MultiIndex.from_frame(ends[STAGE])].to_numpy()
    stopped_early = (ends["tokens"] < length).groupby([ends[key] for key in ARM], dropna=False).transform("any")
    ends = ends.assign(budget=np.where(stopped_early, 0, length))
    worse = ends[beaten(ends, [*ARM, "budget"])]
    return among & pd.MultiIndex.from_frame(rows[STAGE]).isin(pd.MultiIndex.from_frame(worse[STAGE]))


def _descend(rows: pd.DataFrame, dropped: pd.Series) -> pd.Series:
    """Which rows are of stages that began, themselves or through others, with the weights of a dropped one."""
    found = pd.Series(False, index=rows.index)
    while True:
        gone = set(rows["run"][dropped | found])
        later = rows["after"].isin(gone) & (rows["stage"] > 0) & ~dropped
        if (later == found).all():
            return found
        found = later

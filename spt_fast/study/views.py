"""The runs table, seen by each law: which rows it takes, in which groups, under which names.

A view returns groups, (what all runs of the group have in common, a DataFrame with the law's columns). Every view takes
what `usable` leaves of the table:

    failed runs, and losses that are not numbers      left out
    runs whose mixture changes within a stage         left out, and what was trained from them (SCPT): no law has a
                                                      term for it
    runs that differ in their learning rate only      the rate with the lowest mean `domain_select` over seeds is kept,
                                                      the same rule for every arm

What is left out is said: `usable` returns it as notes.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pandas as pd

from spt_fast.errors import DataError, nearest
from spt_fast.laws.table import ALIKE, SHARE, check

Group = tuple[dict[str, Any], pd.DataFrame]
"""A value of None: unknown, as the pretraining of foreign weights is."""

NUMBERS = (
    *("stage", "params", "seed", "lr", "anchor", "tokens", "delta", "injected", "domain_tokens", "epochs"),
    *("pretrain_tokens", "pretrain_delta", "domain_train", "domain_heldout", "general_heldout", "domain_select"),
    *("domain_before", "general_before"),
)
NEEDED = ("run", "after", "status", "start", "handed_on", *ALIKE, *NUMBERS)
SHARES = ("delta", "injected", "pretrain_delta")
STAGE = ["run", "stage"]
ARM = ["stage", "start", "params", "domain_tokens", "anchor", "delta", "pretrain_tokens", "pretrain_delta"]
"""What runs of one arm share; they differ by seed and, where it is searched, by learning rate."""

DIGITS = 9
"""Decimals of shares: they are quotients of token counts, and laws tell arms by them."""
SETTLED = 0.2
"""Of a run's tokens: what is measured before is of the first steep fall, which no power law describes. The paper's own
curves begin at 40B of 200B."""
WHOLE_CORPUS = 0.95
"""Epochs from which a finetune has read its corpus, but for what rounding to whole steps leaves."""


# ------------------------------------------------------------------------------------------------------- what is used


def usable(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows that laws may take, and what was left out and why.

    Raises DataError for a table that lacks columns, holds shares above 1, or mixes tokenizers or held-out texts.
    """
    _check_columns(table)
    notes: list[str] = []
    failed = table["status"] != "done"
    if failed.any():
        notes.append(f"left out, as they failed: {_listed(table['run'][failed])}")
    rows = table[~failed].reset_index(drop=True)
    if rows.empty:
        raise DataError("the runs table has no finished run; fit it once the study has trained some")
    rows = rows.assign(**{name: _numbers(rows[name]) for name in NUMBERS}, handed_on=rows["handed_on"].astype(bool))
    for name in SHARES:
        check(f"{name} in the runs table", rows[name].dropna().to_numpy(), SHARE, DataError)
    _check_alike(rows)
    for name in ("domain_heldout", "general_heldout"):
        unknown = rows[name].isna()
        broken = unknown & ~unknown.groupby([rows[key] for key in STAGE]).transform("all")
        if broken.any():
            notes.append(
                f"left out, as {name} is not a number: {broken.sum()} evaluations of {_listed(rows['run'][broken])}"
            )
    rows[list(SHARES)] = rows[list(SHARES)].round(DIGITS)
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
            notes.append(f"left out, as {why}: {_listed(rows['run'][which])}")
    return rows[~(unsteady | other_rate | orphaned)].reset_index(drop=True), notes


def _check_columns(table: pd.DataFrame) -> None:
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"a runs table is a pandas DataFrame, as read_table makes it; got {type(table).__name__}")
    for name in NEEDED:
        if name not in table:
            raise DataError(f"the runs table has no column {name!r}; {nearest(name, map(str, table.columns))}")


def _numbers(column: pd.Series) -> pd.Series:
    """As floats; what is infinite is NaN."""
    try:
        return pd.to_numeric(column).astype(float).replace([np.inf, -np.inf], np.nan)
    except (TypeError, ValueError) as error:
        raise DataError(f"column {column.name!r} of the runs table must hold numbers ({error})") from None


def _check_alike(rows: pd.DataFrame) -> None:
    """The tokenizer is one for all; pretraining and adaptation may be evaluated on texts of their own."""
    adapted = rows["stage"] > 0
    for name, part in (("tokenizer", rows), ("heldout", rows[~adapted]), ("heldout", rows[adapted])):
        one = part.drop_duplicates(name)
        if len(one) > 1:
            (first, ours), (second, theirs) = one[["run", name]].astype(str).to_numpy()[:2].tolist()
            raise DataError(
                f"{first} and {second} differ in {name} ({ours} and {theirs}), and so their losses are not comparable; "
                "give the runs of one study at a time"
            )


def _other_rate(rows: pd.DataFrame, among: pd.Series) -> pd.Series:
    """Which of these rows are of runs that the same arm beats with another learning rate. Where no seed has more than
    one, each phase's own grid has chosen already, maybe another for each seed."""
    ends = rows[among].sort_values(["handed_on", "tokens"]).groupby(STAGE).tail(1)
    length = rows.groupby(STAGE)["tokens"].max().loc[pd.MultiIndex.from_frame(ends[STAGE])].to_numpy()
    stopped_early = (ends["tokens"] < length).groupby([ends[key] for key in ARM], dropna=False).transform("any")
    ends = ends.assign(budget=np.where(stopped_early, 0, length))
    arm = [*ARM, "budget"]
    rates = ends.groupby([*arm, "seed"], dropna=False)["lr"].transform("nunique")
    ends = ends[rates.groupby([ends[key] for key in arm], dropna=False).transform("max") > 1]
    means = ends.groupby([*arm, "lr"], dropna=False)["domain_select"].mean().fillna(np.inf).reset_index()
    best = means.sort_values("domain_select").drop_duplicates(arm)
    kept = ends.merge(best[[*arm, "lr"]], on=[*arm, "lr"])
    beaten = ends[~pd.MultiIndex.from_frame(ends[STAGE]).isin(pd.MultiIndex.from_frame(kept[STAGE]))]
    return among & pd.MultiIndex.from_frame(rows[STAGE]).isin(pd.MultiIndex.from_frame(beaten[STAGE]))


def _descend(rows: pd.DataFrame, dropped: pd.Series) -> pd.Series:
    """Which rows are of stages that began, themselves or through others, with the weights of a dropped one."""
    found = pd.Series(False, index=rows.index)
    while True:
        gone = set(rows["run"][dropped | found])
        later = rows["after"].isin(gone) & (rows["stage"] > 0) & ~dropped
        if (later == found).all():
            return found
        found = later


def _listed(runs: pd.Series, most: int = 3) -> str:
    names = runs.drop_duplicates().tolist()
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -------------------------------------------------------------------------------------------------------- pretraining


def overfitting(table: pd.DataFrame) -> list[Group]:
    """For OverfittingLaw: the curves of pretraining from scratch on mixtures once they are `SETTLED`, per model size
    and domain corpus. Runs without domain text belong to every corpus."""
    rows = _known(_pretraining(table), "domain_heldout")
    rows = rows[rows["tokens"] >= SETTLED * rows.groupby("run")["tokens"].transform("max")]
    rows = rows[(rows["delta"] == 0) | rows["domain_train"].notna() & (rows["delta"] < 1)]
    frame = _named(
        rows,
        tokens=rows["tokens"],
        fraction=rows["delta"],
        train_loss=rows["domain_train"].where(rows["delta"] > 0),
        heldout_loss=rows["domain_heldout"],
        params=rows["params"],
        domain_tokens=rows["domain_tokens"],
        seed=rows["seed"],
    )
    groups = []
    for group, _ in _grouped(frame[frame["fraction"] > 0], "params", "domain_tokens"):
        own = (frame["domain_tokens"] == group["domain_tokens"]) | (frame["fraction"] == 0)
        members = frame[own & (frame["params"] == group["params"])]
        groups.append((group, members.drop_duplicates(["fraction", "seed", "tokens", "heldout_loss"])))
    return groups


def chinchilla(table: pd.DataFrame, of: Literal["domain", "general"] = "general") -> list[Group]:
    """For ChinchillaLaw: pretraining at two sizes or more, per domain share (and corpus, for the domain loss)."""
    rows = _known(_pretraining(table), f"{of}_heldout")
    if of == "general":
        rows = rows[rows["delta"] < 1]
    frame = _named(
        rows,
        params=rows["params"],
        tokens=rows["tokens"],
        loss=rows[f"{of}_heldout"],
        delta=rows["delta"],
        domain_tokens=rows["domain_tokens"],
    )
    by = ("delta",) if of == "general" else ("delta", "domain_tokens")
    return [(group, members) for group, members in _grouped(frame, *by) if members["params"].nunique() > 1]


def data_constrained(table: pd.DataFrame) -> list[Group]:
    """For DataConstrainedLaw: pretraining on the domain corpus alone, where the unique tokens are known."""
    rows = _known(_pretraining(table), "domain_heldout")
    rows = rows[rows["delta"] == 1]
    frame = _named(
        rows,
        params=rows["params"],
        tokens=rows["tokens"],
        unique_tokens=rows["domain_tokens"],
        loss=rows["domain_heldout"],
    )
    return [({}, frame)] if len(frame) else []


def _pretraining(table: pd.DataFrame) -> pd.DataFrame:
    rows, _ = usable(table)
    return rows[(rows["stage"] == 0) & (rows["start"] == "scratch") & (rows["tokens"] > 0)]


# --------------------------------------------------------------------------------------------------------- adaptation


def after_pretraining(rows: pd.DataFrame) -> pd.DataFrame:
    """What finetunes, mostly on the domain, handed on after pretraining of a known mixture."""
    kept = rows["handed_on"].astype(bool) & (rows["stage"] > 0) & (rows["start"] == "pretrained")
    kept &= (rows["injected"] < 0.5) & (rows["pretrain_tokens"] > 0) & rows["pretrain_delta"].notna()
    return rows[kept]


def post_finetuning(table: pd.DataFrame) -> list[Group]:
    """For PostFinetuneLaw: finetunes on domain text alone, by the pretraining they began with, per model size and
    domain corpus."""
    rows = _known(_handed_on(table), "domain_heldout", "domain_before", "pretrain_delta")
    rows = rows[(rows["stage"] == 1) & (rows["injected"] == 0) & (rows["pretrain_tokens"] > 0)]
    frame = _named(
        rows,
        tokens=rows["pretrain_tokens"],
        fraction=rows["pretrain_delta"],
        heldout_loss=rows["domain_before"],
        finetuned_loss=rows["domain_heldout"],
        params=rows["params"],
        domain_tokens=rows["domain_tokens"],
    )
    return _grouped(frame, "params", "domain_tokens")


def forgetting(table: pd.DataFrame) -> list[Group]:
    """For ForgettingLaw: the general loss of finetunes that have read their corpus, per pretraining; of all pretraining
    shares the smallest, which is no domain text where there are such runs."""
    rows = _known(_finetunes(table), "general_heldout", "general_before")
    frame = _named(
        rows,
        params=rows["params"],
        unique_tokens=rows["domain_tokens"],
        injected=rows["injected"],
        loss_before=rows["general_before"],
        loss=rows["general_heldout"],
        pretrain_delta=rows["pretrain_delta"],
        pretrain_tokens=rows["pretrain_tokens"],
    )
    return _grouped(frame, "pretrain_delta", "pretrain_tokens")


def finetuning(table: pd.DataFrame) -> list[Group]:
    """For FinetuneLaw: the domain loss of the same finetunes, with the smallest share of general text only."""
    rows = _known(_finetunes(table), "domain_heldout")
    frame = _named(
        rows,
        params=rows["params"],
        unique_tokens=rows["domain_tokens"],
        loss=rows["domain_heldout"],
        injected=rows["injected"],
        pretrain_delta=rows["pretrain_delta"],
        pretrain_tokens=rows["pretrain_tokens"],
    )
    groups = _grouped(frame, "pretrain_delta", "pretrain_tokens")
    return [(group, members[members["injected"] == members["injected"].min()]) for group, members in groups]


def dcpt(table: pd.DataFrame, of: Literal["domain", "general"]) -> list[Group]:
    """For DCPTLaw: the curves of continued pretraining, up to the weights that are handed on, per pretraining and
    domain corpus."""
    rows = _known(_continued(table), f"{of}_heldout")
    rows = rows[rows["tokens"] > 0]
    frame = _named(
        rows,
        params=rows["params"],
        tokens=rows["tokens"],
        own_ratio=rows["delta" if of == "domain" else "injected"],
        loss=rows[f"{of}_heldout"],
        **{key: rows[key] for key in CONTINUED},
    )
    return _grouped(frame, *CONTINUED)


def cmr(table: pd.DataFrame) -> list[Group]:
    """For CMRLaw: the same curves of both losses, per model size too. Losses are a run's increments from its own start
    on top of the mean start, which is the row at tokens = 0."""
    losses = ("general", "domain")
    rows = _known(_continued(table), *(f"{of}_{at}" for of in losses for at in ("heldout", "before")))
    rows = rows[rows["tokens"] > 0]
    groups = []
    for group, members in _grouped(rows, "params", *CONTINUED):
        start = {of: members[f"{of}_before"].mean() for of in losses}
        frame = _named(
            members,
            tokens=members["tokens"],
            domain_ratio=members["delta"],
            **{f"{of}_loss": members[f"{of}_heldout"] - members[f"{of}_before"] + start[of] for of in losses},
        )
        first = frame.iloc[:1].assign(run="start", tokens=0.0, **{f"{of}_loss": loss for of, loss in start.items()})
        groups.append((group, pd.concat([first, frame], ignore_index=True)))
    return groups


CONTINUED = ("domain_tokens", "pretrain_delta", "pretrain_tokens")


def _adapted(table: pd.DataFrame) -> pd.DataFrame:
    """All evaluations of stages that went on from a whole model, without an anchor."""
    rows, _ = usable(table)
    return rows[(rows["stage"] >= 1) & (rows["start"] == "pretrained") & (rows["anchor"] == 0)]


def _handed_on(table: pd.DataFrame) -> pd.DataFrame:
    rows = _adapted(table)
    return rows[rows["handed_on"]]


def _finetunes(table: pd.DataFrame) -> pd.DataFrame:
    rows = _handed_on(table)
    return _least_specialized(rows[(rows["delta"] > 0) & (rows["epochs"] >= WHOLE_CORPUS)])


def _continued(table: pd.DataFrame) -> pd.DataFrame:
    rows = _adapted(table)
    until = rows["tokens"].where(rows["handed_on"]).groupby([rows[key] for key in STAGE]).transform("max")
    return _least_specialized(rows[rows["tokens"] <= until])


def _least_specialized(rows: pd.DataFrame) -> pd.DataFrame:
    """Those whose pretraining had the smallest domain share of all; and those where it is unknown."""
    share = rows["pretrain_delta"]
    return rows[share.isna() | (share == share.min())]


def _known(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    return rows.dropna(subset=list(columns))


def _named(rows: pd.DataFrame, **columns: pd.Series) -> pd.DataFrame:
    return pd.DataFrame({name: rows[name] for name in ("run", *ALIKE)} | columns).reset_index(drop=True)


def _grouped(frame: pd.DataFrame, *by: str) -> list[Group]:
    return [
        ({name: _plain(value) for name, value in zip(by, values, strict=True)}, members.reset_index(drop=True))
        for values, members in frame.groupby(list(by), dropna=False)
    ]


def _plain(value: float) -> float | int | None:
    if math.isnan(value):
        return None
    return int(value) if float(value).is_integer() else float(value)

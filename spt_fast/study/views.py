"""The usable rows of a runs table in the form of each law: its rows and columns, in groups that are fitted separately.

A view returns groups: (the properties that the group's runs share, a DataFrame with the law's columns).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pandas as pd

from spt_fast.laws.columns import ALIKE
from spt_fast.study.finetunes import SIZES
from spt_fast.study.usable import STAGE, UsableRows
from spt_fast.train.lr import PLATEAU

Group = tuple[dict[str, Any], pd.DataFrame]
"""None stands for unknown, such as the pretraining of a base."""

SETTLED = 0.2
"""The share of a run's tokens before which measurements are left out: no power law describes the first steep fall. The
paper's own curves begin at 40B of 200B."""
START = "start"
"""The `run` of a row that is the common start of all runs and belongs to none."""
PRETRAINING = ("pretrain_delta", "pretrain_tokens")
CONTINUED = ("domain_tokens", *PRETRAINING)
FEWEST_LENGTHS = 4
"""Lengths of finished runs from which a law of curves needs no others: one more than a power law with a floor has
unknowns."""
WHOLE_CORPUS = 0.95
"""Epochs from which a finetune counts as having read its corpus; less than 1, since runs have whole steps."""


# -------------------------------------------------------------------------------------------------------- pretraining


def overfitting(table: UsableRows) -> list[Group]:
    """For OverfittingLaw: pretraining curves from scratch, after `SETTLED` (or `_ends`), per model size and domain
    corpus. Runs without domain text belong to every corpus."""
    rows = _known(_pretraining(table), "domain_heldout")
    rows = rows[rows["tokens"] >= SETTLED * rows.groupby("run")["tokens"].transform("max")]
    rows = rows[(rows["delta"] == 0) | rows["domain_train"].notna() & (rows["delta"] < 1)]
    same = ("params", "domain_tokens", "seed", "tokens", "finished")
    frame = _named(rows, *same, fraction="delta", train_loss="domain_train", heldout_loss="domain_heldout")
    frame["train_loss"] = frame["train_loss"].where(frame["fraction"] > 0)
    groups = []
    for group, _ in _grouped(frame[frame["fraction"] > 0], *SIZES):
        own = (frame["domain_tokens"] == group["domain_tokens"]) | (frame["fraction"] == 0)
        members = frame[own & (frame["params"] == group["params"])]
        members = members.drop_duplicates(["fraction", "seed", "tokens", "heldout_loss"])
        groups.append((group, _ends(members, "fraction")))
    return groups


def mixture_repetition(table: UsableRows) -> list[Group]:
    """For MixtureRepetitionLaw: held-out losses of the curves of `overfitting`, if the unique tokens are known."""
    groups = []
    for group, rows in overfitting(table):
        named = rows.rename(columns={"heldout_loss": "loss"}).drop(columns="train_loss")
        groups += [(group, named.assign(unique_tokens=group["domain_tokens"]))] if group["domain_tokens"] else []
    return groups


def chinchilla(table: UsableRows, of: Literal["domain", "general"] = "general") -> list[Group]:
    """For ChinchillaLaw: losses of finished pretraining at two model sizes or more, per domain share (and for the
    domain loss per corpus)."""
    rows = _pretraining(table)
    rows = _known(rows[rows["finished"]], f"{of}_heldout")
    if of == "general":
        rows = rows[rows["delta"] < 1]
    frame = _named(rows, "params", "tokens", "delta", "domain_tokens", loss=f"{of}_heldout")
    by = ("delta",) if of == "general" else ("delta", "domain_tokens")
    return [(group, members) for group, members in _grouped(frame, *by) if members["params"].nunique() > 1]


def data_constrained(table: UsableRows) -> list[Group]:
    """For DataConstrainedLaw: losses of finished pretraining on the domain corpus alone, if the unique tokens are
    known."""
    rows = _pretraining(table)
    rows = _known(rows[rows["finished"]], "domain_heldout")
    rows = rows[rows["delta"] == 1]
    frame = _named(rows, "params", "tokens", unique_tokens="domain_tokens", loss="domain_heldout")
    return [({}, frame)] if len(frame) else []


def _pretraining(table: UsableRows) -> pd.DataFrame:
    rows = _with_finished(table)
    return rows[(rows["stage"] == 0) & (rows["start"] == "scratch") & (rows["tokens"] > 0)]


def _with_finished(table: UsableRows) -> pd.DataFrame:
    """The rows with the column `finished`: whether the loss is that of a run that ends there, as at final weights, and
    all along runs whose rate is still near its peak at these and, if they are not the last, after them. While a rate
    falls, the loss is above that of a run that ends there. Tables of earlier versions lack the rate; of those, runs
    with several budgets count, since studies have them at a plateau only."""
    rows = table.rows
    stage = [rows[name] for name in STAGE]
    ends = rows["tokens"].where(rows["handed_on"])
    end = ends.groupby(stage).transform("max")
    rate = rows["rate"] if "rate" in rows else pd.Series(math.nan, index=rows.index)
    at_end = rate.where(rows["tokens"] >= end).groupby(stage).transform("min")
    several = rows["handed_on"].groupby(stage).transform("sum") > 1
    return rows.assign(finished=(ends == end) | (at_end >= PLATEAU) | (at_end.isna() & several))


def _ends(frame: pd.DataFrame, *arm: str) -> pd.DataFrame:
    """The rows whose column `finished` is true, if every arm has them at FEWEST_LENGTHS or more; else all."""
    lengths = frame["tokens"].where(frame["finished"]).groupby([frame[name] for name in arm]).nunique()
    kept = frame[frame["finished"]] if (lengths >= FEWEST_LENGTHS).all() else frame
    return kept.drop(columns="finished").reset_index(drop=True)


# --------------------------------------------------------------------------------------------------------- adaptation


def post_finetuning(table: UsableRows) -> list[Group]:
    """For PostFinetuneLaw: finetunes on domain text alone with the budget and share of their pretraining, per model
    size and domain corpus."""
    rows = _known(_handed_on(table), "domain_heldout", "domain_before", "pretrain_delta")
    rows = rows[(rows["stage"] == 1) & (rows["injected"] == 0) & (rows["pretrain_tokens"] > 0)]
    losses = {"heldout_loss": "domain_before", "finetuned_loss": "domain_heldout"}
    frame = _named(rows, *SIZES, tokens="pretrain_tokens", fraction="pretrain_delta", **losses)
    return _grouped(frame, *SIZES)


def forgetting(table: UsableRows) -> list[Group]:
    """For ForgettingLaw: the general loss of finetunes that have read their corpus, per pretraining; only those with
    the smallest domain share of pretraining, which is 0 if it was run."""
    rows = _known(_finetunes(table), "general_heldout", "general_before")
    columns = {"unique_tokens": "domain_tokens", "loss_before": "general_before", "loss": "general_heldout"}
    return _grouped(_named(rows, "params", "injected", *PRETRAINING, **columns), *PRETRAINING)


def finetuning(table: UsableRows) -> list[Group]:
    """For FinetuneLaw: the domain loss of the finetunes of `forgetting` with the smallest share of general text."""
    rows = _known(_finetunes(table), "domain_heldout")
    columns = {"unique_tokens": "domain_tokens", "loss": "domain_heldout"}
    groups = _grouped(_named(rows, "params", "injected", *PRETRAINING, **columns), *PRETRAINING)
    return [(group, members[members["injected"] == members["injected"].min()]) for group, members in groups]


def dcpt(table: UsableRows, of: Literal["domain", "general"]) -> list[Group]:
    """For DCPTLaw: curves of continued pretraining up to the final weights (or `_ends`), per pretraining and domain
    corpus."""
    rows = _known(_continued(table), f"{of}_heldout")
    rows = rows[rows["tokens"] > 0]
    columns = {"own_ratio": "delta" if of == "domain" else "injected", "loss": f"{of}_heldout"}
    frame = _named(rows, "params", "tokens", "finished", *CONTINUED, **columns)
    return [(group, _ends(members, "params", "own_ratio")) for group, members in _grouped(frame, *CONTINUED)]


def cmr(table: UsableRows) -> list[Group]:
    """For CMRLaw: the curves of `dcpt` with both losses, also per model size. Losses are a run's changes from its
    start, added to the mean start, which is the row at tokens = 0."""
    losses = ("general", "domain")
    rows = _known(_continued(table), *(f"{of}_{at}" for of in losses for at in ("heldout", "before")))
    rows = rows[rows["tokens"] > 0]
    groups = []
    for group, members in _grouped(rows, "params", *CONTINUED):
        start = {of: members[f"{of}_before"].mean() for of in losses}
        frame = _named(members, "tokens", domain_ratio="delta")
        for of in losses:
            frame[f"{of}_loss"] = members[f"{of}_heldout"] - members[f"{of}_before"] + start[of]
        first = frame.iloc[:1].assign(run=START, tokens=0.0, **{f"{of}_loss": loss for of, loss in start.items()})
        groups.append((group, pd.concat([first, frame], ignore_index=True)))
    return groups


def _adapted(table: UsableRows) -> pd.DataFrame:
    """All evaluations of stages that trained a whole model further on domain and general text, without an anchor or an
    average."""
    rows = _with_finished(table)
    plain = (rows["anchor"] == 0) & (rows["average"] == 0) & (rows["other"] == "")
    return rows[(rows["stage"] >= 1) & (rows["start"] == "pretrained") & plain]


def _handed_on(table: UsableRows) -> pd.DataFrame:
    rows = _adapted(table)
    return rows[rows["handed_on"]]


def _finetunes(table: UsableRows) -> pd.DataFrame:
    rows = _handed_on(table)
    return _least_specialized(rows[(rows["delta"] > 0) & (rows["epochs"] >= WHOLE_CORPUS)])


def _continued(table: UsableRows) -> pd.DataFrame:
    rows = _adapted(table)
    until = rows["tokens"].where(rows["handed_on"]).groupby([rows[key] for key in STAGE]).transform("max")
    return _least_specialized(rows[rows["tokens"] <= until])


def _least_specialized(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the smallest domain share of pretraining, or with an unknown one."""
    share = rows["pretrain_delta"]
    return rows[share.isna() | (share == share.min())]


def _known(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    return rows.dropna(subset=list(columns))


def _named(rows: pd.DataFrame, *same: str, **renamed: str) -> pd.DataFrame:
    """The columns `same`, and others renamed to a law's names: new="old"."""
    columns = {name: name for name in ("run", *ALIKE, *same)} | renamed
    return pd.DataFrame({new: rows[old] for new, old in columns.items()}).reset_index(drop=True)


def _grouped(frame: pd.DataFrame, *by: str) -> list[Group]:
    return [
        ({name: _plain(value) for name, value in zip(by, values, strict=True)}, members.reset_index(drop=True))
        for values, members in frame.groupby(list(by), dropna=False)
    ]


def _plain(value: float) -> float | int | None:
    if math.isnan(value):
        return None
    return int(value) if float(value).is_integer() else float(value)

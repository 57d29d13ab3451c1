"""The usable rows of a runs table, seen by each law: which rows it takes, in which groups, under which names.

A view returns groups, (what all runs of the group have in common, a DataFrame with the law's columns).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pandas as pd

from spt_fast.laws.columns import ALIKE
from spt_fast.study.usable import STAGE, UsableRows

Group = tuple[dict[str, Any], pd.DataFrame]
"""A value of None: unknown, as the pretraining of foreign weights is."""

SETTLED = 0.2
"""Of a run's tokens: what is measured before is of the first steep fall, which no power law describes. The paper's own
curves begin at 40B of 200B."""
WHOLE_CORPUS = 0.95
"""Epochs from which a finetune has read its corpus, but for what rounding to whole steps leaves."""


# -------------------------------------------------------------------------------------------------------- pretraining


def overfitting(table: UsableRows) -> list[Group]:
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


def chinchilla(table: UsableRows, of: Literal["domain", "general"] = "general") -> list[Group]:
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


def data_constrained(table: UsableRows) -> list[Group]:
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


def _pretraining(table: UsableRows) -> pd.DataFrame:
    rows = table.rows
    return rows[(rows["stage"] == 0) & (rows["start"] == "scratch") & (rows["tokens"] > 0)]


# --------------------------------------------------------------------------------------------------------- adaptation


def post_finetuning(table: UsableRows) -> list[Group]:
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


def forgetting(table: UsableRows) -> list[Group]:
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


def finetuning(table: UsableRows) -> list[Group]:
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


def dcpt(table: UsableRows, of: Literal["domain", "general"]) -> list[Group]:
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


def cmr(table: UsableRows) -> list[Group]:
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


def _adapted(table: UsableRows) -> pd.DataFrame:
    """All evaluations of stages that went on from a whole model, without an anchor."""
    rows = table.rows
    return rows[(rows["stage"] >= 1) & (rows["start"] == "pretrained") & (rows["anchor"] == 0)]


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

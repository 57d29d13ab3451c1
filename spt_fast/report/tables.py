"""The tables of a page that list laws, runs, and what the page was made from."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pandas as pd

from spt_fast import __version__
from spt_fast.quantities import amount, percent
from spt_fast.study.behind import Behind
from spt_fast.study.findings import error_of, group_name, r2_of
from spt_fast.study.fits import Fitted
from spt_fast.study.settings import SETTINGS, with_settings


def law_rows(fits: Sequence[Fitted]) -> list[list[str]]:
    return [
        [
            fit.law_name,
            group_name(fit.group),
            str(fit.runs),
            r2_of(fit.score).replace("-", "−"),
            error_of(fit.score),
            "; ".join(f"{error_of(errors)} ({what})" for what, errors in fit.holdout.items()),
        ]
        for fit in fits
        if fit.law is not None
    ]


RUN_COLUMNS: dict[str, tuple[str, Callable[[float], str] | None]] = {
    "run": ("run", None),
    "phase": ("phase", None),
    "status": ("status", None),
    "params": ("params", amount),
    "seed": ("seed", "{:.0f}".format),
    "share": ("delta", percent),
    "tokens": ("tokens", amount),
    "epochs": ("epochs", "{:.3g}".format),
    "domain": ("domain_heldout", "{:.3f}".format),
    "general": ("general_heldout", "{:.3f}".format),
    "pretrain δ": ("pretrain_delta", percent),
    "pretrain tokens": ("pretrain_tokens", amount),
    "domain before": ("domain_before", "{:.3f}".format),
    "general before": ("general_before", "{:.3f}".format),
    "domain documents": ("domain_documents", amount),
    "domain tokens scored": ("domain_scored", amount),
    "general documents": ("general_documents", amount),
    "general tokens scored": ("general_scored", amount),
    "lr": ("lr", "{:g}".format),
    "anchor": ("anchor", "{:g}".format),
    "average": ("average", percent),
    "start": ("start", None),
}
"""Columns of the table of runs: the column in the runs table, and how a number is written; text if None."""


@dataclass(frozen=True)
class Cell:
    """A cell's text. A number has a sort key, which is empty if it is unknown."""

    text: str
    number: bool = False
    sort: str = ""


@dataclass(frozen=True)
class RunRow:
    cells: list[Cell]
    failed: bool


def run_columns(table: pd.DataFrame) -> dict[str, tuple[str, Callable[[float], str] | None]]:
    """RUN_COLUMNS, and the optimizer fields in which runs differ."""
    table = with_settings(table)
    differing = [name for name in SETTINGS if name not in ("lr", "optimizer") and table[name].nunique() > 1]
    named = {"optimizer": ("optimizer", None)} if table["optimizer"].nunique() > 1 else {}
    return RUN_COLUMNS | named | {name.replace("_", " "): (name, "{:g}".format) for name in differing}


def run_rows(table: pd.DataFrame) -> list[RunRow]:
    """A row per phase of a run, with the figures of its final weights; also a row for each failed run."""
    failed = table["status"] != "done"
    rows = table[table["handed_on"] | failed].sort_values(["stage", "params", "run", "tokens"])
    of_adaptation = ["pretrain_delta", "pretrain_tokens", "anchor", "average"]
    rows[of_adaptation] = rows[of_adaptation].where(rows["stage"] > 0)
    return [
        RunRow([_cell(row[column], written) for column, written in run_columns(table).values()], failed=bad)
        for bad, row in zip(failed[rows.index], rows.to_dict("records"), strict=True)
    ]


def _cell(value: Any, written: Callable[[float], str] | None) -> Cell:
    if written is None:
        return Cell(str(value))
    return Cell("", number=True) if pd.isna(value) else Cell(written(value), number=True, sort=f"{value:.7g}")


def provenance(table: pd.DataFrame, sources: Sequence[str]) -> dict[str, str]:
    done = table[table["status"] == "done"]
    stages = done.drop_duplicates(["run", "stage"])
    flops = done.groupby(["run", "stage"])["flops"].agg(lambda of_stage: of_stage.max() - of_stage.min()).sum()

    def values(column: str, write: Callable[[Any], str] = str) -> str:
        return ", ".join(write(value) for value in sorted(done[column].dropna().unique())) or "none"

    return {
        "Read from": ", ".join(sources),
        "Runs": f"{done['run'].nunique()} done, {table.loc[table['status'] != 'done', 'run'].nunique()} failed",
        "Stages": f"{(stages['stage'] == 0).sum()} of pretraining, {(stages['stage'] > 0).sum()} of adaptation",
        "Evaluations": f"{len(done):,}",
        "Seeds": values("seed"),
        "Model sizes": values("params", lambda n: f"{n:,}"),
        "Domain corpora": values("domain_tokens", lambda n: f"{int(n):,} tokens"),
        "Tokenizer": values("tokenizer"),
        "Held-out text": values("heldout"),
        "Domain losses are on": behind(done, "domain"),
        "General losses are on": behind(done, "general"),
        "Training text, domain": values("domain_text"),
        "Training text, general": values("general_text"),
        "Training FLOPs, kept arms": f"{flops:.3g}",
        "Versions": f"spt-fast {__version__}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "pandas", "matplotlib"))
        + f", Python {platform.python_version()}",
    }


def behind(done: pd.DataFrame, corpus: str) -> str:
    """The held-out text behind a corpus's losses, and their standard error, in words."""
    known = Behind.of_rows(done, corpus)
    if known is None:
        return "text that is not recorded"
    error = "unknown" if known.standard_error is None else f"up to {known.standard_error:.2g} nats"
    return f"{known.size or 'text without documents'}, standard error {error}"

"""What people read of fits: a sentence or a cell for a fact, the same on a terminal and on a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from spt_fast.study.finetunes import Treatment
from spt_fast.study.fits import Errors, Fits, Fitted, Score
from spt_fast.study.words import amount

# ---------------------------------------------------------------------------------------------------------------- fits


def print_fits(fits: Fits, console: Console, *, every_parameter: bool = False) -> None:
    """How well each law fits and predicts, its parameters, and what is missing for the others. `every_parameter`: also
    of the laws that have some for each share."""
    found = [one for one in fits.laws if one.law]
    if found:
        console.print(_quality_table(found))
    for one in found:
        if one.law and (one.law.names or every_parameter):
            figures = (f"{name} {p.value:.4g} ({p.low:.4g} to {p.high:.4g})" for name, p in one.parameters.items())
            console.print(f"- {law_title(one)}: {', '.join(figures)}")
        for warning in one.warnings:
            console.print(f"- {law_title(one)}: {warning}")
    for one in fits.laws:
        if one.problem:
            console.print(f"- not fitted: {law_title(one)}: {one.problem}")
    for note in fits.notes:
        console.print(f"- {note}")
    for crossover in fits.crossovers:
        console.print(f"- to pretrain or not: {crossover.says}")


def _quality_table(found: Sequence[Fitted]) -> Table:
    """A row per law and group, 80 columns wide."""
    table = Table(
        title="error: mean relative error, of the losses that a law was fitted to, and of losses that it predicted",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("law", max_width=26)
    for heading in ("runs", "R²", "error"):
        table.add_column(heading, justify="right")
    table.add_column("left out and\npredicted", no_wrap=True)
    for heading in ("R²", "error"):
        table.add_column(heading, justify="right")
    for one in found:
        left_out = one.holdout.values()
        table.add_row(
            f"{one.law_name}\n{group_name(one.group)}".rstrip(),
            f"{one.runs:,}",
            r2_of(one.score),
            error_of(one.score),
            "\n".join(one.holdout) or "nothing",
            "\n".join(map(r2_of, left_out)),
            "\n".join(map(error_of, left_out)),
        )
    return table


def r2_of(score: Score | Errors | None) -> str:
    return f"{score.r2:.3f}" if score and math.isfinite(score.r2) else ""


def error_of(score: Score | Errors | None) -> str:
    return f"{100 * score.mre:.2f}%" if score else ""


def law_title(one: Fitted) -> str:
    return ", ".join(filter(None, (one.law_name, group_name(one.group))))


def group_name(group: Mapping[str, float | None]) -> str:
    """What the runs of a fit have in common, as far as it is known."""
    words: dict[str, Callable[[float], str]] = {
        "params": lambda size: f"{amount(size)} parameters",
        "domain_tokens": lambda tokens: f"{amount(tokens)} domain tokens",
        "delta": _regime,
        "pretrain_delta": lambda delta: f"after {_regime(delta)}",
        "pretrain_tokens": lambda tokens: f"{amount(tokens)} tokens of pretraining",
    }
    return ", ".join(words[name](value) for name, value in group.items() if value is not None)


def _regime(delta: float) -> str:
    return Treatment(delta, 0.0, 0.0).name

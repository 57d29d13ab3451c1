"""What a run has read, computed from the same functions that fed it.

A visit is a token read as an input. In a phase with a grid the kept arm's reading counts, as it is what the weights
saw; in a phase that stopped early, every step until it stopped. A run that is not finished is audited up to its newest
whole checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console

from spt_fast.data.visits import Visits, document_visits
from spt_fast.errors import DataError, invalid
from spt_fast.printing import print_table
from spt_fast.train import checkpoint
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.plan import Plan, make_plan
from spt_fast.train.state import SavedState


@dataclass(frozen=True)
class SourceReading:
    """What a run has read of a source; visits are the fewest and most of any of its tokens."""

    windows: int
    tokens: int
    epochs: float
    min_visits: int
    max_visits: int


def audit_run(run: Path, source: str | None = None) -> dict[str, SourceReading]:
    """What was read, by source; of `source` alone where it is given. Raises DataError where the run has no such one."""
    plan, counts = _reading_of(run)
    readings = {}
    for name, count in ({source: _count(run, counts, source)} if source else counts).items():
        visits = document_visits(plan.rings[name], count, 0, plan.train[name].num_tokens)
        readings[name] = SourceReading(
            windows=count,
            tokens=count * plan.model.context,
            epochs=float(plan.rings[name].epochs(count)),
            min_visits=visits.min_visits,
            max_visits=visits.max_visits,
        )
    return readings


def audit_document(run: Path, source: str | None, document: int) -> Visits:
    """`document` counts within the source's dataset, from 0. Raises DataError for a source or document that isn't
    there."""
    if source is None:
        raise DataError("document: counts within a source; name it by `source=…`", argument=True)
    plan, counts = _reading_of(run)
    count, data = _count(run, counts, source), plan.train[source]
    ends = data.document_ends
    if ends is None:
        raise DataError(
            f"document: {data.path} records no documents; leave it out and audit the whole source", argument=True
        )
    if not 0 <= document < len(ends):
        expected = f"{source} has documents 0 to {len(ends) - 1}"
        raise DataError(invalid("document", document, expected), argument=True)
    start, end = int(ends[document - 1]) if document else 0, int(ends[document])
    return document_visits(plan.rings[source], count, start, end)


def print_audit(run: Path, readings: Mapping[str, SourceReading], console: Console) -> None:
    """A row by source."""
    columns = [column.name for column in fields(SourceReading)]
    print_table(
        console, str(run), ["source", *columns], [[name, *vars(reading).values()] for name, reading in readings.items()]
    )


def _count(run: Path, counts: Mapping[str, int], source: str) -> int:
    if source not in counts:
        raise DataError(invalid("source", source, f"{run} has {', '.join(counts)}"), argument=True)
    return counts[source]


def _reading_of(run: Path) -> tuple[Plan, dict[str, int]]:
    """The run's plan, and how many windows of each source it has read."""
    plan = make_plan(recipe_of(run))
    counts = dict.fromkeys(plan.recipe.sources, 0)
    summary = summary_of(run)
    if summary and summary["status"] == "done":
        plan.check_same_data(summary["data"], run)
        for phase in summary["phases"].values():
            for source, (_, end) in phase["windows"].items():
                counts[source] = end
        return plan, counts
    found = checkpoint.newest(run / "checkpoints")
    if found:
        saved = SavedState.read(found.state, found.path)
        plan.check_same_data(saved.data, found.path)
        state = saved.train
        counts |= state.counts
        for source, windows in plan.phases[state.phase].windows(state.step).items():
            counts[source] += windows
    return plan, counts

"""What a run has read, computed from the same functions that fed it.

A visit is a token read as an input. Of a phase with a grid the kept arm's reading counts, as it is what the weights
saw; of a phase that stopped early, every step until it stopped. A run that is not finished is audited up to its newest
whole checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spt_fast.data.visits import document_visits
from spt_fast.errors import DataError
from spt_fast.train import checkpoint
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.plan import Plan, make_plan
from spt_fast.train.state import SavedState


def audit_run(run: Path) -> dict[str, dict[str, Any]]:
    """By source: windows, tokens and epochs read, and the fewest and most visits of any of its tokens."""
    plan, counts = _reading_of(run)
    return {
        source: {
            "windows": count,
            "tokens": count * plan.model.context,
            "epochs": float(plan.epochs(source, count)),
            **_visits(plan, source, count, 0, plan.train[source].num_tokens),
        }
        for source, count in counts.items()
    }


def audit_document(run: Path, source: str, document: int) -> dict[str, Any]:
    """Of one document: tokens, token_visits (over all its tokens), min_visits, max_visits.

    `document` counts within the source's dataset, from 0. Raises DataError for a source or document that isn't there.
    """
    plan, counts = _reading_of(run)
    if source not in counts:
        raise DataError(f"--source {source}: {run} has no such source; it has {', '.join(counts)}")
    data = plan.train[source]
    ends = data.document_ends
    if ends is None:
        raise DataError(f"--source {source}: {data.path} records no documents; audit the whole source instead")
    if not 0 <= document < len(ends):
        raise DataError(f"--document {document}: {source} has documents 0 to {len(ends) - 1}")
    start, end = int(ends[document - 1]) if document else 0, int(ends[document])
    visits = document_visits(plan.rings[source], counts[source], start, end)
    return {"tokens": end - start, **{key: visits[key] for key in ("token_visits", "min_visits", "max_visits")}}


def _visits(plan: Plan, source: str, count: int, start: int, end: int) -> dict[str, int]:
    visits = document_visits(plan.rings[source], count, start, end)
    return {key: visits[key] for key in ("min_visits", "max_visits")}


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
        phase = plan.phases[state.phase]
        for source, windows in phase.mixture.counts(state.step * phase.phase.batch.sequences).items():
            counts[source] += windows
    return plan, counts

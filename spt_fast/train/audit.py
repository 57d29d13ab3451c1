"""What a run has read, computed by the functions that chose its data.

A visit is a token read as an input. A phase with a grid counts the kept arm only, since its weights are the result; a
phase that stopped early counts every step until it stopped. An unfinished run is audited up to its newest whole
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from rich.console import Console

from spt_fast.config import Recipe
from spt_fast.data.mixture import Mixture
from spt_fast.data.ring import Ring
from spt_fast.data.shards import TokenDataset
from spt_fast.data.visits import Visits, document_visits
from spt_fast.errors import DataError, invalid
from spt_fast.printing import print_table
from spt_fast.train import checkpoint
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.plan import make_plan, recorded_texts
from spt_fast.train.state import SavedState
from spt_fast.train.weights import read_config


@dataclass(frozen=True)
class SourceReading:
    """What a run has read of a source; visits are the fewest and most of any one of its tokens."""

    windows: int
    tokens: int
    epochs: float
    min_visits: int
    max_visits: int


def audit_run(run: Path, source: str | None = None) -> dict[str, SourceReading]:
    """What was read, by source, or of `source` only. Raises DataError if the run has no such source."""
    reading = _reading_of(run)
    readings = {}
    for name, read in ({source: _read(run, reading, source)} if source else reading.read).items():
        visits = document_visits(read, 0, read[0][0].num_tokens)
        readings[name] = SourceReading(
            windows=sum(count for _, count in read),
            tokens=sum(count * ring.context for ring, count in read),
            epochs=float(sum(ring.epochs(count) for ring, count in read)),
            min_visits=visits.min_visits,
            max_visits=visits.max_visits,
        )
    return readings


def audit_document(run: Path, source: str | None, document: int) -> Visits:
    """`document` counts within the source's dataset, from 0. Raises DataError for an unknown source or document."""
    if source is None:
        raise DataError("document: counts within a source; name it with `source=…`", argument=True)
    reading = _reading_of(run)
    read, data = _read(run, reading, source), reading.texts.get(source)
    if data is None:
        path = recipe_of(run).sources[source].train
        raise DataError(
            f"sources.{source}.train: {path}, which holds the document ends, is missing or damaged; put it back"
        )
    ends = data.document_ends
    if ends is None:
        raise DataError(
            f"document: {data.path} records no documents; leave it out and audit the whole source", argument=True
        )
    if isinstance(document, bool) or not isinstance(document, Integral) or not 0 <= document < len(ends):
        limited = recipe_of(run).sources[source].limit_tokens is not None
        expected = f"{source} has documents 0 to {len(ends) - 1}{' within its limit_tokens' if limited else ''}"
        raise DataError(invalid("document", document, expected), argument=True)
    start, end = int(ends[document - 1]) if document else 0, int(ends[document])
    return document_visits(read, start, end)


def print_audit(run: Path, readings: Mapping[str, SourceReading], console: Console) -> None:
    """Print a row for each source."""
    columns = [column.name for column in fields(SourceReading)]
    print_table(
        console, str(run), ["source", *columns], [[name, *vars(reading).values()] for name, reading in readings.items()]
    )


def _read(run: Path, reading: _Reading, source: str) -> list[tuple[Ring, int]]:
    if source not in reading.read:
        raise DataError(invalid("source", source, f"{run} has {', '.join(reading.read)}"), argument=True)
    return reading.read[source]


@dataclass(frozen=True)
class _Reading:
    """How far a run has read."""

    read: dict[str, list[tuple[Ring, int]]]
    """Windows read, by source and by window length."""
    texts: dict[str, TokenDataset]
    """The datasets by source, as far as they still exist."""


def _reading_of(run: Path) -> _Reading:
    """From the run's records. DataError if the text is not the text that was read, or if it is missing and an earlier
    version recorded too little."""
    recipe = recipe_of(run)
    texts, context, tokens, windows = _recorded(run, recipe)
    read = {source: dict[int, int]() for source in recipe.sources}
    for phase in recipe.phases:
        for source, (_, end) in windows.get(phase.name, {}).items():
            read[source][phase.window(context)] = end
    for name, source in recipe.sources.items():
        if name not in tokens and name not in texts:
            raise DataError(f"sources.{name}.train: {source.train} is missing or damaged; put it back")
    held = {name: tokens[name] if name in tokens else texts[name].num_tokens for name in recipe.sources}
    first = recipe.phases[0].window(context)
    return _Reading(
        {
            name: [(Ring(held[name], length, recipe.seed, name), n) for length, n in (lengths or {first: 0}).items()]
            for name, lengths in read.items()
        },
        texts,
    )


def _recorded(run: Path, recipe: Recipe) -> tuple[dict[str, TokenDataset], int, dict[str, int], dict[str, Any]]:
    """The texts that still exist, the model's context, the tokens of each source, and by phase, as far as one was
    trained, the first window of each source and the first one after it."""
    summary = summary_of(run)
    if summary and summary["status"] == "done":
        texts = recorded_texts(recipe, summary.get("data", {}), run, summary.get("directory") or "")
        windows = {name: phase["windows"] for name, phase in summary["phases"].items()}
        context = summary.get("context") or read_config(run).context
        return texts, context, summary.get("train_tokens", {}), windows
    if (found := checkpoint.newest(run / "checkpoints")) is None:
        plan = make_plan(recipe)
        return plan.train, plan.model.context, {}, {}
    saved = SavedState.read(found.state, found.path)
    texts, state = recorded_texts(recipe, saved.data, found.path, saved.directory), saved.train
    known = {name: saved.texts.get(f"sources.{name}.train") for name in recipe.sources}
    under_way = recipe.phases[state.phase]
    drawn = Mixture(under_way.mixture).counts(state.step * under_way.batch.sequences)
    here = {source: [before, before + drawn.get(source, 0)] for source, before in state.counts.items()}
    windows = {name: phase.windows for name, phase in state.finished.items()} | {under_way.name: here}
    return texts, saved.model.context, {name: text.tokens for name, text in known.items() if text}, windows

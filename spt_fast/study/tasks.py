"""Task scores of runs: before and after their last phase, and compared with the first run.

Differences are over the same questions with the same settings. Their standard errors come from the difference of each
question, and are smaller than those of the scores if both models know the same answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from spt_fast.errors import CheckpointError, counted
from spt_fast.evaluation.results import FEW_QUESTIONS, FOLDER, Metric, Settings, TaskResult, results_of, standard_error
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.lineage import parent_of


@dataclass(frozen=True)
class Difference:
    """By how much a metric is higher than another."""

    value: float
    standard_error: float | None
    """Over questions; None for one question, or if the metric is not a mean over questions."""

    @classmethod
    def between(cls, one: Metric, other: Metric | None) -> Difference | None:
        if other is None:
            return None
        if one.each is None or other.each is None or len(one.each) != len(other.each):
            return cls(one.value - other.value, None)
        each = [a - b for a, b in zip(one.each, other.each, strict=True)]
        return cls(fmean(each), standard_error(each))


@dataclass(frozen=True, kw_only=True)
class RunScore:
    """One metric of a run."""

    run: str
    metric: str
    before: Metric | None
    """The metric of the weights that the last phase started from; None if it has no score with the same settings."""
    after: Metric
    change: Difference | None
    against_first: Difference | None
    """None for the first run."""


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """Runs with the same settings in a task."""

    task: str
    questions: int
    settings: Settings
    scores: list[RunScore]
    notes: list[str]
    """Sentences: which runs are not in the table and why, and whether there are too few questions."""


def task_tables(folders: Sequence[Path]) -> list[TaskTable]:
    """A table for each task that runs were scored in; folders: the runs'. CheckpointError for damaged results."""
    names = Counter(folder.resolve().name for folder in folders)
    runs = {str(folder) if names[name := folder.resolve().name] > 1 else name: folder for folder in folders}
    after = {name: _results(_last(folder)) for name, folder in runs.items()}
    tasks = sorted({task for results in after.values() for task, _ in results})
    if not tasks:
        return []
    before = {name: _results(_start(folder)) for name, folder in runs.items()}
    return [_table(task, after, before) for task in tasks]


def with_results(folders: Sequence[Path]) -> list[Path]:
    """The run folders with task results among `folders`, and inside those that are studies."""
    runs = [run for folder in folders for run in (folder, *sorted(folder.glob("runs/*")))]
    return [run for run in runs if (run / FOLDER).is_dir() and (run / "recipe.yaml").exists()]


Results = dict[tuple[str, Settings], TaskResult]
"""By task and settings."""


def _table(task: str, after: dict[str, Results], before: dict[str, Results]) -> TaskTable:
    asked = Counter(settings for results in after.values() for name, settings in results if name == task)
    order = {one: place for place, one in enumerate(asked)}  # newest last: the settings of a task may have changed
    settings = max(asked, key=lambda one: (asked[one], one.limit is None, order[one]))
    key, notes = (task, settings), []
    found = [run for run in after if key in after[run]]
    for run in after:
        if run not in found:
            notes.append(f"{run} is left out: {_missing(task, settings, after[run])}")
        elif key not in before[run] and any(name == task for name, _ in before[run]):
            notes.append(f"{run}: its starting weights are left out: {_missing(task, settings, before[run])}")
    first = after[found[0]][key]
    if first.questions < FEW_QUESTIONS:
        notes.append(
            f"{counted(first.questions, 'question', 'are')} few; differences below two standard errors may be chance"
        )
    scores = []
    for run in found:
        start = before[run].get(key)
        for name, metric in after[run][key].metrics.items():
            at_start = start.metrics.get(name) if start else None
            of_first = None if run == found[0] else first.metrics.get(name)
            scores.append(
                RunScore(
                    run=run,
                    metric=name,
                    before=at_start,
                    after=metric,
                    change=Difference.between(metric, at_start),
                    against_first=Difference.between(metric, of_first),
                )
            )
    return TaskTable(task=task, questions=first.questions, settings=settings, scores=scores, notes=notes)


def _missing(task: str, settings: Settings, results: Results) -> str:
    """Why weights have no result in a task with these settings, as a clause of a note."""
    others = [vars(other) for name, other in results if name == task]
    if not others:
        return "it was not scored"
    differs = ", ".join(
        f"{name} {others[0][name]} instead of {value}"
        for name, value in vars(settings).items()
        if others[0][name] != value
    )
    return f"it was scored with other settings ({differs}); use the same ones"


def _results(weights: Path | None) -> Results:
    return {} if weights is None else {(result.task, result.settings): result for result in results_of(weights)}


def _last(folder: Path) -> Path:
    """The final weights of a run."""
    return folder / "weights" / recipe_of(folder).phases[-1].name


def _start(folder: Path) -> Path | None:
    """The weights that a run's last phase started from; None for a start from scratch, or if they are missing."""
    recipe = recipe_of(folder)
    if len(recipe.phases) > 1:
        return folder / "weights" / recipe.phases[-2].name
    try:
        parent = parent_of(folder, recipe)
    except CheckpointError:
        return None
    if parent is not None:
        return parent[0] / "weights" / parent[1]
    if recipe.init is None:
        return None
    named = Path(recipe.init)
    places: tuple[Any, ...] = (named, (summary_of(folder) or {}).get("directory", "") / named)
    return next((place for place in places if place.is_dir()), None)


COLUMNS = ("run", "metric", "before", "after", "change", "against the first")


def cells(score: RunScore, plus_minus: str = " ± ") -> list[str]:
    """The cells of a row under COLUMNS."""
    figures = (score.before, score.after, score.change, score.against_first)
    signs = ("", "", "+", "+")
    return [score.run, score.metric, *(_figure(f, sign, plus_minus) for f, sign in zip(figures, signs, strict=True))]


def _figure(figure: Metric | Difference | None, sign: str, plus_minus: str) -> str:
    if figure is None:
        return ""
    error = "" if figure.standard_error is None else f"{plus_minus}{figure.standard_error:.3f}"
    return f"{figure.value:{sign}.3f}".replace("-", "−") + error


def title_of(table: TaskTable) -> str:
    """The caption of a table."""
    return f"{table.task}: {counted(table.questions, 'question')}, {table.settings.says}"

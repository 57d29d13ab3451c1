"""Tasks: questions for a model, from lm-eval or from the user's own file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console

from spt_fast import __version__
from spt_fast.errors import DataError, SptError, SptWarning, counted, invalid
from spt_fast.evaluation import questions as own
from spt_fast.evaluation.likelihood import TextModel
from spt_fast.evaluation.results import FEW_QUESTIONS, Metric, TaskResult, save, settings_of
from spt_fast.printing import print_note, print_table
from spt_fast.train.weights import chosen


def score_tasks(
    weights: Path,
    tasks: Sequence[str],
    *,
    tokenizer: Path | None = None,
    context: int | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch: int | None = None,
    bos: str | None = None,
    progress: bool = True,
) -> dict[str, TaskResult]:
    """The scores of weights in tasks, by the tasks' names; saved beside the weights.

    `weights` is a run, its weights/<phase>, a checkpoint or a Hugging Face folder. tasks: files of questions (.jsonl),
    lm-eval's task files (.yaml), and names of its tasks. context: tokens that the model sees; its own by default.
    num_fewshot: solved examples before each question; for the user's own file its first ones, which are not scored.
    bos: the token that every text begins with; by default the one that the documents of the weights' run began with,
    else the one of their Hugging Face tokenizer. progress: show a bar on standard error.
    SptError for tasks that don't exist or have invalid lines, before the model is loaded.
    """
    for name, given, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
        if given is not None and given < least:
            raise SptError(invalid(name, given, f"write a whole number of at least {least}"), argument=True)
    files = {Path(task).name: own.read_questions(Path(task)) for task in tasks if task.lower().endswith(own.FILES)}
    others = [task for task in tasks if not task.lower().endswith(own.FILES)]
    if not tasks or len(files) + len({*others}) < len(tasks):
        expected = "name at least one task, each once, and files with different names"
        raise DataError(invalid("tasks", ",".join(tasks), expected), argument=True)
    for name, questions in files.items():
        if len(questions) <= (num_fewshot or 0):
            says = f"at most {len(questions) - 1}, since the examples are the first of the questions in {name}"
            raise SptError(invalid("num_fewshot", num_fewshot, says), argument=True)
    for task in others:
        if task.endswith((".yaml", ".yml")) != Path(task).is_file():
            expected = (
                "give a file of questions (.jsonl), a task file of lm-eval (.yaml), or the name of one of its tasks"
            )
            raise DataError(invalid("tasks", task, expected), argument=True)
    harness = _harness(others) if others else None
    manager = harness.find(others) if harness else None
    weights = chosen(weights)
    model = TextModel.load(weights, tokenizer, bos=bos, context=context, batch=batch, progress=progress)
    found = [_ask(model, name, questions, num_fewshot or 0, limit) for name, questions in files.items()]
    if harness:
        found += harness.score(model, manager, others, num_fewshot, limit)
    for result in found:
        save(result, weights, model.tokenizer_digest)
        if result.questions < FEW_QUESTIONS:
            warnings.warn(
                f"{result.task}: {counted(result.questions, 'question', 'are')} few; differences below two standard "
                "errors mean nothing",
                SptWarning,
                stacklevel=2,
            )
    return {result.task: result for result in found}


def _harness(tasks: Sequence[str]) -> ModuleType:
    """The module that needs lm-eval."""
    try:
        from spt_fast.evaluation import harness
    except ModuleNotFoundError as error:
        raise DataError(
            f'tasks: {", ".join(tasks)} needs lm-eval ({error.name} isn\'t installed): pip install "spt-fast[eval]"; '
            "files of questions (.jsonl) don't need it",
            argument=True,
        ) from None
    return harness


def _ask(
    model: TextModel, name: str, questions: Sequence[own.Question], num_fewshot: int, limit: int | None
) -> TaskResult:
    examples, asked = questions[:num_fewshot], questions[num_fewshot:][:limit]
    settings = settings_of(
        model,
        version=own.digest_of(questions),
        library=f"spt-fast {__version__}",
        num_fewshot=num_fewshot,
        limit=limit if limit is not None and limit <= len(asked) < len(questions) - num_fewshot else None,
    )
    metrics = {metric: Metric.mean(each) for metric, each in own.answer(model, asked, examples).items()}
    return TaskResult(task=name, questions=len(asked), metrics=metrics, settings=settings)


def print_tasks(weights: Path, results: Mapping[str, TaskResult], console: Console) -> None:
    """Print a row for each metric, then how each task was scored."""
    rows = [
        [name, metric, m.value, m.standard_error, result.questions]
        for name, result in results.items()
        for metric, m in result.metrics.items()
    ]
    print_table(console, str(weights), ["task", "metric", "value", "standard error", "questions"], rows)
    for name, result in results.items():
        print_note(console, f"{name}: {result.settings.says}")

"""Results of tasks, kept beside the weights: one file each, so that several tasks can be scored at once.

For a run, its phases and checkpoints they are in RUN/tasks, for other weights in the `tasks` folder beside them. Two
results can be compared if their settings are equal.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from spt_fast.errors import CheckpointError, SptWarning, counted, cut
from spt_fast.files import write_text

if TYPE_CHECKING:
    from spt_fast.evaluation.likelihood import TextModel

FOLDER = "tasks"
FEW_QUESTIONS = 100
"""With fewer, the standard error of an accuracy is up to 5 points and more."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything besides the weights that a result depends on."""

    version: str
    """Of the task: a digest of its questions and prompts."""
    library: str
    """The library of the prompts and metrics, with its version."""
    num_fewshot: int
    """Solved examples before each question."""
    limit: int | None
    """Limit on the questions; None for all."""
    context: int
    """Limit on the tokens that the model saw."""
    bos: int | None
    """The id that each text began with; None for none."""
    dtype: str
    """The compute dtype."""

    @property
    def says(self) -> str:
        """In words, without the version."""
        begin = "no begin-of-text id" if self.bos is None else f"begin-of-text id {self.bos}"
        limit = "" if self.limit is None else f"limit {self.limit:,}, "
        shown = counted(self.num_fewshot, "example")
        return f"{self.library}, {shown}, {limit}context {self.context:,}, {begin}, in {self.dtype}"


def settings_of(model: TextModel, *, version: str, library: str, num_fewshot: int, limit: int | None) -> Settings:
    return Settings(
        version=version,
        library=library,
        num_fewshot=num_fewshot,
        limit=limit,
        context=model.context,
        bos=model.bos,
        dtype=model.dtype,
    )


@dataclass(frozen=True)
class Metric:
    """The mean over questions, or another statistic of them."""

    value: float
    standard_error: float | None
    """None for one question, and if it is not known."""
    each: Sequence[float] | None = None
    """By question, in order; None if the metric is no mean over questions."""

    @classmethod
    def mean(cls, each: Sequence[float]) -> Metric:
        return cls(fmean(each), standard_error(each), each)

    def as_json(self) -> dict[str, float | None]:
        return {"value": self.value, "standard_error": self.standard_error}


def standard_error(each: Sequence[float]) -> float | None:
    """The standard error of the mean."""
    return stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The scores of weights in a task."""

    task: str
    questions: int
    metrics: dict[str, Metric]
    settings: Settings

    @classmethod
    def of(cls, data: dict[str, Any]) -> TaskResult:
        metrics = {name: Metric(**metric) for name, metric in data["metrics"].items()}
        return cls(
            task=data["task"],
            questions=data["questions"],
            metrics=metrics,
            settings=Settings(**data["settings"]),
        )


def save(result: TaskResult, weights: Path, tokenizer: str) -> None:
    """Save a result, replacing one of the same weights and settings; a warning if it can't be written. tokenizer: the
    digest of the one that was used."""
    folder, prefix = _place(weights)
    settings = hashlib.sha256(json.dumps(asdict(result.settings)).encode()).hexdigest()
    kept = {"weights": weights.resolve().name, **_digests_of(weights), "tokenizer": tokenizer, **asdict(result)}
    try:
        folder.mkdir(exist_ok=True)
        write_text(folder / f"{prefix}{result.task}-{settings[:12]}.json", json.dumps(kept) + "\n")
    except OSError as error:
        warnings.warn(f"{folder}: the result could not be saved ({error.strerror})", SptWarning, stacklevel=2)


def results_of(weights: Path) -> list[TaskResult]:
    """The results of weights by task, the newest last. Results of other weights, or of another config.json or
    tokenizer, that are in the same folder are left out. CheckpointError for a damaged file."""
    folder, prefix = _place(weights)
    files = sorted(folder.glob("*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    now = {**_digests_of(weights), "tokenizer": _tokenizer_of(weights)} if files else {}
    found = []
    for file in files:
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            changed = any(digest and kept.get(name) not in (None, digest) for name, digest in now.items())
            if (not prefix or kept["weights"] == weights.resolve().name) and not changed:
                found.append(TaskResult.of(kept))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: is damaged ({cut(repr(error), 200)}); delete it and score the task again"
            ) from None
    return found


def _place(weights: Path) -> tuple[Path, str]:
    """The folder of the results of weights, and the prefix of their names."""
    from spt_fast.train.origin import run_of  # these import torch, which is slow, and most runs have no results
    from spt_fast.train.weights import locate

    run = run_of(weights)
    return (run / FOLDER, f"{weights.resolve().name}-") if run else (locate(weights) / FOLDER, "")


def _digests_of(weights: Path) -> dict[str, str | None]:
    """Digest of weights and of their config.json, which checkpoints don't have; None if they are missing."""
    from spt_fast.train.weights import digest_of, locate

    if not weights.is_dir():
        return {"digest": None, "config": None}
    file = locate(weights) / "config.json"
    config = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
    return {"digest": digest_of(weights), "config": config}


def _tokenizer_of(weights: Path) -> str | None:
    from spt_fast.train.origin import tokenizer_digest

    return tokenizer_digest(weights) if weights.is_dir() else None

"""lm-eval's tasks for our models. lm-eval is imported only when it is needed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from numbers import Real
from typing import Any

import lm_eval
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from spt_fast.errors import DataError, SptError, cut, invalid, nearest
from spt_fast.evaluation.likelihood import TextModel
from spt_fast.evaluation.results import Metric, TaskResult, settings_of

MOST_GENERATED = 256
"""Default limit on an answer's tokens: lm-eval's own."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the limit on generated tokens in tasks."""


class HarnessModel(LM):
    """The interface that lm-eval needs of a model."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self._model = model

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For pairs (context, continuation)."""
        found = self._model.likelihoods([self._model.pair(*request.args) for request in requests])
        return [(one.nats, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For whole texts (text,)."""
        windows = [self._model.windows(*request.args) for request in requests]
        found = iter(self._model.likelihoods([window for of_text in windows for window in of_text]))
        return [sum(next(found).nats for _ in of_text) for of_text in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For pairs (context, settings)."""
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        said: dict[int, str] = {}
        for places in alike.values():
            settings = requests[places[0]].args[1]
            until, sampled = settings.get("until") or [], settings.get("do_sample", False)
            continued = self._model.continuations(
                [requests[i].args[0] for i in places],
                [until] if isinstance(until, str) else until,
                next((settings[name] for name in LENGTHS if settings.get(name)), MOST_GENERATED),
                temperature=settings.get("temperature", 1.0) if sampled else 0.0,
                top_k=settings.get("top_k") if sampled else None,
                top_p=settings.get("top_p") if sampled else None,
            )
            said |= zip(places, continued, strict=True)
        return [said[i] for i in range(len(requests))]


def find(names: Sequence[str]) -> TaskManager:
    """All of lm-eval's tasks; DataError for a name that is neither a task nor a file."""
    manager = TaskManager()
    for name in names:
        if not name.endswith((".yaml", ".yml")) and name not in manager.all_tasks:
            expected = f"give lm-eval's name of a task, a .yaml or a .jsonl file; {nearest(name, manager.all_tasks)}"
            raise DataError(invalid("tasks", name, expected), argument=True)
    return manager


def score(
    model: TextModel, manager: TaskManager, names: Sequence[str], num_fewshot: int | None, limit: int | None
) -> list[TaskResult]:
    """The results of tasks and groups of tasks; DataError if lm-eval can't run one."""
    for chatty in ("lm_eval", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None  # git prints a fatal error outside of a repository
    try:
        said = evaluator.simple_evaluate(
            HarnessModel(model), tasks=[*names], num_fewshot=num_fewshot, limit=limit, task_manager=manager
        )
    except SptError:
        raise
    except Exception as error:  # tasks contain arbitrary code
        reason = cut(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise DataError(
            f"tasks: lm-eval cannot run {', '.join(names)} ({reason}); if its data can't be fetched, copy the "
            "Hugging Face cache of a machine that has it (HF_HOME), or name local files in a task file",
            argument=True,
        ) from error
    return [_result(model, task, said, limit) for task in said["results"]]


def _result(model: TextModel, task: str, said: dict[str, Any], limit: int | None) -> TaskResult:
    samples = sorted(said["samples"].get(task, []), key=lambda sample: sample["doc_id"])
    asked = [[sample[key] for key in ("doc_hash", "prompt_hash", "target_hash")] for sample in samples]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    counts = said["n-samples"].get(task, {})
    questions = counts.get("effective") or said["results"][task].get("sample_len") or 0
    metrics = {}
    for key, value in said["results"][task].items():
        name, _, kept_by = key.partition(",")
        if not kept_by or name.endswith("_stderr") or not isinstance(value, Real):
            continue
        each = [sample.get(name) for sample in samples if sample["filter"] == kept_by]
        error = said["results"][task].get(f"{name}_stderr,{kept_by}")
        known = isinstance(error, Real)
        metrics[name if kept_by == "none" else f"{name} ({kept_by})"] = Metric(
            float(value),
            float(error) if known else None,
            [*map(float, each)] if each and all(isinstance(one, Real) for one in each) else None,
        )
    settings = settings_of(
        model,
        version=f"{said['versions'].get(task)}, {digest}",
        library=f"lm-eval {lm_eval.__version__}",
        num_fewshot=said["n-shot"].get(task) or 0,
        limit=limit if questions != counts.get("original") else None,
    )
    return TaskResult(task=task, questions=questions, metrics=metrics, settings=settings)

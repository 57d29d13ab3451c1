"""How a run computes, decided before its first step: the dtype, the backend and launch of every op, and on a CPU the
number of threads.

A resumed run keeps the choices of its checkpoint. Another uses what was measured on this machine for its shapes; on a
GPU that has not trained such shapes yet, they are measured first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spt_fast.config import load_recipe
from spt_fast.errors import RecipeError, invalid
from spt_fast.kernels import auto_backends, chosen_backends
from spt_fast.kernels.backend import Candidate, install, pass_over
from spt_fast.kernels.judging import Question, checker
from spt_fast.kernels.self_check import Fault, self_check
from spt_fast.kernels.trials import Shape, questions, trial
from spt_fast.kernels.tuner import chosen, describe, known, tune
from spt_fast.model.config import GPTConfig
from spt_fast.model.flops import parameters
from spt_fast.model.gpt import gains_by_fp8
from spt_fast.printing import terminal
from spt_fast.train.plan import PhasePlan, Plan, make_plan
from spt_fast.train.precision import Precision, begin_or_keep, pick_precision, precision_of
from spt_fast.train.state import Compute
from spt_fast.train.threads import USUAL, threads_of
from spt_fast.train.world import launched_processes, pick_device

AT_START_S = 120.0
SAMPLE = GPTConfig(layers=6, width=384, heads=6, kv_heads=6, ffn=1024, context=512, vocab_size=16384)
"""What is tuned without a recipe."""
REPLACES = {"swiglu_mlp": "swiglu_linear", "self_attention": "qkv_attention"}
"""The ops that models call now, which also project their input, and those that they called before, with the same
backends and launches."""

Records = Mapping[str, Mapping[str, Any]]
"""The tuner's results, by op."""


@dataclass(frozen=True)
class Choices:
    """The same in every process of a run."""

    precision: Precision
    kernels: Records = field(default_factory=dict)
    threads: int | None = None
    """None keeps the current number."""
    faults: Sequence[Fault] = ()
    """Backends that give wrong results on this machine."""

    def install(self) -> dict[str, str]:
        """Use these choices from now on in this process; returns the backend that `auto` now means, by op."""
        install(chosen(self.kernels))
        for fault in self.faults:
            pass_over(fault.op, fault.backend)
        if self.threads:
            torch.set_num_threads(self.threads)
        return auto_backends()

    def measured(self) -> dict[str, Any]:
        """For a checkpoint."""
        kept = ("date", "default", "chosen", "seconds")
        kernels = {op: {key: record[key] for key in kept} for op, record in self.kernels.items()}
        threads = {"threads": self.threads} if self.threads else {}
        return {"precision": self.precision.reason, "kernels": kernels, **threads}

    def lines(self) -> Iterator[str]:
        """Lines on every choice that is not the default."""
        yield from (f"warning: {fault}" for fault in self.faults)
        if self.threads and self.threads != USUAL:
            yield f"threads: {self.threads} rather than {USUAL}, which were slower"
        for op, record in self.kernels.items():
            if record["chosen"] != record["default"]:
                yield f"{op}: {Candidate.read(record['chosen'])}: {describe(record)}"


def choose(
    plan: Plan,
    device: torch.device,
    processes: int,
    before: Compute | None = None,
    *,
    say: Callable[[str], object] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Choices:
    """For a run that starts or resumes (`before`). say: reports what takes time; without it, as in a dry run, no op is
    measured and nothing is recorded."""
    if say is not None and before is not None:
        return _kept(plan, device, processes, before, say)
    alone = device.type == "cpu" and processes == 1
    threads = _take_threads(plan.model, plan.recipe.precision, *_batch(plan, processes)) if alone else None
    precision = precision_of(plan.recipe, device, plan.model, record=say is not None)
    asked = asked_by(plan, precision, device, processes)
    found = known(asked)
    if say is None:
        return Choices(precision, found, threads)
    if device.type == "cuda" and plan.recipe.engine.tune_kernels and len(found) < len(asked):
        say(f"timing kernels for this GPU and these shapes, once, up to {AT_START_S:.0f} s (engine.tune_kernels)")
        found = tune(asked, seconds=AT_START_S, say=say, stop=stop)
    return Choices(precision, found, threads, _faults(plan, precision, device))


def _kept(plan: Plan, device: torch.device, processes: int, before: Compute, say: Callable[[str], object]) -> Choices:
    """The choices of a resumed run, as far as this machine can follow them."""
    precision = begin_or_keep(plan.recipe, device, plan.model, before)
    alone = device.type == "cpu" and processes == 1 and not os.environ.get("OMP_NUM_THREADS")
    threads = before.measured.get("threads") if alone else None
    asked = asked_by(plan, precision, device, processes)
    kernels = _renamed(before.measured.get("kernels", {}), asked)
    faults = _faults(plan, precision, device)
    if device.type == "cuda":
        kernels = without_unfit(kernels, asked, say)
    return Choices(precision, kernels, min(threads, USUAL) if threads else None, faults)  # there may be fewer cores


def _renamed(records: Records, asked: Sequence[Question]) -> Records:
    """A checkpoint's choices for ops that the model no longer calls, under the names of those that replace them."""
    names = {REPLACES[question.op]: question.op for question in asked if question.op in REPLACES}
    later = {names[op]: record for op, record in records.items() if op in names}
    return {**later, **{op: record for op, record in records.items() if op not in names}}


def without_unfit(records: Records, asked: Sequence[Question], say: Callable[[str], object]) -> Records:
    """The choices that this machine can run: another GPU may have less memory for a launch, or lack a backend. Resets
    what is installed."""
    left = dict(records)
    for question in asked:
        if question.op in records:
            candidate = Candidate.read(records[question.op]["chosen"])
            dtype, device = getattr(torch, question.dtype), torch.device(question.device)
            problem = checker(question.op, trial(question.op, question.small, dtype, device))(candidate)
            if problem:
                say(f"warning: {question.op}: {candidate}, which the run used before, {problem}; the default is used")
                del left[question.op]
    install({})
    return left


def _faults(plan: Plan, precision: Precision, device: torch.device) -> Sequence[Fault]:
    """On a GPU, where kernels are compiled just in time."""
    return self_check(device, precision.dtype, head_dim=plan.model.head_dim) if device.type == "cuda" else ()


def _take_threads(
    config: GPTConfig, precision: str, sequences: int, context: int, *, measure: bool = False
) -> int | None:
    """Set this process's number of threads to the measured one: later measurements are made with it."""
    found = threads_of(config, precision, sequences, context, measure=measure)
    if not found:
        return None
    torch.set_num_threads(found["chosen"])
    return found["chosen"]


def _longest(plan: Plan) -> PhasePlan:
    return max(plan.phases, key=lambda phase: phase.tokens)


def _batch(plan: Plan, processes: int) -> tuple[int, int]:
    """Sequences of a micro-batch, and tokens of each."""
    return _longest(plan).micro(processes), _longest(plan).context


def asked_by(plan: Plan, precision: Precision, device: torch.device, processes: int) -> list[Question]:
    """The questions for the tuner on a plan, at the shapes of its longest phase."""
    sequences, context = _batch(plan, processes)
    return asked_of(
        plan.model,
        precision.dtype,
        device,
        sequences=sequences,
        context=context,
        documents=_longest(plan).phase.documents,
        deterministic=plan.recipe.engine.deterministic,
        fp8=plan.recipe.engine.fp8,
        selective=plan.recipe.engine.checkpointing == "selective",
    )


def asked_of(
    config: GPTConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    sequences: int,
    context: int,
    documents: bool,
    deterministic: bool,
    fp8: bool = False,
    selective: bool = False,
) -> list[Question]:
    """The questions for the tuner on a model trained in such micro-batches; with `selective` checkpointing, which looks
    at every op, projections are not fused with what follows or precedes them."""
    shape = Shape(
        sequences=sequences,
        context=context,
        width=config.width,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        ffn=config.ffn,
        vocab_size=config.vocab_size,
        window=config.window,
        documents=documents,
        parameters=parameters(config),
    )
    normalised = config.qk_norm and config.qk_norm_over != "width"
    in_fp8 = fp8 and gains_by_fp8((config.width, 2 * config.ffn))
    attention = "qkv_attention" if normalised or in_fp8 or selective else "self_attention"
    if config.qk_norm_over == "width":
        attention = "flash_attention"
    activation = "swiglu_packed" if in_fp8 else "swiglu_linear" if selective else "swiglu_mlp"
    ops = ["add_rms_norm", activation, "embedding", "adamw_step"]
    ops += ["qk_norm_rope" if normalised else "rope", *(["fp8_linear"] if in_fp8 else [])]
    ops += ["linear_cross_entropy", attention]  # the ones with the most candidates get the remaining time
    return questions(ops, shape, dtype, device, deterministic=deterministic)


def overview(
    path: Path | None, overrides: Sequence[str] = (), *, seconds: float | None = None
) -> tuple[dict[str, str], Records]:
    """By op the backend that `auto` means for a recipe's run, or for SAMPLE, and why; and the records that decided it.
    seconds: measure missing ops for at most this long. "precision" is among the ops, and "threads" if their number was
    measured. RecipeError for overrides without a recipe."""
    device = pick_device()
    alone = device.type == "cpu" and launched_processes() == 1
    if path is None:
        if overrides:
            raise RecipeError(invalid("--set", overrides[0], "there is no recipe to change; give RECIPE too"))
        shape: dict[str, Any] = {"sequences": 4, "context": SAMPLE.context, "documents": False, "deterministic": False}
        threads = _take_threads(SAMPLE, "auto", 4, SAMPLE.context, measure=seconds is not None) if alone else None
        precision = pick_precision("auto", device, SAMPLE)
        asked = asked_of(SAMPLE, precision.dtype, device, **shape)
    else:
        recipe = load_recipe(path, tuple(overrides))
        plan = make_plan(recipe, world=launched_processes())
        batch = _batch(plan, launched_processes())
        threads = _take_threads(plan.model, recipe.precision, *batch, measure=seconds is not None) if alone else None
        precision = precision_of(recipe, device, plan.model)
        asked = asked_by(plan, precision, device, launched_processes())
    found = known(asked) if seconds is None else tune(asked, seconds=seconds, say=terminal(stderr=True).print)
    install(chosen(found))
    backends, reasons = auto_backends(), chosen_backends()
    for op, record in found.items():
        candidate = Candidate.read(record["chosen"])
        launches = str(candidate).removeprefix(candidate.backend)
        reasons[op] = f"{backends[op]}: {describe(record)}{launches}"
    counted = {"threads": f"{threads}: the fastest of those tried"} if threads else {}
    return {**reasons, "precision": str(precision), **counted}, found

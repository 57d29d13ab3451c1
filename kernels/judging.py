"""Correctness and time of an op's candidates: the work of the tuner's child processes.

A candidate is correct if its error, against float64, is at most twice that of PyTorch's ops of the same dtype, and if
two runs give the same bits. Correct ones are timed in turns, forward and with the backward pass: on a GPU its own time,
if the host takes no more than the head start (`measured`) to launch.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spt_fast.kernels import flash_attn
from spt_fast.kernels.backend import Candidate, install
from spt_fast.kernels.measured import Clock, gpu_seconds, host_seconds, medians

NOT_REACHED = "was not reached in time"
TIMING_SHARE = 0.25
"""Share of a request's time; checks have the rest."""
ROUNDS = 25
REPEATED_S = 0.003
"""A faster candidate is run several times between two readings of the clock."""
MAY_DIFFER = ("auto", "sdpa", *flash_attn.BACKENDS)
"""Backends that add in any order, or may choose one that does; only `deterministic` forbids them."""
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}


@dataclass(frozen=True)
class Trial:
    """An op to try at a shape.

    call        (*inputs, backend=...) -> results; one that works in place returns the changed tensors
    gradients   how many of the inputs, from the first, have one
    candidates  the default first
    """

    call: Callable[..., Any]
    inputs: Sequence[Tensor]
    gradients: int
    candidates: Sequence[Candidate]


@dataclass(frozen=True)
class Question:
    """A question for the tuner. source: "module:function", which makes the Trial of (shape, dtype, device); `small` is
    a shape with the same launch that takes little time in float64."""

    op: str
    source: str
    shape: Mapping[str, Any]
    small: Mapping[str, Any]
    dtype: str
    device: str
    deterministic: bool = False


def judge(request: Mapping[str, Any], tell: Callable[..., None]) -> None:
    """In the child: reports for every candidate of a question what is wrong with it, or how long it takes."""
    question = Question(**request["question"])
    device, dtype = torch.device(question.device), getattr(torch, question.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(request["threads"])
    if question.deterministic:
        torch.use_deterministic_algorithms(True)
    module, _, function = question.source.partition(":")
    make = getattr(importlib.import_module(module), function)
    whole, small = (make(question.op, shape, dtype, device) for shape in (question.shape, question.small))
    candidates = [Candidate.read(plain) for plain in request["candidates"]] or whole.candidates
    tell(candidates=[one.plain() for one in candidates])
    judged = {i for i, _ in request["judged"]}
    until = time.monotonic() + (1 - TIMING_SHARE) * (request["ends"] - time.monotonic())
    check = checker(question.op, small)
    passed = []
    for i, candidate in enumerate(candidates):
        if i in judged:
            continue
        tell(at=i)
        problem: str | None = NOT_REACHED
        if i == 0 or time.monotonic() < until:
            strict = question.deterministic or candidate.backend not in MAY_DIFFER
            problem = check(candidate) or unstable(question.op, whole, candidate, strict)
        if problem:
            tell(problems=[[i, problem]])
            use(device)
        else:
            passed.append(i)
    rivals: list[Callable[[], object]] = []
    times, clock = [], gpu_seconds if device.type == "cuda" else host_seconds
    for i in passed:
        tell(at=i)
        both, repeated = _rivals(question.op, whole, candidates[i], clock)
        rivals += both
        times.append(repeated)
    tell(at=None)
    taken = medians(rivals, rounds=ROUNDS, seconds=max(0.1, request["ends"] - time.monotonic()), clock=clock)
    for i, repeated, forward, step in zip(passed, times, taken[::2], taken[1::2], strict=True):
        tell(seconds=[[i, [forward / repeated, max(0.0, step - forward) / repeated]]])


def use(device: torch.device) -> None:
    """RuntimeError if any illegal access has ended this process's use of the GPU."""
    torch.ones(1, device=device).add_(1).item()


def _results(
    op: str, trial: Trial, candidate: Candidate, inputs: Sequence[Tensor], upstream: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Outputs and gradients; without `upstream`, those of half the sum of the outputs' squares."""
    given = [x.detach().clone().requires_grad_(n < trial.gradients) for n, x in enumerate(inputs)]
    install({op: candidate})
    outputs = trial.call(*given, backend=candidate.backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = given[: trial.gradients]
    gradients = torch.autograd.grad(outputs, leaves, upstream or [y.detach() for y in outputs]) if leaves else ()
    return [*(y.detach() for y in outputs), *gradients]


def checker(op: str, trial: Trial) -> Callable[[Candidate], str | None]:
    """What is wrong with a candidate's numbers: it may have twice the error of PyTorch's ops in this dtype, against
    float64, plus a rounding of the largest number."""
    plain = Candidate("reference")
    outputs = _results(op, trial, plain, trial.inputs)
    upstream = [torch.ones_like(y) + y for y in outputs[: len(outputs) - trial.gradients]]
    wide = [x.double() if x.is_floating_point() else x for x in trial.inputs]
    exact = _results(op, trial, plain, wide, [u.double() for u in upstream])
    allowed = _results(op, trial, plain, trial.inputs, upstream)

    def check(candidate: Candidate) -> str | None:
        try:
            found = _results(op, trial, candidate, trial.inputs, upstream)
        except Exception as error:
            return f"raises {type(error).__name__}: {str(error)[:200]}"
        for number, (f, a, e) in enumerate(zip(found, allowed, exact, strict=True)):
            wrong, usual = (float((x.double() - e).abs().max()) if e.numel() else 0.0 for x in (f, a))
            rounding = ROUNDING.get(a.dtype, 0.0) * float(e.abs().max() if e.numel() else 0.0)
            if not wrong <= 2 * usual + rounding:
                return f"has an error of {wrong:.3g} in result {number}, PyTorch's ops of {usual:.3g}"
        return None

    return check


def unstable(op: str, trial: Trial, candidate: Candidate, strict: bool) -> str | None:
    """What is wrong if a candidate's numbers are not finite, or, if `strict`, not the same twice."""
    try:
        first, second = (_results(op, trial, candidate, trial.inputs) for _ in range(2))
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:200]}"
    if not all(x.isfinite().all() for x in first):
        return "gives numbers that are not finite"
    if strict and not all(map(torch.equal, first, second)):
        return "gives other bits the second time"
    return None


def _rivals(op: str, trial: Trial, candidate: Candidate, clock: Clock) -> tuple[list[Callable[[], object]], int]:
    """The timed functions, the forward pass and both passes, and how many times each runs."""
    given = [x.detach().requires_grad_(n < trial.gradients) for n, x in enumerate(trial.inputs)]
    leaves = given[: trial.gradients]

    def once(backward: bool) -> None:
        outputs = trial.call(*given, backend=candidate.backend)
        if backward and leaves:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(outputs, leaves, [y.detach() for y in outputs])

    def several(backward: bool, times: int) -> None:
        install({op: candidate})
        for _ in range(times):
            once(backward)

    clock(partial(several, True, 1))
    twice = host_seconds(lambda: clock(partial(several, True, 2)))  # with a GPU's head start, which has to suffice
    times = max(1, round(2 * REPEATED_S / twice))
    return [partial(several, backward, times) for backward in (False, True)], times

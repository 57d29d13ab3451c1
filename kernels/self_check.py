"""Checks the ops on this machine: each once against PyTorch's own in float64, and twice for equal bits.

Compilers and drivers have bugs that only some GPUs and versions show. `auto` doesn't use what fails
(`backend.pass_over`), and the run reports it. An illegal memory access ends all use of the GPU in its process, so the
check runs in a child.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from spt_fast.kernels.backend import OPS, BackendError, Candidate, install, obstacle
from spt_fast.kernels.child import Child, Died, Undecided
from spt_fast.kernels.judging import MAY_DIFFER, Trial, checker, unstable, use
from spt_fast.kernels.trials import TRIALS, Shape, trial_of

SHAPE = Shape(
    sequences=2, context=192, width=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab_size=512,
    window=None, documents=False, parameters=1 << 12,
)  # fmt: skip
"""More than a block in every dimension, with a partial last block."""
LONGEST_S = 300.0
"""Time limit, compilation included."""
TASK = "spt_fast.kernels.self_check:check"


@dataclass(frozen=True)
class Fault:
    """An error of a backend in an op."""

    op: str
    backend: str
    problem: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} is not used: it {self.problem}"


def self_check(device: torch.device, dtype: torch.dtype, *, head_dim: int = 64, task: str = TASK) -> list[Fault]:
    """Tries every backend that `auto` may use for tensors in this dtype on this device, in a separate process, or in
    this one if there can't be one. Resets what is installed."""
    faults: dict[tuple[str, str], str] = {}
    at: list[str] | None = None

    def hear(**message: Any) -> None:
        nonlocal at
        at = message.get("at", at)
        if "fault" in message:
            op, backend, problem = message["fault"]
            faults[op, backend] = problem

    request = {"task": task, **asked(device, dtype, head_dim)}
    with Child() as child:
        while True:
            at = None
            try:
                for message in child.ask(request, time.monotonic() + LONGEST_S):
                    hear(**message)
            except (Died, Undecided) as death:
                if at is not None:
                    faults.setdefault((at[0], at[1]), str(death))
                    request["after"] = at
                    continue
                check(request, hear)
            return [Fault(*where, problem) for where, problem in faults.items()]


def asked(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> dict[str, Any]:
    """The messages to `check`."""
    shape = asdict(replace(SHAPE, head_dim=head_dim))
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "shape": shape}


def check(request: Mapping[str, Any], tell: Callable[..., object]) -> None:
    """Reports what it works on, [op, backend], and its faults, [op, backend, problem]. It starts `after` the pair that
    ended the previous process."""
    device, dtype, shape = torch.device(request["device"]), getattr(torch, request["dtype"]), Shape(**request["shape"])
    use(device)  # if this fails, no backend is at fault
    after = request.get("after")
    for op in TRIALS:
        cases: list[tuple[Trial, Callable[[Candidate], str | None]]] = []
        for backend in OPS[op].auto[device.type]:
            if after:
                after = None if after == [op, backend] else after
                continue
            if backend == "reference" or obstacle(backend, device.type, dtype):
                continue
            if not cases:
                shapes = [shape, replace(shape, documents=True)] if op.endswith("attention") else [shape]
                trials = [trial_of(op, each, dtype, device) for each in shapes]
                cases = [(trial, checker(op, trial)) for trial in trials]
            tell(at=[op, backend])
            if problem := _problem(op, backend, cases):
                tell(fault=[op, backend, problem])
                use(device)
    tell(at=None)
    install({})


def _problem(op: str, backend: str, cases: Sequence[tuple[Trial, Callable[[Candidate], str | None]]]) -> str | None:
    candidate = Candidate(backend)
    for trial, wrong in cases:
        try:
            trial.call(*(x.clone() for x in trial.inputs), backend=backend)
        except BackendError:  # not for such heads, or on this GPU
            continue
        except Exception:
            pass  # the check says which
        if problem := wrong(candidate) or unstable(op, trial, candidate, backend not in MAY_DIFFER):
            return problem
    return None

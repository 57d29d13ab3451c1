"""Whether the ops are right on this machine: each once against PyTorch's own in float64, and twice for equal bits.

Compilers and drivers have faults that only some GPUs and versions show. What fails is passed over by `auto`
(`backend.pass_over`), and the run says so. An illegal memory access ends the process, as it would end the run; the
tuner, which tries each op in a process of its own, survives it. fp8_linear, which nothing takes unasked, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from spt_fast.kernels.backend import OPS, BackendError, Candidate, install, obstacle
from spt_fast.kernels.judging import MAY_DIFFER, checker, unstable
from spt_fast.kernels.trials import TRIALS, Shape, trial_of

SHAPE = Shape(
    sequences=2, context=192, width=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab_size=512,
    window=None, documents=False, parameters=1 << 12,
)  # fmt: skip
"""More than a block of everything, and the last block not full."""


@dataclass(frozen=True)
class Fault:
    """What a backend does wrong in an op."""

    op: str
    backend: str
    problem: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} is passed over: it {self.problem}"


def self_check(device: torch.device, dtype: torch.dtype, *, head_dim: int = 64) -> list[Fault]:
    """Tries every backend that `auto` may take for tensors in this dtype on this device. Forgets what is installed."""
    shape = replace(SHAPE, head_dim=head_dim)
    faults = []
    for op in TRIALS:
        shapes = [shape, replace(shape, documents=True)] if op.endswith("attention") else [shape]
        for backend in OPS[op].auto[device.type]:
            if backend == "reference" or obstacle(backend, device.type, dtype):
                continue
            if problem := _problem(op, backend, shapes, dtype, device):
                faults.append(Fault(op, backend, problem))
    install({})
    return faults


def _problem(op: str, backend: str, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> str | None:
    for shape in shapes:
        trial, candidate = trial_of(op, shape, dtype, device), Candidate(backend)
        try:
            trial.call(*trial.inputs, backend=backend)
        except BackendError:  # not for such heads
            continue
        except Exception:
            pass  # the check says which
        problem = checker(op, trial)(candidate) or unstable(op, trial, candidate, backend not in MAY_DIFFER)
        if problem:
            return problem
    return None

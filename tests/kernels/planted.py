"""An op with candidates that go wrong in every way, for the tuner: y = 2 x."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from spt_fast.kernels import self_check, trials
from spt_fast.kernels.backend import Candidate
from spt_fast.kernels.judging import Trial
from spt_fast.kernels.launch import Config, launched

SHAPE = ("planted",)
DEFAULT = Config((("SLEEP_US", 4000), ("BYTES", 9)), 0)
_calls = itertools.count()


def tuned(kernel: str, microseconds: int) -> Candidate:
    return Candidate("quick", ((kernel, SHAPE, Config((("SLEEP_US", microseconds), ("BYTES", 9)), 0)),))


def exits() -> None:
    os._exit(3)


def segfaults() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def raises() -> None:
    raise RuntimeError("no such instruction")


ODD: dict[str, Callable[[], object]] = {
    "exits": exits,
    "segfaults": segfaults,
    "raises": raises,
    "hangs": lambda: time.sleep(600),
    "slow": lambda: time.sleep(0.016),
}


def double(x: Tensor, *, backend: str) -> Tensor:
    if backend == "auto":
        time.sleep(0.012)
    elif backend == "quick":
        for kernel in ("one", "two"):
            time.sleep(launched(kernel, SHAPE, DEFAULT)["SLEEP_US"] / 1e6)
    elif backend in ODD:
        ODD[backend]()
    elif backend == "wrong":
        return 2 * x + x.abs().max() / 50
    elif backend in ("unstable", "sdpa"):
        time.sleep(0.014)
        return 2 * x * (1 + 1e-7 * (next(_calls) % 3))
    elif backend == "infinite":
        return 2 * x / (x.shape[0] < 100)
    return 2 * x


def trial(op: str, shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Trial:
    x = torch.randn(shape["rows"], 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    names = shape.get("candidates", [])
    launches = [tuned("one", 2000), tuned("one", 6000), tuned("two", 1000)] if "quick" in names else []
    return Trial(double, (x,), 1, [Candidate("auto"), *map(Candidate, names), *launches])


def check_of_three(request: Mapping[str, Any], tell: Callable[..., None]) -> None:
    """The self-check, of an op that ends its process, one that is right and one that is wrong."""

    def planted(op: str) -> Callable[..., Any]:
        call, inputs, gradients = trials.TRIALS[op](self_check.SHAPE, torch.randn)

        def with_fault(*given: Tensor, backend: str) -> Any:
            if backend == "cpu" and op == "rms_norm":
                segfaults()
            results = call(*given, backend=backend)
            return tuple(1.1 * x for x in results) if backend == "cpu" and op == "rope" else results

        return lambda shape, random: (with_fault, inputs, gradients)

    self_check.TRIALS = trials.TRIALS = {op: planted(op) for op in ("rms_norm", "add_rms_norm", "rope")}
    self_check.check(request, tell)

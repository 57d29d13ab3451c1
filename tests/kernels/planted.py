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

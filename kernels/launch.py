"""Triton, where it is installed: `jit` and `tl` for the kernels, and the small arithmetic of launching them.

Without Triton the kernels are plain functions that nobody calls, so that every op file imports everywhere. With
TRITON_INTERPRET=1, which must be set before the first import, they run on CPU tensors. Its interpreter is wrong in
bf16: kernels convert to float32 right after every load.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    TRITON_VERSION: str | None = triton.__version__
    jit: Callable[..., Any] = triton.jit
except ImportError:
    tl, TRITON_VERSION = None, None

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


INTERPRETED = TRITON_VERSION is not None and os.environ.get("TRITON_INTERPRET") == "1"


DTYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}
"""What the kernels read and write, by Triton's name of a pointer to it."""


@dataclass(frozen=True)
class Variant:
    """One way in which a Triton kernel may be launched, for ahead-of-time compilation.

    arguments   Triton types of the arguments that are not constants: "*bf16", "*fp32", "fp32", "i32", and "i32:16" for
                a multiple of 16, for which the launcher makes a kernel of its own; None where nothing is given
    constants   the tl.constexpr arguments
    maxnreg     at most so many registers a thread; None leaves it to the assembler
    default     among those that a usual call chooses
    archs       the compute capabilities, times ten, on which it can run
    """

    kernel: Callable[..., Any]
    arguments: Mapping[str, str | None]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    default: bool = True
    archs: tuple[int, ...] = (80, 90, 100)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a small number in the interpreter, which runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


__all__ = ["DTYPES", "INTERPRETED", "TRITON_VERSION", "Variant", "jit", "multiprocessors", "next_power_of_2", "tl"]

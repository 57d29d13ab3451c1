"""Triton, if it is installed: `jit` and `tl` for the kernels, and the arithmetic of their launches.

Without Triton the kernels are plain functions that are never called, so that every op file imports everywhere. With
TRITON_INTERPRET=1, which must be set before the first import, they run on CPU tensors. Its interpreter is wrong in
bf16, so kernels convert to float32 right after every load.

Triton launches on the current GPU, whichever holds the tensors: our `jit` switches to the tensors' GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

OPTIONS = {"enable_fp_fusion": True}
"""Of every launch: a product and a sum are one instruction. Triton's default, until 3.10 reverses it."""

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    TRITON_VERSION: str | None = triton.__version__
    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

    class Kernel(triton.JITFunction):
        """A kernel that is launched on the GPU of its first tensor."""

        def run(self, *arguments: Any, **options: Any) -> Any:
            options |= OPTIONS
            tensors = (x.base if isinstance(x, TensorDescriptor) else x for x in arguments)
            on = next(x for x in tensors if isinstance(x, torch.Tensor)).device.index
            if on == torch.cuda.current_device():
                return super().run(*arguments, **options)
            with torch.cuda.device(on):
                return super().run(*arguments, **options)

    jit: Callable[..., Any] = triton.jit if INTERPRETED else Kernel
except ImportError:
    tl, TensorDescriptor, TRITON_VERSION, INTERPRETED = None, None, None, False

    def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return function


DTYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}
"""Dtypes of the kernels' tensors, by Triton's name of a pointer."""


@dataclass(frozen=True)
class Config:
    """The launch of a kernel.

    constants   the sizes of a program's blocks, and flags, by the names of the kernel's tl.constexpr arguments
    maxnreg     as in `Variant`
    """

    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None

    def __getitem__(self, constant: str) -> int:
        return dict(self.constants)[constant]

    @property
    def options(self) -> dict[str, Any]:
        """The launch's arguments."""
        registers = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {**dict(self.constants), "num_warps": self.num_warps, "num_stages": self.num_stages, **registers}


_chosen: dict[tuple, Config] = {}


def choose(kernel: str, shape: tuple, config: Config | None) -> None:
    """From now on a kernel has this launch for this shape (both as in `launched`); None for the default."""
    if config is None:
        _chosen.pop((kernel, *shape), None)
    else:
        _chosen[kernel, *shape] = config


def launched(kernel: str, shape: tuple, default: Config) -> Config:
    """The launch of a kernel for a shape, by the names that its file uses for both."""
    return _chosen.get((kernel, *shape), default)


@dataclass(frozen=True)
class Variant:
    """One launch of a Triton kernel, for ahead-of-time compilation.

    arguments   Triton types of the arguments that are not constants: "*bf16", "*fp32", "fp32", "i32", and "i32:16" for
                a multiple of 16, for which the launcher compiles a separate kernel; None for an absent argument
    constants   the tl.constexpr arguments
    maxnreg     limit of registers per thread; None leaves it to the assembler
    default     whether a usual call has this launch
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


__all__ = [
    "DTYPES",
    "INTERPRETED",
    "OPTIONS",
    "TRITON_VERSION",
    "Config",
    "TensorDescriptor",
    "Variant",
    "choose",
    "jit",
    "launched",
    "multiprocessors",
    "next_power_of_2",
    "tl",
]

"""What Triton's matmuls share whose results are computed on before they are stored (feed_forward.py,
self_attention.py).

Factors and results are copied by the copy unit of Hopper and later, as descriptors say (TMA). Programs are persistent,
one of 8 warps or two of 4 for each multiprocessor, and make one tile after the other. The loads of the next tile begin
before the results of the last are stored; with two programs one multiplies while the other computes its results.

Such a product is Triton's instead of cuBLAS's, which public measurements on an H100 put at 0.92 to 1.04 times its speed
(triton pull requests 5461 and 5726), and it saves passes over memory. The tuner decides by measuring; by default none
of these kernels is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spt_fast.kernels.backend import autocasts
from spt_fast.kernels.launch import INTERPRETED, Config, TensorDescriptor, Variant, jit, multiprocessors, tl

SEPARATE = Config((), 0)
"""The launch that stands for separate kernels."""
GROUP = 8
"""Tiles below each other that are made together, so that the L2 cache holds the factors of all that run at once."""
WARPS = 8
"""Of all programs of a multiprocessor together: with more, each has too few registers."""
ALIGNMENT = 16
"""Bytes: what descriptors ask of addresses and of the distance of rows."""


def config(rows: int, columns: int, depth: int, warps: int, stages: int) -> Config:
    """A launch with tiles [rows, columns], whose sums take `depth` products per step of the loop."""
    constants = (("ROWS", rows), ("COLUMNS", columns), ("DEPTH", depth), ("GROUP", GROUP))
    return Config(constants, warps, stages)


def fits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether these kernels run for tensors of these dtypes and layouts; whether their shapes agree is not checked."""
    given = [x, *(parameter for parameter in parameters if parameter is not None)]
    widths = [x.shape[-1], *(size for parameter in given[1:] for size in parameter.shape)]  # of results too
    if not (x.is_cuda or INTERPRETED):
        return False
    arch = 9 if INTERPRETED else torch.cuda.get_device_capability(x.device)[0]
    return (
        arch in (9, 10)
        and all(each.numel() > 0 and each.dtype == x.dtype for each in given)
        and (x.dtype != torch.bfloat16 if INTERPRETED else x.itemsize == 2)  # the interpreter gets bf16 wrong
        and all(width * x.itemsize % ALIGNMENT == 0 for width in widths)
        and all(each.is_contiguous() and each.data_ptr() % ALIGNMENT == 0 for each in given[1:])
        and not autocasts(x)
    )


def describable(x: Tensor) -> Tensor:
    """x, or a copy if it isn't contiguous or its address isn't aligned."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def described(x: Tensor, *block: int) -> Any:
    """A descriptor of a `describable` tensor in blocks of this shape. Past its ends a block is 0, and is not stored."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def launch(kernel: Any, rows: int, columns: int, chosen: Config, device: torch.device, *arguments: Any) -> None:
    """Runs a kernel that makes the tiles of a result [rows, columns]."""
    tiles = -(-rows // chosen["ROWS"]) * -(-columns // chosen["COLUMNS"])
    programs = multiprocessors(device) * WARPS // chosen.num_warps
    kernel[(min(tiles, programs),)](*arguments, **chosen.options)


def variant(
    kernel: Any, dtype: str, blocks: Mapping[str, tuple], others: Mapping[str, str | None], chosen: Config, **more: int
) -> Variant:
    """A launch for ahead-of-time compilation. blocks: of the descriptors, by argument; others: Triton types of other
    arguments; more: further constants."""
    descriptors = {name: f"tensordesc<{dtype}{list(block)}>" for name, block in blocks.items()}
    constants, options = {**more, **dict(chosen.constants)}, (chosen.num_warps, chosen.num_stages)
    return Variant(kernel, {**descriptors, **others}, constants, *options, default=False, archs=(90, 100))


@jit
def place(tile, down, across, GROUP: tl.constexpr):
    """(row, column) of a tile among `down` by `across`: GROUP rows at a time, column after column."""
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = tile % (GROUP * across)
    return first + inside % height, inside // height

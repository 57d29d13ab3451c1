"""Products of two matrices: PyTorch's, but csrc/matmul.cpp for float32 on AMD's processors from family 26 (Zen 5) on.

There PyTorch calls MKL, which uses AVX2 on processors of other makers than Intel: 105 of the 255 GFLOP/s of a core,
ours up to 238. On family 25 (Zen 4), which takes AVX-512 in two halves, both reach 72 to 104, and a step takes as long
with either. In bf16 PyTorch calls oneDNN, which reaches 95% of such cores; ours was not better. A row's result of ours
is the same for any number of rows from FEWEST_ROWS on and of threads. The choice depends only on the processor and the
shapes, never on a measurement, so that a resumed run computes as before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spt_fast import native

RUNS = native.is_built() and native.ops().cpu_matmul_runs()
PAYS = RUNS and native.ops().cpu_matmul_pays()

FEWEST_ROWS = 32
"""Rows of the left factor: with fewer, packing the right one doesn't pay."""

_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default

if RUNS:
    torch.library.register_fake("spt_fast::cpu_product", lambda a, b: a.new_empty(len(a), b.shape[1]))
    torch.library.register_fake("spt_fast::cpu_matmul", lambda a, b, out, add: None)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    """a b in `out`, or added to it: a [M, K], b [K, N], out [M, N], of one dtype; out is new if it is None.

    RuntimeError: shapes or dtypes that don't fit.
    """
    if not _is_ours(a, b):
        return torch.addmm(out, a, b, out=out) if add and out is not None else torch.mm(a, b, out=out)
    if out is None:
        return native.ops().cpu_product(a, b)
    native.ops().cpu_matmul(a, b, out, add)
    return out


def rows_times(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ matrix + bias: x [..., K], matrix [K, N], bias [N], of one dtype. Ours runs without autograd."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if bias is not None and not _is_ours(rows, matrix):
        y = torch.addmm(bias, rows, matrix)
    else:
        y = multiply(rows, matrix) if bias is None else multiply(rows, matrix) + bias
    return shaped(y, (*x.shape[:-1], matrix.shape[1]))


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A new matrix y in another shape, for an autograd Function to return: of a view autograd allows no change in
    place."""
    return y if len(shape) == 2 else _UNSAFE_VIEW(y, shape)


def _is_ours(a: Tensor, b: Tensor) -> bool:
    return (
        PAYS
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and len(a) >= FEWEST_ROWS
        and 1 in a.stride()
        and 1 in b.stride()
        and not torch.compiler.is_compiling()
    )

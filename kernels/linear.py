"""A linear layer that sums its weight's gradient in float32, directly in `weight.grad`.

    y = x wᵀ + b        dx = dy w        dw += dyᵀ x        db += sum over rows of dy

Legend: N rows (all leading dimensions together), I inputs, O outputs.

The products are PyTorch's. Autograd makes dw in the dtype of w, converts it to `weight.grad_dtype` and adds it to that
of earlier micro-batches: for a bf16 weight, bytes per number are 2 written, 2 + 4 for the conversion, and 12 for the
addition, in three kernels, and every micro-batch's part is rounded to bf16. After `accumulate_in_place` for a
parameter, the product itself adds to `.grad` (beta = 1): 8 bytes, 4 the first time, one kernel, no rounding. A CPU has
no product of bf16 numbers with float32 sums: there it is rounded once, and csrc/linear.cpp adds it in one pass.

kernels/gradients.py lists the requirements for callers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast import native
from spt_fast.errors import invalid
from spt_fast.kernels.backend import CPU_LIBRARY, Op, accumulation_dtype, autocasts
from spt_fast.kernels.gradients import accumulates_in_place, gradient_of
from spt_fast.kernels.launch import Variant
from spt_fast.kernels.matmul import multiply, rows_times

_Operand = TypeVar("_Operand", Tensor, Tensor | None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x @ weight.T + bias: x [..., I], weight [O, I], bias [O], of one dtype, as the result.

    ValueError: shapes that don't fit, or a backend that isn't available. RuntimeError: dtypes that differ.
    """
    check("linear", "x", x, x.shape, weight, bias)
    if backend != "auto":
        _LINEAR.pick(backend, x)
    return project(x, weight, bias)


def check(
    op: str, name: str, x: Tensor, inputs: Sequence[int], weight: Tensor, bias: Tensor | None, of: str = ""
) -> None:
    """ValueError for a weight or bias whose shape doesn't fit.

    name    of x, the argument that decides how many inputs there are
    inputs  their number at its end
    of      what the names of weight and bias begin with
    """
    shape = weight.shape
    if not inputs:
        raise ValueError(invalid(f"{op}({name})", (), "it must have one or more dimensions"))
    if len(shape) != 2 or shape[1] != inputs[-1]:
        expected = f"it must be [O, {inputs[-1]}], for {name} {tuple(x.shape)}"
        raise ValueError(invalid(f"{op}({of}weight)", tuple(shape), expected))
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != shape[0]):
        expected = f"it must be [{shape[0]}], for {of}weight {tuple(shape)}"
        raise ValueError(invalid(f"{op}({of}bias)", tuple(bias.shape), expected))


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of shapes that fit."""
    if torch.is_grad_enabled() and accumulates_in_place(weight) and not autocasts(x):
        return _InPlace.apply(x, weight, bias)
    return F.linear(x, weight, bias) if torch.is_grad_enabled() else rows_times(x, weight.T, bias)


def as_autocast(*tensors: _Operand) -> list[_Operand]:
    """A product's operands, in autocast's dtype if it is on."""
    x = next(x for x in tensors if x is not None)
    if not autocasts(x):
        return list(tensors)
    dtype = torch.get_autocast_dtype(x.device.type)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # the parameter itself: a checkpoint's copy of saved tensors is not
        ctx.bias = bias if accumulates_in_place(bias) else None
        return rows_times(x, weight.T, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = rows_times(dy, weight) if ctx.needs_input_grad[0] else None
        return dx, *weight_gradients(dy, x, ctx.weight, ctx.bias, ctx.needs_input_grad[1:])


def weight_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The `wanted` gradients of the weight and bias of y = x wᵀ + b. Those of the given `weight` and `bias` are added
    in place, and None here."""
    dy_NO = dy.reshape(dy.shape[:-1].numel(), dy.shape[-1])
    x_NI = x.reshape(len(dy_NO), x.shape[-1])
    dweight = dbias = None
    if weight is not None:
        add_product(*gradient_of(weight), dy_NO.T, x_NI)
    elif wanted[0]:
        dweight = multiply(dy_NO.T, x_NI)
    if wanted[1]:
        dbias = dy_NO.sum(0, dtype=accumulation_dtype(dy))
        if bias is not None:
            total, new = gradient_of(bias)
            total.copy_(dbias) if new else total.add_(dbias)
            dbias = None
    return dweight, dbias


def add_product(total: Tensor, new: bool, a: Tensor, b: Tensor, product: Tensor | None = None) -> None:
    """Adds a b to the total, in float32 (float64 for float64 factors); a `new` total becomes a b, whatever it holds.

    product: memory in the factors' dtype for a CPU's a b, which would otherwise be allocated.
    """
    dtype = accumulation_dtype(a)
    if a.dtype != dtype and not a.is_cuda:
        product = torch.mm(a, b, out=product) if product is not None else a @ b
        if new:
            total.copy_(product)
        elif a.dtype == torch.bfloat16 and CPU_LIBRARY and total.is_contiguous():
            native.ops().cpu_add_product(total, product)
        else:
            total.add_(product)
    elif a.dtype == dtype:
        multiply(a, b, total, add=not new)
    else:
        torch.addmm(total, a, b, beta=0 if new else 1, out_dtype=dtype, out=total)


def variants() -> list[Variant]:
    return []


_LINEAR = Op("linear", {device: {"reference": "PyTorch's matmul"} for device in ("cuda", "cpu")}, variants)

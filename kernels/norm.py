"""RMSNorm, alone and fused with the residual addition before it.

    r = (mean(x^2) + eps)^(-1/2)        x^ = x r        y = x^ w                    (Zhang & Sennrich, arXiv 1910.07467)
    dw = sum over rows of dy x^         dx = r (dy w - x^ mean(dy w x^))

Legend: N rows (all leading dimensions together), D the normalised width.

What is saved for the backward pass is x, w and one r a row; x^ is made again. Bytes moved for bf16, in an ideal kernel:
forward 4ND (read x, write y), backward 6ND (read x and dy, write dx). In the pre-norm residual stream, the sum that the
norm reads is a sum that the block before has to write, so `add_rms_norm` makes both in one pass: 8ND forward instead of
10ND, 8ND backward instead of 12ND.

Every sum is taken in float32 (float64 for float64 inputs) and rounded once, to the dtype of x. The weight's gradient is
handed on in that wider dtype, unrounded, for those who accumulate in it (`weight.grad_dtype`); autograd casts it to the
weight's dtype for those who don't. The weight may have another dtype than x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spt_fast.kernels.backend import Op, accumulation_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., D] and weight [D], any floating dtypes; the result has x's shape and dtype.
    ValueError: shapes that don't fit, or a backend that isn't available.
    """
    _check("rms_norm", x, weight)
    return _RMS_NORM[backend](x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual, weight), x + residual), both in x's dtype.

    x and residual [..., D] of one shape and dtype, weight [D]. The sum is rounded to x's dtype before it is
    normalised, so that the norm is exactly that of the stream which is handed on.
    ValueError: shapes or dtypes that don't fit, or a backend that isn't available.
    """
    _check("add_rms_norm", x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            "add_rms_norm: x and residual must agree; "
            f"given {x.dtype} {tuple(x.shape)} and {residual.dtype} {tuple(residual.shape)}"
        )
    return _ADD_RMS_NORM[backend](x, residual, weight, eps)


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight must be [{x.shape[-1] if x.dim() else 'D'}] as x's last dimension, not {tuple(weight.shape)}"
        )


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y [..., D] in x's dtype, r [..., 1] in the accumulation dtype)."""
    wide = x.to(accumulation_dtype(x))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).mul_(weight.to(wide.dtype)).to(x.dtype), rstd


def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dx [..., D], dw [D]) in the accumulation dtype."""
    dtype, D = rstd.dtype, x.shape[-1]
    dy, weight = dy.to(dtype), weight.to(dtype)
    x_hat = x.to(dtype) * rstd
    product = dy * x_hat
    dw = product.reshape(-1, D).sum(0)
    projection = (product @ weight).div_(D).unsqueeze(-1)
    return (dy * weight).addcmul_(x_hat, projection, value=-1).mul_(rstd), dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dw = _backward(dy, x, weight, rstd)
        return dx.to(x.dtype), dw, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        stream = x + residual
        y, rstd = _forward(stream, weight, eps)
        ctx.save_for_backward(stream, weight, rstd)
        ctx.set_materialize_grads(False)
        return y, stream

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstream: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dstream, dstream, None, None
        dx, dw = _backward(dy, stream, weight, rstd)
        if dstream is not None:
            dx.add_(dstream)
        dx = dx.to(stream.dtype)
        return dx, dx, dw, None


_RMS_NORM = Op("rms_norm", {"reference": _RMSNorm.apply})
_ADD_RMS_NORM = Op("add_rms_norm", {"reference": _AddRMSNorm.apply})

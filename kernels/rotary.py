"""Rotary position embedding (RoPE), alone and fused with the per-head RMSNorm of queries and keys (QK-norm).

In the rotate-half convention of Hugging Face Llama a head x = (a, b) of D = 2h numbers is h pairs (a_i, b_i), each
turned by the angle t / theta^(2i/D) of its position t:

    a' = a cos - b sin        b' = b cos + a sin                                       (Su et al., arXiv 2104.09864)

`cos` and `sin` hold the h angles twice over, once for each half. A rotation is orthogonal, so its gradient is the
rotation by the opposite angle, and nothing but the two tables has to be saved.

Legend: B batch, T positions, H heads (queries and keys may have different numbers), D head dimension.

Bytes moved for bf16, in an ideal kernel: 4·B·T·D·(Hq + Hk) each way; with QK-norm fused the same, against twice that
for norm and rotation one after the other. The arithmetic is float32 (float64 for float64 inputs), rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spt_fast.kernels.backend import Op, accumulation_dtype
from spt_fast.kernels.norm import rms_norm


def rope(q_BTHD: Tensor, k_BTHD: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated to their positions.

    q_BTHD and k_BTHD may differ in heads; cos and sin are [T, D] or [B, T, D], with halves repeated, and are taken as
    constants (no gradient). The results have the shapes and dtypes of q and k.
    ValueError: an odd D, shapes that don't fit, or a backend that isn't available.
    """
    _check("rope", q_BTHD, k_BTHD, cos, sin)
    _ROPE.pick(backend, q_BTHD)
    return _rope_reference(q_BTHD, k_BTHD, cos, sin)


def qk_norm_rope(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`rope` of queries and keys that were RMS-normalised head by head, with weights [D] shared by all heads (Qwen3).

    Shapes, dtypes and errors as in `rope`.
    """
    _check("qk_norm_rope", q_BTHD, k_BTHD, cos, sin)
    _QK_NORM_ROPE.pick(backend, q_BTHD)
    return _qk_norm_rope_reference(q_BTHD, k_BTHD, q_weight, k_weight, cos, sin, eps)


def _check(op: str, q_BTHD: Tensor, k_BTHD: Tensor, cos: Tensor, sin: Tensor) -> None:
    if (
        q_BTHD.dim() != 4
        or k_BTHD.dim() != 4
        or q_BTHD.shape[:2] + q_BTHD.shape[3:] != k_BTHD.shape[:2] + k_BTHD.shape[3:]
    ):
        raise ValueError(
            f"{op}: q {tuple(q_BTHD.shape)} and k {tuple(k_BTHD.shape)} must be [B, T, H, D] and agree in all but H"
        )
    B, T, _, D = q_BTHD.shape
    if D % 2:
        raise ValueError(f"{op}: the head dimension must be even, not {D}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((T, D), (B, T, D)):
            raise ValueError(f"{op}: {name} must be [{T}, {D}] or [{B}, {T}, {D}], not {tuple(table.shape)}")


def _rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype, half = accumulation_dtype(x_BTHD), x_BTHD.shape[-1] // 2
    cos, sin = cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)
    x = x_BTHD.to(dtype)
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y.to(x_BTHD.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x_BTHD, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHD: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy_BTHD, cos, -sin), None, None


def _rope_reference(q_BTHD: Tensor, k_BTHD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _Rotation.apply(q_BTHD, cos, sin), _Rotation.apply(k_BTHD, cos, sin)


def _qk_norm_rope_reference(
    q_BTHD: Tensor, k_BTHD: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    q_BTHD = rms_norm(q_BTHD, q_weight, eps, backend="reference")
    k_BTHD = rms_norm(k_BTHD, k_weight, eps, backend="reference")
    return _rope_reference(q_BTHD, k_BTHD, cos, sin)


_ROPE = Op("rope", {"cuda": {"reference": "PyTorch ops"}, "cpu": {"reference": "PyTorch ops"}})
_QK_NORM_ROPE = Op("qk_norm_rope", {"cuda": {"reference": "PyTorch ops"}, "cpu": {"reference": "PyTorch ops"}})

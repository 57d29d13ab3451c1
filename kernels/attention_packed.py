"""Attention of a whole projection: queries, keys and values side by side, as one matmul writes them.

    q, k, v = split(qkv)        q, k = R norm(q), R norm(k)        o = attention(q, k, v)

Norm and rotation R (rotary.py) are optional. With separate ops, the backward pass would write dq, dk and dv, read dq
and dk to rotate them back and write them elsewhere, and then copy all three side by side for the matmul: for bf16
8·B·T·D·(H + K) + 4·B·T·D·(H + 2K) bytes after attention's own gradients. Here they are written where the matmul needs
them, and dq and dk are rotated back in place: 4·B·T·D·(H + K) bytes, one kernel instead of two.

triton, cpu     our attention kernels accept the gradients' strides. Without QK-norm the CPU's kernel rotates queries
                and keys as it reads them and their gradients as it writes them, which needs no pass at all.
others          return gradients as three tensors: these are rotated back into the one, and v's is copied.

Queries and keys are rotated into new memory, not in place: a checkpointed block may hold the projection, and norms need
it again. Inputs are never changed.

Legend: B rows, T positions, H query heads, K key/value heads, S = H + 2K, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_fast.kernels import attention_cpu, attention_triton, rotary
from spt_fast.kernels.backend import accumulation_dtype, custom_op, new_like


def split(qkv_BTSD: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) as views."""
    q, k, v = qkv_BTSD.split([qkv_BTSD.shape[2] - 2 * K, K, K], dim=2)
    return q, k, v


@custom_op("qkv_rotation", lambda qkv_BTSD, q_weight, k_weight, cos, sin, K, *_: _rotated_like(qkv_BTSD, K))
def rotation(
    qkv_BTSD: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    K: int,
    eps: float,
    backend: str,
) -> Tensor:
    """Queries and keys, normalised if there are weights, and rotated: [B, T, H + K, D]."""
    q, k, _ = split(qkv_BTSD, K)
    rotated = _rotated_like(qkv_BTSD, K)
    q_out, k_out = rotated.split([q.shape[2], K], dim=2)
    rotary.rotate_into(q_out, k_out, q, k, q_weight, k_weight, cos, sin, eps, backend)
    return rotated


def _rotated_like(qkv_BTSD: Tensor, K: int) -> Tensor:
    B, T, S, D = qkv_BTSD.shape
    return qkv_BTSD.new_empty(B, T, S - K, D)


def _weights_gradients(x: Tensor) -> Tensor:
    return x.new_empty(2, x.shape[-1], dtype=accumulation_dtype(x))


def _rotate_back(
    dqkv_BTSD: Tensor,
    dq: Tensor,
    dk: Tensor,
    qkv_BTSD: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    K: int,
    eps: float,
    backend: str,
) -> Tensor:
    """From the gradients of the rotated tensors to those of the inputs, in dqkv, which may hold dq and dk already;
    returns the weights' [2, D], which are undefined without weights. qkv is needed with weights."""
    q_out, k_out, _ = split(dqkv_BTSD, K)
    if qkv_BTSD is None or q_weight is None or k_weight is None:
        rotary.rotate_into(q_out, k_out, dq, dk, None, None, cos, sin, 0.0, backend, inverse=True)
        return _weights_gradients(dqkv_BTSD)
    q, k, _ = split(qkv_BTSD, K)
    return rotary.backward_into(q_out, k_out, dq, dk, q, k, q_weight, k_weight, cos, sin, eps, backend)


def _side_by_side(dq: Tensor, dk: Tensor, dv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    (B, T, H, D), K = dq.shape, dv.shape[2]
    return dq.new_empty(B, T, H + 2 * K, D), _weights_gradients(dq)


@custom_op("qkv_rotation_backward", _side_by_side)
def rotation_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv_BTSD: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dqkv, the gradients of both weights); qkv is needed with weights."""
    dqkv, _ = _side_by_side(dq, dk, dv)
    K = dv.shape[2]
    copy_heads(split(dqkv, K)[2], dv)
    return dqkv, _rotate_back(dqkv, dq, dk, qkv_BTSD, q_weight, k_weight, cos, sin, K, eps, backend)


WIDEST = torch.complex128
"""The dtype with the largest numbers, 16 bytes."""


def copy_heads(into_BTHD: Tensor, x_BTHD: Tensor) -> None:
    """Copies 16 bytes at a time where the heads of a position lie side by side in both, and are whole numbers of them.
    PyTorch copies tensors with gaps number by number: bf16 at 1.5 TB/s on an H200 with 4.2."""
    pair, (_, _, H, D) = [into_BTHD, x_BTHD], x_BTHD.shape
    sizes = [size for x in pair for size in (H * D, x.storage_offset(), *x.stride()[:2])]
    if all(x.stride()[2:] == (D, 1) for x in pair) and all(
        size * into_BTHD.itemsize % WIDEST.itemsize == 0 for size in sizes
    ):
        pair = [x.flatten(2).view(WIDEST) for x in pair]
    pair[0].copy_(pair[1])


@custom_op("qkv_attention_backward", lambda qkv_BTSD, *_: (*new_like(qkv_BTSD), _weights_gradients(qkv_BTSD)))
def attention_backward(
    qkv_BTSD: Tensor,
    rotated: Tensor | None,
    do_BTHD: Tensor,
    o_BTHD: Tensor,
    lse_BHT: Tensor,
    where: Tensor,
    cu_seqlens: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    K: int,
    window: int | None,
    scale: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dqkv, the gradients of both weights); `where`: the visible keys, as in the backend's forward pass."""
    dqkv = qkv_BTSD.new_empty(qkv_BTSD.shape)
    gradients, inputs = split(dqkv, K), _inputs(qkv_BTSD, rotated, K)
    if backend == "triton":
        attention_triton.backward_into(
            *gradients, do_BTHD, *inputs, o_BTHD, lse_BHT, where, cu_seqlens, True, window, scale
        )
    else:
        angles = (cos, sin) if rotated is None else (None, None)
        attention_cpu.backward_into(*gradients, do_BTHD, *inputs, where, o_BTHD, lse_BHT, scale, *angles)
    if rotated is None or cos is None or sin is None:
        return dqkv, _weights_gradients(dqkv)
    dq, dk, _ = gradients
    return dqkv, _rotate_back(dqkv, dq, dk, qkv_BTSD, q_weight, k_weight, cos, sin, K, eps, backend)


def _inputs(qkv_BTSD: Tensor, rotated: Tensor | None, K: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = split(qkv_BTSD, K)
    return (q, k, v) if rotated is None else (*rotated.split([q.shape[2], K], dim=2), v)


class Attention(torch.autograd.Function):
    """o [B, T, H, D], by our own kernels ("triton" or "cpu")."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTSD: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        K: int,
        window: int | None,
        scale: float,
        eps: float,
        backend: str,
    ) -> Tensor:
        qkv = qkv_BTSD.detach()
        weights = [None if w is None else w.detach() for w in (q_weight, k_weight)]
        rotated = None
        if cos is not None and sin is not None and (backend == "triton" or q_weight is not None):
            rotated = rotation(qkv, *weights, cos, sin, K, eps, backend)
        inputs = _inputs(qkv, rotated, K)
        if backend == "triton":
            o_BTHD, lse_BHT, where = attention_triton.attention(*inputs, cu_seqlens, True, window, scale)
        else:
            where = attention_cpu.first_keys(qkv.shape[0], qkv.shape[1], cu_seqlens, window)
            angles = (cos, sin) if rotated is None else (None, None)
            o_BTHD, lse_BHT = attention_cpu.attention(*inputs, where, scale, *angles)
        ctx.save_for_backward(qkv, rotated, o_BTHD, lse_BHT, where, cu_seqlens, *weights, cos, sin)
        ctx.K, ctx.window, ctx.scale, ctx.eps, ctx.backend = K, window, scale, eps, backend
        return o_BTHD

    @staticmethod
    def backward(ctx: Any, do_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        qkv, rotated, *others = ctx.saved_tensors
        options = (ctx.K, ctx.window, ctx.scale, ctx.eps, ctx.backend)
        dqkv, dw = attention_backward(qkv, rotated, do_BTHD, *others, *options)
        weighted = others[4] is not None
        return dqkv, dw[0] if weighted else None, dw[1] if weighted else None, *[None] * 8


class Rotated(torch.autograd.Function):
    """(q, k, v) for attention whose gradients come as three tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTSD: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        K: int,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv_BTSD.detach()
        weights = [None if w is None else w.detach() for w in (q_weight, k_weight)]
        ctx.save_for_backward(None if q_weight is None else qkv, *weights, cos, sin)
        ctx.eps, ctx.backend = eps, backend
        return _inputs(qkv, rotation(qkv, *weights, cos, sin, K, eps, backend), K)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint allows only that
        dqkv, dw = rotation_backward(*gradients, *saved, ctx.eps, ctx.backend)
        weighted = saved[1] is not None
        return dqkv, dw[0] if weighted else None, dw[1] if weighted else None, *[None] * 5

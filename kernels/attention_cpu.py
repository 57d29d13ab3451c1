"""Causal attention on CPUs, float32 with AVX-512 and bf16 with AVX512-BF16: csrc/attention.cpp as a custom op.

A query sees an interval of keys that ends with itself, so causality, rows, documents and a window reduce to one number
per query, `first_BT`: the first key in its row that it sees, or one beyond itself for padding. Scores exist one tile of
64 x 64 at a time, in float32; the backward pass recomputes them from q, k and the base-2 logarithm of each softmax's
denominator. With rotary tables it rotates q and k as it reads them, and their gradients back as it writes them, which
saves a pass over each in attention of a whole projection (attention_packed.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_fast import native
from spt_fast.kernels.backend import custom_op, differentiable, new_like, with_dense_rows
from spt_fast.kernels.documents import first_keys as first_keys_of

INSTRUCTIONS = {torch.float32: "AVX-512", torch.bfloat16: "AVX512-BF16"}
"""What a CPU needs, by dtype."""
SUPPORTED = frozenset(
    dtype for dtype in INSTRUCTIONS if native.is_built() and native.ops().cpu_attention_supported(dtype)
)
MAX_HEAD_DIM = 256


def obstacle(q_BTHD: Tensor, causal: bool) -> str | None:
    """Why this can't compute the attention of these queries; None if it can."""
    D, dtype = q_BTHD.shape[-1], q_BTHD.dtype
    if q_BTHD.device.type != "cpu" or dtype not in INSTRUCTIONS:
        return f"it supports float32 and bfloat16 on the CPU, not {dtype} on {q_BTHD.device.type}"
    if dtype not in SUPPORTED:
        return f"this CPU has no {INSTRUCTIONS[dtype]}, which {dtype} needs, or the C++ extension is not built"
    if not causal:
        return "it is only causal"
    if D % 16 or not 0 < D <= MAX_HEAD_DIM:
        return f"it supports head dimensions that are multiples of 16 up to {MAX_HEAD_DIM}, not {D}"
    return None


def attend(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, cu_seqlens: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """Causal attention; arguments as in `flash_attention`."""
    B, T = q_BTHD.shape[:2]
    return attention(q_BTHD, k_BTHD, v_BTHD, first_keys(B, T, cu_seqlens, window), scale, None, None)[0]


def first_keys(B: int, T: int, cu_seqlens: Tensor | None, window: int | None) -> Tensor:
    """int32 [B, T]: the first key in its row that each query sees; one past itself for padding."""
    if cu_seqlens is not None:
        return first_keys_of(cu_seqlens, B, T, window)
    first_BT = torch.zeros(B, T, dtype=torch.int32)
    if window is not None:
        first_BT = torch.maximum(first_BT, torch.arange(1 - window, T - window + 1, dtype=torch.int32))
    return first_BT


def _empty_results(q_BTHD: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, T, H, D = q_BTHD.shape
    return q_BTHD.new_empty(B, T, H, D), q_BTHD.new_empty(B, H, T, dtype=torch.float32)


@custom_op("attention_cpu", _empty_results)
def attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    first_BT: Tensor,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, D], log2 of the softmax's denominator, float32 [B, H, T]); with cos and sin for rotated q and k."""
    q, k, v = with_dense_rows(q_BTHD, k_BTHD, v_BTHD)
    return native.ops().cpu_attention_forward(q, k, v, first_BT, scale, *_angles(cos, sin))


def _angles(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    """Contiguous and of one shape; empty for None."""
    if cos is None or sin is None:
        return torch.empty(0), torch.empty(0)
    cos, sin = torch.broadcast_tensors(cos, sin)
    return cos.float().contiguous(), sin.float().contiguous()


@custom_op("attention_cpu_backward", lambda do_BTHD, q_BTHD, k_BTHD, v_BTHD, *_: new_like(q_BTHD, k_BTHD, v_BTHD))
def _attention_backward(
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    first_BT: Tensor,
    o_BTHD: Tensor,
    lse2_BHT: Tensor,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = new_like(q_BTHD, k_BTHD, v_BTHD)
    backward_into(dq, dk, dv, do_BTHD, q_BTHD, k_BTHD, v_BTHD, first_BT, o_BTHD, lse2_BHT, scale, cos, sin)
    return dq, dk, dv


def backward_into(
    dq_BTHD: Tensor,
    dk_BTHD: Tensor,
    dv_BTHD: Tensor,
    do_BTHD: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    first_BT: Tensor,
    o_BTHD: Tensor,
    lse2_BHT: Tensor,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Writes the three gradients, in which the numbers of a head are contiguous."""
    do, q, k, v, o = with_dense_rows(do_BTHD, q_BTHD, k_BTHD, v_BTHD, o_BTHD)
    native.ops().cpu_attention_backward(
        do, q, k, v, first_BT, o, lse2_BHT, scale, *_angles(cos, sin), dq_BTHD, dk_BTHD, dv_BTHD
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q_BTHD, k_BTHD, v_BTHD, first_BT, ctx.scale, cos, sin = inputs
    ctx.save_for_backward(q_BTHD, k_BTHD, v_BTHD, first_BT, *output, cos, sin)


def _gradients(ctx: Any, do_BTHD: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, cos, sin = ctx.saved_tensors
    return *_attention_backward(do_BTHD, *saved, ctx.scale, cos, sin), None, None, None, None


differentiable(attention, _gradients, _setup_context)

"""Causal attention: documents, sliding window, grouped queries.

    o_i = sum_j p_ij v_j,   p_i = softmax over the visible j of scale q_i·k_j                    (Dao, arXiv 2307.08691)

Key j is visible to query i where j <= i (causal), j > i - window (if there is a window) and both lie in one document
(if there are cu_seqlens). Query head h reads key/value head floor(h Hk / Hq).

Documents are given as the cumulative ends of the B·T positions read as one line: document d is cu_seqlens[d] …
cu_seqlens[d+1] - 1. Row ends cut too, documents may be empty, and positions past the last document are padding: they
see nothing, nothing sees them, their output and all their gradients are 0, whatever they hold (NaN too).

Legend: B rows, T positions, H heads, D head dimension; doc_BT the document number of every position.

The work is 4·T·D multiply-adds a head and row of queries forward and 10 backward, half of it under the causal mask.
What costs bytes is a T x T matrix of scores a head, which a fused kernel such as PyTorch's SDPA never writes. The
reference is SDPA, with a mask of B·T·T booleans for documents and of T·T for a window, which is the simple way, not
the fast one.

On a CPU in bf16, SDPA reaches a third of the speed of a large product of matrices, and it makes the weights p twice. So
for plain causal attention over short sequences the reference works by itself: a few heads at a time, a block of query
rows against only the keys up to its last row, scores and softmax in float32, and p kept for the backward pass in bf16
(T/2 numbers a query and head: at T = 256 a sixth more memory than the rest of a layer keeps). That halves the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spt_fast.kernels.backend import Op, accumulation_dtype

# The longest sequence for which p is kept; rows of queries in a block; bytes of scores at a time, which should stay in
# cache.
BLOCKED_MAX_TOKENS = 1024
BLOCK_ROWS = 128
CHUNK_BYTES = 8 << 20


def flash_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query to the keys that it may see; the result has the shape and dtype of q_BTHD.

    k_BTHD and v_BTHD may have fewer heads, a divisor of q's (grouped queries). cu_seqlens is int32 [n+1] on q's
    device: starts at 0, non-decreasing, at most B·T. window counts the visible keys, the query's own included, and
    needs causal=True. scale defaults to D^(-1/2).
    ValueError: shapes, window or cu_seqlens that don't fit (cu_seqlens' values are looked at only on a CPU, where
    that costs no synchronisation), or a backend that isn't available.
    """
    _check(q_BTHD, k_BTHD, v_BTHD, causal, cu_seqlens, window)
    if window is not None and window >= q_BTHD.shape[1]:
        window = None
    _FLASH_ATTENTION.pick(backend, q_BTHD)
    return _reference(q_BTHD, k_BTHD, v_BTHD, causal, cu_seqlens, window, scale)


def _check(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, cu_seqlens: Tensor | None, window: int | None
) -> None:
    shapes = f"q {tuple(q_BTHD.shape)}, k {tuple(k_BTHD.shape)}, v {tuple(v_BTHD.shape)}"
    if q_BTHD.dim() != 4 or k_BTHD.shape != v_BTHD.shape:
        raise ValueError(f"flash_attention: q, k and v must be [B, T, H, D], k and v alike; given {shapes}")
    B, T, H, D = q_BTHD.shape
    if (
        k_BTHD.dim() != 4
        or (k_BTHD.shape[0], k_BTHD.shape[1], k_BTHD.shape[3]) != (B, T, D)
        or H % max(1, k_BTHD.shape[2])
    ):
        raise ValueError(
            f"flash_attention: k and v must agree with q in B, T, D, and their heads must divide q's; given {shapes}"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"flash_attention: window must be at least 1, and with causal=True; given {window}, causal={causal}"
        )
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"flash_attention: cu_seqlens must be int32 [n+1], not {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends != sorted(ends) or ends[-1] > B * T:
            raise ValueError(
                f"flash_attention: cu_seqlens must start at 0, never fall and end by B·T = {B * T}; given {ends}"
            )


def _reference(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    window: int | None,
    scale: float | None,
) -> Tensor:
    if cu_seqlens is None and window is None:
        on_cpu_in_bf16 = q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.bfloat16
        if causal and on_cpu_in_bf16 and q_BTHD.shape[1] <= BLOCKED_MAX_TOKENS:
            return _blocked(q_BTHD, k_BTHD, v_BTHD, scale)
        return _sdpa(q_BTHD, k_BTHD, v_BTHD, None, causal, scale)
    B, T, device = q_BTHD.shape[0], q_BTHD.shape[1], q_BTHD.device
    distance_TT = torch.arange(T, device=device).unsqueeze(1) - torch.arange(T, device=device)
    visible = distance_TT >= (0 if causal else -T)
    if window is not None:
        visible = visible & (distance_TT < window)
    if cu_seqlens is None:
        return _sdpa(q_BTHD, k_BTHD, v_BTHD, visible, False, scale)

    flat = torch.arange(B * T, device=device, dtype=torch.int32)
    doc_BT = torch.searchsorted(cu_seqlens, flat, right=True).view(B, T)
    # Padding is zeroed on the way in (a weight of 0 times NaN is NaN) and on the way out; a padding query, which would
    # otherwise see nothing and divide 0 by 0, sees the other padding. Both masks return zero gradients.
    padding_BT11 = (doc_BT == len(cu_seqlens))[..., None, None]
    q_BTHD, k_BTHD, v_BTHD = (x.masked_fill(padding_BT11, 0) for x in (q_BTHD, k_BTHD, v_BTHD))
    visible_B1TT = (visible & (doc_BT.unsqueeze(2) == doc_BT.unsqueeze(1))).unsqueeze(1)
    return _sdpa(q_BTHD, k_BTHD, v_BTHD, visible_B1TT, False, scale).masked_fill(padding_BT11, 0)


def _sdpa(
    q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, visible: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    q_BHTD, k_BHTD, v_BHTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    gqa = k_BHTD.shape[1] != q_BHTD.shape[1]
    o_BHTD = F.scaled_dot_product_attention(
        q_BHTD, k_BHTD, v_BHTD, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=gqa
    )
    return o_BHTD.transpose(1, 2)


def _blocked(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float | None) -> Tensor:
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    # A Function sees requires_grad, but not whether gradients are enabled.
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHD, k_BTHD, v_BTHD))
    return _BlockedCausalAttention.apply(q_BTHD, k_BTHD, v_BTHD, scale, keep)


class _BlockedCausalAttention(torch.autograd.Function):
    """M = B · key/value heads, G query heads that share one of them, R = G · query rows of a block."""

    @staticmethod
    def forward(ctx: Any, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, scale: float, keep: bool) -> Tensor:
        kv_heads, dtype = k_BTHD.shape[2], accumulation_dtype(q_BTHD)
        q_MGTD = _by_kv_head(q_BTHD, kv_heads)
        k_MTD, v_MTD = (_by_kv_head(x, kv_heads).squeeze(1) for x in (k_BTHD, v_BTHD))
        o_MGTD = torch.empty_like(q_MGTD)
        future = torch.full((BLOCK_ROWS, BLOCK_ROWS), -torch.inf, dtype=dtype).triu_(1)
        kept: list[Tensor] = []
        for heads, blocks in _chunks(q_MGTD):
            q, k = q_MGTD[heads].to(dtype), k_MTD[heads].to(dtype) * scale
            for start, end in blocks:
                s_MRT = torch.bmm(q[:, :, start:end].flatten(1, 2), k[:, :end].mT)
                s_MRT.unflatten(1, (-1, end - start))[..., start:].add_(future[: end - start, : end - start])
                p_MRT = torch.softmax(s_MRT, dim=-1, out=s_MRT).to(q_BTHD.dtype)
                o_MGTD[heads, :, start:end] = torch.bmm(p_MRT, v_MTD[heads, :end]).unflatten(1, (-1, end - start))
                if keep:
                    kept.append(p_MRT)
        if keep:
            ctx.save_for_backward(q_MGTD, k_MTD, v_MTD, *kept)
            ctx.scale, ctx.kv_heads = scale, kv_heads
        return _by_token(o_MGTD, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        q_MGTD, k_MTD, v_MTD, *kept = ctx.saved_tensors
        kv_heads, dtype = ctx.kv_heads, accumulation_dtype(do_BTHD)
        do_MGTD = _by_kv_head(do_BTHD, kv_heads)
        dq_MGTD = torch.empty_like(q_MGTD)
        dk_MTD, dv_MTD = (torch.zeros_like(x, dtype=dtype) for x in (k_MTD, v_MTD))
        weights = iter(kept)
        for heads, blocks in _chunks(q_MGTD):
            for start, end in blocks:
                p_MRT = next(weights)
                q_MRD, do_MRD = (x[heads, :, start:end].flatten(1, 2) for x in (q_MGTD, do_MGTD))
                dp_MRT = torch.bmm(do_MRD, v_MTD[heads, :end].mT)
                ds_MRT = torch.ops.aten._softmax_backward_data(dp_MRT, p_MRT, -1, dp_MRT.dtype)
                dv_MTD[heads, :end] += torch.bmm(p_MRT.mT, do_MRD)
                dk_MTD[heads, :end] += torch.bmm(ds_MRT.mT, q_MRD)
                dq_MGTD[heads, :, start:end] = torch.bmm(ds_MRT, k_MTD[heads, :end]).unflatten(1, (-1, end - start))
        dq_BTHD = _by_token(dq_MGTD.mul_(ctx.scale), kv_heads)
        dk_BTHD, dv_BTHD = (_by_token(x.unsqueeze(1), kv_heads) for x in (dk_MTD.mul_(ctx.scale), dv_MTD))
        return dq_BTHD, dk_BTHD.to(do_BTHD.dtype), dv_BTHD.to(do_BTHD.dtype), None, None


def _chunks(q_MGTD: Tensor) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Slices of M, each with the (start, end) of its blocks of query rows."""
    M, G, T, _ = q_MGTD.shape
    size = max(1, CHUNK_BYTES // (G * min(BLOCK_ROWS, T) * T * accumulation_dtype(q_MGTD).itemsize))
    blocks = [(start, min(start + BLOCK_ROWS, T)) for start in range(0, T, BLOCK_ROWS)]
    return ((slice(start, start + size), blocks) for start in range(0, M, size))


def _by_kv_head(x_BTHD: Tensor, kv_heads: int) -> Tensor:
    """[B · kv_heads, heads / kv_heads, T, D], contiguous."""
    return x_BTHD.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _by_token(x_MGTD: Tensor, kv_heads: int) -> Tensor:
    """The inverse of `_by_kv_head`."""
    return x_MGTD.unflatten(0, (-1, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


_FLASH_ATTENTION = Op("flash_attention", {"cuda": {"reference": "PyTorch ops"}, "cpu": {"reference": "PyTorch ops"}})

"""The projection to queries, keys and values, and attention.

    qkv = x wᵀ + b        q, k, v = split(qkv)        q, k = R norm(q), R norm(k)        o = attention(q, k, v)

Legend: B rows, T positions, N = B·T, E the input's width, H query heads, K key/value heads, S = H + 2K, D head
dimension; w [S·D, E].

With separate ops (`linear`, `qkv_attention`) a GPU's kernel reads the projected queries and keys and writes them
rotated, 4·N·D·(H + K) bytes for bf16, and both are kept for the backward pass. Without a norm in between, a matmul can
rotate them as it ends: a pair of numbers to rotate together are D/2 columns apart in one tile. The kernel here does so,
with a single rounding, and only its result is kept. persistent.py says when it is used. The gradients are rotated back
by a pass of their own, and those of other backends than Triton put side by side (attention_packed.py).
"""

from __future__ import annotations

from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from spt_fast.errors import invalid
from spt_fast.kernels import attention_packed, attention_triton, flash_attn
from spt_fast.kernels.attention import ATTENTION_BACKENDS, attend, checked, flash_attention, pick
from spt_fast.kernels.backend import OPS, Candidate, Op, is_looked_at, obstacle
from spt_fast.kernels.gradients import accumulates_in_place
from spt_fast.kernels.launch import Config, Variant, jit, launched, tl
from spt_fast.kernels.linear import check, project, weight_gradients
from spt_fast.kernels.matmul import rows_times
from spt_fast.kernels.persistent import SEPARATE, config, describable, described, fits, launch, place, variant


def self_attention(
    x_BTE: Tensor,
    weight: Tensor,
    kv_heads: int,
    head_dim: int,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """qkv_attention of x_BTE @ weight.T + bias, a projection to heads of head_dim numbers; all else is passed on to it.

    weight [S·D, E], bias [S·D], of x's dtype; the result is [B, T, H, D]. ValueError: shapes that don't fit, and as in
    `qkv_attention`. RuntimeError: dtypes that differ.
    """
    K, D, positions = kv_heads, head_dim, (cos, sin, q_weight, k_weight)
    if x_BTE.dim() != 3:
        raise ValueError(invalid("self_attention(x_BTE)", tuple(x_BTE.shape), "it must be [B, T, E]"))
    check("self_attention", "x_BTE", x_BTE, x_BTE.shape, weight, bias)
    if D < 1 or weight.shape[0] % D:
        raise ValueError(invalid("self_attention(head_dim)", D, f"it must divide the weight's {len(weight)} rows"))
    separate = q_weight is not None or is_looked_at((x_BTE, weight, bias))  # which is to see every op
    if (
        not separate
        and _launched(x_BTE, weight, D) != SEPARATE
        and cos is not None
        and sin is not None
        and k_weight is None
        and fits(x_BTE, weight, bias)
    ):
        like = x_BTE[..., :1, None].expand(*x_BTE.shape[:2], len(weight) // D, D)
        visible, factor = checked(like, K, *positions, cu_seqlens, window, scale)
        masked = cu_seqlens is not None or visible is not None
        chosen = pick(backend, like, True, masked=masked, op=_SELF_ATTENTION)
        if chosen == "triton":
            return cast("Tensor", Fused.apply(x_BTE, weight, bias, cos, sin, cu_seqlens, K, D, visible, factor))
        if chosen in OTHERS:
            q, k, v = Projected.apply(x_BTE, weight, bias, cos, sin, K, D)
            return flash_attention(q, k, v, cu_seqlens=cu_seqlens, window=visible, scale=factor, backend=chosen)
    qkv_BTSD = project(x_BTE, weight, bias).unflatten(-1, (-1, D))
    op = OPS["qkv_attention"] if separate else _SELF_ATTENTION  # the one that the tuner asks for
    return attend(qkv_BTSD, K, *positions, eps, cu_seqlens, window, scale, backend, op)


class Fused(torch.autograd.Function):
    """With queries and keys that the projection has rotated, and attention in Triton."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTE: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor | None,
        K: int,
        D: int,
        window: int | None,
        scale: float,
    ) -> Tensor:
        qkv_BTSD = _projected(x_BTE, weight, bias, cos, sin, K, D)
        inputs = attention_packed.split(qkv_BTSD, K)
        o_BTHD, lse_BHT, spans = attention_triton.attention(*inputs, cu_seqlens, True, window, scale)
        ctx.save_for_backward(x_BTE, weight, qkv_BTSD, o_BTHD, lse_BHT, spans, cu_seqlens, cos, sin)
        ctx.K, ctx.window, ctx.scale = K, window, scale
        _remember(ctx, weight, bias)
        return o_BTHD

    @staticmethod
    def backward(ctx: Any, do_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTE, weight, qkv_BTSD, o_BTHD, lse_BHT, spans, cu_seqlens, cos, sin = ctx.saved_tensors
        rotated = qkv_BTSD[:, :, : qkv_BTSD.shape[2] - ctx.K]
        dqkv_BTSD, _ = attention_packed.attention_backward(
            qkv_BTSD, rotated, do_BTHD, o_BTHD, lse_BHT, spans, cu_seqlens, None, None, cos, sin, ctx.K, ctx.window,
            ctx.scale, 0.0, "triton",
        )  # fmt: skip
        return *_gradients(ctx, dqkv_BTSD, x_BTE, weight), *[None] * 7


class Projected(torch.autograd.Function):
    """(q, k, v), of which the first two are rotated, for attention whose gradients come as three tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTE: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        K: int,
        D: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x_BTE, weight, cos, sin)
        _remember(ctx, weight, bias)
        return attention_packed.split(_projected(x_BTE, weight, bias, cos, sin, K, D), K)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_BTE, weight, cos, sin = ctx.saved_tensors
        dqkv_BTSD, _ = attention_packed.rotation_backward(*gradients, None, None, None, cos, sin, 0.0, "triton")
        return *_gradients(ctx, dqkv_BTSD, x_BTE, weight), *[None] * 4


def _remember(ctx: Any, weight: Tensor, bias: Tensor | None) -> None:
    """The parameters themselves, if they accumulate in place: a checkpoint's copies of saved tensors don't."""
    ctx.in_place = [each if accumulates_in_place(each) else None for each in (weight, bias)]


def _gradients(ctx: Any, dqkv_BTSD: Tensor, x_BTE: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, the weight and the bias."""
    dy_BTC, (of_weight, of_bias) = dqkv_BTSD.flatten(2), ctx.in_place
    dx_BTE = rows_times(dy_BTC, weight) if ctx.needs_input_grad[0] else None
    return dx_BTE, *weight_gradients(dy_BTC, x_BTE, of_weight, of_bias, ctx.needs_input_grad[1:3])


# ------------------------------------------------------------------------------------------------ launches

OTHERS = ("sdpa", *flash_attn.BACKENDS)
"""Backends besides Triton that attend to what the fused projection makes."""
SIZES = ((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 3))
"""To be measured: rows and columns of a tile, depth, warps, stages."""


def candidates(D: int) -> list[Config]:
    """The fused launches; every tile holds whole heads."""
    return [config(*sizes) for sizes in SIZES] if D in (64, 128) else []


def _launched(x: Tensor, weight: Tensor, D: int) -> Config:
    return launched("qkv_projection", (*weight.shape, D, x.itemsize), SEPARATE)


def _launches(x: Tensor, weight: Tensor, cos: Tensor, *_: Tensor) -> list[Candidate]:
    if not x.is_cuda:
        return []
    D = cos.shape[-1]
    found = [Candidate("triton", (each,)) for each in attention_triton.launches(x.new_empty(0, D))]
    if fits(x, weight):
        known = ("triton", "sdpa", *flash_attn.VERSIONS)
        backends = [name for name in known if obstacle(name, x.device.type, x.dtype) is None]
        launches = [("qkv_projection", (*weight.shape, D, x.itemsize), each) for each in candidates(D)]
        found += [Candidate(*pair) for pair in product(backends, zip(launches))]
    return found


# ------------------------------------------------------------------------------------------------ the kernel


@jit
def _projection_kernel(
    x, weight, bias_ptr, cos_ptr, sin_ptr, qkv, N, E, C, ROTATED, PERIOD,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """C columns; those of the first ROTATED heads are rotated, row n by the angles in row n % PERIOD of the tables."""
    HALF: tl.constexpr = D // 2
    HEADS: tl.constexpr = COLUMNS // D
    down, across = tl.cdiv(N, ROWS), tl.cdiv(C, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        i, j = place(tile, down, across, GROUP)
        n, c = i * ROWS, j * COLUMNS
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
        for e in range(0, E, DEPTH):
            y = tl.dot(x.load([n, e]), weight.load([c, e]).T, y, input_precision="ieee")
        # Of values too, by 0: in a branch that reads sums, the compiler would let every product wait for the last.
        rows = n + tl.arange(0, ROWS)
        angles = (rows % PERIOD)[:, None] * D + tl.arange(0, HALF)[None, :]
        cos = tl.load(cos_ptr + angles).to(tl.float32)[:, None, :]
        sin = tl.load(sin_ptr + angles).to(tl.float32)[:, None, :]
        rotated = (c // D + tl.arange(0, HEADS) < ROTATED)[None, :, None]
        cos, sin = tl.where(rotated, cos, 1.0), tl.where(rotated, sin, 0.0)
        a, b = tl.split(tl.permute(tl.reshape(y, (ROWS, HEADS, 2, HALF)), (0, 1, 3, 2)))
        if bias_ptr is not None:
            columns = c + tl.arange(0, HEADS)[:, None] * D + tl.arange(0, HALF)[None, :]
            a += tl.load(bias_ptr + columns, columns < C, 0.0).to(tl.float32)[None, :, :]
            b += tl.load(bias_ptr + HALF + columns, columns < C, 0.0).to(tl.float32)[None, :, :]
        y = tl.join(a * cos - b * sin, b * cos + a * sin)
        y = tl.reshape(tl.permute(y, (0, 1, 3, 2)), (ROWS, COLUMNS))
        qkv.store([n, c], y.to(qkv.dtype))


def _projected(x_BTE: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, K: int, D: int) -> Tensor:
    """[B, T, S, D], whose queries and keys are rotated."""
    (B, T, inputs), C = x_BTE.shape, len(weight)
    x_NE, cos, sin = describable(x_BTE.reshape(B * T, inputs)), cos.contiguous(), sin.contiguous()
    chosen = _launched(x_BTE, weight, D)
    rows, columns, depth = chosen["ROWS"], chosen["COLUMNS"], chosen["DEPTH"]
    qkv_BTSD = x_BTE.new_empty(B, T, C // D, D)
    launch(
        _projection_kernel, B * T, C, chosen, x_BTE.device,
        described(x_NE, rows, depth), described(weight, columns, depth), bias, cos, sin,
        described(qkv_BTSD.view(B * T, C), rows, columns), B * T, inputs, C, C // D - K, cos.numel() // D, D,
    )  # fmt: skip
    return qkv_BTSD


def variants() -> list[Variant]:
    """The fused launches, with and without a bias; none is a default. Attention's own are those of its file."""
    found = []
    for (dtype, bias), D in product((("bf16", None), ("bf16", "*bf16"), ("fp16", None)), (64, 128)):
        others = {
            "bias_ptr": bias, "cos_ptr": "*fp32", "sin_ptr": "*fp32",
            "N": "i32", "E": "i32:16", "C": "i32:16", "ROTATED": "i32", "PERIOD": "i32",
        }  # fmt: skip
        for each in candidates(D)[: 1 if dtype == "fp16" else None]:
            rows, columns, depth = each["ROWS"], each["COLUMNS"], each["DEPTH"]
            blocks = {"x": (rows, depth), "weight": (columns, depth), "qkv": (rows, columns)}
            found.append(variant(_projection_kernel, dtype, blocks, others, each, D=D))
    return found


_SELF_ATTENTION = Op("self_attention", ATTENTION_BACKENDS, variants, _launches)

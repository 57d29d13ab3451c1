"""Rotary position embedding (RoPE), alone and fused with the per-head RMSNorm of queries and keys (QK-norm).

In the rotate-half convention of Hugging Face Llama a head x = (a, b) of D = 2h numbers is h pairs (a_i, b_i), each
turned by the angle t / theta^(2i/D) of its position t:

    y = R x:    a' = a cos - b sin        b' = b cos + a sin                           (Su et al., arXiv 2104.09864)

`cos` and `sin` hold the h angles twice, once for each half; the kernels read the first. A rotation is orthogonal, so
its gradient is the rotation by the opposite angle, and only the two tables have to be saved. With QK-norm

    y = R (x^ w)        x^ = x r        r = (mean(x^2) + eps)^(-1/2)                   (Henry et al., arXiv 2010.04245)
    g = R^-1 dy         dw = sum over all heads of g x^         dx = r (g w - x^ mean(g w x^))

where everything that follows from x is recomputed from the saved q and k: a program holds the whole head anyway.

Legend: B batch, T positions, H heads (queries and keys may have different numbers), D head dimension, h = D/2.

Bytes moved for bf16, in an ideal kernel: rope 4·B·T·D·(Hq + Hk) each way, one read and one write; qk_norm_rope the same
forward and 6·B·T·D·(Hq + Hk) backward (read x and dy, write dx), where separate ops for norm and rotation move 8 and
10. Queries and keys go through one kernel, so that the tables are read once per token and not once per head. They are
slices of one projection [B, T, (Hq + 2 Hk) D] and are read in place, by their strides; only a last dimension that is
not contiguous is copied first. The results are contiguous; attention of a whole projection (attention_packed.py) has
them written where it needs them instead, which may be where they are read.

The arithmetic is float32 (float64 for float64 inputs), rounded once. The weights' gradients are returned in that wider
dtype, unrounded, as in norm.py, and are summed in the same way: over a program's (or block's) tokens, then over
programs, always in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_fast import native
from spt_fast.errors import invalid
from spt_fast.kernels.backend import Op, accumulation_dtype, custom_op, differentiable, new_like, with_dense_rows
from spt_fast.kernels.launch import Variant, jit, multiprocessors, next_power_of_2, tl


def rope(q_BTHD: Tensor, k_BTHD: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated to their positions.

    q_BTHD and k_BTHD, of one dtype, may differ in heads; cos and sin are [T, D] or [B, T, D], with halves repeated, and
    are constants (no gradient). The results have the shapes and dtype of q and k.
    ValueError: an odd D, shapes or dtypes that don't fit, or a backend that cannot run for q.
    """
    check("rope", q_BTHD, k_BTHD, cos, sin)
    return _rope(q_BTHD, k_BTHD, cos, sin, False, _ROPE.pick(backend, q_BTHD))


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
    """`rope` of queries and keys that are RMS-normalised head by head, with weights [D] shared by all heads (Qwen3).

    Shapes, dtypes and errors as in `rope`; the weights may have other dtypes than q and k.
    """
    check("qk_norm_rope", q_BTHD, k_BTHD, cos, sin, q_weight, k_weight)
    return _qk_norm_rope(q_BTHD, k_BTHD, q_weight, k_weight, cos, sin, eps, _QK_NORM_ROPE.pick(backend, q_BTHD))


def pick(backend: str, q_BTHD: Tensor, *, normalised: bool) -> str:
    """The backend that runs a rotation, alone or with norms."""
    return (_QK_NORM_ROPE if normalised else _ROPE).pick(backend, q_BTHD)


def check(
    op: str,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
) -> None:
    """ValueError for invalid arguments of `rope`, or with weights of `qk_norm_rope`."""
    if (
        q_BTHD.dim() != 4
        or k_BTHD.dim() != 4
        or q_BTHD.shape[:2] + q_BTHD.shape[3:] != k_BTHD.shape[:2] + k_BTHD.shape[3:]
    ):
        raise ValueError(
            f"{op}: q is {tuple(q_BTHD.shape)}, k is {tuple(k_BTHD.shape)}; "
            "they must be [B, T, H, D] and agree in all but H"
        )
    if q_BTHD.dtype != k_BTHD.dtype:
        raise ValueError(f"{op}: q is {q_BTHD.dtype}, k is {k_BTHD.dtype}; they must have one dtype")
    B, T, _, D = q_BTHD.shape
    if D % 2:
        raise ValueError(invalid(f"{op}(q_BTHD)", tuple(q_BTHD.shape), "the head dimension must be even"))
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((T, D), (B, T, D)):
            expected = f"it must be [{T}, {D}] or [{B}, {T}, {D}]"
            raise ValueError(invalid(f"{op}({name})", tuple(table.shape), expected))
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: only one of q_weight and k_weight is given; give both or none")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != (D,):
            raise ValueError(invalid(f"{op}({name})", tuple(weight.shape), f"it must be [{D}]"))


# ------------------------------------------------------------------------------------------------ custom ops


@custom_op("rope", lambda q_BTHD, k_BTHD, *_: new_like(q_BTHD, k_BTHD))
def _rope(
    q_BTHD: Tensor, k_BTHD: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """q and k rotated by the angles, or by their opposites."""
    q_out, k_out = new_like(q_BTHD, k_BTHD)
    rotate_into(q_out, k_out, q_BTHD, k_BTHD, None, None, cos, sin, 0.0, backend, inverse=inverse)
    return q_out, k_out


def _rope_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _rope_gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *_rope(dq, dk, *ctx.saved_tensors, not ctx.inverse, ctx.backend), None, None, None, None


differentiable(_rope, _rope_gradients, _rope_context)


@custom_op("qk_norm_rope", lambda q_BTHD, k_BTHD, *_: new_like(q_BTHD, k_BTHD))
def _qk_norm_rope(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = new_like(q_BTHD, k_BTHD)
    rotate_into(q_out, k_out, q_BTHD, k_BTHD, q_weight, k_weight, cos, sin, eps, backend)
    return q_out, k_out


@custom_op(
    "qk_norm_rope_backward",
    lambda dy_q, dy_k, q_BTHD, k_BTHD, *_: (
        *new_like(q_BTHD, k_BTHD),
        q_BTHD.new_empty(2, q_BTHD.shape[-1], dtype=accumulation_dtype(q_BTHD)),
    ),
)
def _qk_norm_rope_backward(
    dy_q: Tensor,
    dy_k: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq and dk in the dtype of q, the gradients of both weights [2, D] in the wide dtype)."""
    dq, dk = new_like(q_BTHD, k_BTHD)
    return dq, dk, backward_into(dq, dk, dy_q, dy_k, q_BTHD, k_BTHD, q_weight, k_weight, cos, sin, eps, backend)


def _qk_norm_rope_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _qk_norm_rope_gradients(ctx: Any, dy_q: Tensor, dy_k: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dw = _qk_norm_rope_backward(dy_q, dy_k, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return dq, dk, dw[0], dw[1], None, None, None, None


differentiable(_qk_norm_rope, _qk_norm_rope_gradients, _qk_norm_rope_context)


def rotate_into(
    q_out: Tensor,
    k_out: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    backend: str,
    *,
    inverse: bool = False,
) -> None:
    """`qk_norm_rope`, or without weights `rope` (by the opposite angles if `inverse`), to q_out and k_out, which may be
    q and k. In both the heads of a position are contiguous, and positions have equal distances."""
    q_BTHD, k_BTHD = with_dense_rows(q_BTHD, k_BTHD)
    arguments = (q_out, k_out, q_BTHD, k_BTHD)
    if q_weight is None or k_weight is None:
        function = {"reference": _reference_rope, "cpu": _cpu_rope, "triton": _triton_rope}[backend]
        function(*arguments, *_tables(cos, sin), inverse)
    else:
        forward = {"reference": _reference_forward, "cpu": _cpu_forward, "triton": _triton_forward}[backend]
        forward(*arguments, q_weight.contiguous(), k_weight.contiguous(), *_tables(cos, sin), eps)


def backward_into(
    dq: Tensor,
    dk: Tensor,
    dy_q: Tensor,
    dy_k: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    backend: str,
) -> Tensor:
    """The gradients of `qk_norm_rope` to dq and dk, with strides as in `rotate_into`; they may be dy_q and dy_k.
    Returns those of the weights, [2, D] in the wide dtype."""
    return {"reference": _reference_backward, "cpu": _cpu_backward, "triton": _triton_backward}[backend](
        dq, dk, *with_dense_rows(dy_q, dy_k, q_BTHD, k_BTHD),
        q_weight.contiguous(), k_weight.contiguous(), *_tables(cos, sin), eps,
    )  # fmt: skip


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both tables, contiguous and of one shape, [T, D] or [B, T, D]."""
    if cos.dim() != sin.dim():
        cos, sin = torch.broadcast_tensors(cos, sin)
    return cos.contiguous(), sin.contiguous()


# ------------------------------------------------------------------------------------------------ reference


def _reference_rope(
    q_out: Tensor, k_out: Tensor, q_BTHD: Tensor, k_BTHD: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> None:
    sin = -sin if inverse else sin
    q_out.copy_(_rotate(_wide(q_BTHD), cos, sin))
    k_out.copy_(_rotate(_wide(k_BTHD), cos, sin))


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x)).contiguous()


def _rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_BTHD.shape[-1] // 2
    cos, sin = cos.to(x_BTHD.dtype).unsqueeze(-2), sin.to(x_BTHD.dtype).unsqueeze(-2)
    y = x_BTHD * cos
    y[..., :half].addcmul_(x_BTHD[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x_BTHD[..., :half], sin[..., half:])
    return y


def _normalised(x_BTHD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x^ [B, T, H, D], r [B, T, H, 1]) in the wide dtype."""
    x = _wide(x_BTHD)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * rstd, rstd


def _reference_forward(
    q_out: Tensor,
    k_out: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> None:
    def forward(x_BTHD: Tensor, weight: Tensor) -> Tensor:
        x_hat, _ = _normalised(x_BTHD, eps)
        return _rotate(x_hat.mul_(weight.to(x_hat.dtype)), cos, sin)

    q_out.copy_(forward(q_BTHD, q_weight))
    k_out.copy_(forward(k_BTHD, k_weight))


def _reference_backward(
    dq: Tensor,
    dk: Tensor,
    dy_q: Tensor,
    dy_k: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> Tensor:
    def backward(dx: Tensor, dy: Tensor, x_BTHD: Tensor, weight: Tensor) -> Tensor:
        x_hat, rstd = _normalised(x_BTHD, eps)
        weight = weight.to(x_hat.dtype)
        g = _rotate(_wide(dy), cos, -sin)
        product = g * x_hat
        projection = (product @ weight).div_(len(weight)).unsqueeze(-1)
        dx.copy_(g.mul_(weight).addcmul_(x_hat, projection, value=-1).mul_(rstd))
        return product.sum((0, 1, 2))

    return torch.stack((backward(dq, dy_q, q_BTHD, q_weight), backward(dk, dy_k, k_BTHD, k_weight)))


# ------------------------------------------------------------------------------------------------ csrc/rotary.cpp


def _cpu_rope(
    q_out: Tensor, k_out: Tensor, q_BTHD: Tensor, k_BTHD: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> None:
    native.ops().cpu_rope(q_BTHD, k_BTHD, cos.float(), sin.float(), inverse, q_out, k_out)


def _cpu_forward(q_out: Tensor, k_out: Tensor, q_BTHD: Tensor, k_BTHD: Tensor, *vectors_and_eps: Any) -> None:
    *vectors, eps = vectors_and_eps
    native.ops().cpu_qk_norm_rope_forward(q_BTHD, k_BTHD, *(x.float() for x in vectors), eps, q_out, k_out)


def _cpu_backward(
    dq: Tensor, dk: Tensor, dy_q: Tensor, dy_k: Tensor, q_BTHD: Tensor, k_BTHD: Tensor, *vectors_and_eps: Any
) -> Tensor:
    *vectors, eps = vectors_and_eps
    given = (dy_q, dy_k, q_BTHD, k_BTHD, *(x.float() for x in vectors))
    return native.ops().cpu_qk_norm_rope_backward(*given, eps, dq, dk)


# ------------------------------------------------------------------------------------------------ Triton

FORWARD_TILE, BACKWARD_TILE = 2048, 1024
"""Numbers of q (or of k, if it has more heads) that a program holds at once, unless a single head has more."""
FORWARD_WARP, BACKWARD_WARP = 512, 256
"""Numbers per warp: few enough that nothing is spilled and that many programs fit on a multiprocessor."""
PROGRAMS_PER_SM = 6


def _launch(Hq: int, Hk: int, D: int, tile: int, warp: int) -> tuple[dict[str, int], int]:
    """(the constants of a program, its warps).

    It processes all heads of some tokens, or, if these are more than its tile, one of several groups of them.
    """
    half, q_heads, k_heads = next_power_of_2(D // 2), next_power_of_2(Hq), next_power_of_2(Hk)
    heads = max(q_heads, k_heads)
    groups = max(1, min(heads, heads * 2 * half // tile))
    group = heads // groups * 2 * half
    tokens = max(1, min(16, tile // group))
    constants = {
        "GROUPS": groups,
        "TOKENS": tokens,
        "Q_HEADS": max(1, q_heads // groups),
        "K_HEADS": max(1, k_heads // groups),
        "HALF": half,
    }
    return constants, max(1, min(16, tokens * group // warp))


def _registers(constants: dict[str, int], half: int) -> int | None:
    """Limit of registers per thread of the backward kernel, None if the assembler's own choice spills nothing.

    If q has more heads than k and one program processes all, and if heads are no whole vectors, it aims at a high
    occupancy and spills.
    """
    if half % 16:
        return 168
    if constants["GROUPS"] > 1 or constants["Q_HEADS"] == constants["K_HEADS"]:
        return None
    return 128 if constants["HALF"] < 128 else 168


# Indices in these functions, int64 so that every offset is: b of the row, t [TOKENS, 1, 1], heads [1, HEADS, 1]; and
# i [1, 1, HALF] of the numbers in the first half of a head.


@jit
def _indices(program, T, GROUPS: tl.constexpr, TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr):
    """(b, t, heads of q, heads of k) of a program."""
    group, block, blocks = program % GROUPS, program // GROUPS, tl.cdiv(T, TOKENS)
    t = tl.cast(block % blocks, tl.int64) * TOKENS + tl.arange(0, TOKENS)
    q_heads = tl.cast(group, tl.int64) * Q_HEADS + tl.arange(0, Q_HEADS)
    k_heads = tl.cast(group, tl.int64) * K_HEADS + tl.arange(0, K_HEADS)
    return tl.cast(block // blocks, tl.int64), t[:, None, None], q_heads[None, :, None], k_heads[None, :, None]


@jit
def _load(places, mask, half):
    return tl.load(places, mask, 0.0).to(tl.float32), tl.load(places + half, mask, 0.0).to(tl.float32)


@jit
def _load_heads(ptr, b, t, heads, i, stride_b, stride_t, stride_h, T, H, half):
    """Both halves, [TOKENS, HEADS, HALF]."""
    mask = (t < T) & (heads < H) & (i < half)
    return _load(ptr + b * stride_b + t * stride_t + heads * stride_h + i, mask, half)


@jit
def _store_heads(ptr, y1, y2, b, t, heads, i, stride_t, T, H, half):
    """To a tensor in which only positions may have gaps between them."""
    mask = (t < T) & (heads < H) & (i < half)
    places = ptr + (b * T + t) * stride_t + heads * (2 * half) + i
    tl.store(places, y1.to(ptr.dtype.element_ty), mask)
    tl.store(places + half, y2.to(ptr.dtype.element_ty), mask)


@jit
def _load_table(ptr, b, t, i, table_step, T, half):
    """The first halves of rows t, [TOKENS, 1, HALF]."""
    return tl.load(ptr + b * table_step + t * (2 * half) + i, (t < T) & (i < half), 0.0).to(tl.float32)


@jit
def _rstd(x1, x2, half, eps):
    mean = (tl.sum(x1 * x1 + x2 * x2, 2) / (2 * half) + eps)[:, :, None]
    return 1 / tl.sqrt(tl.where(mean == 0, 1.0, mean))  # if eps is 0, heads beyond the last must not become NaN


@jit
def _normalise(x1, x2, weight_ptr, i, half, eps):
    w1, w2 = _load(weight_ptr + i, i < half, half)
    rstd = _rstd(x1, x2, half, eps)
    return x1 * rstd * w1, x2 * rstd * w2


@jit
def _forward_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, q_out_stride_t, k_out_stride_t, table_step,
    T, Hq, Hk, half, sign, eps,
    NORM: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, HALF)[None, None, :]
    b, t, q_heads, k_heads = _indices(tl.program_id(0), T, GROUPS, TOKENS, Q_HEADS, K_HEADS)
    q1, q2 = _load_heads(q_ptr, b, t, q_heads, i, q_stride_b, q_stride_t, q_stride_h, T, Hq, half)
    k1, k2 = _load_heads(k_ptr, b, t, k_heads, i, k_stride_b, k_stride_t, k_stride_h, T, Hk, half)
    cos = _load_table(cos_ptr, b, t, i, table_step, T, half)
    sin = _load_table(sin_ptr, b, t, i, table_step, T, half) * sign
    if NORM:
        q1, q2 = _normalise(q1, q2, q_weight_ptr, i, half, eps)
        k1, k2 = _normalise(k1, k2, k_weight_ptr, i, half, eps)
    _store_heads(q_out_ptr, q1 * cos - q2 * sin, q2 * cos + q1 * sin, b, t, q_heads, i, q_out_stride_t, T, Hq, half)
    _store_heads(k_out_ptr, k1 * cos - k2 * sin, k2 * cos + k1 * sin, b, t, k_heads, i, k_out_stride_t, T, Hk, half)


@jit
def _gradient(dy1, dy2, x1, x2, weight_ptr, cos, sin, i, half, eps):
    """(dx, and the weight's gradient before it is summed), each in two halves."""
    w1, w2 = _load(weight_ptr + i, i < half, half)
    g1, g2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
    rstd = _rstd(x1, x2, half, eps)
    x1, x2 = x1 * rstd, x2 * rstd
    dw1, dw2 = g1 * x1, g2 * x2
    projection = tl.sum(dw1 * w1 + dw2 * w2, 2)[:, :, None] / (2 * half)
    return (g1 * w1 - x1 * projection) * rstd, (g2 * w2 - x2 * projection) * rstd, dw1, dw2


@jit
def _store_sums(ptr, sum1, sum2, half, HALF: tl.constexpr):
    i = tl.arange(0, HALF)
    tl.store(ptr + i, tl.sum(tl.sum(sum1, 0), 0), i < half)
    tl.store(ptr + half + i, tl.sum(tl.sum(sum2, 0), 0), i < half)


@jit
def _backward_kernel(
    dy_q_ptr, dy_k_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dw_ptr,
    dy_q_stride_b, dy_q_stride_t, dy_q_stride_h, dy_k_stride_b, dy_k_stride_t, dy_k_stride_h,
    q_stride_b, q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, dq_stride_t, dk_stride_t, table_step,
    B, T, Hq, Hk, half, eps,
    GROUPS: tl.constexpr, TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, HALF)[None, None, :]
    sum_q1, sum_q2 = tl.zeros((TOKENS, Q_HEADS, HALF), tl.float32), tl.zeros((TOKENS, Q_HEADS, HALF), tl.float32)
    sum_k1, sum_k2 = tl.zeros((TOKENS, K_HEADS, HALF), tl.float32), tl.zeros((TOKENS, K_HEADS, HALF), tl.float32)
    for program in range(tl.program_id(0), B * tl.cdiv(T, TOKENS) * GROUPS, tl.num_programs(0)):
        b, t, q_heads, k_heads = _indices(program, T, GROUPS, TOKENS, Q_HEADS, K_HEADS)
        cos = _load_table(cos_ptr, b, t, i, table_step, T, half)
        sin = _load_table(sin_ptr, b, t, i, table_step, T, half)

        dy1, dy2 = _load_heads(dy_q_ptr, b, t, q_heads, i, dy_q_stride_b, dy_q_stride_t, dy_q_stride_h, T, Hq, half)
        x1, x2 = _load_heads(q_ptr, b, t, q_heads, i, q_stride_b, q_stride_t, q_stride_h, T, Hq, half)
        dx1, dx2, dw1, dw2 = _gradient(dy1, dy2, x1, x2, q_weight_ptr, cos, sin, i, half, eps)
        _store_heads(dq_ptr, dx1, dx2, b, t, q_heads, i, dq_stride_t, T, Hq, half)
        sum_q1 += dw1
        sum_q2 += dw2

        dy1, dy2 = _load_heads(dy_k_ptr, b, t, k_heads, i, dy_k_stride_b, dy_k_stride_t, dy_k_stride_h, T, Hk, half)
        x1, x2 = _load_heads(k_ptr, b, t, k_heads, i, k_stride_b, k_stride_t, k_stride_h, T, Hk, half)
        dx1, dx2, dw1, dw2 = _gradient(dy1, dy2, x1, x2, k_weight_ptr, cos, sin, i, half, eps)
        _store_heads(dk_ptr, dx1, dx2, b, t, k_heads, i, dk_stride_t, T, Hk, half)
        sum_k1 += dw1
        sum_k2 += dw2
    sums_ptr = dw_ptr + tl.program_id(0).to(tl.int64) * (4 * half)
    _store_sums(sums_ptr, sum_q1, sum_q2, half, HALF)
    _store_sums(sums_ptr + 2 * half, sum_k1, sum_k2, half, HALF)


def _programs(B: int, T: int, constants: dict[str, int]) -> int:
    return B * -(-T // constants["TOKENS"]) * constants["GROUPS"]


def _table_step(cos: Tensor) -> int:
    """Numbers from one row's table to the next row's."""
    return cos.stride(0) if cos.dim() == 3 else 0


def _triton_rotation(
    q_out: Tensor,
    k_out: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    sign: float,
    eps: float,
) -> None:
    (B, T, Hq, D), Hk = q_BTHD.shape, k_BTHD.shape[2]
    constants, warps = _launch(Hq, Hk, D, FORWARD_TILE, FORWARD_WARP)
    if B * T:
        _forward_kernel[(_programs(B, T, constants),)](
            q_BTHD, k_BTHD, q_weight, k_weight, cos, sin, q_out, k_out,
            *q_BTHD.stride()[:3], *k_BTHD.stride()[:3], q_out.stride(1), k_out.stride(1), _table_step(cos),
            T, Hq, Hk, D // 2, sign, eps, NORM=q_weight is not None, **constants, num_warps=warps,
        )  # fmt: skip


def _triton_rope(
    q_out: Tensor, k_out: Tensor, q_BTHD: Tensor, k_BTHD: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> None:
    _triton_rotation(q_out, k_out, q_BTHD, k_BTHD, None, None, cos, sin, -1.0 if inverse else 1.0, 0.0)


def _triton_forward(
    q_out: Tensor,
    k_out: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> None:
    _triton_rotation(q_out, k_out, q_BTHD, k_BTHD, q_weight, k_weight, cos, sin, 1.0, eps)


def _triton_backward(
    dq: Tensor,
    dk: Tensor,
    dy_q: Tensor,
    dy_k: Tensor,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> Tensor:
    (B, T, Hq, D), Hk = q_BTHD.shape, k_BTHD.shape[2]
    if not B * T:
        return q_BTHD.new_zeros(2, D, dtype=torch.float32)
    constants, warps = _launch(Hq, Hk, D, BACKWARD_TILE, BACKWARD_WARP)
    programs = min(_programs(B, T, constants), PROGRAMS_PER_SM * multiprocessors(q_BTHD.device))
    dw = q_BTHD.new_empty(programs, 2, D, dtype=torch.float32)
    strides = (stride for x in (dy_q, dy_k, q_BTHD, k_BTHD) for stride in x.stride()[:3])
    _backward_kernel[(programs,)](
        dy_q, dy_k, q_BTHD, k_BTHD, q_weight, k_weight, cos, sin, dq, dk, dw,
        *strides, dq.stride(1), dk.stride(1), _table_step(cos), B, T, Hq, Hk, D // 2, eps,
        **constants, num_warps=warps, maxnreg=_registers(constants, D // 2),
    )  # fmt: skip
    return dw.sum(0)


HEAD_SHAPES = (
    (12, 12, 64), (16, 16, 128), (32, 8, 128),
    (4, 4, 32), (6, 6, 64), (9, 3, 64), (14, 2, 64), (15, 5, 64), (25, 25, 64), (32, 8, 64),
    (32, 32, 80), (32, 8, 80), (32, 32, 96), (32, 32, 112),
    (12, 2, 128), (16, 8, 128), (64, 8, 128), (4, 1, 256), (8, 1, 256), (8, 4, 256),
)  # fmt: skip
"""(Hq, Hk, D) of models, the usual ones first."""


def variants() -> list[Variant]:
    """The launches for the heads of models in bf16, of some in float32; backward also for any number of heads, 4 to 128
    of q, of 64 or 128 numbers. The tables of one row are shared by all.

    Numbers of groups above one only shift numbers: 2 stands for all.
    """
    found = []
    cases = [(shape, "*bf16", True) for shape in HEAD_SHAPES]
    cases += [(shape, "*fp32", True) for shape in HEAD_SHAPES[:3:2]]
    powers = [1 << i for i in range(8)]
    cases += [((Hq, Hk, D), "*bf16", False) for Hq in powers[2:] for Hk in powers if Hk <= Hq for D in (64, 128)]
    for (Hq, Hk, D), dtype, forward in cases:
        default = (Hq, Hk, D) in HEAD_SHAPES[:3] and dtype == "*bf16"
        vectors = {"q_weight_ptr": dtype, "k_weight_ptr": dtype, "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
        strides = {f"{x}_stride_{axis}": "i32:16" for x in "qk" for axis in "bth"}
        sizes = {"table_step": "i32:16", **dict.fromkeys(("T", "Hq", "Hk"), "i32")}
        sizes["half"] = "i32" if D // 2 % 16 else "i32:16"
        if forward:
            constants, warps = _launch(Hq, Hk, D, FORWARD_TILE, FORWARD_WARP)
            constants["GROUPS"] = min(2, constants["GROUPS"])
            arguments: dict[str, str | None] = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), dtype)
            arguments |= strides | sizes | vectors | {"sign": "fp32", "eps": "fp32"}
            arguments |= dict.fromkeys(("q_out_stride_t", "k_out_stride_t"), "i32:16")
            found.append(Variant(_forward_kernel, arguments, {"NORM": True, **constants}, warps, default=default))
            arguments = arguments | {"q_weight_ptr": None, "k_weight_ptr": None}
            found.append(Variant(_forward_kernel, arguments, {"NORM": False, **constants}, warps, default=default))
        constants, warps = _launch(Hq, Hk, D, BACKWARD_TILE, BACKWARD_WARP)
        constants["GROUPS"] = min(2, constants["GROUPS"])
        arguments = dict.fromkeys(("dy_q_ptr", "dy_k_ptr", "q_ptr", "k_ptr", "dq_ptr", "dk_ptr"), dtype)
        arguments |= strides | {f"dy_{name}": kind for name, kind in strides.items()} | sizes | vectors
        arguments |= {"dw_ptr": "*fp32", "B": "i32", "eps": "fp32", "dq_stride_t": "i32:16", "dk_stride_t": "i32:16"}
        maxnreg = _registers(constants, D // 2)
        found.append(Variant(_backward_kernel, arguments, constants, warps, maxnreg=maxnreg, default=default))
    return found


def _op(name: str, on_cpu: str) -> Op:
    reference = {"reference": "PyTorch ops"}
    on_cuda = {"triton": "11 to 13 times PyTorch's ops (H200)"}
    return Op(name, {"cuda": on_cuda | reference, "cpu": {"cpu": on_cpu} | reference}, variants)


_ROPE = _op("rope", "4 times PyTorch's ops in bf16, 6 times in float32 (AMD EPYC, 1 thread)")
_QK_NORM_ROPE = _op("qk_norm_rope", "4 times PyTorch's ops in bf16, 8 times in float32 (AMD EPYC, 1 thread)")

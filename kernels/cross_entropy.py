"""Linear layer and cross-entropy in one op, so that the logits are never stored whole.

    z = softcap(x wᵀ)     l = logsumexp(z) - z_target + z_loss logsumexp(z)²
    dl/dz_v = p_v (1 + 2 z_loss logsumexp(z)) - [v = target],   p = softmax(z)
    softcap(s) = c tanh(s / c), whose derivative is 1 - (z / c)²

The z-loss (PaLM, arXiv 2204.02311, page 6) is part of every token's loss, so a mean is over both. Tokens whose target
is ignore_index have loss 0 and no gradient; "mean" divides by the number of the others, and without others it is 0 with
zero gradients, not NaN, so that a micro-batch of padding is harmless.

Legend: N tokens, D width, V vocabulary, C rows of a chunk. At N = 16,384 and V = 151,936 bf16 logits are 5 GB, and
their gradient as much again. Here C rows at a time are computed, turned into their gradient in place, and multiplied
into

    dx = dz w        dw = sum over chunks of dzᵀ x   (float32: sums of many chunks in bf16 make training diverge)

For "mean" and "sum" this happens in the forward pass, since the upstream gradient is one number that can be multiplied
in later: three GEMMs (6NDV multiply-adds and additions), none repeated. For "none" every row has its own upstream
gradient, which must be known first: the logits are recomputed in the backward pass (8NDV). If no gradient is needed,
only the losses are computed. Matmuls and logits are in x's dtype, everything else in float32 (float64 for float64
inputs), dz too until it is rounded once. Gradients of "mean" and "sum" are kept unscaled until the backward pass, so
that float16 doesn't lose them at 1/N.

That backward pass reads and writes dx and dw once more, 4ND + 8VD bytes for bf16, only to multiply by one number. If
the number is known ahead (`scale`), dz includes it. Then the backward pass has nothing to do, and the products can be
added to a `weight.grad` that accumulates in place (kernels/linear.py), which saves a second dw and 12VD bytes more.

The GEMMs are PyTorch's. A backend adds the pass between them, from logits to their gradient, in place. A Triton program
holds a row of at most 128 KB in its registers, which it reads and writes once: 4NV bytes for bf16. A wider row it reads
twice, for the exponentials' sum and for the gradient: 6NV bytes, less what L2 still has at the second read. Of rows
from 64 KB on, of which a multiprocessor holds a single one, the tuner may hold half and read half twice. At V = 50,304
two programs on each multiprocessor of an H100 would read 27 MB between both, at V = 151,936 80 MB; L2 has 50.
csrc/cross_entropy.cpp reads rows once, into a float32 copy in cache. PyTorch's ops make some ten passes, most of them
in float32.

Memory beyond the inputs, in the forward pass: dw (4VD bytes), dx and one chunk of logits (2ND and 2CV for bf16); on a
CPU also the product of one chunk in x's dtype (2VD), which a GPU adds to dw as it multiplies. In the backward pass: dw
and dx before and after scaling. At N = 8192, D = 4096, V = 151,936 in bf16 that is 2.5 + 0.1 + 0.9 GB forward, and
backward 2.6 GB besides the gradients themselves (1.3 GB, or 2.6 if `weight.grad_dtype` is float32).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spt_fast import native
from spt_fast.errors import invalid
from spt_fast.kernels.backend import (
    Candidate,
    Op,
    accumulation_dtype,
    custom_op,
    differentiable,
    is_looked_at,
    tried_on_gpus,
)
from spt_fast.kernels.gradients import accumulates_in_place, gradient_of
from spt_fast.kernels.launch import DTYPES, INTERPRETED, Config, Variant, jit, launched, next_power_of_2, tl
from spt_fast.kernels.linear import add_product, as_autocast
from spt_fast.kernels.matmul import multiply

CHUNK_BYTES = {"cpu": 8 << 20}
CHUNK_BYTES_ELSEWHERE = 1 << 30
"""Bytes of logits at a time. On a CPU they should stay in its cache; a chunk must also be tall enough for its GEMMs and
to pay for the pass over dw that ends it."""
CHUNK_MIN_ROWS = 1024
ROW_BYTES = 128
"""Rows of logits begin at multiples of this: otherwise GEMMs on GPUs are slow at odd vocabularies."""


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy in nats of the logits x_ND @ weight_VDᵀ against targets_N.

    x_ND and weight_VD of one floating dtype; targets_N integers in [0, V) or ignore_index. Returns losses in float32
    (float64 for float64 inputs): a scalar for "mean" (over the tokens not ignored; 0 if there are none) and "sum", [N]
    for "none". The gradient of weight_VD is returned in that dtype too if `weight.grad_dtype` allows it, else in the
    weight's dtype.

    scale, for "mean" and "sum": the loss is multiplied by this number, and its `backward()` must be called without an
    upstream gradient, which is 1 therefore. Gradients are made in the forward pass, which also adds them to
    `weight.grad` if that accumulates in place; then there is one backward pass. Not for float16, whose smallest numbers
    are too large.
    ValueError: shapes, dtypes, reduction, scale or softcap that don't fit, or a backend that cannot run for x.
    RuntimeError: a second backward pass that would not add to `weight.grad` again; on a CPU also an upstream gradient
    other than 1 of a loss with `scale`, or a target outside the vocabulary. On a GPU the Triton kernel makes that row's
    loss and gradient NaN, since an exception would have to wait for the GPU.
    """
    x_ND, weight_VD = as_autocast(x_ND, weight_VD)
    if (
        x_ND.dim() != 2
        or weight_VD.dim() != 2
        or x_ND.shape[1] != weight_VD.shape[1]
        or targets_N.shape != x_ND.shape[:1]
        or not len(weight_VD)
    ):
        raise ValueError(
            f"linear_cross_entropy: x is {tuple(x_ND.shape)}, weight is {tuple(weight_VD.shape)}, targets are "
            f"{tuple(targets_N.shape)}; they must be [N, D], [V, D] and [N], V above 0"
        )
    if x_ND.dtype != weight_VD.dtype:
        raise ValueError(f"linear_cross_entropy: x is {x_ND.dtype}, weight is {weight_VD.dtype}; they must agree")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(invalid("linear_cross_entropy(reduction)", reduction, "it must be 'mean', 'sum' or 'none'"))
    if targets_N.is_floating_point() or targets_N.is_complex() or targets_N.dtype == torch.bool:
        expected = "integers: the correct word of each token"
        raise ValueError(invalid("linear_cross_entropy(targets)", targets_N.dtype, expected))
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(invalid("linear_cross_entropy(softcap)", softcap, "it must be positive and finite, or None"))
    if scale is not None and (reduction == "none" or x_ND.dtype == torch.float16):
        expected = 'None for reduction="none" and for float16'
        raise ValueError(invalid("linear_cross_entropy(scale)", scale, expected))
    backend = _LINEAR_CROSS_ENTROPY.pick(backend, x_ND)
    wanted = torch.is_grad_enabled()
    needs_dx, needs_dw = (
        wanted and (x.requires_grad or torch._C._functorch.is_batchedtensor(x)) for x in (x_ND, weight_VD)
    )  # what vmap has wrapped doesn't say whether it requires them
    arguments = (
        x_ND, weight_VD, targets_N, ignore_index, z_loss, softcap or 0.0, reduction, needs_dx, needs_dw, backend,
    )  # fmt: skip
    if scale is None:
        return _loss(*arguments)[0]
    if is_looked_at(arguments):  # observers can't follow the passes themselves
        return _loss(*arguments)[0] * scale
    return _Scaled.apply(*arguments, scale)


class _Scaled(torch.autograd.Function):
    """The loss times a number, and in the same pass its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        ignore_index: int,
        z_loss: float,
        softcap: float,
        reduction: str,
        needs_dx: bool,
        needs_dw: bool,
        backend: str,
        scale: float,
    ) -> Tensor:
        dloss = x_ND.new_full((), scale, dtype=accumulation_dtype(x_ND))
        if reduction == "mean":
            dloss /= _count(targets_N, ignore_index)
        in_place = needs_dw and accumulates_in_place(weight_VD)
        loss_N, dx_ND, dw_VD = _sweep(
            x_ND, weight_VD, targets_N, dloss.expand(len(x_ND)), ignore_index, z_loss, softcap, needs_dx, needs_dw,
            backend, *(gradient_of(weight_VD) if in_place else ()),
        )  # fmt: skip
        ctx.save_for_backward(dx_ND if needs_dx else None, dw_VD if needs_dw and not in_place else None)
        ctx.in_place, ctx.passed = in_place, False
        return loss_N.sum() * dloss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # If it is NaN, so is the loss, and its step is skipped.
        if dloss.device.type == "cpu" and dloss != 1 and not dloss.isnan():
            raise RuntimeError(
                f"linear_cross_entropy: the upstream gradient is {dloss.item():.6g}; with `scale` it must be 1"
            )
        if ctx.in_place and ctx.passed:
            raise RuntimeError(
                "linear_cross_entropy: a second backward pass of a loss with `scale`, whose forward pass has added the "
                "weight's gradient in place, would not add it again; compute the loss again, or leave `scale` out"
            )
        ctx.passed = True
        return *ctx.saved_tensors, *[None] * 9


def _count(targets_N: Tensor, ignore_index: int) -> Tensor:
    return (targets_N != ignore_index).sum().clamp_(min=1)


# ------------------------------------------------------------------------------------------------ custom ops


def _empty_gradients(x_ND: Tensor, weight_VD: Tensor, needs_dx: bool, needs_dw: bool) -> tuple[Tensor, Tensor]:
    """Space for dx or [0], and in the wide dtype for dw or [0]."""
    dw_VD = weight_VD.new_empty(weight_VD.shape if needs_dw else (0,), dtype=accumulation_dtype(x_ND))
    return x_ND.new_empty(x_ND.shape if needs_dx else (0,)), dw_VD


@custom_op(
    "linear_cross_entropy",
    lambda x_ND, weight_VD, targets_N, ignore_index, z_loss, softcap, reduction, needs_dx, needs_dw, *_: (
        x_ND.new_empty(x_ND.shape[:1] if reduction == "none" else (), dtype=accumulation_dtype(x_ND)),
        *_empty_gradients(x_ND, weight_VD, needs_dx and reduction != "none", needs_dw and reduction != "none"),
        x_ND.new_empty((), dtype=accumulation_dtype(x_ND)),
    ),
)
def _loss(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float,
    reduction: str,
    needs_dx: bool,
    needs_dw: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, unscaled gradients by x and by weight or [0] if there is none yet, their scale []); softcap 0: none."""
    dloss_N = x_ND.new_ones(len(x_ND), dtype=accumulation_dtype(x_ND))
    now = reduction != "none"
    loss_N, dx_ND, dw_VD = _sweep(
        x_ND, weight_VD, targets_N, dloss_N, ignore_index, z_loss, softcap, needs_dx and now, needs_dw and now, backend
    )
    if reduction == "mean":
        count = _count(targets_N, ignore_index).to(loss_N.dtype)
        return loss_N.sum() / count, dx_ND, dw_VD, count.reciprocal()
    return loss_N.sum() if now else loss_N, dx_ND, dw_VD, loss_N.new_ones(())


@custom_op(
    "linear_cross_entropy_backward",
    lambda dloss_N, x_ND, weight_VD, targets_N, ignore_index, z_loss, softcap, needs_dx, needs_dw, *_: _empty_gradients(
        x_ND, weight_VD, needs_dx, needs_dw
    ),
)
def _backward_none(
    dloss_N: Tensor,
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float,
    needs_dx: bool,
    needs_dw: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """For "none": (dx or [0], dw in the wide dtype or [0]), from recomputed logits."""
    return _sweep(x_ND, weight_VD, targets_N, dloss_N, ignore_index, z_loss, softcap, needs_dx, needs_dw, backend)[1:]


@custom_op(
    "linear_cross_entropy_scale",
    lambda scale, dx_ND, dw_VD, dw_dtype: (torch.empty_like(dx_ND), torch.empty_like(dw_VD, dtype=dw_dtype)),
)
def _backward_scaled(scale: Tensor, dx_ND: Tensor, dw_VD: Tensor, dw_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For "mean" and "sum": the forward pass's gradients times one number; dw in the requested dtype."""
    dx_scaled_ND = dx_ND.to(scale.dtype, copy=True).mul_(scale).to(dx_ND.dtype)
    return dx_scaled_ND, torch.mul(dw_VD, scale, out=torch.empty_like(dw_VD, dtype=dw_dtype))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x_ND, weight_VD, targets_N, *ctx.options, reduction, ctx.needs_dx, ctx.needs_dw, ctx.backend = inputs
    loss, dx_ND, dw_VD, scale = output
    ctx.now = reduction != "none"
    ctx.save_for_backward(*((dx_ND, dw_VD, scale) if ctx.now else (x_ND, weight_VD, targets_N)))
    # Autograd would otherwise convert dw to this dtype, with one more copy of it.
    accepted = weight_VD.grad_dtype if weight_VD.is_leaf else weight_VD.dtype
    ctx.dw_dtype = accepted or loss.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if dloss is None:
        return None, None, *nothing
    if ctx.now:
        dx_ND, dw_VD, scale = ctx.saved_tensors
        dx_ND, dw_VD = _backward_scaled(scale * dloss, dx_ND, dw_VD, ctx.dw_dtype)
    else:
        dx_ND, dw_VD = _backward_none(dloss, *ctx.saved_tensors, *ctx.options, ctx.needs_dx, ctx.needs_dw, ctx.backend)
    return dx_ND if ctx.needs_dx else None, dw_VD if ctx.needs_dw else None, *nothing


differentiable(_loss, _gradients, _setup_context)


# ------------------------------------------------------------------------------------------------ chunk by chunk


def _sweep(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    dloss_N: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float,
    needs_dx: bool,
    needs_dw: bool,
    backend: str,
    total_VD: Tensor | None = None,
    new: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N], gradients of sum(dloss_N * losses) by x_ND and, in the wide dtype, by weight_VD, or [0]).

    total_VD: the gradient by weight_VD is added to it, or written if it is `new`.
    All chunks use the same buffers: on a CPU new memory costs more than the arithmetic on it.
    """
    x_ND, weight_VD, dloss_N = x_ND.contiguous(), weight_VD.contiguous(), dloss_N.contiguous()
    targets_N = targets_N.long().contiguous()
    N, V, dtype = len(x_ND), len(weight_VD), dloss_N.dtype

    rows = launched("chunks", _shape_class(x_ND, V), _chunks(_chunk_rows(x_ND, V)))["ROWS"]
    z_CV = _logits_buffer(x_ND, min(rows, N), V)
    loss_N = x_ND.new_empty(N, dtype=dtype)
    dx_ND = x_ND.new_empty(x_ND.shape if needs_dx else (0,))
    if total_VD is None:
        total_VD = weight_VD.new_empty(weight_VD.shape if needs_dw else (0,), dtype=dtype)
    if new and not N:
        total_VD.zero_()
    product_VD = torch.empty_like(weight_VD) if needs_dw and rows < N and not x_ND.is_cuda else None
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        x_CD = x_ND[chunk]
        z_CV = z_CV[: len(x_CD)]
        multiply(x_CD, weight_VD.T, z_CV)
        loss_N[chunk] = _ROWS[backend](
            z_CV, targets_N[chunk], dloss_N[chunk], ignore_index, z_loss, softcap, needs_dx or needs_dw
        )
        if needs_dx:
            multiply(z_CV, weight_VD, dx_ND[chunk])
        if needs_dw:
            add_product(total_VD, new and not start, z_CV.T, x_CD, product_VD)
    return loss_N, dx_ND, total_VD


def _chunk_rows(x_ND: Tensor, vocab_size: int) -> int:
    """Rows of a chunk: as many as fit in CHUNK_BYTES, a multiple of 128, and no chunk much shorter than the others."""
    chunk_bytes = CHUNK_BYTES.get(x_ND.device.type, CHUNK_BYTES_ELSEWHERE)
    most = max(CHUNK_MIN_ROWS, chunk_bytes // (vocab_size * x_ND.itemsize) // 128 * 128)
    chunks = -(-len(x_ND) // most)
    return most if chunks < 2 else min(most, -(-len(x_ND) // chunks // 128) * 128)


def _chunks(rows: int) -> Config:
    return Config((("ROWS", rows),), 0)


def _shape_class(x_ND: Tensor, vocab_size: int) -> tuple[str, int, int, int]:
    return x_ND.device.type, x_ND.itemsize, x_ND.shape[1], vocab_size


def _launches(x_ND: Tensor, weight_VD: Tensor, *_: Tensor) -> list[Candidate]:
    """Shorter and taller chunks, and where rows are held to read them or half of them twice, without softcap."""
    V = len(weight_VD)
    shape, usual = _shape_class(x_ND, V), _chunk_rows(x_ND, V)
    rows = {max(128, int(usual * share) // 128 * 128) for share in (0.25, 0.5, 2, 4)} - {usual}
    backend = _LINEAR_CROSS_ENTROPY.pick("auto", x_ND)
    chunks = [Candidate(backend, (("chunks", shape, _chunks(n)),)) for n in sorted(rows) if n < 2 * len(x_ND)]
    others = [_read_twice(V, False)] if V * x_ND.itemsize <= HELD_BYTES else []
    others += [_half_held(V)] if _may_be_half_held(V, x_ND.itemsize) else []
    return [*chunks, *tried_on_gpus(x_ND, "rows", (V, x_ND.itemsize, False), others)]


def _logits_buffer(x_ND: Tensor, rows: int, vocab_size: int) -> Tensor:
    numbers = ROW_BYTES // x_ND.itemsize
    return x_ND.new_empty(rows, -(-vocab_size // numbers) * numbers)[:, :vocab_size]


# ------------------------------------------------------------------------------------------------ reference


def _reference_rows(
    z_CV: Tensor,
    targets_C: Tensor,
    dloss_C: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float,
    wants_grad: bool,
) -> Tensor:
    ignored_C = targets_C == ignore_index
    targets_C1 = targets_C.masked_fill(ignored_C, 0).unsqueeze(1)
    wide_CV = z_CV.to(dloss_C.dtype)
    if softcap:
        wide_CV = torch.tanh(wide_CV / softcap).mul_(softcap)
    p_CV = torch.softmax(wide_CV, dim=1)
    # The largest logit's probability is at least 1 / V, so that its logarithm is exact to rounding.
    lse_C = wide_CV.amax(1).sub_(p_CV.amax(1).log_())
    loss_C = lse_C - wide_CV.gather(1, targets_C1).squeeze(1) + z_loss * lse_C.square()
    if wants_grad:
        dloss_C = dloss_C.masked_fill(ignored_C, 0)
        dz_CV = p_CV.mul_((dloss_C * (1 + 2 * z_loss * lse_C)).unsqueeze(1))
        dz_CV.scatter_add_(1, targets_C1, -dloss_C.unsqueeze(1))
        if softcap:
            dz_CV.mul_(wide_CV.div_(softcap).square_().neg_().add_(1))
        z_CV.copy_(dz_CV)
    return loss_C.masked_fill_(ignored_C, 0)


# ------------------------------------------------------------------------------------------------ C++


def _cpu_rows(*arguments: Any) -> Tensor:
    return native.ops().cpu_cross_entropy_rows(*arguments)


# ------------------------------------------------------------------------------------------------ Triton

HELD_BYTES, HELD_CAPPED_BYTES, HELD_PER_THREAD = 128 << 10, 100 << 10, 128
"""Bytes of the widest row that a program holds in its registers without a spill, without and with softcap, and the most
logits of it in each thread."""
WARPS, LOADED_PER_THREAD = 4, 4
"""Of such a program: the fewest warps, and logits that a thread loads at a time. Of 8, as wide as a load can be, the
maxima and sums would take so many registers that some are spilled."""
HALF_FROM, HALF_REGISTERS = 32 << 10, 64
"""Logits of 2 bytes from which on half of a row may be held, since fewer leave room for two programs anyway; and the
registers of a thread then, with which larger numbers would be spilled."""
BLOCK, NUMBERS_PER_THREAD = 8192, 16
"""Most logits at a time of a program that reads its row twice, and of each of its threads. With softcap half as many,
in half as many threads, so that none are spilled."""


def _rows_config(vocab_size: int, itemsize: int, capped: bool) -> Config:
    most = HELD_CAPPED_BYTES if capped else HELD_BYTES
    return _held(vocab_size) if vocab_size * itemsize <= most else _read_twice(vocab_size, capped)


def _held(vocab_size: int) -> Config:
    """The launch that holds rows in registers."""
    warps = next_power_of_2(-(-vocab_size // (32 * HELD_PER_THREAD)))
    warps = max(warps, min(WARPS, next_power_of_2(-(-vocab_size // (32 * LOADED_PER_THREAD)))))
    block = 32 * warps * LOADED_PER_THREAD
    return Config((("BLOCK", block), ("BLOCKS", -(-vocab_size // block))), warps)


def _half_held(vocab_size: int) -> Config:
    """The launch that holds half of a row, so that registers suffice for two programs on a multiprocessor: one loads or
    stores while the other computes."""
    whole = _held(vocab_size)
    return Config(
        (("BLOCK", whole["BLOCK"]), ("BLOCKS", whole["BLOCKS"] // 2)), whole.num_warps, maxnreg=HALF_REGISTERS
    )


def _may_be_half_held(vocab_size: int, itemsize: int) -> bool:
    return itemsize == 2 and HALF_FROM <= vocab_size <= HELD_BYTES // 2


def _has_rest(config: Config, vocab_size: int) -> bool:
    """Whether a launch holds less than the row."""
    return config["BLOCK"] * config["BLOCKS"] < vocab_size


def _read_twice(vocab_size: int, capped: bool) -> Config:
    """The launch that reads rows twice."""
    block = min(BLOCK // 2 if capped else BLOCK, next_power_of_2(vocab_size))
    # If logits are loaded one by one, the assembler aims at a high occupancy and spills.
    maxnreg = 128 if vocab_size % 16 else None
    return Config((("BLOCK", block), ("BLOCKS", 0)), max(1, block // (32 * NUMBERS_PER_THREAD)), maxnreg=maxnreg)


COMPILED = None if tl is None else tl.constexpr(not INTERPRETED)
"""Whether kernels may contain assembly."""


@jit
def _exp(x):
    """exp(x), or 0 below 2**-126: tl.exp takes three more instructions, for numbers as small as that."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def _capped(s, softcap):
    """softcap tanh(s / softcap); near 0 by an odd polynomial, since the other formula would cancel."""
    x = s / softcap
    square = x * x
    p = -5.1550859e-3 * square + 2.0111624e-2
    p = p * square - 5.3566975e-2
    p = p * square + 1.3329243e-1
    p = p * square - 3.3333197e-1
    far = 1 - 2 / (_exp(2 * tl.abs(x)) + 1)
    return softcap * tl.where(tl.abs(x) < 0.7, x + x * square * p, tl.where(x < 0, -far, far))


@jit
def _in_row(columns, V, i: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Which columns of block i are logits. Of all blocks but the last the compiler knows that all are."""
    return columns < (V - i * BLOCK if i == BLOCKS - 1 else BLOCK)


@jit
def _kept(z):
    """z, so that the compiler doesn't know it for the same: it would keep the float32 numbers of the first pass for the
    second, in twice the registers."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [z], dtype=z.dtype, is_pure=False, pack=32 // z.dtype.primitive_bitwidth
        )
    return z


@jit
def _added(top, total, z, in_row, softcap, HAS_SOFTCAP: tl.constexpr):
    """Maximum and sum of exponentials, with those of z, by place in the block: threads don't wait for each other."""
    z = z.to(tl.float32)
    if HAS_SOFTCAP:
        z = tl.where(in_row, _capped(z, softcap), float("-inf"))
    above = z - top
    smaller = _exp(-tl.abs(above))
    return tl.maximum(top, z), tl.where(above > 0, total * smaller + 1, total + smaller)


@jit
def _softmax_gradient(z, highest, p_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The gradient by logits that are not the target's, in float32."""
    z = z.to(tl.float32)
    if HAS_SOFTCAP:
        z = _capped(z, softcap)
    dz = _exp(z - highest) * p_scale
    if HAS_SOFTCAP:
        dz *= 1 - (z / softcap) * (z / softcap)
    return dz


@jit
def _rows_kernel(
    z_ptr, targets_ptr, dloss_ptr, loss_ptr, stride, V, ignore_index, z_loss, softcap,
    HAS_SOFTCAP: tl.constexpr, WANTS_GRAD: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """BLOCKS: the first blocks of a row, which are held in registers. REST: whether there are more, read twice."""
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    z_ptrs = z_ptr + columns
    target, dloss = tl.load(targets_ptr + row), tl.load(dloss_ptr + row)
    # Before the branch, which would wait for the target; after it, the compiler would mix loads and arithmetic.
    held = ()
    for i in tl.static_range(BLOCKS):
        in_row = _in_row(columns, V, i, BLOCK, BLOCKS)
        held += (tl.load(z_ptrs + i * BLOCK, in_row, float("-inf")),)  # type: ignore[assignment]
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if WANTS_GRAD:
            for start in range(0, V, BLOCK):
                tl.store(z_ptrs + start, tl.zeros((BLOCK,), z_ptr.dtype.element_ty), start + columns < V)
        return

    known = (target >= 0) & (target < V)
    z_target = tl.load(z_ptr + target, known, float("nan")).to(tl.float32)
    top, total = tl.full((BLOCK,), -3e38, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(BLOCKS):
        in_row = _in_row(columns, V, i, BLOCK, BLOCKS)
        top, total = _added(top, total, held[i], in_row, softcap, HAS_SOFTCAP)
    if REST:
        for start in range(BLOCKS * BLOCK, V, BLOCK):
            in_row = start + columns < V
            z = tl.load(z_ptrs + start, in_row, float("-inf"))
            top, total = _added(top, total, z, in_row, softcap, HAS_SOFTCAP)
    highest = tl.max(top, 0)
    total = tl.sum(total * _exp(top - highest), 0)
    lse = highest + tl.log(total)
    loss_target = _capped(z_target, softcap) if HAS_SOFTCAP else z_target
    tl.store(loss_ptr + row, lse - loss_target + z_loss * lse * lse)

    if WANTS_GRAD:
        p_scale = tl.where(known, dloss, float("nan")) * (1 + 2 * z_loss * lse) / total
        if REST:
            # Backwards, since the cache still has the end of the row.
            blocks = tl.cdiv(V, BLOCK)
            for block in range(0, blocks - BLOCKS):
                start = (blocks - 1 - block) * BLOCK
                z = tl.load(z_ptrs + start, start + columns < V, float("-inf"))
                dz = _softmax_gradient(z, highest, p_scale, softcap, HAS_SOFTCAP)
                tl.store(z_ptrs + start, dz.to(z_ptr.dtype.element_ty), start + columns < V)
        for i in tl.static_range(BLOCKS):
            dz = _softmax_gradient(_kept(held[i]), highest, p_scale, softcap, HAS_SOFTCAP)
            in_row = _in_row(columns, V, i, BLOCK, BLOCKS)
            tl.store(z_ptrs + i * BLOCK, dz.to(z_ptr.dtype.element_ty), in_row)
        dz_target = _exp(loss_target - highest) * p_scale - dloss
        if HAS_SOFTCAP:
            dz_target *= 1 - (loss_target / softcap) * (loss_target / softcap)
        tl.debug_barrier()  # of the program's threads, so that this is the last of the target's two stores
        tl.store(z_ptr + target, dz_target.to(z_ptr.dtype.element_ty), known)


def _triton_rows(
    z_CV: Tensor,
    targets_C: Tensor,
    dloss_C: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float,
    wants_grad: bool,
) -> Tensor:
    loss_C = torch.empty_like(dloss_C)
    V = z_CV.shape[1]
    shape = V, z_CV.itemsize, softcap > 0
    config = launched("rows", shape, _rows_config(*shape))
    _rows_kernel[(len(z_CV),)](
        z_CV, targets_C, dloss_C, loss_C, z_CV.stride(0), V, ignore_index, z_loss, softcap,
        HAS_SOFTCAP=softcap > 0, WANTS_GRAD=wants_grad, REST=_has_rest(config, V), **config.options,
    )  # fmt: skip
    return loss_C


def variants() -> list[Variant]:
    """The launches that hold rows and those that read them twice, with and without softcap and gradient, for
    vocabularies from bytes to 65,536 and beyond in bf16, for some in the other dtypes."""
    widths = {
        "*bf16": (256, 4096, 8192, 32_768, 50_257, 50_304, 65_536),
        "*fp16": (8192, 32_768),
        "*fp32": (8192, 32_768),
    }
    cases = [(V, dtype, False) for dtype, sizes in widths.items() for V in sizes]
    cases += [(V, dtype, True) for dtype in DTYPES for V in (BLOCK, 50_257)]
    cases += [(V, "*bf16", True) for V in (256, 4096)]
    found = []
    for V, dtype, twice in cases:
        arguments = {
            "z_ptr": dtype, "targets_ptr": "*i64", "dloss_ptr": "*fp32", "loss_ptr": "*fp32", "stride": "i32:16",
            "V": "i32" if V % 16 else "i32:16", "ignore_index": "i32", "z_loss": "fp32", "softcap": "fp32",
        }  # fmt: skip
        for capped, wants_grad in ((False, False), (False, True), (True, False), (True, True)):
            configs = [_read_twice(V, capped) if twice else _rows_config(V, DTYPES[dtype].itemsize, capped)]
            if not (twice or capped) and _may_be_half_held(V, DTYPES[dtype].itemsize):
                configs.append(_half_held(V))
            for config in configs:
                flags = {"HAS_SOFTCAP": capped, "WANTS_GRAD": wants_grad, "REST": _has_rest(config, V)}
                constants, usual = flags | dict(config.constants), config is configs[0] and dtype == "*bf16"
                usual = usual and not capped and (V, twice) in ((50_304, False), (BLOCK, True))
                found.append(
                    Variant(_rows_kernel, arguments, constants, config.num_warps, maxnreg=config.maxnreg, default=usual)
                )
    return found


_ROWS = {"reference": _reference_rows, "cpu": _cpu_rows, "triton": _triton_rows}
"""By backend, the pass over a chunk: (z_CV without softcap, targets_C, dloss_C, ignore_index, z_loss, softcap or 0,
wants_grad) -> losses [C], and if wants_grad z_CV becomes the gradient of sum(dloss_C * losses), in place."""
_LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    {
        "cuda": {
            "triton": "one pass over each chunk of logits where PyTorch makes about ten: 2.3 times its ops (H200)",
            "reference": "PyTorch ops",
        },
        "cpu": {
            "cpu": "1.6 times as fast as F.linear and F.cross_entropy, forward and backward (AMD EPYC, 1 core)",
            "reference": "PyTorch ops",
        },
    },
    variants,
    _launches,
)

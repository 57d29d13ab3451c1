"""RMSNorm, alone and fused with the residual addition before it.

    r = (mean(x^2) + eps)^(-1/2)        x^ = x r        y = x^ w                    (Zhang & Sennrich, arXiv 1910.07467)
    dw = sum over rows of dy x^         dx = r (dy w - x^ mean(dy w x^))

Legend: N rows (all leading dimensions together), D the normalised width.

The backward pass saves x, w and one r per row; x^ is recomputed. Bytes moved for bf16, in an ideal kernel: forward 4ND
(read x, write y), backward 6ND (read x and dy, write dx). In the pre-norm residual stream, the norm reads a sum that
the previous block has to write, so `add_rms_norm` computes both in one pass: 8ND forward instead of 10ND, 8ND backward
instead of 12ND.

Every sum is taken in float32 (float64 for float64 inputs) and rounded once, to the dtype of x. The weight's gradient is
returned in that wider dtype, unrounded, for callers that accumulate in it (`weight.grad_dtype`); else autograd casts it
to the weight's dtype. The weight may have another dtype than x.

A Triton program reads some whole rows at once into registers. Backward, as many programs as the GPU holds loop over the
rows, each with the sum of its part of dw in registers; these parts, [programs, D], are added at the end, or once a step
for the norms of all layers (kernels/gradients.py): no atomics, so the same result every time. For rows wider than 8,192
registers hold only that sum: they are read twice, the second time from the cache; float32 and odd widths are left to
the reference. csrc/norm.cpp does the same over blocks of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_fast import native
from spt_fast.errors import invalid
from spt_fast.kernels.backend import (
    Candidate,
    Op,
    accumulation_dtype,
    autocasts,
    custom_op,
    differentiable,
    is_looked_at,
    tried_on_gpus,
)
from spt_fast.kernels.fp8 import with_largest
from spt_fast.kernels.gradients import in_place
from spt_fast.kernels.launch import DTYPES, Config, Variant, jit, launched, multiprocessors, next_power_of_2, tl


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, largest: bool = False, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., D] and weight [D], any floating dtypes; the result has x's shape and dtype. largest: result and gradient by
    x carry the largest magnitudes of their rows, for kernels/fp8.py, if Triton kernels make them. ValueError: shapes
    that don't fit, or a backend that cannot run for x.
    """
    _check("rms_norm", x, weight)
    y, _, _, amax = _norm(x, None, weight, eps, largest, _RMS_NORM.pick(backend, x))
    return with_largest(y, amax) if amax.numel() else y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, largest: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual, weight), x + residual), both in x's dtype.

    x and residual [..., D] of one shape and dtype, weight [D]. The sum is rounded to x's dtype before it is normalised,
    so that the norm is exactly that of the returned stream. largest: as in rms_norm.
    ValueError: shapes or dtypes that don't fit, or a backend that cannot run for x.
    """
    _check("add_rms_norm", x, weight)
    if x.dtype != residual.dtype and autocasts(x):
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: x is {x.dtype} {tuple(x.shape)}, residual is {residual.dtype} {tuple(residual.shape)}; "
            "they must agree"
        )
    y, stream, _, amax = _norm(x, residual, weight, eps, largest, _ADD_RMS_NORM.pick(backend, x))
    return with_largest(y, amax) if amax.numel() else y, stream


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        D = x.shape[-1] if x.dim() else "D"
        raise ValueError(invalid(f"{op}(weight)", tuple(weight.shape), f"it must be [{D}], as x's last dimension"))


# ------------------------------------------------------------------------------------------------ custom ops


def _empty_amax(x: Tensor, largest: bool, backend: str) -> Tensor:
    """Space for the largest magnitudes in x's rows, float32 [N], or [0] if they are not made."""
    made = largest and backend == "triton"
    return x.new_empty(x.shape[:-1].numel() if made else 0, dtype=torch.float32)


@custom_op(
    "rms_norm",
    lambda x, residual, weight, eps, largest, backend: (
        x.new_empty(x.shape),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(x.shape[:-1].numel(), dtype=accumulation_dtype(x)),
        _empty_amax(x, largest, backend),
    ),
)
def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, largest: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [..., D], the stream x + residual [..., D] or [0] without residual, r [N] in the wide dtype, the largest
    magnitudes in y's rows [N] or [0])."""
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    amax = _empty_amax(x, largest, backend)
    if backend == "triton":
        return *_triton_forward(x, residual, weight, eps, amax), amax
    return *(_cpu_forward if backend == "cpu" else _reference_forward)(x, residual, weight, eps), amax


@custom_op(
    "rms_norm_backward",
    lambda dy, dstream, x, weight, rstd, largest, backend: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=rstd.dtype),
        _empty_amax(x, largest, backend),
    ),
)
def _norm_backward(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, largest: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [..., D] in x's dtype, dw [D] in the wide dtype, the largest magnitudes in dx's rows [N] or [0]); x is the
    normalised tensor."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dstream = None if dstream is None else dstream.contiguous()
    amax = _empty_amax(x, largest, backend)
    if backend == "triton":
        return *_triton_backward(dy, dstream, x, weight, rstd, amax), amax
    return *(_cpu_backward if backend == "cpu" else _reference_backward)(dy, dstream, x, weight, rstd), amax


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, ctx.largest, ctx.backend = inputs
    _, stream, rstd, _ = output
    ctx.save_for_backward(x if residual is None else stream, weight, rstd)
    ctx.weight = weight  # the parameter itself: a checkpoint's copy of saved tensors is not
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dw: Tensor | None
    if not ctx.has_residual:
        dstream = None
    if dy is None:
        return dstream, dstream, *[None] * 4
    known = in_place(ctx.weight)
    if known is not None and known.parts() is not None and _makes_parts(x, ctx.backend) and not is_looked_at((dy, x)):
        amax, dw = _empty_amax(x, ctx.largest, ctx.backend), None
        dstream = None if dstream is None else dstream.contiguous()
        dx, _parts = _triton_backward(
            dy.contiguous(), dstream, x.contiguous(), weight.contiguous(), rstd, amax, ctx.weight
        )
    else:
        dx, dw, amax = _norm_backward(dy, dstream, x, weight, rstd, ctx.largest, ctx.backend)
    if amax.numel():
        with_largest(dx, amax)
    return dx, dx if ctx.has_residual else None, dw, *[None] * 3


differentiable(_norm, _gradients, _setup_context)


# ------------------------------------------------------------------------------------------------ reference


def _reference_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stream = x.new_empty(0) if residual is None else x + residual
    wide = (x if residual is None else stream).to(accumulation_dtype(x))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).mul_(weight.to(wide.dtype)).to(x.dtype), stream, rstd.flatten()


def _reference_backward(
    dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dtype, D = rstd.dtype, x.shape[-1]
    rstd = rstd.view(*x.shape[:-1], 1)
    dy, weight = dy.to(dtype), weight.to(dtype)
    x_hat = x.to(dtype) * rstd
    product = dy * x_hat
    dw = product.reshape(-1, D).sum(0)
    projection = (product @ weight).div_(D).unsqueeze(-1)
    dx = (dy * weight).addcmul_(x_hat, projection, value=-1).mul_(rstd)
    if dstream is not None:
        dx.add_(dstream)
    return dx.to(x.dtype), dw


# ------------------------------------------------------------------------------------------------ csrc/norm.cpp


def _cpu_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return native.ops().cpu_rms_norm_forward(x, residual, weight.float(), eps)


def _cpu_backward(dy: Tensor, dstream: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return native.ops().cpu_rms_norm_backward(dy, x, dstream, weight.float(), rstd)


# ------------------------------------------------------------------------------------------------ Triton

FORWARD_TILE, BACKWARD_TILE = 4096, 2048
"""Numbers that a program holds of each tensor, unless a single row has more."""
FORWARD_WARP, BACKWARD_WARP = 1024, 512
"""Bytes of one tensor per warp: few enough that nothing is spilled."""
PROGRAMS_PER_SM = 4
WIDEST = 8192
"""Columns of the widest rows whose x, dy, weight and weight gradient fit in a program's registers at once."""


def _config(kernel: str, D: int, dtype: torch.dtype, tile: float = 1, warp: float = 1, ahead: int = 0) -> Config:
    """The launch of a kernel, "forward" or "backward"; tile and warp: factors of the usual numbers and bytes; ahead:
    how many tiles "backward" requests before it needs them."""
    numbers, warp_bytes = {"forward": (FORWARD_TILE, FORWARD_WARP), "backward": (BACKWARD_TILE, BACKWARD_WARP)}[kernel]
    columns = next_power_of_2(D)
    rows = max(1, min(16, int(tile * numbers) // columns))
    warps = max(1, min(16, rows * columns * dtype.itemsize // int(warp * warp_bytes)))
    if kernel == "forward":
        return Config((("ROWS", rows), ("COLUMNS", columns)), warps)
    warps *= 2 if D % 16 else 1  # numbers are loaded one by one, which needs more registers
    # With few numbers per thread the assembler aims at a high occupancy and spills some.
    maxnreg = 64 if rows * columns <= 8 * 32 * warps else None
    return Config((("ROWS", rows), ("COLUMNS", columns), ("STAGES", 1 + ahead)), warps, maxnreg=maxnreg)


def candidates(kernel: str, D: int, dtype: torch.dtype) -> list[Config]:
    """The launches to measure, the default first."""
    sizes = [(1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 1.0, 0), (1.0, 0.5, 0), (1.0, 2.0, 0)]
    if kernel == "backward":
        sizes += [(1.0, 1.0, 1), (1.0, 1.0, 2), (0.5, 1.0, 2)]
    usual = D <= WIDEST and D % 16 == 0
    return list(dict.fromkeys(_config(kernel, D, dtype, *size) for size in sizes[: None if usual else 1]))


def _launched(kernel: str, x: Tensor) -> Config:
    D = x.shape[-1]
    return launched(f"rms_norm_{kernel}", (D, x.itemsize), _config(kernel, D, x.dtype))


def _launches(x: Tensor, *_: Tensor) -> list[Candidate]:
    D = x.shape[-1]
    return [
        candidate
        for kernel in ("forward", "backward")
        for candidate in tried_on_gpus(x, f"rms_norm_{kernel}", (D, x.itemsize), candidates(kernel, D, x.dtype)[1:])
    ]


@jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, stream_ptr, rstd_ptr, amax_ptr, N, D, eps,
    HAS_RESIDUAL: tl.constexpr, AMAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offsets, mask, 0.0).to(tl.float32)
        stream = x.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + offsets, stream, mask)
        x = stream.to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    weight = tl.load(weight_ptr + columns, columns < D, 0.0).to(tl.float32)
    y = (x * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask)
    tl.store(rstd_ptr + rows, rstd, rows < N)
    if AMAX:
        tl.store(amax_ptr + rows, tl.max(tl.abs(y.to(tl.float32)), 1), rows < N)


@jit
def _load(ptr, offsets, mask, AGAIN: tl.constexpr = False):
    """AGAIN: whether it will be read again soon."""
    return tl.load(ptr + offsets, mask, 0.0, eviction_policy="evict_last" if AGAIN else "").to(tl.float32)


@jit
def _sum(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of all rows of x [ROWS, COLUMNS], half of them added to the others until one is left. tl.sum would pass single
    numbers through shared memory, 16 threads of a warp in the same bank."""
    for i in tl.static_range(ROWS.bit_length() - 1):
        pairs = tl.reshape(x, (2, ROWS >> (i + 1), COLUMNS))
        first, second = tl.split(tl.permute(pairs, (1, 2, 0)))
        x = first + second
    return tl.reshape(x, (COLUMNS,))


@jit
def _backward_kernel(
    dy_ptr, dstream_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dw_ptr, amax_ptr, N, D,
    HAS_DSTREAM: tl.constexpr, TWICE: tl.constexpr, AMAX: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """TWICE: rows are read again after their projection is known, not held. ADD: to the values already in dw."""
    columns = tl.arange(0, COLUMNS)
    if not TWICE:
        weight = _load(weight_ptr, columns, columns < D)[None, :]
    dw = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        offsets = rows[:, None] * D + columns[None, :]
        rstd = tl.load(rstd_ptr + rows, rows < N, 0.0)[:, None]
        dy = _load(dy_ptr, offsets, mask, TWICE)
        x_hat = _load(x_ptr, offsets, mask, TWICE) * rstd
        if TWICE:
            weight = _load(weight_ptr, columns, columns < D, TWICE)[None, :]
        projection = tl.sum(dy * x_hat * weight, 1)[:, None] / D
        if TWICE:
            dy = _load(dy_ptr, offsets, mask)
            x_hat = _load(x_ptr, offsets, mask) * rstd
            weight = _load(weight_ptr, columns, columns < D)[None, :]
        dw += dy * x_hat
        dx = (dy * weight - x_hat * projection) * rstd
        if HAS_DSTREAM:
            dx += _load(dstream_ptr, offsets, mask)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offsets, dx, mask)
        if AMAX:
            tl.store(amax_ptr + rows, tl.max(tl.abs(dx.to(tl.float32)), 1), rows < N)
    total, dw_ptr = _sum(dw, ROWS, COLUMNS), dw_ptr + tl.program_id(0).to(tl.int64) * D
    if ADD:
        total += _load(dw_ptr, columns, columns < D)
    tl.store(dw_ptr + columns, total, columns < D)


def _triton_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, amax: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[-1]
    N = x.numel() // max(1, D)
    y, stream = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    rstd = x.new_empty(N, dtype=torch.float32)
    config = _launched("forward", x)
    if N:
        _forward_kernel[(-(-N // config["ROWS"]),)](
            x, residual, weight, y, stream, rstd, amax, N, D, eps,
            HAS_RESIDUAL=residual is not None, AMAX=amax.numel() > 0, **config.options,
        )  # fmt: skip
    return y, stream, rstd


def _triton_backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    amax: Tensor,
    parameter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, dw), or instead of dw its parts, which a `parameter` may keep."""
    N, D = len(rstd), x.shape[-1]
    dx = torch.empty_like(x)
    if not N:
        return dx, x.new_zeros(D, dtype=torch.float32)
    if not _makes_parts(x, "triton"):
        dx, dw = _reference_backward(dy, dstream, x, weight, rstd)
        _amax_of(dx.view(N, D), amax)
        return dx, dw
    config = _launched("backward", x)
    programs = PROGRAMS_PER_SM * multiprocessors(x.device)
    if parameter is None:
        programs = min(-(-N // config["ROWS"]), programs)
        dw, new = x.new_empty(programs, D, dtype=torch.float32), True
    else:
        dw, new = in_place(parameter).parts().of(parameter, programs)  # type: ignore[union-attr]
    _backward_kernel[(programs,)](
        dy, dstream, x, weight, rstd, dx, dw, amax, N, D,
        HAS_DSTREAM=dstream is not None, TWICE=D > WIDEST, AMAX=amax.numel() > 0 and D <= WIDEST, ADD=not new,
        **config.options,
    )  # fmt: skip
    if D > WIDEST:
        _amax_of(dx.view(N, D), amax)
    return dx, dw.sum(0) if parameter is None else dw


def _makes_parts(x: Tensor, backend: str) -> bool:
    """Whether the kernel runs for these rows; there is at least one."""
    D = x.shape[-1]
    return backend == "triton" and x.numel() > 0 and (D <= WIDEST or (x.dtype != torch.float32 and D % 16 == 0))


def _amax_of(x_ND: Tensor, amax: Tensor) -> None:
    """The largest magnitudes in the rows, if they are asked for, where the kernel has no registers left for them."""
    if amax.numel():
        amax.copy_(x_ND.abs().amax(1))


def variants() -> list[Variant]:
    """The launches for widths from 64 to 16,384 in bf16, with and without the residual, from 2,048 on also for fp8; for
    some widths in float32, float16, and widths that are no multiples of 16. Backward, float32 wider than WIDEST has
    none."""
    found = []
    cases = [(64 << i, "*bf16", "i32:16", whole, False) for i in range(9) for whole in (True, False)]
    cases += [(2048 << i, "*bf16", "i32:16", whole, True) for i in range(4) for whole in (True, False)]
    cases += [(D, "*fp32", "i32:16", True, False) for D in (1024, 4096, 8192, 16384)]
    cases += [(1024, "*fp32", "i32:16", False, False), (1024, "*fp16", "i32:16", True, False)]
    cases += [(D, "*bf16", "i32", True, False) for D in (1000, 3000, 5000)] + [(1000, "*fp32", "i32", True, False)]
    for D, dtype, size, whole, amax in cases:
        sizes = {"N": "i32", "D": size}
        default = (dtype, size, whole) == ("*bf16", "i32:16", True) and D in ((2048,) if amax else (1024, 4096))
        tensors = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr", "stream_ptr"), dtype)
        given = dtype if whole else None
        arguments = {**tensors, "residual_ptr": given, "rstd_ptr": "*fp32", "amax_ptr": "*fp32", **sizes, "eps": "fp32"}
        flags = {"HAS_RESIDUAL": whole, "AMAX": amax}
        found += _variants(_forward_kernel, "forward", D, dtype, arguments, flags, default)
        if D > WIDEST and (dtype == "*fp32" or amax):
            continue
        tensors = dict.fromkeys(("dy_ptr", "x_ptr", "weight_ptr", "dx_ptr"), dtype)
        wide = dict.fromkeys(("rstd_ptr", "dw_ptr", "amax_ptr"), "*fp32")
        arguments = {**tensors, "dstream_ptr": given, **wide, **sizes}
        for add in (False, True):
            flags = {"HAS_DSTREAM": whole, "TWICE": D > WIDEST, "AMAX": amax, "ADD": add}
            found += _variants(_backward_kernel, "backward", D, dtype, arguments, flags, default)
    return found


def _variants(
    kernel: Any, name: str, D: int, dtype: str, arguments: dict, flags: dict[str, bool], default: bool
) -> list[Variant]:
    """A kernel with its default launch, and for a usual call with all its launches."""
    configs = candidates(name, D, DTYPES[dtype])[: None if default else 1]
    return [
        Variant(kernel, arguments, flags | dict(config.constants), config.num_warps, config.num_stages, config.maxnreg,
                default=default and config is configs[0])
        for config in configs
    ]  # fmt: skip


_AUTO = {
    "cuda": {
        "triton": "1.5 to 2.2 times PyTorch's ops, at 63 to 88% of a copy's speed (H200)",
        "reference": "PyTorch ops",
    },
    "cpu": {
        "cpu": "2 to 5 times PyTorch's ops forward, 10 to 20 times backward (AMD EPYC, 2 cores)",
        "reference": "PyTorch ops",
    },
}
_RMS_NORM, _ADD_RMS_NORM = (Op(name, _AUTO, variants, _launches) for name in ("rms_norm", "add_rms_norm"))

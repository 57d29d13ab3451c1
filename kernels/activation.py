"""SwiGLU: the gated activation of Llama's feed-forward layer, alone and with the projection that reads it.

    y = silu(g) u,  silu(g) = g s,  s = sigmoid(g)                                      (Shazeer, arXiv 2002.05202)
    du = dy silu(g)        dg = dy u s (1 + g (1 - s))

Legend: N rows (all leading dimensions together), F the width of the feed-forward layer.

Elementwise, so the bytes decide the time: for bf16, 6NF forward (read g and u, write y) and 10NF backward (read g, u
and dy, write dg and du). Only g and u are saved; s is recomputed. Everything is float32 inside and rounded once; the
reference uses PyTorch's own ops, each rounded.

One matmul makes g and u, side by side in each row of a tensor [N, 2F], and its backward pass needs their gradients side
by side again. With two ops on halves autograd would have to join them, 8NF bytes more. So the kernels accept tensors
with gaps between rows, and `swiglu_packed` reads and writes such halves in place.

The projection after it, z = y wᵀ + b, needs y again for dw = dzᵀ y. `swiglu_linear` does not keep it, which saves 2NF
bytes per layer: the pass from dy = dz w and gate_up to the gradient of gate_up also makes y, 12NF bytes, and writes it
in place of dy. (The same could be done for the norms' results, which the other projections keep: 2ND bytes each for 2ND
more in the norm's backward pass, which would have to run before dw, in one op with the projection. They are a tenth of
what a layer keeps; `checkpointing: selective` drops them, and all other cheap results.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast import native
from spt_fast.errors import invalid
from spt_fast.kernels.backend import Candidate, Op, custom_op, differentiable, tried_on_gpus
from spt_fast.kernels.fp8 import with_largest
from spt_fast.kernels.gradients import accumulates_in_place
from spt_fast.kernels.launch import DTYPES, Config, Variant, jit, launched, next_power_of_2, tl
from spt_fast.kernels.linear import as_autocast, weight_gradients
from spt_fast.kernels.linear import check as check_projection
from spt_fast.kernels.matmul import multiply, rows_times, shaped


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up, of one shape and dtype, which the result has too.

    ValueError: shapes or dtypes that differ, or a backend that isn't available.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}; they must agree"
        )
    return _swiglu(gate, up, False, _SWIGLU.pick(backend, gate))[0]


def swiglu_packed(gate_up: Tensor, *, largest: bool = False, backend: str = "auto") -> Tensor:
    """silu(gate) * up [..., F] of gate_up [..., 2F], each row gate and then up; its gradient is one tensor [..., 2F].

    largest: result and gradient carry the largest magnitudes of their rows, for kernels/fp8.py, if Triton kernels make
    them.
    ValueError: a last dimension that has no halves, or a backend that isn't available.
    """
    _check("swiglu_packed", gate_up)
    y, amax = _swiglu(gate_up, None, largest, _SWIGLU_PACKED.pick(backend, gate_up))
    return with_largest(y, amax) if amax.numel() else y


def swiglu_linear(gate_up: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """swiglu_packed(gate_up) @ weight.T + bias: gate_up [..., 2F], weight [O, F], bias [O], of one dtype, the result
    [..., O] too. The intermediate result is not kept for the backward pass.

    ValueError: shapes that don't fit, or a backend that isn't available. RuntimeError: dtypes that differ.
    """
    _check("swiglu_linear", gate_up)
    check_projection("swiglu_linear", "gate_up", gate_up, (gate_up.shape[-1] // 2,), weight, bias)
    return project_activated(gate_up, weight, bias, backend)


def project_activated(gate_up: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """`swiglu_linear` of shapes that fit."""
    backend = _SWIGLU_LINEAR.pick(backend, gate_up)
    return _swiglu_linear(*as_autocast(gate_up, weight, bias), backend)


def _check(op: str, gate_up: Tensor) -> None:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        expected = "its last dimension must be gate and up side by side, an even number of columns"
        raise ValueError(invalid(f"{op}(gate_up)", tuple(gate_up.shape), expected))


# ------------------------------------------------------------------------------------------------ custom ops


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up; without up, `gate` holds both."""
    if up is not None:
        return gate, up
    gate, up = gate.tensor_split(2, -1)
    return gate, up


def _empty_gradients(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else gate.shape)


def _rows(x: Tensor) -> Tensor:
    """x as [N, F], in place if each row is contiguous and rows have equal distances."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1:].numel())
    return x if x.stride(1) == 1 else x.contiguous()


def _empty_amax(kernel: str, gate: Tensor, up: Tensor | None, largest: bool, backend: str) -> Tensor:
    """Space for the largest magnitudes in each tile's rows, float32 [N, tiles], or [0] if they are not made."""
    if not largest or backend != "triton":
        return gate.new_empty(0, dtype=torch.float32)
    gate, _ = _halves(gate, up)
    tiles = -(-gate.shape[-1] // _launched(kernel, gate.shape[-1], gate.dtype)["COLUMNS"])
    return gate.new_empty(gate.shape[:-1].numel(), tiles, dtype=torch.float32)


@custom_op(
    "swiglu",
    lambda gate, up, largest, backend: (
        gate.new_empty(_halves(gate, up)[0].shape),
        _empty_amax("forward", gate, up, largest, backend),
    ),
)
def _swiglu(gate: Tensor, up: Tensor | None, largest: bool, backend: str) -> tuple[Tensor, Tensor]:
    """(y [..., F], the largest magnitudes in its rows, by parts, or [0]); without up, gate [..., 2F] holds both."""
    amax = _empty_amax("forward", gate, up, largest, backend)
    gate, up = _halves(gate, up)
    return shaped(_forward(_rows(gate), _rows(up), amax, backend), gate.shape), amax


def activate(gate_up: Tensor, backend: str) -> Tensor:
    """swiglu_packed, without autograd."""
    gate, up = _halves(gate_up, None)
    return _forward(_rows(gate), _rows(up), None, backend).view(gate.shape)


def _forward(gate: Tensor, up: Tensor, amax: Tensor | None, backend: str) -> Tensor:
    if backend == "triton":
        return _triton_forward(gate, up, amax)
    return (_cpu_forward if backend == "cpu" else _reference_forward)(gate, up)


@custom_op(
    "swiglu_backward",
    lambda dy, gate, up, largest, backend: (
        *_empty_gradients(gate, up),
        _empty_amax("backward", gate, up, largest, backend),
    ),
)
def _swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor | None, largest: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, or of gate [..., 2F] and an empty one without up; the largest magnitudes in rows of
    both, by parts, or [0]."""
    dgate, dup = _empty_gradients(gate, up)
    inputs, outputs = (dy, *_halves(gate, up)), _halves(dgate, None if up is None else dup)
    amax = _empty_amax("backward", gate, up, largest, backend)
    rows = [_rows(x) for x in (*inputs, *outputs)]
    if backend == "triton":
        _triton_backward(*rows, amax=amax)
    else:
        _BACKWARD[backend](*rows)
    return dgate, dup, amax


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    gate, up, ctx.largest, ctx.backend = inputs
    ctx.save_for_backward(gate, up)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 4
    gate, up = ctx.saved_tensors
    dgate, dup, amax = _swiglu_backward(dy, gate, up, ctx.largest, ctx.backend)
    if amax.numel():
        with_largest(dgate, amax)
    return dgate, None if up is None else dup, None, None


differentiable(_swiglu, _gradients, _setup_context)


@custom_op("swiglu_linear", lambda gate_up, weight, *_: gate_up.new_empty(*gate_up.shape[:-1], weight.shape[0]))
def _swiglu_linear(gate_up: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return rows_times(activate(gate_up, backend), weight.T, bias)


@custom_op(
    "swiglu_linear_backward",
    lambda dz, gate_up, weight, *_: (
        gate_up.new_empty(gate_up.shape),
        gate_up.new_empty(*gate_up.shape[:-1], weight.shape[1]),
    ),
)
def swiglu_linear_backward(dz: Tensor, gate_up: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """(the gradient of gate_up, y)."""
    y_NF = multiply(dz.reshape(dz.shape[:-1].numel(), len(weight)), weight)  # first the gradient of y
    dgate_up = gate_up.new_empty(gate_up.shape)
    halves = (*_halves(gate_up, None), *_halves(dgate_up, None))
    _BACKWARD[backend](y_NF, *(_rows(x) for x in halves), again=True)
    return dgate_up, y_NF.view(*dz.shape[:-1], weight.shape[1])


def _setup_linear(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, str], output: Tensor) -> None:
    gate_up, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(gate_up, weight)
    # The parameters themselves: a checkpoint's copies of saved tensors are not.
    ctx.weight, ctx.bias = (x if accumulates_in_place(x) else None for x in (weight, bias))


def _linear_gradients(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    gate_up, weight = ctx.saved_tensors
    dgate_up, y = swiglu_linear_backward(dz, gate_up, weight, ctx.backend)
    return dgate_up, *weight_gradients(dz, y, ctx.weight, ctx.bias, ctx.needs_input_grad[1:3]), None


differentiable(_swiglu_linear, _linear_gradients, _setup_linear)


# ------------------------------------------------------------------------------------------------ reference


def _reference_forward(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _reference_backward(
    dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, *, again: bool = False
) -> None:
    torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
    silu = F.silu(gate)
    torch.mul(dy, silu, out=dup)
    if again:
        torch.mul(silu, up, out=dy)


# ------------------------------------------------------------------------------------------------ csrc/activation.cpp


def _cpu_forward(gate: Tensor, up: Tensor) -> Tensor:
    return native.ops().cpu_swiglu_forward(gate, up)


def _cpu_backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, *, again: bool = False) -> None:
    ops = native.ops()
    (ops.cpu_swiglu_backward_again if again else ops.cpu_swiglu_backward)(dy, gate, up, dgate, dup)


# ------------------------------------------------------------------------------------------------ Triton

TILE, COLUMNS = 2048, 256
"""Numbers of each tensor in a program's tile, and its columns: at the usual widths, multiples of 256, none is idle."""
WARP_BYTES = 512
"""Bytes of one tensor per warp: every lane loads 16, the most in one instruction."""


def _config(F: int, dtype: torch.dtype, tile: int = TILE, columns: int = COLUMNS) -> Config:
    columns = min(columns, next_power_of_2(F))
    return Config((("ROWS", tile // columns), ("COLUMNS", columns)), tile * dtype.itemsize // WARP_BYTES)


def candidates(F: int, dtype: torch.dtype) -> list[Config]:
    """The launches to measure, the default first."""
    sizes = ((TILE, COLUMNS), (TILE, 2 * COLUMNS), (TILE // 2, COLUMNS), (TILE // 2, 4 * COLUMNS), (2 * TILE, COLUMNS))
    return list(dict.fromkeys(_config(F, dtype, *size) for size in sizes))


def _launched(kernel: str, F: int, dtype: torch.dtype) -> Config:
    """The launch of a kernel, "forward" or "backward"."""
    return launched(f"swiglu_{kernel}", (F, dtype.itemsize), _config(F, dtype))


def swiglu_launches(x: Tensor, F: int) -> list[Candidate]:
    """Further launches to measure, for tensors like x."""
    return [
        candidate
        for kernel in ("forward", "backward")
        for candidate in tried_on_gpus(x, f"swiglu_{kernel}", (F, x.itemsize), candidates(F, x.dtype)[1:])
    ]


@jit
def _tile_of_program(N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows in int64, columns, mask); adjacent tiles follow each other."""
    tiles_in_row = tl.cdiv(F, COLUMNS)
    rows = (tl.program_id(0) // tiles_in_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) % tiles_in_row * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return rows, columns, (rows < N) & (columns < F)


@jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, amax_ptr, N, F, gate_stride, up_stride,
    AMAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns, mask = _tile_of_program(N, F, ROWS, COLUMNS)
    g = tl.load(gate_ptr + rows * gate_stride + columns, mask, 0.0).to(tl.float32)
    u = tl.load(up_ptr + rows * up_stride + columns, mask, 0.0).to(tl.float32)
    y = (g * (1 / (1 + tl.exp(-g))) * u).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows * F + columns, y, mask)
    if AMAX:
        _store_amax(amax_ptr, tl.abs(y.to(tl.float32)), rows, N, F, COLUMNS)


@jit
def _store_amax(amax_ptr, magnitudes, rows, N, F, COLUMNS: tl.constexpr):
    """The largest magnitude in each row of the program's tile."""
    tiles_in_row = tl.cdiv(F, COLUMNS)
    amax = tl.max(magnitudes, 1, keep_dims=True)
    tl.store(amax_ptr + rows * tiles_in_row + tl.program_id(0) % tiles_in_row, amax, rows < N)


@jit
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, amax_ptr, N, F,
    dy_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    AGAIN: tl.constexpr, AMAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """AGAIN: y is written in place of dy."""
    rows, columns, mask = _tile_of_program(N, F, ROWS, COLUMNS)
    dy = tl.load(dy_ptr + rows * dy_stride + columns, mask, 0.0).to(tl.float32)
    g = tl.load(gate_ptr + rows * gate_stride + columns, mask, 0.0).to(tl.float32)
    u = tl.load(up_ptr + rows * up_stride + columns, mask, 0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    dgate = (dy * s * u * (1 + g * (1 - s))).to(dgate_ptr.dtype.element_ty)
    dup = (dy * s * g).to(dup_ptr.dtype.element_ty)
    tl.store(dgate_ptr + rows * dgate_stride + columns, dgate, mask)
    tl.store(dup_ptr + rows * dup_stride + columns, dup, mask)
    if AMAX:
        magnitudes = tl.maximum(tl.abs(dgate.to(tl.float32)), tl.abs(dup.to(tl.float32)))
        _store_amax(amax_ptr, magnitudes, rows, N, F, COLUMNS)
    if AGAIN:
        tl.store(dy_ptr + rows * dy_stride + columns, (g * s * u).to(dy_ptr.dtype.element_ty), mask)


def _launch(kernel: Any, name: str, shape: torch.Size, dtype: torch.dtype, *arguments: Any, **constants: bool) -> None:
    N, F = shape
    config = _launched(name, F, dtype)
    programs = -(-N // config["ROWS"]) * -(-F // config["COLUMNS"])
    if programs:
        kernel[(programs,)](*arguments, **constants, **config.options)


def _triton_forward(gate: Tensor, up: Tensor, amax: Tensor | None) -> Tensor:
    y = gate.new_empty(gate.shape)
    strides, made = (gate.stride(0), up.stride(0)), amax is not None and amax.numel() > 0
    arguments = (gate, up, y, amax if made else None, *gate.shape, *strides)
    _launch(_forward_kernel, "forward", gate.shape, gate.dtype, *arguments, AMAX=made)
    return y


def _triton_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor,
    dup: Tensor,
    *,
    again: bool = False,
    amax: Tensor | None = None,
) -> None:
    tensors = (dy, gate, up, dgate, dup)
    strides, made = [x.stride(0) for x in tensors], amax is not None and amax.numel() > 0
    arguments = (*tensors, amax if made else None, *gate.shape, *strides)
    _launch(_backward_kernel, "backward", gate.shape, gate.dtype, *arguments, AGAIN=again, AMAX=made)


_BACKWARD = {"reference": _reference_backward, "cpu": _cpu_backward, "triton": _triton_backward}
"""By backend, from dy, gate and up to dgate and dup; with `again` also to y, in place of dy."""


def variants() -> list[Variant]:
    """The launches for rows of 64 and more numbers in bf16, of 256 and more in the other dtypes; default: wide ones in
    bf16."""
    found = []
    cases = [(width, "*bf16", "i32:16") for width in (64, 128)] + [(COLUMNS, dtype, "i32:16") for dtype in DTYPES]
    cases += [(1000, dtype, "i32") for dtype in ("*bf16", "*fp32")]
    usual = (COLUMNS, "*bf16", "i32:16")
    configs = [(case, _config(case[0], DTYPES[case[1]])) for case in cases]
    configs += [(usual, config) for config in candidates(4 * COLUMNS, torch.bfloat16)[1:]]
    for (width, dtype, size), config in configs:
        constants = dict(config.constants)
        default = width == COLUMNS and dtype == "*bf16" and config == _config(COLUMNS, torch.bfloat16)
        gradients = ("dy_ptr", "gate_ptr", "up_ptr", "dgate_ptr", "dup_ptr")
        for kernel, tensors, more, amax in (
            (_forward_kernel, ("gate_ptr", "up_ptr", "y_ptr"), {"AMAX": False}, None),
            (_forward_kernel, ("gate_ptr", "up_ptr", "y_ptr"), {"AMAX": True}, "*fp32"),
            (_backward_kernel, gradients, {"AGAIN": False, "AMAX": False}, None),
            (_backward_kernel, gradients, {"AGAIN": True, "AMAX": False}, None),
            (_backward_kernel, gradients, {"AGAIN": False, "AMAX": True}, "*fp32"),
        ):
            strides = [name.replace("_ptr", "_stride") for name in tensors if name != "y_ptr"]
            arguments = {
                **dict.fromkeys(tensors, dtype), "amax_ptr": amax, "N": "i32", **dict.fromkeys(("F", *strides), size),
            }  # fmt: skip
            found.append(Variant(kernel, arguments, constants | more, config.num_warps, default=default))
    return found


SWIGLU_BACKENDS = {
    "cuda": {
        "triton": "one pass over the bytes where PyTorch makes several: 1.8 times its ops, at a copy's speed (H200)",
        "reference": "PyTorch ops",
    },
    "cpu": {
        "cpu": "1.3 to 1.8 times PyTorch's ops forward, 1.4 to 2 times backward (AMD EPYC, 1 thread)",
        "reference": "PyTorch ops",
    },
}
_SWIGLU, _SWIGLU_PACKED, _SWIGLU_LINEAR = (
    Op(name, SWIGLU_BACKENDS, variants, lambda x, *_: swiglu_launches(x, x.shape[-1] // 2))
    for name in ("swiglu", "swiglu_packed", "swiglu_linear")
)

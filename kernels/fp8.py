"""A linear layer whose three matmuls are in fp8, for layers wide enough to gain by it: `engine: {fp8: true}`.

    y = x W^T        dx = dy W        dw = dy^T x           each operand q s, q in fp8 and s in float32

Legend: N rows (all leading dimensions together), I inputs, O outputs, D the width of the quantised tensor.

Tensor cores multiply fp8 twice as fast as bf16. e4m3 (4 bits of exponent, 3 of mantissa, up to 448) is for the forward
tensors, x and W; e5m2 (5 and 2, up to 57,344) for the gradient, whose range is wider (Micikevicius et al., arXiv
2209.05433). Scales are dynamic: s = max |row| / the largest fp8 number, of the same tensor that is multiplied, so there
is no history to keep. y sums along rows of x and W, dx along rows of dy and columns of W, each of which has its own
scale, so that an outlier affects only its own row. dw sums along columns of dy and x, and the hardware needs these
numbers contiguous, so columns are written transposed; here each tensor has a single scale, for which the maxima of the
rows suffice: numbers down to 1/28,672 of the largest keep their three bits of mantissa, in e5m2 down to 1/10^9.

So x and dy are read twice: for the maxima of the rows, unless the op that made them knows these already (`largest_of`),
and for both copies, which one pass writes. W is quantised by rows and columns once a step if its gradients accumulate
in place (kernels/linear.py), otherwise each time. Bytes moved for bf16 besides those of the matmuls, and kernels;
"before" is with one pass by rows for each of x, dy and W, and two by columns with the scales' arithmetic between them:

                        x and dy            kernels     W                       kernels
    before              8NI + 8NO           12          8IO a micro-batch       6
    now                 6NI + 6NO           6           8IO a step              6 a step
    maxima known        4NI + 4NO           4, and one where they are known by parts of rows

A matmul of width D saves half its time, which grows with D: torchao's users find no gain below about 2,048. The
backward pass keeps x in fp8, by columns: half of its bytes.

Requirements of `torch._scaled_mm`: the first operand is row-major, the second column-major; the summed dimension and
the output's columns are divisible by 16 (the rows of x need not be: the transposed copies are padded with zeros); e5m2
is on the left, as dy is in both matmuls. With a scale for each row it returns bf16, so y and dx are rounded to it; with
one for the whole tensor float32, in which dw is returned as in kernels/norm.py. Sums of gradients are kept in float32;
forward ones in the tensor core's own 22 bits (`use_fast_accum`), still far finer than the summed numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_fast.errors import invalid
from spt_fast.kernels.backend import Candidate, Op, custom_op, differentiable, tried_on_gpus
from spt_fast.kernels.gradients import in_place
from spt_fast.kernels.launch import DTYPES, Config, Variant, jit, launched, multiprocessors, next_power_of_2, tl
from spt_fast.kernels.matmul import shaped

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 1e-30
"""A row's maximum counts as at least this, so that neither its scale nor the inverse leaves float32."""
MULTIPLE = 16


def fp8_linear(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """x @ weight.T in fp8: x [..., I] of two or more dimensions, weight [O, I], the result [..., O] in x's dtype.

    ValueError: shapes that don't fit, I or O not divisible by 16, or a backend that cannot run for x (triton: a GPU
    of compute capability below 8.9).
    """
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fp8_linear: x is {tuple(x.shape)}, weight is {tuple(weight.shape)}; "
            "x must be [..., I], of two or more dimensions, and weight [O, I]"
        )
    if any(size % MULTIPLE for size in weight.shape):
        expected = f"both sizes must be divisible by {MULTIPLE}"
        raise ValueError(invalid("fp8_linear(weight)", tuple(weight.shape), expected))
    backend = _FP8_LINEAR.pick(backend, x, triton=obstacle(x.device))
    return _linear(x, weight, *_quantised(weight, backend), largest_of(x), backend)[0]


def obstacle(device: torch.device) -> str | None:
    """Why this GPU cannot multiply fp8; None if it can, and on a CPU, which emulates it."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "fp8 needs a GPU of compute capability 8.9, this one has {}.{}".format(
            *torch.cuda.get_device_capability(device)
        )
    return None


# ------------------------------------------------------------------------------------------------ custom ops


def _quantised(weight: Tensor, backend: str) -> tuple[Tensor, ...]:
    """`_quantise_weight`, cached on a parameter until it changes."""
    if (kept := in_place(weight)) is None:
        return _quantise_weight(weight.detach(), backend)
    key = weight._version, weight.data_ptr(), backend
    if kept.in_fp8 is None or kept.in_fp8[0] != key:
        kept.in_fp8 = key, _quantise_weight(weight.detach(), backend)
    return kept.in_fp8[1]


def _fake_weight(weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    (O, I), by = weight.shape, weight.new_empty  # noqa: E741
    wide: dict[str, Any] = {"dtype": torch.float32}
    bits: dict[str, Any] = {"dtype": torch.uint8}
    return by(O, I, **bits), by(O, 1, **wide), by(I, O, **bits), by(I, 1, **wide)


@custom_op("fp8_quantise_weight", _fake_weight)
def _quantise_weight(weight: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight [O, I] in fp8, its scales [O, 1]; the transpose [I, O], its scales [I, 1]). fp8 is uint8, here and below,
    since few of PyTorch's ops support it."""
    weight = weight.contiguous()
    rows, row_scales = _QUANTISE_ROWS[backend](weight, FORWARD)
    columns, column_scales = _QUANTISE_COLUMNS[backend](weight, FORWARD)
    return rows.view(torch.uint8), row_scales, columns.view(torch.uint8), column_scales


def _padded(N: int) -> int:
    return -(-N // MULTIPLE) * MULTIPLE


@custom_op(
    "fp8_linear",
    lambda x, weight, *_: (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(x.shape[-1], _padded(x.shape[:-1].numel()), dtype=torch.uint8),
        x.new_empty(1, 1, dtype=torch.float32),
    ),
)
def _linear(
    x: Tensor,
    weight: Tensor,
    w_OI: Tensor,
    w_scale_O1: Tensor,
    w_IO: Tensor,
    w_scale_I1: Tensor,
    largest: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x transposed in fp8, its scale); the gradient belongs to the weight itself."""
    q, scale, x_IN, x_scale = _QUANTISE_BOTH[backend](_flat(x), FORWARD, largest)
    y = _product(q, scale, w_OI.view(FORWARD), w_scale_O1, torch.bfloat16, backend)
    return shaped(y.to(x.dtype), (*x.shape[:-1], len(w_OI))), x_IN.view(torch.uint8), x_scale


@custom_op(
    "fp8_linear_backward",
    lambda dy, x_IN, x_scale, w_IO, *_: (
        dy.new_empty(*dy.shape[:-1], w_IO.shape[0]),
        dy.new_empty(w_IO.shape[::-1], dtype=torch.float32),
    ),
)
def _linear_backward(
    dy: Tensor, x_IN: Tensor, x_scale: Tensor, w_IO: Tensor, w_scale_I1: Tensor, largest: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """(dx [..., I] in x's dtype, dw [O, I] in float32)."""
    I, O = w_IO.shape  # noqa: E741
    if not dy.numel():
        return dy.new_zeros(*dy.shape[:-1], I), dy.new_zeros(O, I, dtype=torch.float32)
    q, scale, dy_ON, dy_scale = _QUANTISE_BOTH[backend](_flat(dy), BACKWARD, largest)
    dx = _product(q, scale, w_IO.view(FORWARD), w_scale_I1, torch.bfloat16, backend)
    dw = _product(dy_ON, dy_scale, x_IN.view(FORWARD), x_scale, torch.float32, backend)
    return dx.to(dy.dtype).view(*dy.shape[:-1], I), dw


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, _, _, w_IO, w_scale_I1, _, ctx.backend = inputs
    ctx.save_for_backward(*output[1:], w_IO, w_scale_I1)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    return *_linear_backward(dy, *ctx.saved_tensors, largest_of(dy), ctx.backend), *[None] * 6


differentiable(_linear, _gradients, _setup_context)


def with_largest(x: Tensor, largest: Tensor) -> Tensor:
    """x, which carries the largest magnitudes in its rows, float32 [N] or by parts of the rows [N, P]. Only this exact
    tensor carries them: no view of it, and not after a change in place."""
    if not torch.compiler.is_compiling():
        x.largest = largest, x._version  # type: ignore[attr-defined]
    return x


def largest_of(x: Tensor) -> Tensor | None:
    """The magnitudes that x carries, or None."""
    if torch.compiler.is_compiling():
        return None
    largest, version = getattr(x, "largest", (None, None))
    return largest if version == x._version else None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """(a a_scale) (b b_scale)^T: a [M, K], b [N, K], scales [M, 1] and [N, 1], or both [1, 1]."""
    if backend == "triton" and a.is_cuda:
        forward = a.dtype == FORWARD
        return torch._scaled_mm(a, b.T, a_scale, b_scale.T, out_dtype=dtype, use_fast_accum=forward)
    return ((a.float() @ b.float().T) * a_scale * b_scale.T).to(dtype)


# ------------------------------------------------------------------------------------------------ reference


def _reference_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x [N, D] in fp8, its scales [N, 1])."""
    return _reference_quantise(x.float(), x.float().abs().amax(1, keepdim=True), dtype)


def _reference_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x [N, D] in fp8 as [D, N], its scales [D, 1])."""
    return _reference_rows(x.mT.contiguous(), dtype)


def _reference_both(x: Tensor, dtype: torch.dtype, largest: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x [N, D] in fp8, its scales [N, 1]; x in fp8 as [D, N], padded with zeros to a multiple of 16, its scale [1,
    1]). largest: magnitudes in rows or parts of rows, [N] or [N, P], if they are known."""
    columns = torch.nn.functional.pad(x.float().mT, (0, -len(x) % MULTIPLE)).contiguous()
    largest = columns.abs().amax().view(1, 1) if columns.numel() else x.new_zeros(1, 1, dtype=torch.float32)
    return *_reference_rows(x, dtype), *_reference_quantise(columns, largest, dtype)


def _reference_quantise(x: Tensor, largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    limit, largest = torch.finfo(dtype).max, largest.clamp(min=SMALLEST)
    return (x * (limit / largest)).to(dtype), largest / limit


# ------------------------------------------------------------------------------------------------ Triton

ROWS_TILE, ROWS_WARP = 4096, 512
"""Numbers that a program holds, unless a single row has more; numbers for each warp."""
AMAX_TILE = (32, 256)
COLUMNS_TILE = (128, 64)
"""Rows and columns of x: a row of a tile, and a row of the transposed one in fp8, are 128 bytes."""
BOTH_TILES = ((128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 8), (128, 128, 8))
"""The same and warps, for the pass that writes both layouts: the launches to measure, the default first."""
WARPS = 8
PROGRAMS_PER_SM = 4


def _rows_tile(D: int) -> tuple[int, int, int]:
    """(rows and columns of a program's tile, warps)."""
    columns = next_power_of_2(D)
    rows = max(1, min(16, ROWS_TILE // columns))
    return rows, columns, max(1, min(16, rows * columns // ROWS_WARP))


@jit
def _rows_kernel(
    x_ptr, q_ptr, scale_ptr, N, D,
    LIMIT: tl.constexpr, SMALLEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), 1), SMALLEST)
    limit = tl.full((ROWS,), LIMIT, tl.float32)
    q = x * tl.div_rn(limit, largest)[:, None]
    tl.store(q_ptr + offsets, q.to(q_ptr.dtype.element_ty), mask)
    tl.store(scale_ptr + rows, tl.div_rn(largest, limit), rows < N)


@jit
def _max(x, ROWS: tl.constexpr, LEFT: tl.constexpr, COLUMNS: tl.constexpr):
    """Of all rows of x [ROWS, COLUMNS], half of them compared with the others until LEFT are left. tl.max would pass
    single numbers through shared memory, all 32 threads of a warp in the same bank."""
    for i in tl.static_range(ROWS.bit_length() - LEFT.bit_length()):
        pairs = tl.reshape(x, (2, ROWS >> (i + 1), COLUMNS))
        first, second = tl.split(tl.permute(pairs, (1, 2, 0)))
        x = tl.maximum(first, second)
    return x


@jit
def _column_amax_kernel(x_ptr, largest_ptr, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """WARPS: the program's; as many rows are held, so that within the loop a thread compares only its own numbers."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    largest = tl.zeros((WARPS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask, 0.0).to(tl.float32)
        largest = tl.maximum(largest, _max(tl.abs(x), ROWS, WARPS, COLUMNS))
    largest = tl.reshape(_max(largest, WARPS, 1, COLUMNS), (COLUMNS,))
    tl.store(largest_ptr + tl.program_id(0).to(tl.int64) * D + columns, largest, columns < D)


@jit
def _columns_kernel(
    x_ptr, largest_ptr, q_ptr, N, D,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    largest = tl.load(largest_ptr + columns, columns < D, 1.0)
    x = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask, 0.0).to(tl.float32)
    q = (x * tl.div_rn(tl.full((COLUMNS,), LIMIT, tl.float32), largest)[None, :]).to(q_ptr.dtype.element_ty)
    mask = (columns < D)[:, None] & (rows < N)[None, :]
    tl.store(q_ptr + columns[:, None] * N + rows[None, :], tl.trans(q), mask)


@jit
def _row_amax_kernel(x_ptr, largest_ptr, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask, 0.0).to(tl.float32)
    tl.store(largest_ptr + rows, tl.max(tl.abs(x), 1), rows < N)


@jit
def _both_kernel(
    x_ptr, largest_ptr, whole_ptr, q_ptr, scale_ptr, qt_ptr, whole_scale_ptr, N, D, N_PADDED,
    LIMIT: tl.constexpr, SMALLEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    largest = tl.maximum(tl.load(largest_ptr + rows, rows < N, 0.0), SMALLEST)
    whole = tl.maximum(tl.load(whole_ptr + tl.arange(0, 1)), SMALLEST)
    x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)

    limit = tl.full((ROWS,), LIMIT, tl.float32)
    tl.store(q_ptr + offsets, (x * tl.div_rn(limit, largest)[:, None]).to(q_ptr.dtype.element_ty), mask)

    one = tl.full((1,), LIMIT, tl.float32)
    qt = (x * tl.div_rn(one, whole)[:, None]).to(qt_ptr.dtype.element_ty)
    mask = (columns < D)[:, None] & (rows < N_PADDED)[None, :]
    tl.store(qt_ptr + columns[:, None] * N_PADDED + rows[None, :], tl.trans(qt), mask)

    if tl.program_id(1) == 0:
        tl.store(scale_ptr + rows, tl.div_rn(largest, limit), rows < N)
        tl.store(whole_scale_ptr + tl.arange(0, 1), tl.div_rn(whole, one))


def _triton_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    q, scale = torch.empty_like(x, dtype=dtype), x.new_empty(N, 1, dtype=torch.float32)
    rows, columns, warps = _rows_tile(D)
    if q.numel():
        _rows_kernel[(-(-N // rows),)](
            x, q, scale, N, D,
            LIMIT=torch.finfo(dtype).max, SMALLEST=SMALLEST, ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip
    return q, scale


def _triton_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    rows, columns = AMAX_TILE
    across = -(-D // columns)
    programs = min(-(-N // rows), -(-PROGRAMS_PER_SM * multiprocessors(x.device) // across))
    largest = x.new_empty(programs, D, dtype=torch.float32)
    _column_amax_kernel[(programs, across)](x, largest, N, D, ROWS=rows, COLUMNS=columns, WARPS=WARPS, num_warps=WARPS)
    largest = largest.amax(0).clamp_(min=SMALLEST)
    q, limit = x.new_empty(D, N, dtype=dtype), torch.finfo(dtype).max
    rows, columns = COLUMNS_TILE
    _columns_kernel[(-(-N // rows), -(-D // columns))](
        x, largest, q, N, D, LIMIT=limit, ROWS=rows, COLUMNS=columns, num_warps=WARPS
    )
    return q, (largest / limit).unsqueeze(1)


def _triton_both(x: Tensor, dtype: torch.dtype, largest: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, D = x.shape
    wide: dict[str, Any] = {"dtype": torch.float32}
    q, scale, whole_scale = torch.empty_like(x, dtype=dtype), x.new_empty(N, 1, **wide), x.new_empty(1, 1, **wide)
    qt = x.new_empty(D, _padded(N), dtype=dtype)
    if not x.numel():
        return q, scale, qt, whole_scale.zero_()
    if largest is None:
        rows, columns, warps = _rows_tile(D)
        largest = x.new_empty(N, **wide)
        _row_amax_kernel[(-(-N // rows),)](x, largest, N, D, ROWS=rows, COLUMNS=columns, num_warps=warps)
    elif largest.dim() > 1:
        largest = largest.amax(1)
    config = launched("fp8_both", (D, x.itemsize), candidates()[0])
    _both_kernel[(-(-_padded(N) // config["ROWS"]), -(-D // config["COLUMNS"]))](
        x, largest, largest.amax(), q, scale, qt, whole_scale, N, D, _padded(N),
        LIMIT=torch.finfo(dtype).max, SMALLEST=SMALLEST, **config.options,
    )  # fmt: skip
    return q, scale, qt, whole_scale


def candidates() -> list[Config]:
    """The launches of the pass that writes both layouts, the default first."""
    return [Config((("ROWS", rows), ("COLUMNS", columns)), warps) for rows, columns, warps in BOTH_TILES]


def _launches(x: Tensor, weight: Tensor) -> list[Candidate]:
    """The widths of x and dy have separate kernels."""
    return [
        candidate
        for D in dict.fromkeys((x.shape[-1], len(weight)))
        for candidate in tried_on_gpus(x, "fp8_both", (D, x.itemsize), candidates()[1:])
    ]


def variants() -> list[Variant]:
    """The launches for widths from 2,048 (the model uses no narrower ones) to 16,384 in bf16, of 2,048 in the other
    dtypes, all multiples of 16. GPUs before 8.9 have no fp8, so there is nothing for sm_80."""
    found = []
    sizes = {"N": "i32", "D": "i32:16"}
    weight = {"N": "i32:16", "D": "i32:16"}
    for x in DTYPES:
        widths, usual = [2048 << i for i in range(4)] if x == "*bf16" else [2048], x == "*bf16"
        for D in widths:
            rows, columns, warps = _rows_tile(D)
            tile, default = {"ROWS": rows, "COLUMNS": columns}, usual and D in (2048, 8192)
            arguments = {"x_ptr": x, "largest_ptr": "*fp32", **sizes}
            found.append(Variant(_row_amax_kernel, arguments, tile, warps, default=default, archs=(90, 100)))
            arguments = {"x_ptr": x, "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32", **weight}
            constants = {"LIMIT": torch.finfo(FORWARD).max, "SMALLEST": SMALLEST, **tile}
            found.append(Variant(_rows_kernel, arguments, constants, warps, default=default, archs=(90, 100)))
        for kind, dtype in (("*fp8e4nv", FORWARD), ("*fp8e5", BACKWARD)):
            floats = dict.fromkeys(("largest_ptr", "whole_ptr", "scale_ptr", "whole_scale_ptr"), "*fp32")
            arguments = {"x_ptr": x, "q_ptr": kind, "qt_ptr": kind, **floats, **sizes, "N_PADDED": "i32:16"}
            for config in candidates():
                constants = {"LIMIT": torch.finfo(dtype).max, "SMALLEST": SMALLEST, **dict(config.constants)}
                default, warps = usual and config == candidates()[0], config.num_warps
                found.append(Variant(_both_kernel, arguments, constants, warps, default=default, archs=(90, 100)))
        arguments = {"x_ptr": x, "largest_ptr": "*fp32", "q_ptr": "*fp8e4nv", **weight}
        tile = dict(zip(("ROWS", "COLUMNS"), COLUMNS_TILE, strict=True))
        constants = {"LIMIT": torch.finfo(FORWARD).max, **tile}
        found.append(Variant(_columns_kernel, arguments, constants, WARPS, default=usual, archs=(90, 100)))
        arguments = {"x_ptr": x, "largest_ptr": "*fp32", **weight}
        constants = dict(zip(("ROWS", "COLUMNS", "WARPS"), (*AMAX_TILE, WARPS), strict=True))
        found.append(Variant(_column_amax_kernel, arguments, constants, WARPS, default=usual, archs=(90, 100)))
    return found


_QUANTISE_ROWS = {"reference": _reference_rows, "triton": _triton_rows}
_QUANTISE_COLUMNS = {"reference": _reference_columns, "triton": _triton_columns}
_QUANTISE_BOTH = {"reference": _reference_both, "triton": _triton_both}
_FP8_LINEAR = Op(
    "fp8_linear",
    {
        "cuda": {
            "triton": "quantised in Triton, multiplied by torch._scaled_mm: a 1b step is 1.3 times bf16 (H200)",
            "reference": "float32 matmuls of fp8 values, for GPUs without fp8",
        },
        "cpu": {"reference": "float32 matmuls of fp8 values: the same errors, no speed"},
    },
    variants,
    _launches,
)

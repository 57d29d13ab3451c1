"""A linear layer whose three matmuls are in fp8, for layers wide enough to gain by it: `engine: {fp8: true}`.

    y = x W^T        dx = dy W        dw = dy^T x           each operand q s, q in fp8 and s in float32

Legend: N rows (all leading dimensions together), I inputs, O outputs, D the width of whatever is quantised.

Tensor cores multiply fp8 twice as fast as bf16. e4m3 (4 bits of exponent, 3 of mantissa, up to 448) holds what goes
forward, x and W; e5m2 (5 and 2, up to 57,344) the gradient, whose range is wider (Micikevicius et al., arXiv
2209.05433). Scales are dynamic: s = max |row| / the largest fp8 number, of the very tensor that is multiplied, so there
is no history to keep; every row along which a matmul sums has its own, so that an outlier costs only its own row. y
sums along rows of x and W; dx along rows of dy and columns of W; dw along columns of dy and x. So each tensor is
quantised by rows or columns or both, and since the hardware wants what it sums along side by side, columns are written
transposed.

By rows a tensor is read once, a program holding whole rows: for bf16, 2ND bytes read and ND written. By columns it is
read twice, for the maxima and for the transpose: 4ND and ND. Against that, a matmul of width D saves half its time,
which grows with D: torchao's users find no gain below about 2,048. Saved for the backward pass are x and W as they
came.

What `torch._scaled_mm` asks: the first operand row-major, the second column-major; what it sums along and the columns
that it puts out divisible by 16 (the rows of x need not be: the transposed copies are padded with zeros); and e5m2 on
the left, which is where dy is in both matmuls. With a scale for each row it puts out bf16 on every GPU, to which y and
dx are rounded; float32, in which dw is handed on as in kernels/norm.py, only through cuBLAS 12.9 on Hopper. Elsewhere
dw takes one scale for each whole tensor. Sums of gradients are kept in float32; forward ones in the tensor core's own
22 bits (`use_fast_accum`), still far finer than the numbers that are summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_fast.errors import invalid
from spt_fast.kernels.backend import Op, custom_op, differentiable
from spt_fast.kernels.launch import DTYPES, Variant, jit, multiprocessors, next_power_of_2, tl

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
    return _linear(x, weight, _FP8_LINEAR.pick(backend, x, triton=obstacle(x.device)))


def obstacle(device: torch.device) -> str | None:
    """Why this GPU cannot multiply fp8; None where it can, and on a CPU, which stands in for one."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "fp8 needs a GPU of compute capability 8.9, this one has {}.{}".format(
            *torch.cuda.get_device_capability(device)
        )
    return None


# ------------------------------------------------------------------------------------------------ custom ops


@custom_op("fp8_linear", lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]))
def _linear(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    rows = _QUANTISE_ROWS[backend]
    y = _product(*rows(_flat(x), FORWARD), *rows(weight.contiguous(), FORWARD), torch.bfloat16, backend)
    return y.to(x.dtype).view(*x.shape[:-1], len(weight))


@custom_op(
    "fp8_linear_backward",
    lambda dy, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)),
)
def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """(dx [..., I] in x's dtype, dw [O, I] in float32)."""
    if not dy.numel():
        return x.new_zeros(x.shape), weight.new_zeros(weight.shape, dtype=torch.float32)
    rows, columns = _QUANTISE_ROWS[backend], _QUANTISE_COLUMNS[backend]
    dy_NO, x_NI = _flat(dy), _flat(x)
    dx = _product(*rows(dy_NO, BACKWARD), *columns(weight.contiguous(), FORWARD), torch.bfloat16, backend)
    whole = not _rows_reach_float32(x.device)
    dw = _product(*columns(dy_NO, BACKWARD, whole), *columns(x_NI, FORWARD, whole), torch.float32, backend)
    return dx.to(x.dtype).view(x.shape), dw


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, weight, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_linear_backward(dy, *ctx.saved_tensors, ctx.backend), None


differentiable(_linear, _gradients, _setup_context)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """(a a_scale) (b b_scale)^T: a [M, K], b [N, K], scales [M, 1] and [N, 1], or both [1, 1]."""
    if backend == "triton" and a.is_cuda:
        forward = a.dtype == FORWARD
        return torch._scaled_mm(a, b.T, a_scale, b_scale.T, out_dtype=dtype, use_fast_accum=forward)
    return ((a.float() @ b.float().T) * a_scale * b_scale.T).to(dtype)


def _rows_reach_float32(device: torch.device) -> bool:
    """Whether a matmul with a scale for each row can be put out in float32."""
    if device.type != "cuda":
        return True
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split("."))
    return torch.cuda.get_device_capability(device)[0] == 9 and cuda >= (12, 9)


# ------------------------------------------------------------------------------------------------ reference


def _reference_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x [N, D] in fp8, its scales [N, 1])."""
    return _reference_quantise(x.float(), x.float().abs().amax(1, keepdim=True), dtype)


def _reference_columns(x: Tensor, dtype: torch.dtype, whole: bool = False) -> tuple[Tensor, Tensor]:
    """(x [N, D] in fp8 as [D, N], zeros behind it up to a multiple of 16; scales [D, 1], or [1, 1] of the whole)."""
    x = torch.nn.functional.pad(x.float().mT, (0, -len(x) % MULTIPLE))
    return _reference_quantise(x, x.abs().amax((0, 1) if whole else 1, keepdim=True), dtype)


def _reference_quantise(x: Tensor, largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    limit, largest = torch.finfo(dtype).max, largest.clamp(min=SMALLEST)
    return (x * (limit / largest)).to(dtype), largest / limit


# ------------------------------------------------------------------------------------------------ Triton

ROWS_TILE, ROWS_WARP = 4096, 512
"""Numbers that a program holds, unless a single row has more; numbers for each warp."""
AMAX_TILE = (16, 256)
COLUMNS_TILE = (128, 64)
"""Rows and columns of x: a row of a tile, and a row of the transposed one in fp8, are 128 bytes."""
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
def _column_amax_kernel(x_ptr, largest_ptr, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    largest = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    tl.store(largest_ptr + tl.program_id(0).to(tl.int64) * D + columns, tl.max(largest, 0), columns < D)


@jit
def _columns_kernel(
    x_ptr, largest_ptr, q_ptr, N, D, N_PADDED,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * D + columns[None, :], mask, 0.0).to(tl.float32)
    largest = tl.load(largest_ptr + columns, columns < D, 1.0)
    q = (x * tl.div_rn(tl.full((COLUMNS,), LIMIT, tl.float32), largest)[None, :]).to(q_ptr.dtype.element_ty)
    mask = (columns < D)[:, None] & (rows < N_PADDED)[None, :]
    tl.store(q_ptr + columns[:, None] * N_PADDED + rows[None, :], tl.trans(q), mask)


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


def _triton_columns(x: Tensor, dtype: torch.dtype, whole: bool = False) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    rows, columns = AMAX_TILE
    across = -(-D // columns)
    programs = min(-(-N // rows), -(-PROGRAMS_PER_SM * multiprocessors(x.device) // across))
    largest = x.new_empty(programs, D, dtype=torch.float32)
    _column_amax_kernel[(programs, across)](x, largest, N, D, ROWS=rows, COLUMNS=columns, num_warps=WARPS)
    largest = largest.amax(0).clamp_(min=SMALLEST)
    if whole:
        largest = largest.amax().repeat(D)
    padded = -(-N // MULTIPLE) * MULTIPLE
    q, limit = x.new_empty(D, padded, dtype=dtype), torch.finfo(dtype).max
    rows, columns = COLUMNS_TILE
    _columns_kernel[(-(-padded // rows), -(-D // columns))](
        x, largest, q, N, D, padded, LIMIT=limit, ROWS=rows, COLUMNS=columns, num_warps=WARPS
    )
    return q, (largest[: 1 if whole else D] / limit).unsqueeze(1)


def variants() -> list[Variant]:
    """The launches for widths from 2,048 (the model takes no narrower ones) to 16,384 in bf16, of 2,048 in the other
    dtypes, all multiples of 16. GPUs before 8.9 have no fp8: there is nothing for sm_80."""
    found = []
    sizes = {"N": "i32", "D": "i32:16"}
    for x in DTYPES:
        widths = [2048 << i for i in range(4)] if x == "*bf16" else [2048]
        for kind, dtype in (("*fp8e4nv", FORWARD), ("*fp8e5", BACKWARD)):
            limit = torch.finfo(dtype).max
            for D in widths:
                rows, columns, warps = _rows_tile(D)
                arguments = {"x_ptr": x, "q_ptr": kind, "scale_ptr": "*fp32", **sizes}
                constants = {"LIMIT": limit, "SMALLEST": SMALLEST, "ROWS": rows, "COLUMNS": columns}
                default = x == "*bf16" and D in (2048, 8192)
                found.append(Variant(_rows_kernel, arguments, constants, warps, default=default, archs=(90, 100)))
            arguments = {"x_ptr": x, "largest_ptr": "*fp32", "q_ptr": kind, **sizes, "N_PADDED": "i32:16"}
            constants = {"LIMIT": limit, "ROWS": COLUMNS_TILE[0], "COLUMNS": COLUMNS_TILE[1]}
            found.append(Variant(_columns_kernel, arguments, constants, WARPS, default=x == "*bf16", archs=(90, 100)))
        arguments = {"x_ptr": x, "largest_ptr": "*fp32", **sizes}
        constants = dict(zip(("ROWS", "COLUMNS"), AMAX_TILE, strict=True))
        found.append(Variant(_column_amax_kernel, arguments, constants, WARPS, default=x == "*bf16", archs=(90, 100)))
    return found


_QUANTISE_ROWS = {"reference": _reference_rows, "triton": _triton_rows}
_QUANTISE_COLUMNS = {"reference": _reference_columns, "triton": _triton_columns}
_FP8_LINEAR = Op(
    "fp8_linear",
    {
        "cuda": {
            "triton": "quantised in Triton, multiplied by torch._scaled_mm; not measured yet",
            "reference": "float32 matmuls of what fp8 holds, for GPUs without it",
        },
        "cpu": {"reference": "float32 matmuls of what fp8 holds: the same errors, no speed"},
    },
    variants,
)

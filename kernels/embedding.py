"""Embedding lookup whose gradient is summed in float32.

    y_n = w[t_n]        dw_v = sum of dy_n over the n with t_n = v

A frequent token occurs hundreds of times in a batch. PyTorch sums its gradient in the dtype of the weight: in bf16 a
sum of ones stops at 256. Here it is summed in float32 (float64 for float64 weights) and returned in that dtype,
unrounded, if the caller accumulates in it (`weight.grad_dtype`), else in the weight's dtype.

Legend: N tokens, V vocabulary, D width. Bytes moved for bf16, in an ideal kernel: forward 4ND, backward 2ND + 4VD. The
lookup is PyTorch's own on every backend. Its gradient is PyTorch's index_add in the reference, which on a GPU adds by
atomics, in another order each time. Triton's kernels sort the tokens instead, so that those of a word are adjacent, in
order: one program sums the rows of one word, and writes every row of dw just once, zeros too. One word may have a tenth
of all rows, and its program would run many times as long as all others together: more than CHUNK rows are first summed
in parts, one for each CHUNK places, and then the parts. If dw is added to a gradient in place (kernels/linear.py), only
rows of words that occur are read and written: 2ND + 8D bytes per word. On a CPU threads share the columns and add in
the order of the tokens (csrc/embedding.cpp): sorting them took 1.5 times as long at V = 50,304. Both give the same
result every time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast import native
from spt_fast.errors import invalid
from spt_fast.kernels.backend import Op, accumulation_dtype, custom_op, differentiable
from spt_fast.kernels.gradients import accumulates_in_place, gradient_of
from spt_fast.kernels.launch import DTYPES, Variant, jit, next_power_of_2, tl


def embedding(tokens: Tensor, weight_VD: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows of weight_VD: tokens [...] int64 or int32 in [0, V) → [..., D] in the weight's dtype.

    ValueError: a weight or tokens of another kind, or a backend that cannot run for the weight. IndexError (on a CPU):
    a token outside the vocabulary.
    """
    if weight_VD.dim() != 2:
        raise ValueError(invalid("embedding(weight_VD)", tuple(weight_VD.shape), "it must be [V, D]"))
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(invalid("embedding(tokens)", tokens.dtype, "they must be int64 or int32"))
    backend = _EMBEDDING.pick(backend, weight_VD)
    if torch.is_grad_enabled() and accumulates_in_place(weight_VD):
        return _InPlace.apply(tokens, weight_VD, backend)
    return _embedding(tokens, weight_VD, backend)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VD: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight_VD, ctx.backend = weight_VD, backend
        return _embedding(tokens, weight_VD, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        (tokens,), weight_VD = ctx.saved_tensors, ctx.weight_VD
        _sum(dy, tokens, ctx.backend, *gradient_of(weight_VD))
        return None, None, None


# ------------------------------------------------------------------------------------------------ custom ops


@custom_op("embedding", lambda tokens, weight_VD, *_: weight_VD.new_empty(*tokens.shape, weight_VD.shape[1]))
def _embedding(tokens: Tensor, weight_VD: Tensor, backend: str) -> Tensor:
    return F.embedding(tokens, weight_VD)


@custom_op(
    "embedding_backward",
    lambda dy, tokens, vocab_size, dtype, *_: dy.new_empty(vocab_size, dy.shape[-1], dtype=dtype),
)
def _embedding_backward(dy: Tensor, tokens: Tensor, vocab_size: int, dtype: torch.dtype, backend: str) -> Tensor:
    """dw [V, D], summed in the wide dtype."""
    summed = dtype if backend == "cpu" and dtype == torch.bfloat16 else accumulation_dtype(dy)
    dw_VD = dy.new_empty(vocab_size, dy.shape[-1], dtype=summed)
    _sum(dy, tokens, backend, dw_VD, True)
    return dw_VD.to(dtype)


def _sum(dy: Tensor, tokens: Tensor, backend: str, total_VD: Tensor, new: bool) -> None:
    """Adds dw to the total; a `new` total becomes dw, whatever it holds."""
    dy_ND = dy.reshape(-1, dy.shape[-1]).contiguous()
    {"reference": _reference, "cpu": _cpu, "triton": _triton}[backend](dy_ND, tokens.flatten(), total_VD, new)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, weight_VD, ctx.backend = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab_size = weight_VD.shape[0]
    # Autograd would otherwise convert dw to this dtype, with one more copy of it.
    accepted = weight_VD.grad_dtype if weight_VD.is_leaf else weight_VD.dtype
    ctx.dw_dtype = accepted or accumulation_dtype(weight_VD)


def _gradients(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
    (tokens,) = ctx.saved_tensors
    return None, _embedding_backward(dy, tokens, ctx.vocab_size, ctx.dw_dtype, ctx.backend), None


differentiable(_embedding, _gradients, _setup_context)


# ------------------------------------------------------------------------------------------------ backward


def _reference(dy_ND: Tensor, tokens_N: Tensor, total_VD: Tensor, new: bool) -> None:
    if new:
        total_VD.zero_()
    total_VD.index_add_(0, tokens_N, dy_ND.to(total_VD.dtype))


def _cpu(dy_ND: Tensor, tokens_N: Tensor, total_VD: Tensor, new: bool) -> None:
    native.ops().cpu_embedding_backward(dy_ND, tokens_N.long().contiguous(), total_VD, not new)


ROWS, MAX_COLUMNS, NUMBERS_PER_THREAD = 4, 1024, 8
"""Rows of dy that a program reads at once, its widest part of a row, and how much of that each thread has."""
CHUNK = 64
"""The most rows that one program sums."""


@jit
def _sum_of_rows(dy_ptr, order_ptr, first, end, D, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of the rows of dy in the sorted places from first to end, one after the other: each thread adds up its own
    columns. A sum across warps would pass through shared memory, every thread of a warp in the same bank."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for place in range(first, end, ROWS):
        for i in tl.static_range(ROWS):
            known = place + i < end
            row = tl.load(order_ptr + place + i, known, 0)
            total += tl.load(dy_ptr + row * D + columns, columns < tl.where(known, D, 0), 0.0).to(tl.float32)
    return total


@jit
def _part_kernel(
    dy_ptr, order_ptr, words_ptr, start_ptr, part_ptr, N, D,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """In a chunk of sorted places, the part of a word with more than CHUNK of them: the word at the chunk's first
    place, or, if that is another, at its last. There can be no third one."""
    chunk, last = tl.program_id(0) // 2, tl.program_id(0) % 2
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, N)
    word = tl.load(words_ptr + tl.where(last == 1, end - 1, begin))
    start, stop = tl.load(start_ptr + word), tl.load(start_ptr + word + 1)
    if (stop - start > CHUNK) & ((last == 0) | (start > begin)):
        first, after = tl.maximum(start, begin), tl.minimum(stop, end)
        part = _sum_of_rows(dy_ptr, order_ptr, first, after, D, columns, ROWS, COLUMNS)
        tl.store(part_ptr + tl.program_id(0).to(tl.int64) * D + columns, part, columns < D)


@jit
def _word_kernel(
    dy_ptr, order_ptr, start_ptr, part_ptr, dw_ptr, D,
    ADD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A word's rows, or the parts of their sum, in order. ADD: to the values already in dw."""
    word = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(start_ptr + word), tl.load(start_ptr + word + 1)
    if ADD and start == end:
        return
    if end - start <= CHUNK:
        dw = _sum_of_rows(dy_ptr, order_ptr, start, end, D, columns, ROWS, COLUMNS)
    else:
        dw = tl.zeros((COLUMNS,), tl.float32)
        for chunk in range(start // CHUNK, (end - 1) // CHUNK + 1, ROWS):
            for i in tl.static_range(ROWS):
                begin = (chunk + i) * CHUNK
                part = 2 * (chunk + i) + (start > begin)
                dw += tl.load(part_ptr + part * D + columns, columns < tl.where(begin < end, D, 0), 0.0)
    at = dw_ptr + word * D + columns
    if ADD:
        dw += tl.load(at, columns < D, 0.0)
    tl.store(at, dw, columns < D)


def _sizes(D: int) -> tuple[dict[str, int], int]:
    """(the constants of a program, its warps)."""
    columns = min(MAX_COLUMNS, next_power_of_2(D))
    return {"CHUNK": CHUNK, "ROWS": ROWS, "COLUMNS": columns}, max(1, columns // (32 * NUMBERS_PER_THREAD))


def _triton(dy_ND: Tensor, tokens_N: Tensor, total_VD: Tensor, new: bool) -> None:
    (N, D), vocab_size = dy_ND.shape, len(total_VD)
    if not total_VD.numel():
        return
    words_N, order_N = torch.sort(tokens_N.int(), stable=True)
    start_V1 = torch.searchsorted(words_N, torch.arange(vocab_size + 1, dtype=torch.int32, device=dy_ND.device))
    constants, warps = _sizes(D)
    chunks, across = -(-N // CHUNK), -(-D // constants["COLUMNS"])
    part_CD = dy_ND.new_empty(2 * chunks, D, dtype=torch.float32)
    sizes: dict[str, Any] = {**constants, "num_warps": warps}
    if chunks > 1:
        _part_kernel[(2 * chunks, across)](dy_ND, order_N, words_N, start_V1, part_CD, N, D, **sizes)
    _word_kernel[(vocab_size, across)](dy_ND, order_N, start_V1, part_CD, total_VD, D, ADD=not new, **sizes)


def variants() -> list[Variant]:
    """The launches for widths of 64 and more in bf16, of 512 and more in the other dtypes."""
    found = []
    cases = [(D, "*bf16", "i32:16") for D in (64, 128, 256, 512)] + [(MAX_COLUMNS, d, "i32:16") for d in DTYPES]
    cases += [(512, dtype, "i32:16") for dtype in ("*fp16", "*fp32")]
    cases += [(1000, dtype, "i32") for dtype in ("*bf16", "*fp32")]
    for D, dtype, size in cases:
        constants, warps = _sizes(D)
        default = D == MAX_COLUMNS and dtype == "*bf16"
        arguments: dict[str, str | None] = {
            "dy_ptr": dtype, "order_ptr": "*i64", "start_ptr": "*i64", "part_ptr": "*fp32", "D": size,
        }  # fmt: skip
        part = arguments | {"words_ptr": "*i32", "N": "i32"}
        found.append(Variant(_part_kernel, part, constants, warps, default=default))
        for add in (False, True):
            word, more = arguments | {"dw_ptr": "*fp32"}, constants | {"ADD": add}
            found.append(Variant(_word_kernel, word, more, warps, default=default))
    return found


_EMBEDDING = Op(
    "embedding",
    {
        "cuda": {
            "triton": "sums in order, the same bits every time, where index_add has atomics; not measured yet",
            "reference": "PyTorch ops",
        },
        "cpu": {
            "cpu": "1.6 to 1.9 times PyTorch's index_add, forward and backward, for bf16 weights (AMD EPYC, 1 core)",
            "reference": "PyTorch ops",
        },
    },
    variants,
)

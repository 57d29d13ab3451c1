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
from spt_fast.kernels.backend import Op, accumulation_dtype, custom_op, differentiable
from spt_fast.kernels.gradients import accumulates_in_place, gradient_of
from spt_fast.kernels.launch import DTYPES, Variant, jit, next_power_of_2, tl


def embedding(tokens: Tensor, weight_VD: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows of weight_VD: tokens [...] int64 or int32 in [0, V) → [..., D] in the weight's dtype.

    ValueError: a backend that cannot run for the weight. IndexError (on a CPU): a token outside the vocabulary.
    """
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


ROWS, MAX_COLUMNS, WARPS = 8, 256, 4
"""Numbers of dy that a program reads at once: 8 rows in flight for frequent words."""
CHUNK = 128
"""The most rows that one program sums."""


@jit
def _add_rows(total, dy_ptr, order_ptr, first, end, D, columns, ROWS: tl.constexpr):
    """total + the rows of dy in the sorted places from first to end."""
    for place in range(first, end, ROWS):
        places = place + tl.arange(0, ROWS)
        rows = tl.load(order_ptr + places, places < end, 0)
        mask = (places < end)[:, None] & (columns < D)[None, :]
        total += tl.load(dy_ptr + rows[:, None] * D + columns[None, :], mask, 0.0).to(tl.float32)
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
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = _add_rows(total, dy_ptr, order_ptr, tl.maximum(start, begin), tl.minimum(stop, end), D, columns, ROWS)
        tl.store(part_ptr + tl.program_id(0).to(tl.int64) * D + columns, tl.sum(total, 0), columns < D)


@jit
def _word_kernel(
    dy_ptr, order_ptr, start_ptr, part_ptr, dw_ptr, D,
    ADD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A word's rows, or the parts of their sum, in order. ADD: to the values already in dw."""
    word = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(start_ptr + word), tl.load(start_ptr + word + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if end - start <= CHUNK:
        total = _add_rows(total, dy_ptr, order_ptr, start, end, D, columns, ROWS)
    else:
        for chunk in range(start // CHUNK, (end - 1) // CHUNK + 1, ROWS):
            chunks = chunk + tl.arange(0, ROWS)
            parts = 2 * chunks + (start > chunks * CHUNK)
            mask = (chunks * CHUNK < end)[:, None] & (columns < D)[None, :]
            total += tl.load(part_ptr + parts[:, None] * D + columns[None, :], mask, 0.0)
    dw, at = tl.sum(total, 0), dw_ptr + word * D + columns
    mask_D = (columns < D) & ((end > start) | (not ADD))
    if ADD:
        dw += tl.load(at, mask_D, 0.0)
    tl.store(at, dw, mask_D)


def _columns(D: int) -> int:
    return min(MAX_COLUMNS, next_power_of_2(D))


def _triton(dy_ND: Tensor, tokens_N: Tensor, total_VD: Tensor, new: bool) -> None:
    (N, D), vocab_size = dy_ND.shape, len(total_VD)
    if not total_VD.numel():
        return
    words_N, order_N = torch.sort(tokens_N.int(), stable=True)
    start_V1 = torch.searchsorted(words_N, torch.arange(vocab_size + 1, dtype=torch.int32, device=dy_ND.device))
    chunks, across = -(-N // CHUNK), -(-D // _columns(D))
    part_CD = dy_ND.new_empty(2 * chunks, D, dtype=torch.float32)
    sizes: dict[str, Any] = {"CHUNK": CHUNK, "ROWS": ROWS, "COLUMNS": _columns(D), "num_warps": WARPS}
    if chunks > 1:
        _part_kernel[(2 * chunks, across)](dy_ND, order_N, words_N, start_V1, part_CD, N, D, **sizes)
    _word_kernel[(vocab_size, across)](dy_ND, order_N, start_V1, part_CD, total_VD, D, ADD=not new, **sizes)


def variants() -> list[Variant]:
    """The launches for widths of 64 and more in bf16, of 256 and more in the other dtypes."""
    found = []
    cases = [(D, "*bf16", "i32:16") for D in (64, 128)] + [(MAX_COLUMNS, dtype, "i32:16") for dtype in DTYPES]
    cases += [(1000, dtype, "i32") for dtype in ("*bf16", "*fp32")]
    for D, dtype, size in cases:
        sizes = {"CHUNK": CHUNK, "ROWS": ROWS, "COLUMNS": _columns(D)}
        default = D == MAX_COLUMNS and dtype == "*bf16"
        arguments: dict[str, str | None] = {
            "dy_ptr": dtype, "order_ptr": "*i64", "start_ptr": "*i64", "part_ptr": "*fp32", "D": size,
        }  # fmt: skip
        part = arguments | {"words_ptr": "*i32", "N": "i32"}
        found.append(Variant(_part_kernel, part, sizes, WARPS, default=default))
        for add in (False, True):
            word, constants = arguments | {"dw_ptr": "*fp32"}, sizes | {"ADD": add}
            found.append(Variant(_word_kernel, word, constants, WARPS, default=default))
    return found


_EMBEDDING = Op(
    "embedding",
    {
        "cuda": {
            "triton": "sums in order, the same bits, where index_add has atomics: 0.13 to 0.35 of its speed (H200)",
            "reference": "PyTorch ops",
        },
        "cpu": {
            "cpu": "1.6 to 1.9 times PyTorch's index_add, forward and backward, for bf16 weights (AMD EPYC, 1 core)",
            "reference": "PyTorch ops",
        },
    },
    variants,
)

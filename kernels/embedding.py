"""Embedding lookup whose gradient is summed in float32.

    y_n = w[t_n]        dw_v = sum of dy_n over the n with t_n = v

A frequent token occurs hundreds of times in a batch. PyTorch sums its gradient in the dtype of the weight: in bf16 a
sum of ones stops at 256. Here it is summed in float32 (float64 for float64 weights) and handed on in that dtype,
unrounded, for those who accumulate in it (`weight.grad_dtype`); autograd casts it to the weight's dtype for those who
don't.

Legend: N tokens, V vocabulary, D width. Bytes moved for bf16, in an ideal kernel: forward 4ND, backward 2ND + 4VD. The
lookup is PyTorch's own on every backend. Its gradient is PyTorch's index_add in the reference, which on a GPU adds by
atomics, in another order each time. On a GPU the tokens are sorted instead, so that those of a word lie together, in
their order: one program sums the rows of one word, and writes every row of dw just once, zeros too. Words sorted by
frequency, as in a byte-pair vocabulary, start the long sums first. On a CPU threads share the columns and add in the
order of the tokens (csrc/embedding.cpp): sorting them took 1.5 times as long at V = 50,304. Both give the same result
every time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast import native
from spt_fast.kernels.backend import Op, accumulation_dtype, custom_op, differentiable
from spt_fast.kernels.launch import DTYPES, Variant, jit, next_power_of_2, tl


def embedding(tokens: Tensor, weight_VD: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows of weight_VD: tokens [...] int64 or int32 in [0, V) → [..., D] in the weight's dtype.

    ValueError: a backend that cannot run for the weight. IndexError (on a CPU): a token outside the vocabulary.
    """
    return _embedding(tokens, weight_VD, _EMBEDDING.pick(backend, weight_VD))


# ------------------------------------------------------------------------------------------------ custom ops


@custom_op("embedding", lambda tokens, weight_VD, *_: weight_VD.new_empty(*tokens.shape, weight_VD.shape[1]))
def _embedding(tokens: Tensor, weight_VD: Tensor, backend: str) -> Tensor:
    return F.embedding(tokens, weight_VD)


@custom_op(
    "embedding_backward",
    lambda dy, tokens, vocab_size, *_: dy.new_empty(vocab_size, dy.shape[-1], dtype=accumulation_dtype(dy)),
)
def _embedding_backward(dy: Tensor, tokens: Tensor, vocab_size: int, backend: str) -> Tensor:
    """dw [V, D] in the wide dtype."""
    dy_ND = dy.reshape(-1, dy.shape[-1]).contiguous()
    return {"reference": _reference, "cpu": _cpu, "triton": _triton}[backend](dy_ND, tokens.flatten(), vocab_size)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, weight_VD, ctx.backend = inputs
    ctx.save_for_backward(tokens)
    ctx.vocab_size = weight_VD.shape[0]


def _gradients(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
    (tokens,) = ctx.saved_tensors
    return None, _embedding_backward(dy, tokens, ctx.vocab_size, ctx.backend), None


differentiable(_embedding, _gradients, _setup_context)


# ------------------------------------------------------------------------------------------------ backward


def _reference(dy_ND: Tensor, tokens_N: Tensor, vocab_size: int) -> Tensor:
    dweight_VD = dy_ND.new_zeros(vocab_size, dy_ND.shape[1], dtype=accumulation_dtype(dy_ND))
    return dweight_VD.index_add_(0, tokens_N, dy_ND.to(dweight_VD.dtype))


def _cpu(dy_ND: Tensor, tokens_N: Tensor, vocab_size: int) -> Tensor:
    dweight_VD = dy_ND.new_empty(vocab_size, dy_ND.shape[1], dtype=torch.float32)
    native.ops().cpu_embedding_backward(dy_ND, tokens_N.long().contiguous(), dweight_VD)
    return dweight_VD


ROWS, MAX_COLUMNS, WARPS = 8, 256, 4
"""Of dy, what a program reads at once: 8 rows in flight for words that occur often."""


@jit
def _backward_kernel(dy_ptr, order_ptr, start_ptr, dw_ptr, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    word = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(start_ptr + word), tl.load(start_ptr + word + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, end, ROWS):
        places = first + tl.arange(0, ROWS)
        rows = tl.load(order_ptr + places, places < end, 0)
        mask = (places < end)[:, None] & (columns < D)[None, :]
        total += tl.load(dy_ptr + rows[:, None] * D + columns[None, :], mask, 0.0).to(tl.float32)
    tl.store(dw_ptr + word * D + columns, tl.sum(total, 0), columns < D)


def _columns(D: int) -> int:
    return min(MAX_COLUMNS, next_power_of_2(D))


def _triton(dy_ND: Tensor, tokens_N: Tensor, vocab_size: int) -> Tensor:
    D = dy_ND.shape[1]
    dweight_VD = dy_ND.new_empty(vocab_size, D, dtype=torch.float32)
    words_N, order_N = torch.sort(tokens_N.int(), stable=True)
    start_V1 = torch.searchsorted(words_N, torch.arange(vocab_size + 1, dtype=torch.int32, device=dy_ND.device))
    columns = _columns(D)
    if dweight_VD.numel():
        _backward_kernel[(vocab_size, -(-D // columns))](
            dy_ND, order_N, start_V1, dweight_VD, D, ROWS=ROWS, COLUMNS=columns, num_warps=WARPS
        )
    return dweight_VD


def variants() -> list[Variant]:
    """The launches for widths of 64 and more in bf16, of 256 and more in the other dtypes."""
    found = []
    cases = [(D, "*bf16", "i32:16") for D in (64, 128)] + [(MAX_COLUMNS, dtype, "i32:16") for dtype in DTYPES]
    cases += [(1000, dtype, "i32") for dtype in ("*bf16", "*fp32")]
    for D, dtype, size in cases:
        arguments = {"dy_ptr": dtype, "order_ptr": "*i64", "start_ptr": "*i64", "dw_ptr": "*fp32", "D": size}
        constants, default = {"ROWS": ROWS, "COLUMNS": _columns(D)}, D == MAX_COLUMNS and dtype == "*bf16"
        found.append(Variant(_backward_kernel, arguments, constants, WARPS, default=default))
    return found


_EMBEDDING = Op(
    "embedding",
    {
        "cuda": {
            "triton": "sums in order, the same every time, where index_add has atomics; not measured yet",
            "reference": "PyTorch ops",
        },
        "cpu": {
            "cpu": "1.6 to 1.9 times PyTorch's index_add, forward and backward, for bf16 weights (AMD EPYC, 1 core)",
            "reference": "PyTorch ops",
        },
    },
    variants,
)

"""Embedding lookup whose gradient is summed in float32.

    y_n = w[t_n]        dw_v = sum of dy_n over the n with t_n = v

A frequent token occurs hundreds of times in a batch. PyTorch sums its gradient in the dtype of the weight: in bf16 a
sum of ones stops at 256. Here it is summed in float32 (float64 for float64 weights) and handed on in that dtype,
unrounded, for those who accumulate in it (`weight.grad_dtype`); autograd casts it to the weight's dtype for those who
don't.

Legend: N tokens, V vocabulary, D width. Bytes moved for bf16: forward 4ND, backward 2ND + 8ND (read and write the rows
hit) + 4VD (the zeros).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spt_fast.kernels.backend import Op, accumulation_dtype


def embedding(tokens: Tensor, weight_VD: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows of weight_VD: tokens [...] int64 or int32 in [0, V) → [..., D] in the weight's dtype.

    ValueError: a backend that isn't available. IndexError (on a CPU): a token outside the vocabulary.
    """
    _EMBEDDING.pick(backend, weight_VD)
    return _Embedding.apply(tokens, weight_VD)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.vocab_size = weight_VD.shape[0]
        return F.embedding(tokens, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        dtype = accumulation_dtype(dy)
        dweight_VD = torch.zeros(ctx.vocab_size, dy.shape[-1], dtype=dtype, device=dy.device)
        return None, dweight_VD.index_add_(0, tokens.flatten(), dy.reshape(-1, dy.shape[-1]).to(dtype))


_EMBEDDING = Op("embedding", {"cuda": {"reference": "PyTorch ops"}, "cpu": {"reference": "PyTorch ops"}})

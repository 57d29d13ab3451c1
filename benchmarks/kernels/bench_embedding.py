"""Embedding lookup: python -m benchmarks.kernels.bench_embedding [--help]

Bytes that must be moved (kernels/embedding.py) for N tokens and V rows of D numbers of b bytes: forward 2bND, backward
bND + 8ND + 4VD. The gradient is requested in float32, as in the trainer: PyTorch sums in the weight's dtype and then
casts. Tokens are as frequent as in text: id i in proportion to 1 / i. Caches hold the frequent rows, so rates may
exceed 100%.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import embedding


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[(32768, 50_304, 768), (32768, 50_304, 2048), (16384, 151_936, 4096)],
        cpu=[(4096, 4096, 384), (8192, 50_304, 768)],
        dry=[(16, 32, 64)],
    )
    return [partial(lookup, run, *shape) for shape in shapes]


def lookup(run: Run, N: int, V: int, D: int) -> Case:
    tokens_N = torch.rand(N, device=run.device).mul_(math.log(V)).exp_().long().sub_(1).clamp_(0, V - 1)
    weight_VD = run.randn(V, D)
    weight_VD.grad_dtype = torch.float32
    contenders = [
        *run.torch_contenders(F.embedding),
        *run.ours(embedding),
        Contender("liger", liger),
    ]
    b = weight_VD.itemsize
    forward, backward = 2 * b * N * D, b * N * D + 8 * N * D + 4 * V * D
    work = {"forward": forward, "backward": backward, "both": forward + backward}
    return Case("embedding", f"{N} tokens, {V} x {D}", (tokens_N, weight_VD), contenders, work)


def liger() -> Function:
    from liger_kernel.ops.experimental.embedding import LigerEmbeddingFunction

    def look_up(tokens_N: Tensor, weight_VD: Tensor) -> Tensor:
        return LigerEmbeddingFunction.apply(weight_VD, tokens_N)

    return look_up


if __name__ == "__main__":
    main(cases, __doc__)

"""A linear layer's weight gradient: python -m benchmarks.kernels.bench_linear [--help]

It is added in float32 to an existing one. FLOPs (kernels/linear.py): 2NIO. Autograd computes the product in the
weight's dtype, converts it and adds it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, Contender, Run, main
from spt_fast.kernels.linear import add_product


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[(32768, 768, 2304), (32768, 768, 4096), (16384, 2048, 6144), (16384, 2048, 11264)],
        cpu=[(4096, 384, 1152), (4096, 384, 2048)],
        dry=[(16, 32, 64)],
    )
    return [partial(weight_gradient, run, *shape) for shape in shapes]


def weight_gradient(run: Run, N: int, I: int, O: int) -> Case:  # noqa: E741
    dy, x = run.randn(N, O, grad=False), run.randn(N, I, grad=False)
    total = run.randn(O, I, dtype=torch.float32, grad=False)
    contenders = [*run.torch_contenders(autograd), Contender("ours", lambda: ours, "ours")]
    return Case("linear", f"{N} x {I} to {O}", (dy, x, total), contenders, {"step": 2.0 * N * I * O}, unit="TFLOP/s")


def autograd(dy: Tensor, x: Tensor, total: Tensor) -> Tensor:
    return total.add_((dy.T @ x).to(total.dtype))


def ours(dy: Tensor, x: Tensor, total: Tensor) -> Tensor:
    add_product(total, False, dy.T, x)
    return total


if __name__ == "__main__":
    main(cases, __doc__)

"""Linear layer and cross-entropy in one: python -m benchmarks.kernels.bench_cross_entropy [--help]

FLOPs (kernels/cross_entropy.py) for N tokens, width D, vocabulary V: three matmuls, 6NDV; further work of a contender
(a recomputed matmul, the softmax) lowers its rate. The floor is these three matmuls alone, timed in the same rounds.
Contenders differ in the work of their forward pass, so only "both" is ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import linear_cross_entropy

SHARE = 2
ROWS = 512
"""Rows at a time in the float64 result."""


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[(32768, 768, 50_304), (16384, 2048, 50_304), (8192, 4096, 151_936)],
        cpu=[(4096, 384, 4096)],
        dry=[(32, 64, 160)],
    )
    return [partial(loss, run, *shape) for shape in shapes]


def loss(run: Run, N: int, D: int, V: int) -> Case:
    inputs = (
        run.randn(N, D),
        run.randn(V, D, scale=0.02),
        torch.randint(V, (N,), device=run.device),
    )
    contenders = [
        *run.torch_contenders(eager),
        *run.ours(linear_cross_entropy),
        Contender("torch's own, fused", lambda: F.linear_cross_entropy, "torch"),
        Contender("liger", partial(liger, None)),
        Contender("liger, float32 sums", partial(liger, torch.float32)),
        Contender("cut-cross-entropy", cut_cross_entropy),
        Contender("three matmuls", lambda: three_products, "floor"),
    ]
    product = 2 * N * D * V
    work = {"forward": product, "backward": 2 * product, "both": 3 * product}
    return Case(
        "linear_cross_entropy",
        f"{N} x {D} x {V}",
        inputs,
        contenders,
        work,
        unit="TFLOP/s",
        exact=partial(exact, *inputs),
        alike=("both",),
    )


def eager(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_ND, weight_VD).to(torch.promote_types(x_ND.dtype, torch.float32)), targets_N)


@torch.no_grad()
def three_products(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    dz_NV = x_ND @ weight_VD.T
    dx_ND = dz_NV @ weight_VD
    del dx_ND
    return dz_NV.T @ x_ND


@torch.no_grad()
def exact(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, _: Sequence[Tensor]) -> list[Tensor]:
    """Mean loss and its gradients in float64, some rows at a time."""
    N, weight_VD = len(x_ND), weight_VD.double()
    total, dx_ND, dw_VD = x_ND.new_zeros((), dtype=torch.float64), x_ND.double(), torch.zeros_like(weight_VD)
    for start in range(0, N, ROWS):
        rows = slice(start, start + ROWS)
        x_RD = x_ND[rows].double()
        logp_RV = torch.log_softmax(x_RD @ weight_VD.T, dim=1)
        index_R1 = targets_N[rows, None]
        total -= logp_RV.gather(1, index_R1).sum()
        dz_RV = logp_RV.exp_().scatter_add_(1, index_R1, -torch.ones_like(index_R1, dtype=torch.float64)).div_(N)
        dx_ND[rows] = dz_RV @ weight_VD
        dw_VD.addmm_(dz_RV.T, x_RD)
    return [total / N, dx_ND, dw_VD]


def liger(accumulate: torch.dtype | None) -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return partial(_liger, liger_fused_linear_cross_entropy, accumulate)


def _liger(function: Function, accumulate: torch.dtype | None, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return function(x, weight, targets, accum_dtype=accumulate)


def cut_cross_entropy() -> Function:
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut


if __name__ == "__main__":
    main(cases, __doc__)

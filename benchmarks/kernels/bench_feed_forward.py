"""The feed-forward layer with SwiGLU: python -m benchmarks.kernels.bench_feed_forward [--help]

FLOPs: 6NDF forward, twice that backward. "fused" has SwiGLU in the matmuls (kernels/feed_forward.py), on Hopper and
later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import feed_forward, swiglu_mlp


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[(32768, 768, 2048), (32768, 1024, 2816), (16384, 2048, 5632)],
        cpu=[(4096, 384, 1024)],
        dry=[(8, 16, 64)],
    )
    return [partial(case, run, *shape) for shape in shapes]


def case(run: Run, N: int, D: int, width: int) -> Case:
    x = run.randn(N, D)
    weights = run.randn(2 * width, D, scale=D**-0.5), run.randn(D, width, scale=width**-0.5)
    contenders = [*run.torch_contenders(eager), *run.ours(swiglu_mlp), Contender("triton, fused", fused, "ours")]
    product = 2.0 * N * width * D
    work = {"forward": 3 * product, "backward": 6 * product, "both": 9 * product}
    return Case("swiglu_mlp", f"{N} x {D}, {width} wide", (x, *weights), contenders, work, unit="TFLOP/s")


def eager(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up_weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down_weight)


def fused() -> Function:
    """With the first of the fused launches of each kernel."""
    if not torch.cuda.is_available():
        raise ImportError("needs a GPU")

    def function(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
        launches = [feed_forward.candidates(kernel, down_weight.shape[1])[0] for kernel in ("forward", "backward")]
        return cast("Tensor", feed_forward.Fused.apply(x, gate_up_weight, down_weight, None, None, *launches))

    return function


if __name__ == "__main__":
    main(cases, __doc__)

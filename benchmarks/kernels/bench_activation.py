"""SwiGLU: python -m benchmarks.kernels.bench_activation [--help]

Bytes that must be moved (kernels/activation.py), for numbers of b bytes: forward 3b per element, backward 5b. With the
projection to D that reads it, FLOPs: 2NFD forward, twice that backward; there the extra memory matters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import swiglu, swiglu_linear


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[(2**26 // width, width) for width in (2048, 2816, 5632, 8192)],
        cpu=[(4096, 1024)],
        dry=[(8, 64)],
    )
    projected = run.sizes(gpu=[(32768, 2048, 768), (16384, 5632, 2048)], cpu=[(4096, 1024, 384)], dry=[(8, 64, 16)])
    return [*(partial(gated, run, *shape) for shape in shapes), *(partial(fed, run, *shape) for shape in projected)]


def gated(run: Run, N: int, width: int) -> Case:
    gate, up = run.randn(N, width), run.randn(N, width)
    contenders = [
        *run.torch_contenders(eager),
        *run.ours(swiglu),
        Contender("liger", liger),
    ]
    tensor_bytes = gate.numel() * gate.itemsize
    work = {"forward": 3 * tensor_bytes, "backward": 5 * tensor_bytes, "both": 8 * tensor_bytes}
    return Case("swiglu", f"{N} x {width}", (gate, up), contenders, work)


def fed(run: Run, N: int, width: int, D: int) -> Case:
    gate_up, weight = run.randn(N, 2 * width), run.randn(D, width, scale=0.02)
    contenders = [*run.torch_contenders(eager_fed), *run.ours(swiglu_linear)]
    product = 2.0 * N * width * D
    work = {"forward": product, "backward": 2 * product, "both": 3 * product}
    return Case("swiglu_linear", f"{N} x {width} to {D}", (gate_up, weight), contenders, work, unit="TFLOP/s")


def eager_fed(gate_up: Tensor, weight: Tensor) -> Tensor:
    return F.linear(eager(*gate_up.chunk(2, dim=-1)), weight)


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def liger() -> Function:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu  # its backward pass writes over gate and up


if __name__ == "__main__":
    main(cases, __doc__)

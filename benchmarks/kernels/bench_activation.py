"""SwiGLU: python -m benchmarks.kernels.bench_activation [--help]

Bytes that must be moved (kernels/activation.py), for numbers of b bytes: forward 3b an element, backward 5b.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import swiglu


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[(2**26 // width, width) for width in (2048, 2816, 5632, 8192)],
        cpu=[(4096, 1024)],
        dry=[(8, 64)],
    )
    return [partial(gated, run, N, width) for N, width in shapes]


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


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def liger() -> Function:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu  # its backward pass writes over gate and up


if __name__ == "__main__":
    main(cases, __doc__)

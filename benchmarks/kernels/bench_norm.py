"""RMSNorm, alone and with the residual addition: python -m benchmarks.kernels.bench_norm [--help]

Bytes that must be moved (kernels/norm.py), for numbers of b bytes: forward 2bND, backward 3bND; with the residual 4bND
each way, the gradient of the stream included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import add_rms_norm, rms_norm

SHARE = 2
EPS = 1e-6


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[(2**25 // 768, 768), *((2**27 // D, D) for D in (1024, 2048, 4096, 8192))],
        cpu=[(4096, 384), (32768, 1024)],
        dry=[(8, 64)],
    )
    return [partial(case, run, N, D) for N, D in shapes for case in (norm, add_norm)]


def norm(run: Run, N: int, D: int) -> Case:
    x, weight = run.randn(N, D), run.randn(D)
    contenders = [
        *run.torch_contenders(eager_norm),
        *run.ours(rms_norm),
        Contender("liger", liger_norm),
    ]
    return _case("rms_norm", (x, weight), contenders, forward=2, backward=3)


def add_norm(run: Run, N: int, D: int) -> Case:
    x, residual, weight = run.randn(N, D), run.randn(N, D), run.randn(D)
    contenders = [
        *run.torch_contenders(eager_add_norm),
        *run.ours(add_rms_norm),
        Contender("liger", liger_add_norm),
    ]
    return _case("add_rms_norm", (x, residual, weight), contenders, forward=4, backward=4)


def _case(op: str, inputs: tuple[Tensor, ...], contenders: list[Contender], *, forward: int, backward: int) -> Case:
    x = inputs[0]
    tensor_bytes = x.numel() * x.itemsize
    work = {
        "forward": forward * tensor_bytes,
        "backward": backward * tensor_bytes,
        "both": (forward + backward) * tensor_bytes,
    }
    return Case(op, f"{x.shape[0]} x {x.shape[1]}", inputs, contenders, work)


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def eager_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    stream = x + residual
    return F.rms_norm(stream, weight.shape, weight, EPS), stream


def liger_norm() -> Function:
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda x, weight: liger_rms_norm(x, weight, EPS, in_place=False)


def liger_add_norm() -> Function:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return lambda x, residual, weight: liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)


if __name__ == "__main__":
    main(cases, __doc__)

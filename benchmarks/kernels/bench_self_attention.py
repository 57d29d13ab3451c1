"""The projection to queries, keys and values, rotated, and attention: python -m benchmarks.kernels.bench_self_attention
[--help]

FLOPs: those of the matmul, and of the pairs that the mask leaves. "fused" has the rotation in the matmul
(kernels/self_attention.py), on Hopper and later.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.bench_attention import rotate, sdpa, tables
from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import self_attention
from spt_fast.kernels.launch import choose

SELF_ATTENTION = importlib.import_module("spt_fast.kernels.self_attention")  # the function has the same name


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[(32, 1024, 12, 64), (16, 2048, 16, 64), (8, 2048, 16, 128)],
        cpu=[(4, 256, 6, 64)],
        dry=[(1, 24, 2, 16)],
    )
    return [partial(case, run, *shape) for shape in shapes]


def case(run: Run, B: int, T: int, H: int, D: int) -> Case:
    cos, sin = tables(run, T, D)
    x, weight = run.randn(B, T, H * D), run.randn(3 * H * D, H * D, scale=(H * D) ** -0.5)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = F.linear(x, weight).unflatten(-1, (3 * H, D)).split(H, dim=2)
        return sdpa(*rotate(q, k, cos, sin), v)

    def ours(x: Tensor, weight: Tensor, *, backend: str) -> Tensor:
        return self_attention(x, weight, H, D, None, cos, sin, backend=backend)

    def fused() -> Function:
        """With the first of its launches, which is chosen only within the call: the other contenders keep theirs."""
        if not torch.cuda.is_available():
            raise ImportError("needs a GPU")
        place, launch = ("qkv_projection", (*weight.shape, D, weight.itemsize)), SELF_ATTENTION.candidates(D)[0]

        def function(x: Tensor, weight: Tensor) -> Tensor:
            choose(*place, launch)
            try:
                return SELF_ATTENTION.Fused.apply(x, weight, None, cos, sin, None, H, D, None, D**-0.5)
            finally:
                choose(*place, None)

        return function

    contenders = [*run.torch_contenders(eager), *run.ours(ours, "sdpa"), Contender("triton, fused", fused, "ours")]
    forward = 6.0 * B * T * (H * D) ** 2 + 2.0 * B * T * (T + 1) * D * H
    backward = 12.0 * B * T * (H * D) ** 2 + 5.0 * B * T * (T + 1) * D * H
    work = {"forward": forward, "backward": backward, "both": forward + backward}
    return Case("self_attention", f"{B} x {T} x {H} heads of {D}", (x, weight), contenders, work, unit="TFLOP/s")


if __name__ == "__main__":
    main(cases, __doc__)

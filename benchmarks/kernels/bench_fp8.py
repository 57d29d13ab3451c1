"""Linear layer in 8-bit floating point: python -m benchmarks.kernels.bench_fp8 [--help]

FLOPs for N tokens, D in, F out: 2NDF forward, twice that backward. The ceiling is bf16's, so fp8 may exceed 100%. Needs
a GPU with fp8 (compute capability 8.9 or more). Two operands of 3 mantissa bits, relative error 2^-4 at most and
uniform below, have an error of about 4% of a product's norm, 6% if one of them (a gradient) has 2: 10% is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import accumulate_in_place, fp8_linear
from spt_fast.kernels.gradients import in_place

SHARE = 2
ALLOWED_ERROR = 0.1


def cases(run: Run) -> list[Callable[[], Case]]:
    shapes = run.sizes(
        gpu=[(16384, 1024, 2816), (16384, 2048, 2048), (16384, 2048, 11264), (8192, 8192, 8192)],
        cpu=[],
        dry=[(32, 64, 32)],
    )
    return [partial(linear, run, *shape) for shape in shapes]


def linear(run: Run, N: int, D: int, F_: int) -> Case:
    x, weight = run.randn(N, D), run.randn(F_, D, scale=0.02)
    contenders = [
        Contender("eager", lambda: F.linear, "torch"),
        Contender("ours, triton", partial(ours, "triton"), "ours"),
        Contender("ours, weight kept in fp8", partial(ours, "triton", kept=True), "ours"),
        Contender("ours, reference", partial(ours, "reference"), "ours"),
        Contender("torchao, tensorwise", partial(torchao, "tensorwise", (F_, D), run)),
        Contender("torchao, rowwise", partial(torchao, "rowwise", (F_, D), run)),
        Contender("bf16 matmuls", lambda: three_products, "floor"),
    ]
    product = 2.0 * N * D * F_
    work = {"forward": product, "backward": 2 * product, "both": 3 * product}
    name = f"{N} x {D} -> {F_}"
    return Case("fp8_linear", name, (x, weight), contenders, work, unit="TFLOP/s", allowed=ALLOWED_ERROR)


@torch.no_grad()
def three_products(x: Tensor, weight: Tensor) -> Tensor:
    y = x @ weight.T
    dx = y @ weight
    del dx
    return y.T @ x


def ours(backend: str, *, kept: bool = False) -> Function:
    """kept: from one call to the next, as for all micro-batches of a step but the first."""

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        if kept and in_place(weight) is None:
            accumulate_in_place([weight])
        return fp8_linear(x, weight, backend=backend)

    return apply


def torchao(recipe: str, shape: tuple[int, int], run: Run) -> Function:
    """torchao's Float8Linear, compiled if requested, which is its intended use."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    F_, D = shape
    config = Float8LinearConfig.from_recipe_name(recipe)
    model = nn.Sequential(nn.Linear(D, F_, bias=False, device=run.device, dtype=run.dtype))
    layer = convert_to_float8_training(model, config=config)
    if run.compiled:
        torch._dynamo.reset()
        layer = torch.compile(layer, dynamic=False)

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {name: weight for name, _ in layer.named_parameters()}, (x,))

    return apply


if __name__ == "__main__":
    main(cases, __doc__)

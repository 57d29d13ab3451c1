"""What every op is held to: twice the error that plain PyTorch ops of the same dtype make against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]

# Half a unit in the last place of a number near 1: what a single rounding may cost. A composition that happens to hit
# the exact result must not fail an op that is one rounding off.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23, torch.float64: 2**-52}


def run(function: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of all floating inputs."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], upstream)
    return [*(output.detach() for output in outputs), *grads]


def assert_as_exact_as_torch(
    ours: Function, composition: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor], roundings: int = 1
) -> None:
    """`ours` errs at most twice as much as `composition`, plus `roundings` of the largest value."""

    def in_float64(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.double() if x.is_floating_point() else x for x in tensors]

    exact = run(composition, in_float64(inputs), in_float64(upstream))
    found, plain = run(ours, inputs, upstream), run(composition, inputs, upstream)
    for number, (e, o, p) in enumerate(zip(exact, found, plain, strict=True)):
        assert o.shape == e.shape
        assert o.isfinite().all(), f"result {number} is not finite"
        if e.numel() == 0:
            continue
        error, allowed = (o.double() - e).abs(), (p.double() - e).abs()
        rounding = roundings * ROUNDING[p.dtype] * e.abs().max()
        for name, statistic in (("largest", Tensor.max), ("mean", Tensor.mean)):
            assert statistic(error) <= 2 * statistic(allowed) + rounding * (1 if name == "largest" else 0.1), (
                f"result {number}: {name} error {statistic(error):.3g}, composition {statistic(allowed):.3g}"
            )


def strided(x: Tensor) -> Tensor:
    """The same numbers, with gaps of NaN between them."""
    wide = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def transposed(x: Tensor) -> Tensor:
    """The same numbers, the last two dimensions in the other order in memory."""
    return x.mT.contiguous().mT

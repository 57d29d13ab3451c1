"""What every op is held to: twice the error that plain PyTorch ops of the same dtype make against float64."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from spt_fast.kernels.backend import obstacle
from spt_fast.kernels.launch import INTERPRETED
from tests.seed import SEED

Function = Callable[..., Tensor | tuple[Tensor, ...]]

# Half a unit in the last place of a number near 1: what a single rounding may cost. A composition that happens to hit
# the exact result must not fail an op that is one rounding off.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23, torch.float64: 2**-52}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where ops are tested: on a GPU where there is one; elsewhere Triton's kernels run in its interpreter."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(backend: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend's name; the test is skipped, with the reason, where it cannot run."""
    problem = obstacle(backend, DEVICE, dtype)
    if problem:
        pytest.skip(problem)
    return backend


def backends_and_dtypes(*backends: str) -> list[tuple[str, torch.dtype]]:
    """What can be tested here. In Triton's interpreter bf16 is left out, whose arithmetic it gets wrong."""
    return [
        (backend, dtype)
        for backend in backends
        for dtype in DTYPES
        if obstacle(backend, DEVICE, dtype) is None
        and not (backend == "triton" and INTERPRETED and dtype == torch.bfloat16)
    ]


def random_tensors(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Other numbers in every test and in every call, whichever tests run before it."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    _CALLS[test] += 1
    generator = torch.Generator().manual_seed(zlib.crc32(f"{SEED} {test} {_CALLS[test]}".encode()))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


_CALLS: Counter[str] = Counter()


def run(function: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of all floating inputs."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], upstream)
    return [*(output.detach() for output in outputs), *grads]


def by_more_than_chance(test: Callable[..., None]) -> Callable[..., None]:
    """A test on numbers drawn at random, whose bound one draw in some thousands breaks by chance, another one on each
    kind of processor: it fails where a second draw does not meet the bound either."""

    @wraps(test)
    def twice(*args: Any, **kwargs: Any) -> None:
        try:
            test(*args, **kwargs)
        except AssertionError:
            test(*args, **kwargs)

    return twice


def assert_as_exact_as_torch(
    ours: Function, composition: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor], roundings: int = 1
) -> None:
    """`ours` errs at most twice as much as `composition`, plus `roundings` of the largest value.

    A result that cancels to nothing errs by roundings of what it is a difference of: of the largest value of them all.
    """

    def in_float64(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x.double() if x.is_floating_point() else x for x in tensors]

    exact = run(composition, in_float64(inputs), in_float64(upstream))
    found, plain = run(ours, inputs, upstream), run(composition, inputs, upstream)
    largest = max((float(e.abs().max()) for e in exact if e.numel()), default=0.0)
    for number, (e, o, p) in enumerate(zip(exact, found, plain, strict=True)):
        assert o.shape == e.shape
        assert o.isfinite().all(), f"result {number} is not finite"
        if e.numel() == 0:
            continue
        error, allowed = (o.double() - e).abs(), (p.double() - e).abs()
        value = float(e.abs().max())
        rounding = roundings * ROUNDING[p.dtype] * (value if value > 1e-9 * largest else largest)
        share = {"largest": 1.0, "mean": max(0.1, e.numel() ** -0.5)}  # a mean of few errors is no better than they are
        for name, statistic in (("largest", Tensor.max), ("mean", Tensor.mean)):
            assert statistic(error) <= 2 * statistic(allowed) + rounding * share[name], (
                f"result {number}: {name} error {statistic(error):.3g}, composition {statistic(allowed):.3g}"
            )

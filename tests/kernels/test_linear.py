from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spt_fast.kernels import accumulate_in_place, linear
from spt_fast.kernels.linear import add_product, variants
from tests.kernels.compare import DEVICE, ROUNDING, by_more_than_chance, random_tensors
from tests.kernels.contract import Contract, Sample


class TestContract(Contract):
    samples = (
        Sample(
            "linear",
            linear,
            F.linear,
            lambda rows, dtype: random_tensors([(*rows, 6), (5, 6), (5,)], dtype),
            rows=(2, 7),
            empty=((0,), (3, 0)),
            gradients=3,
            loose=("reference",),
        ),
    )


def parameters(values: list[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(x.clone()) for x in values]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@by_more_than_chance
def test_in_place_as_exact_as_autograd(dtype: torch.dtype, recomputed: bool) -> None:
    """Several micro-batches, in float32; autograd's parts are rounded to the dtype and then added in float32."""
    weight, bias, *rest = random_tensors([(48, 64), (48,), *[(3, 20, 64), (3, 20, 48)] * 3], dtype)
    batches = list(zip(rest[::2], rest[1::2], strict=True))
    wide = torch.promote_types(dtype, torch.float32)
    exact, plain, ours = (parameters([x.double() if i == 0 else x for x in (weight, bias)]) for i in range(3))
    for parameter in plain:
        parameter.grad_dtype = wide
    accumulate_in_place(ours)
    for x, dy in batches:
        F.linear(x.double(), *exact).backward(dy.double())
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        F.linear(inputs[0], *plain).backward(dy)
        y = checkpoint(linear, inputs[1], *ours, use_reentrant=False) if recomputed else linear(inputs[1], *ours)
        y.backward(dy)
        assert torch.equal(*(x.grad for x in inputs))
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert o.grad.dtype == wide
        allowed = 2 * (p.grad.double() - e.grad).abs().max() + 16 * ROUNDING[wide] * e.grad.abs().max()
        assert (o.grad.double() - e.grad).abs().max() <= allowed


def test_in_place_it_adds_to_the_gradient_and_returns_none() -> None:
    x, weight = random_tensors([(7, 4), (5, 4)], torch.float32)
    weight.requires_grad_()
    accumulate_in_place([weight])
    weight.grad = held = torch.ones(5, 4, device=DEVICE)
    linear(x, weight).mul_(1).sum().backward()
    assert weight.grad is held
    torch.testing.assert_close(held, 1 + x.sum(0).expand(5, 4))
    with torch.no_grad():
        assert linear(x, weight).grad_fn is None
    weight.requires_grad_(False)
    assert not linear(x, weight).requires_grad
    weight.requires_grad_()
    x.requires_grad_()
    dx, dw = torch.autograd.grad(linear(x, weight).sum(), (x, weight), allow_unused=True)
    assert dw is None
    torch.testing.assert_close(dx, weight.detach().sum(0).expand(7, 4))
    y = linear(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_after_conversions_to_another_dtype_and_back() -> None:
    module = torch.nn.Linear(3, 2, bias=False, device=DEVICE)
    memory = torch.full((2, 3), torch.nan, device=DEVICE)
    accumulate_in_place([module.weight], [memory])
    for dtype in (torch.float64, torch.float32):
        module.to(dtype)
        module.zero_grad()
        linear(torch.ones(4, 3, dtype=dtype, device=DEVICE), module.weight).sum().backward()
        assert module.weight.grad.dtype == dtype
        assert (module.weight.grad == 4).all()
    assert module.weight.grad is memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_to_a_total(dtype: torch.dtype) -> None:
    """Of factors in any layout; of none it is 0, whatever memory held before."""
    a, b = random_tensors([(6, 9), (6, 4)], dtype)
    first = torch.full((9, 4), torch.nan, device=DEVICE)
    add_product(first, True, a.T, b)
    torch.testing.assert_close(first, a.float().T @ b.float(), rtol=0.01, atol=0.05)
    total, room = first.clone(), torch.empty(9, 4, dtype=dtype, device=DEVICE)
    add_product(total, False, a.T, b, room if dtype == torch.bfloat16 else None)
    torch.testing.assert_close(total, 2 * first)
    apart = torch.zeros(9, 8, device=DEVICE)[:, ::2]
    add_product(apart, False, a.T, b)
    torch.testing.assert_close(apart, first)
    add_product(apart, True, a[:0].T, b[:0])
    assert not apart.any()


def test_every_launch_is_compiled_ahead_of_time() -> None:
    assert not variants()  # no kernel of our own

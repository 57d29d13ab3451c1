from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import swiglu
from tests.kernels.compare import assert_as_exact_as_torch, run, strided, transposed


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 1024), (3, 5, 127), (1,)])
def test_as_exact_as_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(sum(shape))
    gate, up, upstream = ((3 * torch.randn(shape)).to(dtype) for _ in range(3))
    assert_as_exact_as_torch(swiglu, plain_swiglu, (gate, up), (upstream,))


@pytest.mark.parametrize("layout", [strided, transposed])
def test_strided_inputs_and_upstream_gradients(layout) -> None:
    torch.manual_seed(0)
    gate, up, upstream = (torch.randn(4, 6, 32).bfloat16() for _ in range(3))
    expected = run(swiglu, (gate, up), (upstream,))
    for e, f in zip(expected, run(swiglu, (layout(gate), layout(up)), (layout(upstream),)), strict=True):
        assert torch.equal(e, f)


def test_gradcheck() -> None:
    torch.manual_seed(1)
    gate, up = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_extreme_gates_give_no_nan() -> None:
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4]).bfloat16().requires_grad_()
    y = swiglu(gate, torch.ones(5).bfloat16())
    y.sum().backward()
    assert y.isfinite().all()
    assert gate.grad is not None
    torch.testing.assert_close(gate.grad.float(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_empty_batch() -> None:
    gate, up = torch.empty(0, 8, requires_grad=True), torch.empty(0, 8, requires_grad=True)
    swiglu(gate, up).sum().backward()
    assert gate.grad is not None
    assert gate.grad.shape == (0, 8)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="agree"):
        swiglu(torch.randn(2, 8), torch.randn(2, 1))
    with pytest.raises(ValueError, match="agree"):
        swiglu(torch.randn(2, 8), torch.randn(2, 8).bfloat16())

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spt_fast.kernels import embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (50,), (0, 4)])
def test_equals_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(11, 6).to(dtype).requires_grad_()
    tokens = torch.randint(0, 11, shape)
    y = embedding(tokens, weight)
    assert torch.equal(y, F.embedding(tokens, weight))
    upstream = torch.randn_like(y)
    (dw,) = torch.autograd.grad(y, weight, upstream)
    exact = torch.zeros(11, 6, dtype=torch.float64).index_add_(0, tokens.flatten(), upstream.double().flatten(0, -2))
    torch.testing.assert_close(dw, exact.to(dtype))


def test_a_frequent_token_keeps_its_whole_gradient() -> None:
    """In bf16 a running sum of ones stops at 256."""
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    embedding(torch.ones(5000, dtype=torch.long), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 0], [5000, 5000], [0, 0]]


def test_gradcheck() -> None:
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: embedding(torch.tensor([[1, 1], [4, 0]]), w), (weight,))


def test_strided_upstream_gradient() -> None:
    torch.manual_seed(1)
    weight = torch.randn(5, 3, requires_grad=True)
    tokens, upstream = torch.randint(0, 5, (4, 6)), torch.randn(6, 4, 3)
    (strided,) = torch.autograd.grad(embedding(tokens, weight), weight, upstream.transpose(0, 1))
    (plain,) = torch.autograd.grad(embedding(tokens, weight), weight, upstream.transpose(0, 1).contiguous())
    assert torch.equal(strided, plain)


def test_a_token_beyond_the_vocabulary_is_an_error() -> None:
    with pytest.raises(IndexError):
        embedding(torch.tensor([5]), torch.randn(5, 3))

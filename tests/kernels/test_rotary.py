from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import qk_norm_rope, rope
from tests.kernels.compare import assert_as_exact_as_torch, run, strided, transposed


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.to(q.dtype).unsqueeze(-2), sin.to(q.dtype).unsqueeze(-2)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def plain_qk_norm_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w for x, w in ((q, wq), (k, wk)))
    return plain_rope(q, k, cos, sin)


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, D] of random angles, halves repeated."""
    angles = (6.3 * torch.rand(*shape[:-1], shape[-1] // 2, dtype=dtype)).repeat(*[1] * (len(shape) - 1), 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("B", "T", "H", "K", "D"), [(2, 16, 6, 2, 64), (1, 7, 3, 3, 6), (3, 5, 4, 1, 84)])
@pytest.mark.parametrize("per_row", [False, True])
def test_as_exact_as_torch(dtype: torch.dtype, B: int, T: int, H: int, K: int, D: int, per_row: bool) -> None:
    torch.manual_seed(T)
    q, up_q = (torch.randn(B, T, H, D).to(dtype) for _ in range(2))
    k, up_k = (torch.randn(B, T, K, D).to(dtype) for _ in range(2))
    cos, sin = tables(*([B] if per_row else []), T, D)
    wq, wk = torch.randn(D).to(dtype), torch.randn(D).to(dtype)
    upstream = (up_q, up_k)
    assert_as_exact_as_torch(
        lambda q, k: rope(q, k, cos.to(torch.float64) if q.dtype == torch.float64 else cos, sin),
        lambda q, k: plain_rope(q, k, cos, sin),
        (q, k),
        upstream,
    )
    assert_as_exact_as_torch(
        lambda q, k, wq, wk: qk_norm_rope(q, k, wq, wk, cos, sin),
        lambda q, k, wq, wk: plain_qk_norm_rope(q, k, wq, wk, cos, sin),
        (q, k, wq, wk),
        upstream,
    )


def test_rotation_depends_on_the_distance_only() -> None:
    """Shifting both positions by the same number leaves every product q·k as it was."""
    torch.manual_seed(0)
    D, shift = 32, 17
    frequencies = 10_000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.outer(torch.arange(64, dtype=torch.float64), frequencies).repeat(1, 2)
    q, k = torch.randn(1, 20, 2, D).double(), torch.randn(1, 20, 2, D).double()
    products = []
    for start in (0, shift):
        rows = angles[start : start + 20]
        q_, k_ = rope(q, k, rows.cos(), rows.sin())
        products.append(torch.einsum("bthd,bshd->bhts", q_, k_))
    torch.testing.assert_close(*products)
    q_, _ = rope(q, k, angles[:20].cos(), angles[:20].sin())
    assert torch.equal(q_[:, 0], q[:, 0])
    assert not torch.allclose(q_[:, 1], q[:, 1])


def test_per_row_tables_are_used_per_row() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(3, 4, 2, 8), torch.randn(3, 4, 1, 8)
    cos, sin = tables(3, 4, 8)
    q_, k_ = rope(q, k, cos, sin)
    for row in range(3):
        alone = rope(q[row : row + 1], k[row : row + 1], cos[row], sin[row])
        assert torch.equal(q_[row], alone[0][0])
        assert torch.equal(k_[row], alone[1][0])


@pytest.mark.parametrize("layout", [strided, transposed, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
def test_strided_inputs_and_upstream_gradients(layout) -> None:
    torch.manual_seed(2)
    q, k, up_q, up_k = (torch.randn(2, 9, heads, 16).bfloat16() for heads in (4, 2, 4, 2))
    cos, sin = tables(9, 16)
    function = lambda q, k: rope(q, k, strided(cos), sin)  # noqa: E731
    expected = run(function, (q, k), (up_q, up_k))
    found = run(function, [layout(q), layout(k)], [layout(up_q), layout(up_k)])
    for e, f in zip(expected, found, strict=True):
        assert torch.equal(e, f)


def test_slices_of_one_projection() -> None:
    """As the model calls it: q and k are views of one tensor, which the op must not write to."""
    torch.manual_seed(3)
    qkv = torch.randn(2, 8, 5, 16)
    before = qkv.clone()
    cos, sin = tables(8, 16)
    q, k, _ = qkv.split([3, 1, 1], dim=2)
    rope(q, k, cos, sin)
    assert torch.equal(qkv, before)


def test_gradcheck() -> None:
    torch.manual_seed(4)
    q = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    wq, wk = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = tables(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))
    assert torch.autograd.gradcheck(lambda q, k, wq, wk: qk_norm_rope(q, k, wq, wk, cos, sin), (q, k, wq, wk))


def test_empty_batch() -> None:
    q, k = torch.randn(0, 4, 2, 8, requires_grad=True), torch.randn(0, 4, 1, 8, requires_grad=True)
    cos, sin = tables(4, 8)
    q_, k_ = rope(q, k, cos, sin)
    (q_.sum() + k_.sum()).backward()
    assert (q_.shape, k_.shape) == (q.shape, k.shape)


def test_bad_shapes_are_refused() -> None:
    q, k = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 1, 8)
    cos, sin = tables(4, 8)
    with pytest.raises(ValueError, match="cos"):
        rope(q, k, cos[:3], sin)
    with pytest.raises(ValueError, match="sin"):
        rope(q, k, cos, sin[:, :4])
    with pytest.raises(ValueError, match="agree"):
        rope(q, k[:, :3], cos, sin)
    with pytest.raises(ValueError, match="even"):
        rope(q[..., :7], k[..., :7], cos[:, :7], sin[:, :7])

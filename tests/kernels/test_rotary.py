from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import qk_norm_rope, rope, rotary
from tests.kernels.compare import (
    DEVICE,
    assert_as_exact_as_torch,
    backends_and_dtypes,
    by_more_than_chance,
    random_tensors,
    run,
    usable,
)
from tests.kernels.contract import Contract, Sample, Shape
from tests.kernels.launches import BF16, FP32, compiled_launches

EPS = 1e-6


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.to(q.dtype).unsqueeze(-2), sin.to(q.dtype).unsqueeze(-2)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def plain_qk_norm_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w for x, w in ((q, wq), (k, wk)))
    return plain_rope(q, k, cos, sin)


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, D] of random angles, halves repeated."""
    angles = (6.3 * torch.rand(*shape[:-1], shape[-1] // 2, dtype=dtype)).repeat(*[1] * (len(shape) - 1), 2)
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


ALL = backends_and_dtypes("reference", "cpu", "triton")


def draw(weights: int) -> Callable[[Shape, torch.dtype], list[Tensor]]:
    """q, k, so many weights, and the tables."""

    def inputs(rows: Shape, dtype: torch.dtype) -> list[Tensor]:
        B, T = rows
        tensors = random_tensors([(B, T, 4, 8), (B, T, 2, 8), *[(8,)] * weights], dtype)
        return [*tensors, *tables(T, 8, dtype=torch.promote_types(dtype, torch.float32))]

    return inputs


FEW = {"rows": (2, 3), "empty": ((0, 4), (2, 0)), "many": (8, 300)}


class TestContract(Contract):
    samples = (
        Sample("rope", rope, plain_rope, draw(0), gradients=2, **FEW),
        Sample("qk_norm_rope", qk_norm_rope, plain_qk_norm_rope, draw(2), gradients=4, **FEW),
    )


def test_second_derivatives_of_a_rotation() -> None:
    q, k, *tables = draw(0)((2, 3), torch.float64)
    assert torch.autograd.gradgradcheck(lambda q, k: rope(q, k, *tables), (q.requires_grad_(), k.requires_grad_()))


# Twice as many key heads as query heads is nobody's model, but the kernels' groups of heads are made of either.
@pytest.mark.parametrize(("backend", "dtype"), ALL)
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D"),
    [(2, 16, 6, 2, 64), (1, 7, 3, 3, 42), (3, 5, 4, 1, 84), (2, 3, 32, 8, 128), (40, 1, 1, 2, 34), (1, 2, 12, 12, 256)],
)
@pytest.mark.parametrize("per_row", [False, True])
@by_more_than_chance
def test_as_exact_as_torch(
    backend: str, dtype: torch.dtype, B: int, T: int, H: int, K: int, D: int, per_row: bool
) -> None:
    q, k, up_q, up_k, wq, wk = random_tensors([(B, T, H, D), (B, T, K, D)] * 2 + [(D,)] * 2, dtype)
    cos, sin = tables(*([B] if per_row else []), T, D)
    assert_as_exact_as_torch(
        lambda q, k: rope(q, k, cos, sin, backend="reference" if q.dtype == torch.float64 else backend),
        lambda q, k: plain_rope(q, k, cos, sin),
        (q, k),
        (up_q, up_k),
    )
    assert_as_exact_as_torch(
        lambda q, k, wq, wk: qk_norm_rope(q, k, wq, wk, cos, sin, EPS, backend=backend),
        lambda q, k, wq, wk: plain_qk_norm_rope(q, k, wq, wk, cos, sin),
        (q, k, wq, wk),
        (up_q, up_k),
    )


@pytest.mark.parametrize(("backend", "dtype"), [case for case in ALL if case[1] != torch.float32])
@pytest.mark.parametrize("far", [0, 1, 2])
def test_offsets_beyond_32_bits(backend: str, dtype: torch.dtype, far: int) -> None:
    """q lies in a tensor of 2^31 numbers, of which all but a few are never touched, so that they take no memory."""
    q, k, up_q, up_k, wq, wk = random_tensors([(3, 3, 3, 8)] * 4 + [(8,)] * 2, dtype)
    cos, sin = tables(3, 8)
    space = torch.empty(2**31 + 1024, dtype=dtype, device=DEVICE)
    strides = [8, 24, 72]
    strides.insert(far, 2**30)

    def spread(x: Tensor) -> Tensor:
        return space.as_strided(x.shape, (*strides[:3], 1)).copy_(x)

    function = lambda q, k, wq, wk: qk_norm_rope(q, k, wq, wk, cos, sin, backend=backend)  # noqa: E731
    expected = run(function, (q, k, wq, wk), (up_q, up_k))
    for e, f in zip(expected, run(function, (spread(q), k, wq, wk), (up_q, up_k)), strict=True):
        assert torch.equal(e, f)
    for e, f in zip(expected, run(function, (q, k, wq, wk), (spread(up_q), up_k)), strict=True):
        assert torch.equal(e, f)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_tables_of_any_dtype_and_of_two_shapes(backend: str) -> None:
    backend = usable(backend)
    q, k, up_q, up_k = random_tensors([(2, 3, 4, 8), (2, 3, 1, 8)] * 2, torch.float32)
    cos, sin = (table.bfloat16().double() for table in tables(3, 8))
    results = [
        run(lambda q, k: rope(q, k, c, s, backend=backend), (q, k), (up_q, up_k))  # noqa: B023
        for c, s in ((cos, sin), (cos.bfloat16(), sin.float()), (cos, sin.repeat(2, 1, 1)), (cos.repeat(2, 1, 1), sin))
    ]
    for other in results[1:]:
        for e, f in zip(results[0], other, strict=True):
            assert torch.equal(e, f)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_rotation_depends_on_the_distance_only(backend: str) -> None:
    """Shifting both positions by the same number leaves every product q·k as it was."""
    backend = usable(backend)
    D, shift = 32, 17
    frequencies = 10_000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.outer(torch.arange(64, dtype=torch.float64), frequencies).repeat(1, 2).to(DEVICE)
    q, k = random_tensors([(1, 20, 2, D)] * 2, torch.float32)
    products = []
    for start in (0, shift):
        rows = angles[start : start + 20]
        q_, k_ = rope(q, k, rows.cos(), rows.sin(), backend=backend)
        products.append(torch.einsum("bthd,bshd->bhts", q_.double(), k_.double()))
    # A rotated number is within 3 roundings of 2^-24 of its size; a product sums D of them.
    torch.testing.assert_close(
        *products, rtol=0, atol=2 * 3 * 2**-24 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    )
    q_, _ = rope(q, k, angles[:20].cos(), angles[:20].sin(), backend=backend)
    assert torch.equal(q_[:, 0], q[:, 0])
    assert not torch.allclose(q_[:, 1], q[:, 1])


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_per_row_tables_are_used_per_row(backend: str) -> None:
    backend = usable(backend)
    q, k, wq, wk = random_tensors([(3, 4, 2, 8), (3, 4, 1, 8), (8,), (8,)], torch.float32)
    cos, sin = tables(3, 4, 8)
    for function in (
        lambda q, k, cos, sin: rope(q, k, cos, sin, backend=backend),
        lambda q, k, cos, sin: qk_norm_rope(q, k, wq, wk, cos, sin, backend=backend),
    ):
        together = function(q, k, cos, sin)
        for row in range(3):
            alone = function(q[row : row + 1], k[row : row + 1], cos[row], sin[row])
            for all_rows, one in zip(together, alone, strict=True):
                assert torch.equal(all_rows[row], one[0])


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_without_eps_unit_weights_leave_the_rotation_alone(backend: str) -> None:
    """With weights of 1 and heads of length sqrt(D), qk_norm_rope is rope."""
    backend = usable(backend)
    q, k, up_q, up_k = random_tensors([(2, 3, 3, 16), (2, 3, 1, 16)] * 2, torch.float32)
    q, k = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (q, k))
    ones = torch.ones(16, device=DEVICE)
    cos, sin = tables(3, 16)
    found = run(lambda *x: qk_norm_rope(*x, cos, sin, 0.0, backend=backend), (q, k, ones, ones), (up_q, up_k))
    for f, e in zip(found, rope(q, k, cos, sin, backend=backend), strict=False):
        torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-6)
    assert all(f.isfinite().all() for f in found), "with eps = 0 a head that is only padding must not count"


def test_weight_gradients_reach_a_float32_accumulator_unrounded() -> None:
    q, k, up_q, up_k, wq, wk = random_tensors([(4, 60, 4, 16), (4, 60, 1, 16)] * 2 + [(16,)] * 2, torch.bfloat16)
    cos, sin = tables(60, 16)
    weights = [torch.nn.Parameter(w) for w in (wq, wk)]
    for weight in weights:
        weight.grad_dtype = torch.float32
    torch.autograd.backward(qk_norm_rope(q, k, *weights, cos, sin), (up_q, up_k))
    exact = run(
        lambda q, k, wq, wk: plain_qk_norm_rope(q, k, wq, wk, cos, sin),
        [x.double() for x in (q, k, wq, wk)],
        (up_q.double(), up_k.double()),
    )
    for weight, e in zip(weights, exact[-2:], strict=True):
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        torch.testing.assert_close(weight.grad.double(), e, rtol=1e-4, atol=1e-4)


def test_bad_shapes_are_refused() -> None:
    q, k, w = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 1, 8), torch.randn(8)
    cos, sin = (table.cpu() for table in tables(4, 8))
    with pytest.raises(ValueError, match="cos"):
        rope(q, k, cos[:3], sin)
    with pytest.raises(ValueError, match="sin"):
        rope(q, k, cos, sin[:, :4])
    with pytest.raises(ValueError, match="agree"):
        rope(q, k[:, :3], cos, sin)
    with pytest.raises(ValueError, match="even"):
        rope(q[..., :7], k[..., :7], cos[:, :7], sin[:, :7])
    with pytest.raises(ValueError, match="one dtype"):
        rope(q, k.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match=r"q_weight\): \(4,\) is invalid: it must be \[8\]"):
        qk_norm_rope(q, k, w[:4], w, cos, sin)
    with pytest.raises(ValueError, match=r"k_weight\): \(4,\) is invalid: it must be \[8\]"):
        qk_norm_rope(q, k, w, w[:4], cos, sin)


def test_every_launch_is_compiled_ahead_of_time() -> None:
    with compiled_launches(rotary):
        models = (
            (12, 12, 64), (16, 16, 64), (25, 25, 64), (6, 6, 64), (9, 3, 64), (15, 5, 64), (14, 2, 64), (32, 8, 64),
            (16, 16, 128), (32, 32, 128), (16, 8, 128), (12, 2, 128), (28, 4, 128), (24, 8, 128), (32, 8, 128),
            (40, 8, 128), (64, 8, 128), (4, 4, 32), (32, 32, 80), (32, 8, 80), (32, 32, 96), (24, 8, 96), (32, 32, 112),
            (4, 1, 256), (8, 1, 256), (8, 4, 256),
        )  # fmt: skip
        heads = (4, 6, 8, 9, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 71, 96, 128)
        cases = [(shape, BF16, True) for shape in models]
        cases += [((12, 12, 64), FP32, True), ((32, 8, 128), FP32, True)]
        cases += [
            ((Hq, Hk, D), BF16, False) for Hq in heads for Hk in range(1, Hq + 1) if Hq % Hk == 0 for D in (64, 128)
        ]
        for (Hq, Hk, D), dtype, forward in cases:
            q, k, weight = (torch.empty(*size, D, dtype=dtype) for size in ((1, 1, Hq), (1, 1, Hk), ()))
            table = torch.empty(1, D)
            if forward:
                rotary._triton_rope(q, k, q, k, table, table, False)
                rotary._triton_forward(q, k, q, k, weight, weight, table, table, 1e-6)
            rotary._triton_backward(q, k, q, k, q, k, weight, weight, table, table, 1e-6)

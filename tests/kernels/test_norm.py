from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import add_rms_norm, norm, rms_norm
from tests.kernels.compare import (
    DEVICE,
    assert_as_exact_as_torch,
    backends_and_dtypes,
    random_tensors,
    run,
    strided,
    transposed,
    usable,
)
from tests.kernels.launches import BF16, FP16, FP32, WIDTHS, compiled_launches

EPS = 1e-5


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    stream = x + residual
    return plain_rms_norm(stream, weight), stream


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("reference", "cpu", "triton"))
@pytest.mark.parametrize("shape", [(64, 384), (3, 5, 127), (2, 3, 4, 64), (257, 33), (384,), (300, 1000)])
def test_as_exact_as_torch(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual, up, up2 = random_tensors([shape] * 4, dtype)
    (weight,) = random_tensors([shape[-1:]], dtype)
    assert_as_exact_as_torch(lambda x, w: rms_norm(x, w, EPS, backend=backend), plain_rms_norm, (x, weight), (up,))
    assert_as_exact_as_torch(
        lambda x, r, w: add_rms_norm(x, r, w, EPS, backend=backend),
        plain_add_rms_norm,
        (x, residual, weight),
        (up, up2),
    )


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("triton"))
def test_rows_that_are_read_twice_give_the_same(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, upstream = random_tensors([(5, 48), (5, 48)], dtype), random_tensors([(5, 48), (5, 48)], dtype)
    inputs += random_tensors([(48,)], dtype)
    once = run(lambda x, r, w: add_rms_norm(x, r, w, EPS, backend=backend), inputs, upstream)
    monkeypatch.setattr(norm, "WIDEST", 32)
    twice = run(lambda x, r, w: add_rms_norm(x, r, w, EPS, backend=backend), inputs, upstream)
    for expected, found in zip(once, twice, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("reference", "cpu", "triton"))
@pytest.mark.parametrize("layout", [strided, transposed])
def test_strided_inputs_and_upstream_gradients(backend: str, dtype: torch.dtype, layout) -> None:
    x, residual, up, up2 = random_tensors([(6, 7, 32)] * 4, dtype)
    (weight,) = random_tensors([(32,)], dtype)
    for function, inputs, upstream in (
        (lambda x, w: rms_norm(x, w, backend=backend), (x, weight), (up,)),
        (lambda x, r, w: add_rms_norm(x, r, w, backend=backend), (x, residual, weight), (up, up2)),
    ):
        moved = [layout(t) if t.dim() > 1 else strided(t) for t in inputs]
        for expected, found in zip(
            run(function, inputs, upstream), run(function, moved, [layout(u) for u in upstream]), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("reference", "cpu", "triton"))
def test_what_torch_asks_of_a_custom_op(backend: str, dtype: torch.dtype) -> None:
    x, residual = random_tensors([(5, 32)] * 2, dtype)
    (weight,) = random_tensors([(32,)], dtype)
    for given in (None, residual):
        leaves = [t if t is None else t.clone().requires_grad_() for t in (x, given, weight)]
        torch.library.opcheck(torch.ops.spt_fast.rms_norm, (*leaves, EPS, backend))


def test_it_compiles_whole() -> None:
    x, residual, up = random_tensors([(5, 32)] * 3, torch.float32)
    (weight,) = random_tensors([(32,)], torch.float32)

    def function(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, stream = add_rms_norm(x, residual, weight)
        return rms_norm(stream, weight) + y

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, found = (run(f, (x, residual, weight), (up,)) for f in (function, compiled))
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_every_backend_sees_an_empty_batch(backend: str) -> None:
    x, weight = torch.empty(0, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    y, stream, dx, dr, dw = run(
        lambda x, r, w: add_rms_norm(x, r, w, backend=usable(backend)), (x, x.clone(), weight), (x, x)
    )
    assert y.shape == stream.shape == dx.shape == dr.shape == x.shape
    assert not dw.any()


def test_gradcheck() -> None:
    torch.manual_seed(2)
    x, residual = (torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS), (x, residual, weight))


def test_gradients_where_only_one_output_is_used() -> None:
    torch.manual_seed(3)
    x, residual = (torch.randn(4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS)[0], (x, residual, weight))
    assert torch.autograd.gradcheck(lambda x, r: add_rms_norm(x, r, weight, EPS)[1], (x, residual))


def test_empty_batch() -> None:
    x = torch.empty(0, 5, 16, requires_grad=True)
    weight = torch.ones(16, requires_grad=True)
    y, stream = add_rms_norm(rms_norm(x, weight), x, weight)
    (y.sum() + stream.sum()).backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert weight.grad is not None
    assert not weight.grad.any()


def test_norm_is_of_the_rounded_stream() -> None:
    torch.manual_seed(4)
    x, residual, weight = torch.randn(32, 64).bfloat16(), torch.randn(32, 64).bfloat16(), torch.randn(64).bfloat16()
    y, stream = add_rms_norm(x, residual, weight)
    assert torch.equal(stream, x + residual)
    assert torch.equal(y, rms_norm(stream, weight))


def test_large_and_small_values_survive_half_precision() -> None:
    for value in (3e4, 1e-3):
        x = torch.full((2, 64), value, dtype=torch.float16)
        torch.testing.assert_close(rms_norm(x, torch.ones(64).half(), eps=0.0), torch.ones(2, 64).half())


def test_weight_gradient_reaches_a_float32_accumulator_unrounded() -> None:
    torch.manual_seed(5)
    x, weight, up = torch.randn(500, 16).bfloat16(), torch.ones(16).bfloat16(), torch.randn(500, 16).bfloat16()
    weight = torch.nn.Parameter(weight)
    weight.grad_dtype = torch.float32
    rms_norm(x, weight, EPS).backward(up)
    _, _, exact = run(plain_rms_norm, (x.double(), weight.double()), (up.double(),))
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-4, atol=1e-4)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.randn(2, 8), torch.randn(7))
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.randn(2, 8), torch.randn(3, 8), torch.randn(8))
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.randn(2, 8), torch.randn(2, 8).bfloat16(), torch.randn(8))


def test_every_launch_is_compiled_ahead_of_time() -> None:
    with compiled_launches(norm):
        cases = [(D, BF16, whole) for D in WIDTHS for whole in (False, True)]
        cases += [(D, FP32, True) for D in (768, 1024, 3072, 4096, 12288, 16384)]
        cases += [(1024, FP32, False), (768, FP16, True)]
        cases += [(1000, BF16, True), (3000, BF16, True), (5000, BF16, True), (1000, FP32, True)]
        for D, dtype, whole in cases:
            x, weight = torch.empty(2, D, dtype=dtype), torch.empty(D, dtype=dtype)
            other = x if whole else None
            norm._triton_forward(x, other, weight, 1e-6)
            norm._triton_backward(x, other, x, weight, torch.empty(2))

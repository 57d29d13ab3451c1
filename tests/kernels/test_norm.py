from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import accumulate_in_place, add_rms_norm, norm, rms_norm
from spt_fast.kernels.fp8 import largest_of
from spt_fast.kernels.gradients import sum_parts_at_last
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
from tests.kernels.launches import BF16, FP16, FP32, WIDTHS, compiled_launches

EPS = 1e-5


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    stream = x + residual
    return plain_rms_norm(stream, weight), stream


def draw(tensors: int) -> Callable[[Shape, torch.dtype], list[Tensor]]:
    """So many tensors and a weight."""
    return lambda rows, dtype: random_tensors([(*rows, 24)] * tensors + [(24,)], dtype)


FEW = {"rows": (3, 4), "empty": ((0,), (0, 5)), "many": (2000,)}


class TestContract(Contract):
    samples = (
        Sample("rms_norm", partial(rms_norm, eps=EPS), plain_rms_norm, draw(1), gradients=2, **FEW),
        Sample("add_rms_norm", partial(add_rms_norm, eps=EPS), plain_add_rms_norm, draw(2), gradients=3, **FEW),
    )


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("reference", "cpu", "triton"))
@pytest.mark.parametrize("shape", [(64, 384), (3, 5, 127), (2, 3, 4, 64), (257, 33), (384,), (300, 1000)])
@by_more_than_chance
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


def test_norm_is_of_the_rounded_stream() -> None:
    torch.manual_seed(4)
    x, residual, weight = torch.randn(32, 64).bfloat16(), torch.randn(32, 64).bfloat16(), torch.randn(64).bfloat16()
    y, stream = add_rms_norm(x, residual, weight)
    assert torch.equal(stream, x + residual)
    assert torch.equal(y, rms_norm(stream, weight))


def test_under_autocast_a_sum_of_two_dtypes_is_in_the_wider_one() -> None:
    """The stream is float32 there, and what is added to it comes from a product in bf16."""
    x, residual, weight = random_tensors([(3, 24), (3, 24), (24,)], torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        for given in ((x.bfloat16(), residual), (x, residual.bfloat16())):
            ours = add_rms_norm(*given, weight)
            expected = add_rms_norm(*(tensor.float() for tensor in given), weight)
            assert [y.dtype for y in ours] == [torch.float32] * 2
            assert all(map(torch.equal, ours, expected))
    with pytest.raises(ValueError, match="they must agree"):
        add_rms_norm(x.bfloat16(), residual, weight)


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


def test_results_and_gradients_carry_the_largest_of_their_rows() -> None:
    usable("triton")
    x, residual, weight, dy = random_tensors([(3, 5, 300), (3, 5, 300), (300,), (3, 5, 300)], torch.float32)
    x.requires_grad_()
    for y in (
        rms_norm(x, weight, largest=True, backend="triton"),
        add_rms_norm(x, residual, weight, largest=True, backend="triton")[0],
    ):
        assert torch.equal(largest_of(y), y.abs().amax(2).flatten())
        seen = []
        y.grad_fn.register_hook(lambda inputs, _, seen=seen: seen.append(inputs[0]))
        y.backward(dy)
        assert torch.equal(largest_of(seen[0]), seen[0].abs().amax(2).flatten())
    assert largest_of(rms_norm(x, weight, backend="triton")) is None
    assert largest_of(rms_norm(x, weight, largest=True, backend="reference")) is None


def test_the_largest_of_rows_that_are_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    usable("triton")
    monkeypatch.setattr(norm, "WIDEST", 64)
    for D, dtype in ((96, torch.float16), (96, torch.float32)):
        x, weight, dy = random_tensors([(7, D), (D,), (7, D)], dtype)
        amax = torch.empty(7, device=DEVICE)
        dx, _ = norm._triton_backward(dy, None, x, weight, torch.ones(7, device=DEVICE), amax)
        assert torch.equal(amax, dx.abs().amax(1).float())


def test_weights_gradients_stay_in_parts_until_they_are_added_up() -> None:
    """Of several norms and two micro-batches, the second of fewer rows, and of a third where the second was given up;
    with a gradient that something else made."""
    usable("triton")
    inputs = random_tensors([(61, 32), (5, 32)], FP32)
    weights, plain = ([torch.nn.Parameter(torch.full((D,), 1.0 + D, device=DEVICE)) for D in (32, 8, 32)] for _ in "ab")
    accumulate_in_place(weights)
    (wide, narrow) = sum_parts_at_last(weights)

    def backward(weights: list[torch.nn.Parameter], x: torch.Tensor) -> None:
        y = sum(rms_norm(x[:, : len(w)], w, backend="triton").square().sum() for w in weights)
        (y + rms_norm(x, weights[2], backend="reference").sum()).backward()

    backward(weights, inputs[0])
    assert all(w.grad is None for w in weights[:2])
    wide.forget()
    narrow.forget()
    weights[2].grad = None
    for x in inputs:
        backward(weights, x)
        backward(plain, x)
    for parts in (wide, narrow, wide):
        parts.add_up()
    for ours, theirs in zip(weights, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


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
            other, kept = x if whole else None, torch.nn.Parameter(torch.ones(D))
            accumulate_in_place([kept])
            kept_in = sum_parts_at_last([kept])
            for amax in (torch.empty(0), torch.empty(2))[: 2 if D >= 2048 and D % 16 == 0 and dtype == BF16 else 1]:
                norm._triton_forward(x, other, weight, 1e-6, amax)
                for parameter in (None, kept):
                    for _ in range(1 if parameter is None else 2):
                        norm._triton_backward(x, other, x, weight, torch.empty(2), amax, parameter)
            assert kept_in

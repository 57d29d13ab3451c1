from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spt_fast.kernels import accumulate_in_place, activation, linear, swiglu, swiglu_linear, swiglu_packed
from spt_fast.kernels.fp8 import largest_of
from tests.kernels.compare import (
    DEVICE,
    assert_as_exact_as_torch,
    backends_and_dtypes,
    by_more_than_chance,
    random_tensors,
    run,
    usable,
)
from tests.kernels.contract import Contract, Sample
from tests.kernels.launches import BF16, FP16, FP32, compiled_launches

every_backend = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("reference", "cpu", "triton"))


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def plain_swiglu_packed(gate_up: Tensor) -> Tensor:
    return plain_swiglu(*gate_up.chunk(2, dim=-1))


FEW = {"rows": (2, 3, 24), "empty": ((0, 8), (3, 0), (0,), (2, 0, 4)), "many": (2000, 100), "loose": ("reference",)}


class TestContract(Contract):
    samples = (
        Sample(
            "swiglu", swiglu, plain_swiglu, lambda rows, dtype: random_tensors([rows] * 2, dtype), gradients=2, **FEW
        ),
        Sample(
            "swiglu_packed",
            swiglu_packed,
            plain_swiglu_packed,
            lambda rows, dtype: random_tensors([(*rows[:-1], 2 * rows[-1])], dtype),
            gradients=1,
            **FEW,
        ),
        Sample(
            "swiglu_linear",
            swiglu_linear,
            lambda gate_up, weight, bias: F.linear(plain_swiglu_packed(gate_up), weight, bias),
            lambda rows, dtype: random_tensors([(*rows, 12), (5, 6), (5,)], dtype),
            rows=(2, 7),
            empty=((0,), (3, 0)),
            gradients=3,
            loose=("reference", "cpu", "triton"),  # of which the products are PyTorch's
        ),
    )


@every_backend
@pytest.mark.parametrize("shape", [(64, 1024), (3, 5, 127), (2, 3, 4, 48), (100,), (100, 1), (33, 300)])
@by_more_than_chance
def test_as_exact_as_torch(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up, upstream = (3 * x for x in random_tensors([shape] * 3, dtype))
    assert_as_exact_as_torch(lambda g, u: swiglu(g, u, backend=backend), plain_swiglu, (gate, up), (upstream,))
    packed = torch.cat((gate, up), -1)
    assert_as_exact_as_torch(lambda x: swiglu_packed(x, backend=backend), plain_swiglu_packed, (packed,), (upstream,))


@every_backend
@pytest.mark.parametrize("in_place", [False, True])
@by_more_than_chance
def test_with_a_projection_as_exact_as_torch(backend: str, dtype: torch.dtype, in_place: bool) -> None:
    """With two roundings, since what is in the middle is rounded twice, as it would be by itself."""
    gate_up, weight, bias, dz = random_tensors([(3, 5, 96), (40, 48), (40,), (3, 5, 40)], dtype)

    def ours(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return swiglu_linear(gate_up, weight, bias, backend=backend)

    def plain(gate_up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(plain_swiglu_packed(gate_up), weight, bias)

    if not in_place:
        assert_as_exact_as_torch(ours, plain, (gate_up, weight, bias), (dz,), 2)
        return
    expected = run(ours, (gate_up, weight, bias), (dz,))
    leaves = [x.requires_grad_() for x in (gate_up, weight, bias)]
    accumulate_in_place(leaves[1:])
    for _ in range(2):
        y = checkpoint(ours, *leaves, use_reentrant=False)
        y.backward(dz)
    for e, found in zip(expected[1:], leaves, strict=True):
        assert found.grad is not None
        torch.testing.assert_close(found.grad.float(), 2 * e.float(), rtol=0, atol=float(e.abs().max()) * 2**-7)


@every_backend
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_number(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As among others. (Alone it has no neighbour to measure its error by where 1 + g (1 - s) is nearly 0.)"""
    gate, up, upstream = random_tensors([(2,)] * 3, dtype)
    expected = run(lambda g, u: swiglu(g, u, backend=backend), (gate, up), (upstream,))
    one = [x[0].view(shape) for x in (gate, up, upstream)]
    for e, f in zip(expected, run(lambda g, u: swiglu(g, u, backend=backend), one[:2], one[2:]), strict=True):
        torch.testing.assert_close(f, e[0].view(shape))


@every_backend
def test_extreme_gates(backend: str, dtype: torch.dtype) -> None:
    """silu is 0 far below 0, and the identity far above; there exponentials overflow."""
    largest = torch.finfo(dtype).max
    gate = torch.tensor([-largest, -1e4, -200.0, -89.0, -87.0, 0.0, 87.0, 200.0, 1e4, largest]).to(DEVICE, dtype)
    one = torch.ones_like(gate)
    y, dgate, dup = (x.float() for x in run(lambda g, u: swiglu(g, u, backend=backend), (gate, one), (one,)))
    silu = gate.float().clamp(min=0)
    torch.testing.assert_close(y, silu)
    torch.testing.assert_close(dup, silu)
    torch.testing.assert_close(dgate, (gate.float().sign() + 1) / 2)


@every_backend
def test_nan_stays_nan(backend: str, dtype: torch.dtype) -> None:
    """A loss that went wrong must be seen."""
    nan = torch.full((3, 32), float("nan"), dtype=dtype, device=DEVICE)
    one = torch.ones_like(nan)
    for gate, up in ((nan, one), (one, nan)):
        y, dgate, dup = run(lambda g, u: swiglu(g, u, backend=backend), (gate, up), (one,))
        assert y.isnan().all()
        assert dgate.isnan().all()
        assert dup.isnan().all() == gate.isnan().all()


@pytest.mark.skipif(DEVICE != "cuda", reason="takes 9 GB of a GPU")
def test_more_numbers_than_an_int32_counts() -> None:
    gate_up = torch.zeros(2**20 + 1, 4096, dtype=torch.bfloat16, device=DEVICE)
    gate_up[-1] = 1
    y = swiglu_packed(gate_up, backend="triton")
    assert not y[:-1].any()
    assert (y[-1] == torch.tensor(1.0).sigmoid().bfloat16().item()).all()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_rows_further_apart_than_an_int32_counts(backend: str) -> None:
    """Offsets are computed in int64: three rows, 2^31 numbers from the first to the last, in memory that is never
    touched between them."""
    distance = 2**30 + 16
    gate_up = torch.empty(2 * distance + 32, dtype=torch.float16 if backend == "triton" else torch.bfloat16)
    gate_up = gate_up.as_strided((3, 32), (distance, 1))
    gate_up.copy_(*random_tensors([(3, 32)], gate_up.dtype))
    assert torch.equal(
        swiglu_packed(gate_up, backend=usable(backend, gate_up.dtype)),
        swiglu_packed(gate_up.contiguous(), backend=backend),
    )


@pytest.mark.parametrize("width", [48, 600])
def test_results_and_gradients_carry_the_largest_of_their_rows_in_parts(width: int) -> None:
    usable("triton")
    gate_up, dy = random_tensors([(3, 7, 2 * width), (3, 7, width)], torch.float32)
    y = swiglu_packed(gate_up.requires_grad_(), largest=True, backend="triton")
    seen: list[Tensor] = []
    y.grad_fn.register_hook(lambda inputs, _: seen.append(inputs[0]))
    y.backward(dy)
    for x in (y, seen[0]):
        largest = largest_of(x)
        assert largest is not None
        assert largest.shape == (21, -(-width // 256))
        assert torch.equal(largest.amax(1), x.abs().amax(2).flatten())
    assert largest_of(swiglu_packed(gate_up, backend="triton")) is None
    assert largest_of(swiglu_packed(gate_up, largest=True, backend="reference")) is None


@pytest.mark.parametrize("in_place", [False, True])
def test_products_under_autocast_are_in_its_dtype(in_place: bool) -> None:
    gate_up, down, up = (x.requires_grad_() for x in random_tensors([(6, 16), (4, 8), (16, 6)], torch.float32))
    if in_place:
        accumulate_in_place([down, up])
    with torch.autocast(DEVICE, torch.bfloat16):
        y, z = swiglu_linear(gate_up, down), linear(torch.ones(3, 6, device=DEVICE), up)
    assert y.dtype == z.dtype == torch.bfloat16
    (y.sum() + z.sum()).backward()
    plain = [x.detach().requires_grad_() for x in (gate_up, down, up)]
    (swiglu_linear(plain[0], plain[1]).sum() + linear(torch.ones(3, 6, device=DEVICE), plain[2]).sum()).backward()
    for ours, exact in zip((gate_up, down, up), plain, strict=True):
        torch.testing.assert_close(ours.grad, exact.grad, rtol=0.05, atol=0.05)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="agree"):
        swiglu(torch.randn(2, 8), torch.randn(2, 1))
    with pytest.raises(ValueError, match="agree"):
        swiglu(torch.randn(2, 8), torch.randn(2, 8).bfloat16())
    with pytest.raises(ValueError, match=r"gate_up\): \(2, 7\) is invalid: .* even number of columns"):
        swiglu_packed(torch.randn(2, 7))
    with pytest.raises(ValueError, match="even number of columns"):
        swiglu_packed(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"swiglu_linear\(weight\): \(5, 4\) is invalid: it must be \[O, 3\]"):
        swiglu_linear(torch.randn(2, 6), torch.randn(5, 4))


def test_every_launch_is_compiled_ahead_of_time() -> None:
    with compiled_launches(activation):
        cases = [(width, BF16) for width in (64, 128, 256, 1000, 1365, 4096)]
        cases += [(width, FP32) for width in (256, 1000, 1365, 4096)] + [(256, FP16), (4096, FP16)]
        for width, dtype in cases:
            gate_up = torch.empty(2, 2 * width, dtype=dtype)
            gate, up = gate_up.split(width, -1)
            for amax in (None, torch.empty(2, 64)):
                activation._triton_forward(gate, up, amax)
                activation._triton_backward(up, gate, up, *torch.empty_like(gate_up).split(width, -1), amax=amax)
            for again in (False, True):
                activation._triton_backward(up, gate, up, *torch.empty_like(gate_up).split(width, -1), again=again)

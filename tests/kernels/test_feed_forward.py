from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spt_fast.kernels import accumulate_in_place, feed_forward, swiglu_mlp
from spt_fast.kernels.backend import OPS, Candidate, install
from spt_fast.kernels.launch import Config
from spt_fast.kernels.persistent import SEPARATE, config, fits
from tests.kernels.compare import (
    DEVICE,
    assert_as_exact_as_torch,
    backends_and_dtypes,
    by_more_than_chance,
    random_tensors,
    run,
    usable,
)
from tests.kernels.contract import Calls, Contract, Sample
from tests.kernels.launches import BF16, FP16, compiled_launches

D, F_, E = 24, 32, 8
SMALL = config(16, 16, 16, 4, 1)
every_backend = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("reference", "cpu", "triton"))


@contextmanager
def fused(*kernels: str) -> Iterator[None]:
    """Within it the shape above runs in these fused kernels: "forward", "backward"."""
    launches = [(f"swiglu_mlp_{kernel}", (D, F_, size), SMALL) for kernel in kernels for size in (2, 4)]
    install({"swiglu_mlp": Candidate("auto", tuple(launches))})
    try:
        yield
    finally:
        install({})


def inputs(rows: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    x, *weights = random_tensors([(*rows, D), (2 * F_, D), (E, F_), (2 * F_,), (E,)], dtype)
    return [x, *(0.3 * weight for weight in weights)]


def plain(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, *biases: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up_weight, *biases[:1]).chunk(2, dim=-1)
    return F.linear(gate * torch.sigmoid(gate) * up, down_weight, *biases[1:])


class TestContract(Contract):
    samples = (
        Sample(
            "swiglu_mlp",
            swiglu_mlp,
            plain,
            inputs,
            rows=(2, 3),
            empty=((0,), (3, 0)),
            gradients=5,
            loose=("reference", "cpu", "triton"),  # of which products are PyTorch's
            strided=True,
        ),
    )

    @pytest.fixture(autouse=True)
    def in_fused_kernels(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """But for torch.compile, which gets the separate ops."""
        with nullcontext() if "compiles" in request.node.name else fused("forward", "backward"):
            yield


@every_backend
@pytest.mark.parametrize("kernels", [(), ("forward",), ("backward",), ("forward", "backward")])
@pytest.mark.parametrize("biases", [False, True])
@by_more_than_chance
def test_as_exact_as_torch(backend: str, dtype: torch.dtype, kernels: tuple[str, ...], biases: bool) -> None:
    """Of 21 rows the last tile has only 5. With two roundings, since two intermediate results are rounded."""
    if kernels and backend != "triton":
        pytest.skip("which has no fused kernels")
    given, (dz,) = inputs((3, 7), dtype)[: 5 if biases else 3], random_tensors([(3, 7, E)], dtype)
    with fused(*kernels):
        assert_as_exact_as_torch(lambda *x: swiglu_mlp(*x, backend=backend), plain, given, (dz,), 2)


def test_fused_kernels_run_where_they_are_chosen_and_fit() -> None:
    usable("triton")
    given = [x.requires_grad_() for x in inputs((5,), torch.float32)]

    def is_fused(*given: Tensor, backend: str = "triton") -> bool:
        return "Fused" in type(swiglu_mlp(*given, backend=backend).grad_fn).__name__

    assert not is_fused(*given)
    for kernels in (("forward",), ("backward",), ("forward", "backward")):
        with fused(*kernels):
            assert is_fused(*given)
            assert not is_fused(*given, backend="reference")
            assert not is_fused(*(x.double() for x in given), backend="auto")
            with torch.autocast(DEVICE, torch.bfloat16):
                assert not is_fused(*given)
    odd = torch.ones(4, 22, device=DEVICE)
    assert fits(odd[:, :20])
    assert not fits(odd)  # 88 bytes to a row
    assert not fits(odd[:0, :20])
    assert not fits(odd[:, :20], odd[:, :20])  # whose rows are apart
    assert not fits(odd[:, :20], torch.ones(100, device=DEVICE)[1:21])  # not aligned
    assert not fits(odd[:, :20], torch.ones(6, 20, device=DEVICE))  # 24 bytes to a row of the result
    assert not fits(odd[:, :20], torch.ones(0, 20, device=DEVICE))


def test_where_ops_are_looked_at_the_separate_ones_run_as_chosen_for_them() -> None:
    usable("triton")
    given = [x.requires_grad_() for x in inputs((5,), torch.float32)]
    alone = swiglu_mlp(*given, backend="reference")
    with fused("forward", "backward"), Calls() as calls:
        assert torch.equal(swiglu_mlp(*given, backend="triton"), swiglu_mlp(*given, backend="triton"))
    assert [arguments[-1] for _, arguments, _ in calls.found] == ["triton", "triton"]
    install({"swiglu_mlp": Candidate("triton"), "swiglu_linear": Candidate("reference")})
    try:
        with Calls() as calls:
            assert torch.equal(swiglu_mlp(*given), alone)
    finally:
        install({})
    assert [arguments[-1] for _, arguments, _ in calls.found] == ["reference"]


def test_tensors_that_are_not_aligned_are_copied() -> None:
    usable("triton")
    given, (dz,) = inputs((5,), torch.float32), random_tensors([(5, E)], torch.float32)
    expected = run(plain, given, (dz,))
    flat = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (given[0], dz)]
    assert all(x.data_ptr() % 16 for x in flat)
    with fused("forward", "backward"):
        found = run(lambda *x: swiglu_mlp(*x, backend="triton"), [flat[0], *given[1:]], flat[1:])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [("forward",), ("forward", "backward")])
def test_second_derivatives_are_refused(kernels: tuple[str, ...]) -> None:
    usable("triton")
    given = [x.requires_grad_() for x in inputs((5,), torch.float32)]
    with fused(*kernels), pytest.raises(RuntimeError, match="swiglu_mlp has no second derivative"):
        torch.autograd.grad(swiglu_mlp(*given, backend="triton").square().sum(), given, create_graph=True)


def test_the_fused_kernel_makes_the_same_result_again() -> None:
    """The backward pass computes y from g and u as they were stored, as the forward pass did."""
    usable("triton")
    x, gate_up_weight, down_weight, bias, _ = inputs((37,), torch.float16)
    gate_up, y = feed_forward._forward(x, gate_up_weight, bias, SMALL)
    _, again = feed_forward._backward(torch.ones(37, E, dtype=x.dtype, device=DEVICE), gate_up, down_weight, SMALL)
    assert torch.equal(y, again)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_added_in_place(frozen: bool) -> None:
    """Also through a checkpoint; a weight without a gradient gets none."""
    usable("triton")
    given, (dz,) = inputs((3, 5), torch.float32), random_tensors([(3, 5, E)], torch.float32)
    expected = run(plain, given, (dz,))[1:]
    leaves = [x.requires_grad_(not (frozen and number == 2)) for number, x in enumerate(given)]
    accumulate_in_place(leaves[1:])
    with fused("forward", "backward"):
        for _ in range(2):
            checkpoint(lambda *x: swiglu_mlp(*x, backend="triton"), *leaves, use_reentrant=False).backward(dz)
    for number, (e, leaf) in enumerate(zip(expected, leaves, strict=True)):
        if frozen and number == 2:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, 2 * e, rtol=1e-4, atol=1e-4)


def test_without_gradients() -> None:
    usable("triton")
    given = inputs((5,), torch.float32)
    with fused("forward"), torch.no_grad():
        torch.testing.assert_close(swiglu_mlp(*given, backend="triton"), plain(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [(), ("forward", "backward")])
def test_shapes_that_do_not_fit_are_refused(kernels: tuple[str, ...]) -> None:
    x, gate_up_weight, down_weight, _, bias = inputs((2,), torch.float32)
    with fused(*kernels):
        with pytest.raises(ValueError, match=r"swiglu_mlp\(down_weight\): \(8, 31\) .* \[O, 32\], for gate_up_weight"):
            swiglu_mlp(x, gate_up_weight, down_weight[:, 1:])
        with pytest.raises(ValueError, match=r"swiglu_mlp\(gate_up_weight\): \(64, 24\) .* \[O, 23\], for x \(2, 23\)"):
            swiglu_mlp(x[:, 1:], gate_up_weight, down_weight)
        with pytest.raises(ValueError, match=r"swiglu_mlp\(gate_up_bias\): \(8,\) .* \[64\], for gate_up_weight"):
            swiglu_mlp(x, gate_up_weight, down_weight, bias)


def test_candidates_are_the_launches_of_every_kernel() -> None:
    assert OPS["swiglu_mlp"].candidates(*inputs((2,), torch.float32))[0] == Candidate("auto")
    assert {each["COLUMNS"] for each in feed_forward.candidates("forward", 5632)} == {64, 128}
    assert {each["COLUMNS"] for each in feed_forward.candidates("backward", 1088)} == {64}
    assert feed_forward.candidates("forward", 1000) == []


def test_every_launch_is_compiled_ahead_of_time() -> None:
    def launches(kernel: str, dtype: torch.dtype) -> list[Config]:
        found = feed_forward.candidates(kernel, 128)
        return found if dtype == BF16 else found[:1]

    with compiled_launches(feed_forward):
        for dtype, bias in product((BF16, FP16), (None, torch.empty(256))):
            x, gate_up, weight = (torch.empty(shape, dtype=dtype) for shape in ((3, 64), (3, 256), (256, 64)))
            bias = None if bias is None or dtype == FP16 else bias.to(dtype)
            for chosen in launches("forward", dtype):
                feed_forward._forward(x, weight, bias, chosen)
            for chosen in launches("backward", dtype):
                feed_forward._backward(x, gate_up, weight.view(64, 256)[:, :128].contiguous(), chosen)
    assert SEPARATE not in [*feed_forward.candidates("forward", 128), *feed_forward.candidates("backward", 128)]

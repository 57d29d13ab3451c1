from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import activation, swiglu, swiglu_packed
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
from tests.kernels.launches import BF16, FP16, FP32, compiled_launches

every_backend = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("reference", "cpu", "triton"))


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def plain_swiglu_packed(gate_up: Tensor) -> Tensor:
    return plain_swiglu(*gate_up.chunk(2, dim=-1))


@every_backend
@pytest.mark.parametrize("shape", [(64, 1024), (3, 5, 127), (2, 3, 4, 48), (100,), (100, 1), (33, 300)])
def test_as_exact_as_torch(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up, upstream = (3 * x for x in random_tensors([shape] * 3, dtype))
    assert_as_exact_as_torch(lambda g, u: swiglu(g, u, backend=backend), plain_swiglu, (gate, up), (upstream,))
    packed = torch.cat((gate, up), -1)
    assert_as_exact_as_torch(lambda x: swiglu_packed(x, backend=backend), plain_swiglu_packed, (packed,), (upstream,))


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
@pytest.mark.parametrize("layout", [strided, transposed])
def test_strided_inputs_and_upstream_gradients(backend: str, dtype: torch.dtype, layout) -> None:
    gate, up, upstream = random_tensors([(4, 6, 32)] * 3, dtype)
    for function, inputs in (
        (lambda g, u: swiglu(g, u, backend=backend), (gate, up)),
        (lambda x: swiglu_packed(x, backend=backend), (torch.cat((gate, up), -1),)),
    ):
        expected = run(function, inputs, (upstream,))
        for e, f in zip(expected, run(function, [layout(x) for x in inputs], (layout(upstream),)), strict=True):
            assert torch.equal(e, f)


@every_backend
def test_rows_that_lie_apart(backend: str, dtype: torch.dtype) -> None:
    """Every tensor at another distance, other numbers in between; to the last bit what rows side by side give, but in
    the reference, whose PyTorch ops round otherwise at the end of a vector than within."""
    same = {"rtol": 0, "atol": 0} if backend != "reference" else {}
    apart, (gate, up, upstream) = [], random_tensors([(3, 5, 70)] * 3, dtype)
    for x, columns in ((gate, 140), (up, 90), (upstream, 75)):
        wide = torch.full((3, 5, columns), float("nan"), dtype=dtype, device=DEVICE)
        wide[..., :70] = x
        apart.append(wide[..., :70])
    expected = run(lambda g, u: swiglu(g, u, backend=backend), (gate, up), (upstream,))
    found = run(lambda g, u: swiglu(g, u, backend=backend), apart[:2], apart[2:])
    y, dgate_up = run(lambda x: swiglu_packed(x, backend=backend), (torch.cat((gate, up), -1),), apart[2:])
    for results in (found, [y, *dgate_up.chunk(2, dim=-1)]):
        for e, f in zip(expected, results, strict=True):
            torch.testing.assert_close(f, e, **same)
    assert y.is_contiguous()
    assert dgate_up.is_contiguous()


@every_backend
def test_an_upstream_gradient_that_is_one_number_everywhere(backend: str, dtype: torch.dtype) -> None:
    gate, up = random_tensors([(3, 70)] * 2, dtype)
    one = torch.ones((), dtype=dtype, device=DEVICE)
    expanded = run(lambda g, u: swiglu(g, u, backend=backend), (gate, up), (one.expand(3, 70),))
    for e, f in zip(
        run(lambda g, u: swiglu(g, u, backend=backend), (gate, up), (one.repeat(3, 70),)), expanded, strict=True
    ):
        assert torch.equal(e, f)


@every_backend
def test_what_torch_asks_of_a_custom_op(backend: str, dtype: torch.dtype) -> None:
    gate, up = (x.requires_grad_() for x in random_tensors([(5, 32)] * 2, dtype))
    torch.library.opcheck(torch.ops.spt_fast.swiglu, (gate, up, backend))
    torch.library.opcheck(torch.ops.spt_fast.swiglu, (gate, None, backend))


def test_it_compiles_whole() -> None:
    gate_up, upstream = random_tensors([(5, 64), (5, 32)], torch.float32)

    def function(gate_up: Tensor) -> Tensor:
        return swiglu_packed(gate_up) + swiglu(*gate_up.chunk(2, dim=-1))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for e, f in zip(*(run(f, (gate_up,), (upstream,)) for f in (function, compiled)), strict=True):
        assert torch.equal(e, f)


def test_gradcheck() -> None:
    torch.manual_seed(1)
    gate, up = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.autograd.gradcheck(swiglu_packed, (gate,))
    assert torch.autograd.gradcheck(lambda up: swiglu(gate.detach(), up), (up,))


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
def test_what_is_not_a_number_stays_so(backend: str, dtype: torch.dtype) -> None:
    """A loss that went wrong must be seen."""
    nan = torch.full((3, 32), float("nan"), dtype=dtype, device=DEVICE)
    one = torch.ones_like(nan)
    for gate, up in ((nan, one), (one, nan)):
        y, dgate, dup = run(lambda g, u: swiglu(g, u, backend=backend), (gate, up), (one,))
        assert y.isnan().all()
        assert dgate.isnan().all()
        assert dup.isnan().all() == gate.isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)])
def test_empty_batch(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE)
    for result in run(lambda g, u: swiglu(g, u, backend=usable(backend)), (x, x.clone()), (x,)):
        assert result.shape == shape
    half = torch.empty(*shape[:-1], shape[-1] // 2, device=DEVICE)
    y, dx = run(lambda x: swiglu_packed(x, backend=usable(backend)), (x,), (half,))
    assert y.shape == half.shape
    assert dx.shape == shape


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


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="agree"):
        swiglu(torch.randn(2, 8), torch.randn(2, 1))
    with pytest.raises(ValueError, match="agree"):
        swiglu(torch.randn(2, 8), torch.randn(2, 8).bfloat16())
    with pytest.raises(ValueError, match=r"even number of columns; given \(2, 7\)"):
        swiglu_packed(torch.randn(2, 7))
    with pytest.raises(ValueError, match="even number of columns"):
        swiglu_packed(torch.tensor(1.0))


def test_every_launch_is_compiled_ahead_of_time() -> None:
    with compiled_launches(activation):
        cases = [(F, BF16) for F in (64, 128, 256, 1000, 1365, 4096)]
        cases += [(F, FP32) for F in (256, 1000, 1365, 4096)] + [(256, FP16), (4096, FP16)]
        for F, dtype in cases:
            gate_up = torch.empty(2, 2 * F, dtype=dtype)
            gate, up = gate_up.split(F, -1)
            activation._triton_forward(gate, up)
            activation._triton_backward(up, gate, up, *torch.empty_like(gate_up).split(F, -1))

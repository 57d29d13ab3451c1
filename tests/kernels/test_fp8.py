from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import fp8, fp8_linear
from spt_fast.kernels.launch import INTERPRETED
from tests.kernels.compare import DEVICE, backends_and_dtypes, random_tensors, run, usable
from tests.kernels.contract import Contract, Sample
from tests.kernels.launches import BF16, FP16, FP32, WIDTHS, compiled_launches

every_backend = pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("reference", "triton"))

FORMATS = pytest.mark.parametrize("format", [fp8.FORWARD, fp8.BACKWARD])


def numbers_of(format: torch.dtype, shape: tuple[int, int], power: int = 0) -> Tensor:
    """Random numbers that fp8 holds, times 2^power; the largest fp8 number is in every row and column, so that scales
    are powers of two. Triton's interpreter, which rounds to fp8 wrongly, has then nothing to round."""
    x = random_tensors([shape], torch.float32)[0].cpu()
    x = (x * 2.0 ** torch.arange(shape[0]).remainder(5)[:, None]).to(format).float()
    longest = torch.arange(max(shape))
    x[longest % shape[0], longest % shape[1]] = torch.finfo(format).max
    return (x * 2.0**power).to(DEVICE)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


class TestContract(Contract):
    samples = (
        Sample(
            "fp8_linear",
            fp8_linear,
            linear,
            lambda rows, dtype: random_tensors([(*rows, 32), (16, 32)], dtype),
            rows=(3, 6),
            empty=((2, 0), (0,)),
            gradients=2,
            exact=False,
        ),
    )


# ------------------------------------------------------------------------------------------------ quantising


@FORMATS
@pytest.mark.parametrize("shape", [(37, 48), (1, 16), (128, 64), (150, 272)])
def test_triton_quantises_as_the_reference(format: torch.dtype, shape: tuple[int, int]) -> None:
    usable("triton")
    on_grid, random = numbers_of(format, shape, power=-3), random_tensors([shape], torch.float32)[0]
    random[0] = 0
    for ours, reference in (
        (fp8._triton_rows, fp8._reference_rows),
        (fp8._triton_columns, fp8._reference_columns),
        (lambda *x: fp8._triton_columns(*x, whole=True), lambda *x: fp8._reference_columns(*x, whole=True)),
    ):
        for x in (on_grid, random):
            (q, scale), (expected_q, expected_scale) = ours(x, format), reference(x, format)
            torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0)
            assert q.shape == expected_q.shape
            if x is on_grid or not INTERPRETED:
                assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))


@FORMATS
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_what_is_quantised_is_what_was_given(format: torch.dtype, backend: str) -> None:
    """Numbers that fp8 holds come back; columns transposed, with zeros behind them."""
    x = numbers_of(format, (37, 48), power=-5)
    q, scale = fp8._QUANTISE_ROWS[usable(backend)](x, format)
    assert torch.equal(q.float() * scale, x)
    for whole in (False, True):
        q, scale = fp8._QUANTISE_COLUMNS[backend](x, format, whole)
        assert q.shape == (48, 48)
        assert scale.shape == ((1, 1) if whole else (48, 1))
        back = q.float() * scale
        assert torch.equal(back[:, :37], x.T)
        assert not back[:, 37:].any()


@FORMATS
def test_rounding_costs_at_most_half_a_step(format: torch.dtype) -> None:
    """Half a step is eps / 2 of a normal number, and half of the smallest number below those."""
    (x,) = random_tensors([(64, 256)], torch.float32)
    x *= torch.logspace(-20, 20, 64, device=DEVICE)[:, None]
    q, scale = fp8._reference_rows(x, format)
    limits = torch.finfo(format)
    allowed = limits.eps / 2 * x.abs() + limits.smallest_normal * limits.eps / 2 * scale
    assert ((q.float() * scale - x).abs() <= allowed * (1 + 1e-5)).all()


@every_backend
def test_an_outlier_costs_only_its_own_row(backend: str, dtype: torch.dtype) -> None:
    x = numbers_of(fp8.FORWARD, (32, 32), power=-9)
    x[3] *= 2.0**40 if dtype != torch.float16 else 2.0**9
    q, scale = fp8._QUANTISE_ROWS[backend](x.to(dtype), fp8.FORWARD)
    assert torch.equal(q.float() * scale, x)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_zeros_and_tiny_numbers(backend: str) -> None:
    """No scale is 0 or infinite."""
    x = torch.zeros(16, 32, device=DEVICE)
    x[1], x[2] = 1e-38, 1e-20
    for q, scale in (
        fp8._QUANTISE_ROWS[usable(backend)](x, fp8.BACKWARD),
        fp8._QUANTISE_COLUMNS[backend](x, fp8.BACKWARD),
    ):
        assert q.float().isfinite().all()
        assert scale.isfinite().all()
        assert (scale > 0).all()
    q, scale = fp8._QUANTISE_ROWS[backend](x, fp8.BACKWARD)
    torch.testing.assert_close((q.float() * scale)[2], x[2], rtol=1e-6, atol=0)


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_seen(backend: str, dtype: torch.dtype, bad: float) -> None:
    x, weight, dy = (torch.ones(shape, dtype=dtype, device=DEVICE) for shape in ((32, 16), (16, 16), (32, 16)))
    if backend == "triton" and INTERPRETED and bad != bad:
        pytest.skip("Triton's interpreter makes 384 of it")
    x[5, 3] = dy[7, 2] = bad
    y, dx, dw = run(lambda x, w: fp8_linear(x, w, backend=backend), (x, weight), (dy,))
    assert not y[5].isfinite().any()
    assert not dx[7].isfinite().any()
    assert not dw[2].isfinite().any()
    assert not dw[:, 3].isfinite().any()
    assert y[:5].isfinite().all()


# ------------------------------------------------------------------------------------------------ the linear layer


@every_backend
@pytest.mark.parametrize("rows", [(32,), (5, 7), (1,)])
def test_numbers_that_fp8_holds_are_multiplied_exactly(backend: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    """Up to the rounding of the sums, to bf16 (2^-8 of each) or, for dw, float32."""
    N = torch.Size(rows).numel()
    x, weight = numbers_of(fp8.FORWARD, (N, 48), -9), numbers_of(fp8.FORWARD, (16, 48), -9)
    dy = numbers_of(fp8.BACKWARD, (N, 16), -16).to(dtype).float()  # float16 lacks the smallest
    exact = run(linear, (x.double(), weight.double()), (dy.double(),))
    weight = torch.nn.Parameter(weight.to(dtype))
    weight.grad_dtype = torch.float32
    x = x.to(dtype).view(*rows, 48).requires_grad_()
    y = fp8_linear(x, weight, backend=backend)
    y.backward(dy.to(dtype).view(*rows, 16))
    assert y.dtype == x.dtype
    assert x.grad is not None
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    for e, f in zip(exact, (y, x.grad, weight.grad), strict=True):
        rounding = 2.0**-20 if f is weight.grad else 2.0**-8
        error = (f.detach().double().view(e.shape) - e).abs()
        assert (error <= rounding * e.abs() + 2.0**-18 * e.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("whole", [False, True])
def test_error_is_that_of_two_rounded_operands(
    backend: str, dtype: torch.dtype, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number rounded to m bits of mantissa errs by a uniform share of half a step, which is at most (for a mantissa
    of 1) 2^-(m+1) of it: in the root mean square 1/sqrt(3) of that. Errors of many products are independent and add as
    squares: with e4m3 twice sqrt(2 2^-8 / 3), with e5m2 and e4m3 sqrt((2^-6 + 2^-8) / 3) of the sum's own root mean
    square. Half of that is less than random numbers give in these formats, and more than in finer ones."""
    if backend == "triton" and INTERPRETED:
        pytest.skip("Triton's interpreter rounds to fp8 wrongly")
    if whole:
        monkeypatch.setattr(fp8, "_rows_reach_float32", lambda device: False)
    x, weight, dy = random_tensors([(100, 256), (128, 256), (100, 128)], dtype)
    exact = run(linear, (x.double(), weight.double()), (dy.double(),))
    found = run(lambda x, w: fp8_linear(x, w, backend=usable(backend, dtype)), (x, weight), (dy,))
    forward, backward = (2 * 2**-8 / 3) ** 0.5, ((2**-6 + 2**-8) / 3) ** 0.5
    for e, f, allowed in zip(exact, found, (forward, backward, backward), strict=True):
        error = ((f.double() - e).square().mean() / e.square().mean()).sqrt()
        assert allowed / 2 < error < allowed


def test_bad_shapes_are_refused() -> None:
    for x, weight in (((4, 32), (16, 16)), ((32,), (16, 32)), ((4, 32), (32,))):
        with pytest.raises(ValueError, match=r"x must be \[..., I\]"):
            fp8_linear(torch.ones(x), torch.ones(weight))
    for weight in ((16, 24), (24, 16)):
        with pytest.raises(ValueError, match="divisible by 16"):
            fp8_linear(torch.ones(4, weight[1]), torch.ones(weight))


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fp8.obstacle(torch.device("cuda")) == "fp8 needs a GPU of compute capability 8.9, this one has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8.obstacle(torch.device("cuda")) is None
    monkeypatch.setattr(fp8, "obstacle", lambda device: "no fp8")
    with pytest.raises(ValueError, match="'triton' is invalid: no fp8"):
        fp8_linear(torch.ones(4, 16), torch.ones(16, 16), backend=usable("triton"))
    fp8_linear(torch.ones(4, 16), torch.ones(16, 16))


@pytest.mark.parametrize(
    ("capability", "cuda", "reach"), [((9, 0), "12.9", True), ((9, 0), "12.8", False), ((10, 0), "13.0", False)]
)
def test_where_a_scale_for_each_row_reaches_float32(
    capability: tuple[int, int], cuda: str, reach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert fp8._rows_reach_float32(torch.device("cuda")) == reach


def test_the_products_are_such_as_the_gpu_takes() -> None:
    """torch's own checks of shapes, strides, dtypes and scales, on tensors without numbers."""
    usable("triton")
    rows, columns = fp8._triton_rows, fp8._triton_columns
    for N, whole in ((5, False), (5, True), (64, False)):
        x, weight, dy = (torch.ones(shape, device=DEVICE) for shape in ((N, 48), (16, 48), (N, 16)))
        for a, a_scale, b, b_scale, dtype in (
            (*rows(x, fp8.FORWARD), *rows(weight, fp8.FORWARD), torch.bfloat16),
            (*rows(dy, fp8.BACKWARD), *columns(weight, fp8.FORWARD), torch.bfloat16),
            (*columns(dy, fp8.BACKWARD, whole), *columns(x, fp8.FORWARD, whole), torch.float32),
        ):
            assert b.dtype == fp8.FORWARD
            a, a_scale, b, b_scale = (t.to("meta") for t in (a, a_scale, b, b_scale))
            assert torch._scaled_mm(a, b.T, a_scale, b_scale.T, out_dtype=dtype).shape == (len(a), len(b))


def test_every_launch_is_compiled_ahead_of_time() -> None:
    with compiled_launches(fp8):
        cases = [(D, BF16) for D in WIDTHS if D > 1024] + [(D, dtype) for D in (1536, 2048) for dtype in (FP16, FP32)]
        for D, dtype in cases:
            for kind in (fp8.FORWARD, fp8.BACKWARD):
                fp8._triton_rows(torch.empty(3, D, dtype=dtype), kind)
                fp8._triton_columns(torch.empty(3, D, dtype=dtype), kind)

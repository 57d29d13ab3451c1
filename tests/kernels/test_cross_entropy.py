from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.kernels import accumulate_in_place, cross_entropy, linear_cross_entropy
from spt_fast.kernels.launch import INTERPRETED, Config, _chosen
from tests.kernels.compare import (
    DEVICE,
    ROUNDING,
    assert_as_exact_as_torch,
    backends_and_dtypes,
    by_more_than_chance,
    random_tensors,
    run,
)
from tests.kernels.contract import Contract, Sample
from tests.kernels.launches import BF16, FP16, FP32, compiled_launches

OPTIONS = [{}, {"z_loss": 1e-2}, {"softcap": 2.0}, {"softcap": 5.0, "z_loss": 0.1}]
REDUCTIONS = ["mean", "sum", "none"]
ROUNDINGS = 3
EVERYWHERE = backends_and_dtypes("reference", "cpu", "triton")
IN_FLOAT32 = [(backend, dtype) for backend, dtype in EVERYWHERE if dtype == torch.float32]


@pytest.fixture(autouse=True)
def small_chunks_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one short, and several blocks of a row, on small inputs."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES_ELSEWHERE", 1)
    monkeypatch.setattr(cross_entropy, "CHUNK_MIN_ROWS", 16)
    monkeypatch.setattr(cross_entropy, "BLOCK", 128)
    monkeypatch.setattr(cross_entropy, "WARPS", 1)


def plain(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Whole logits, their losses in float32 as F.cross_entropy is used in mixed precision."""
    z_NV = (x_ND @ weight_VD.T).to(torch.promote_types(x_ND.dtype, torch.float32))
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    loss_N = F.cross_entropy(z_NV, targets_N, ignore_index=ignore_index, reduction="none")
    kept_N = targets_N != ignore_index
    loss_N = loss_N + z_loss * z_NV.logsumexp(1).square() * kept_N
    if reduction == "none":
        return loss_N
    return loss_N.sum() / (kept_N.sum() if reduction == "mean" else 1)


def draw(N: int, D: int, V: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight for logits of about 1, targets, every seventh of them ignored, and a positive number for each row."""
    x, weight, where, upstream = random_tensors([(N, D), (V, D), (N,), (N,)], dtype)
    targets = (where.double().abs() * 1e4).long() % V
    targets[3::7] = -100
    return x, weight / D**0.5, targets, upstream.abs().to(torch.promote_types(dtype, torch.float32))


class TestContract(Contract):
    samples = tuple(
        Sample(
            "linear_cross_entropy",
            partial(linear_cross_entropy, reduction=reduction, **options),
            partial(plain, reduction=reduction, **options),
            lambda rows, dtype: draw(*rows, 5, 33, dtype)[:3],
            rows=(17,),
            empty=((0,),),
            gradients=2,
        )
        for reduction, options in zip(REDUCTIONS, ({"z_loss": 0.01, "softcap": 3.0}, {}, {"z_loss": 0.01}), strict=True)
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_exact_in_float64(options: dict, reduction: str) -> None:
    x, weight, targets, upstream = draw(70, 8, 33)
    results = [
        run(
            lambda x, w, f=f: f(x, w, targets, reduction=reduction, **options),
            (x, 3 * weight),
            (upstream if reduction == "none" else upstream[0],),
        )
        for f in (linear_cross_entropy, plain)
    ]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("backend", "dtype"), EVERYWHERE)
@pytest.mark.parametrize(
    ("reduction", "options"), [("mean", 0), ("none", 0), ("sum", 1), ("mean", 2), ("none", 3), ("mean", 3)]
)
@pytest.mark.parametrize("shape", [(20, 64, 301), (17, 16, 256), (60, 3, 2)])
@by_more_than_chance
def test_as_exact_as_torch(backend: str, dtype: torch.dtype, reduction: str, options: int, shape: tuple) -> None:
    """With ROUNDINGS in float32, which chance may put between two equally exact results: of the sum of exponentials, of
    its logarithm, and of the difference to the target's logit. In half precision the logits' own errors hide them."""
    x, weight, targets, upstream = draw(*shape, dtype)
    assert_as_exact_as_torch(
        lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction, **OPTIONS[options], backend=backend),
        lambda x, w: plain(x, w, targets, reduction=reduction, **OPTIONS[options]),
        (x, 3 * weight),
        (upstream if reduction == "none" else upstream[0],),
        ROUNDINGS if dtype == torch.float32 else 1,
    )


@pytest.mark.parametrize(("backend", "dtype"), [case for case in EVERYWHERE if case[0] != "triton" or DEVICE == "cuda"])
@by_more_than_chance
def test_as_exact_as_torch_at_a_real_size(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, weight, targets, upstream = draw(1100, 128, 2053, dtype)
    assert_as_exact_as_torch(
        lambda x, w: linear_cross_entropy(x, w, targets, z_loss=1e-4, backend=backend),
        lambda x, w: plain(x, w, targets, z_loss=1e-4),
        (x, weight),
        (upstream[0],),
        ROUNDINGS if dtype == torch.float32 else 1,
    )


@pytest.mark.parametrize(("backend", "dtype"), IN_FLOAT32)
def test_without_reduction_each_row_takes_its_own_upstream_gradient(backend: str, dtype: torch.dtype) -> None:
    """A known bug elsewhere: all rows scaled by the first row's gradient."""
    x, weight, targets, upstream = draw(40, 4, 9, dtype)
    upstream.zero_()
    upstream[5] = 2.0
    _, dx, _ = run(
        lambda x, w: linear_cross_entropy(x, w, targets, reduction="none", backend=backend), (x, weight), (upstream,)
    )
    assert dx[5].any()
    dx[5] = 0
    assert not dx.any()


@pytest.mark.parametrize(("backend", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored_is_zero(backend: str, dtype: torch.dtype, reduction: str) -> None:
    x, weight, targets, _ = draw(20, 4, 7, dtype)
    x.requires_grad_()
    weight.requires_grad_()
    targets.fill_(-100)
    loss = linear_cross_entropy(x, weight, targets, reduction=reduction, z_loss=0.1, softcap=5.0, backend=backend)
    loss.sum().backward()
    for zero in (loss, x.grad, weight.grad):
        assert zero is not None
        assert not zero.any()


@pytest.mark.parametrize(("backend", "dtype"), EVERYWHERE)
@by_more_than_chance
def test_another_ignore_index(backend: str, dtype: torch.dtype) -> None:
    x, weight, targets, upstream = draw(30, 4, 9, dtype)
    targets[targets < 0] = 3
    assert_as_exact_as_torch(
        lambda x, w: linear_cross_entropy(x, w, targets, ignore_index=3, backend=backend),
        lambda x, w: plain(x, w, targets, ignore_index=3),
        (x, weight),
        (upstream[0],),
        ROUNDINGS if dtype == torch.float32 else 1,
    )


@pytest.mark.parametrize("targets_dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_of_other_integer_types(targets_dtype: torch.dtype) -> None:
    x, weight, targets, _ = draw(40, 8, 33)
    targets = targets.abs() % 33
    assert torch.equal(
        linear_cross_entropy(x, weight, targets.to(targets_dtype)), linear_cross_entropy(x, weight, targets)
    )


@pytest.mark.parametrize(("backend", "dtype"), IN_FLOAT32)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_one_gradient_wanted(backend: str, dtype: torch.dtype, reduction: str) -> None:
    x, weight, targets, _ = draw(40, 8, 33, dtype)
    upstream = torch.ones(40 if reduction == "none" else (), device=DEVICE)
    function = lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction, backend=backend)  # noqa: E731
    _, dx, dw = run(function, (x, weight), (upstream,))
    (found,) = torch.autograd.grad(function(x.requires_grad_(), weight), x, upstream)
    torch.testing.assert_close(found, dx, rtol=0, atol=0)
    (found,) = torch.autograd.grad(function(x.detach(), weight.requires_grad_()), weight, upstream)
    torch.testing.assert_close(found, dw, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "dtype"), IN_FLOAT32)
def test_gradients_that_are_not_needed_are_not_made(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, targets, _ = draw(40, 8, 33, dtype)
    x.requires_grad_()
    rows, asked = cross_entropy._ROWS[backend], []
    monkeypatch.setitem(cross_entropy._ROWS, backend, lambda z, *args: asked.append(args[-1]) or rows(z, *args))
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets, backend=backend)
    loss = linear_cross_entropy(x, weight, targets, reduction="none", backend=backend)
    assert not any(asked)
    loss.sum().backward()
    assert any(asked)

    z = (x @ weight.T).detach()
    before, dloss = z.clone(), torch.ones(40, device=DEVICE)
    rows(z, targets, dloss, -100, 0.1, 5.0, False)
    assert torch.equal(z, before)


@pytest.mark.parametrize(("backend", "dtype"), EVERYWHERE)
def test_logits_never_exist_whole(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made is a chunk of logits or a gradient, not [N, V]; nor is a [V, D] made for every chunk."""
    monkeypatch.setattr(cross_entropy, "CHUNK_MIN_ROWS", 8)
    N, D, V = 192, 4, 64
    sizes: list[int] = []

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                given = [
                    x.untyped_storage().data_ptr() for x in (*args, (kwargs or {}).get("out")) if torch.is_tensor(x)
                ]
                sizes.extend([result.numel()] * (result.untyped_storage().data_ptr() not in given))
            return result

    x, weight, targets, upstream = draw(N, D, V, dtype)
    with Made():
        cross_entropy._sweep(x, weight, targets, upstream, -100, 0.0, 0.0, True, True, backend)
    assert max(sizes) == max(N * D, 8 * V)
    assert sizes.count(V * D) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradient_is_summed_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers of one sign, of which a sum of 1024 chunks in half precision would stop growing.

    With unit roundoff u = eps / 2, every dz errs by u of itself and every chunk's product by u of itself: eps in all.
    """
    monkeypatch.setattr(cross_entropy, "CHUNK_MIN_ROWS", 4)
    x, weight, targets, _ = draw(4096, 8, 5, dtype)
    x, targets = x.abs(), torch.zeros_like(targets)
    weight = torch.nn.Parameter(weight)
    weight.grad_dtype = torch.float32
    linear_cross_entropy(x, weight, targets, reduction="sum").backward()
    z = (x @ weight.detach().T).double().requires_grad_()  # as rounded: the errors of logits are no sum's
    F.cross_entropy(z, targets, reduction="sum").backward()
    assert z.grad is not None
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    exact = z.grad[:, 0] @ x.double()
    assert ((weight.grad[0].double() - exact) / exact).abs().max() < torch.finfo(dtype).eps


def test_weight_gradient_takes_the_dtype_that_autograd_would_give_it() -> None:
    x, weight, targets, _ = draw(40, 8, 33, torch.bfloat16)
    made = []
    for grad_dtype in (torch.bfloat16, torch.float32):
        leaf = torch.nn.Parameter(weight)
        leaf.grad_dtype = grad_dtype
        linear_cross_entropy(x, leaf, targets).backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == grad_dtype
        made.append(leaf.grad)
    assert torch.equal(made[0], made[1].bfloat16())
    made[1].zero_()
    linear_cross_entropy(x, leaf * 1, targets).backward()
    assert torch.equal(made[1], made[0].float())


@pytest.mark.parametrize(("backend", "dtype"), EVERYWHERE)
def test_rows_beyond_2_to_the_31_numbers(backend: str, dtype: torch.dtype) -> None:
    """Three rows so far apart in a buffer, of which nothing else is touched, that int32 offsets overflow."""
    if dtype == torch.float32:
        pytest.skip("half the bytes do")
    V, apart = 200, 2**30 + 64
    z = torch.empty(2 * apart + V, dtype=dtype, device=DEVICE).as_strided((3, V), (apart, 1))
    near, targets, dloss = torch.randn(3, V).to(z), torch.tensor([7, -100, 9]).to(DEVICE), torch.ones(3, device=DEVICE)
    z.copy_(near)
    rows = getattr(cross_entropy, f"_{backend}_rows")
    expected, found = (rows(to, targets, dloss, -100, 0.1, 5.0, True) for to in (near, z))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(z, near, rtol=0, atol=0)


def test_chunks_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU tall enough for GEMMs, and within what the docstring says of memory."""
    monkeypatch.undo()
    with torch.device("meta"):
        x = torch.empty(8192, 4096, dtype=torch.bfloat16)
    rows, V = cross_entropy._chunk_rows(x, 151_936), 151_936
    assert rows >= 2048
    assert rows * V * 2 <= 1 << 30
    assert -(-8192 // rows) * rows - 8192 < rows / 2  # the last chunk isn't a sliver
    chunk = cross_entropy._logits_buffer(x, rows, V + 1)
    assert chunk.shape == (rows, V + 1)
    assert chunk.stride(0) % 64 == 0
    assert 4 * V * 4096 + 2 * 8192 * 4096 + 2 * chunk.untyped_storage().nbytes() // 2 < 4e9


def test_twice_backward_through_a_kept_graph() -> None:
    x, weight, targets, _ = draw(20, 4, 9)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(2 * loss, (x, weight)), strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction: str) -> None:
    x, weight, targets, _ = draw(20, 4, 9)
    loss = linear_cross_entropy(x.requires_grad_(), weight, targets, reduction=reduction).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@pytest.mark.parametrize(("backend", "dtype"), EVERYWHERE)
def test_extreme_logits_are_finite(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[300.0], [-300.0]]).to(DEVICE, dtype).requires_grad_()
    weight = torch.tensor([[3.0], [-3.0], [0.0]]).to(DEVICE, dtype)
    targets = torch.tensor([1, 1], device=DEVICE)
    loss = linear_cross_entropy(x, weight, targets, reduction="none", backend=backend)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([1800.0, 0.0], device=DEVICE), rtol=0.01, atol=0)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("backend", "dtype"), EVERYWHERE)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_logits_are_not_hidden(backend: str, dtype: torch.dtype, broken: float) -> None:
    x, weight, targets, _ = draw(9, 4, 200, dtype)
    x.fill_(1)
    weight[150] = broken
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, backend=backend)
    loss.backward()
    assert loss.isnan()
    assert x.grad is not None
    assert x.grad[targets >= 0].isnan().all()


@pytest.mark.parametrize(("backend", "dtype"), IN_FLOAT32)
@pytest.mark.parametrize("target", [9, -1])
def test_targets_outside_the_vocabulary(backend: str, dtype: torch.dtype, target: int) -> None:
    x, weight, targets, _ = draw(6, 4, 9, dtype)
    targets[2] = target
    if backend != "triton":
        if DEVICE == "cuda":
            pytest.skip("an assertion on the GPU ends the process")
        with pytest.raises(RuntimeError, match=r"^(?!.*/csrc/).*out of bounds"):
            linear_cross_entropy(x, weight, targets, backend=backend)
        return
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, reduction="none", backend=backend)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    assert x.grad is not None
    assert x.grad[2].isnan().all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast_the_product_is_in_its_dtype(backend: str) -> None:
    x, weight = random_tensors([(9, 8), (13, 8)], torch.float32)
    loss = partial(linear_cross_entropy, targets_N=torch.arange(9, device=DEVICE), backend=backend)
    upstream = [torch.ones((), device=DEVICE)]
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(loss, [x, weight], upstream)
        of_two_dtypes = run(loss, [x.bfloat16(), weight], upstream)
    assert [found.dtype for found in ours] == [torch.float32] * 3
    expected = run(loss, [x.bfloat16(), weight.bfloat16()], upstream)
    for found in (ours, of_two_dtypes):
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


def test_bad_arguments_are_refused() -> None:
    x, weight, targets, _ = draw(6, 4, 9)
    for wrong in ((x[:, :3], weight, targets), (x, weight, targets[:5]), (x[0], weight, targets[:1])):
        with pytest.raises(ValueError, match=r"they must be \[N, D\], \[V, D\] and \[N\]"):
            linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="agree"):
        linear_cross_entropy(x, weight.float(), targets)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(x, weight, targets, reduction="average")
    for softcap in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="softcap"):
            linear_cross_entropy(x, weight, targets, softcap=softcap)
    for dtype in (torch.float32, torch.bool, torch.complex64):  # probabilities would be rounded to words
        with pytest.raises(ValueError, match=rf"\(targets\): {dtype} is invalid: integers"):
            linear_cross_entropy(x, weight, targets.to(dtype))


@pytest.mark.parametrize(("backend", "dtype"), [case for case in EVERYWHERE if case[0] == "triton"])
@pytest.mark.parametrize(
    ("V", "softcap", "z_loss"),
    [(2, 0.0, 0.0), (127, 0.0, 0.1), (128, 2.0, 0.1), (129, 2.0, 0.1), (256, 0.0, 0.1), (301, 2.0, 0.1)],
)
def test_rows_held_and_rows_read_twice_are_alike(
    backend: str, dtype: torch.dtype, V: int, softcap: float, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block, in a last block of one logit, in whole ones. What lies behind a row stays as it is."""
    ends, ignored, unknown = [0, V // 2, V - 1], [-100], [V, -1]
    targets = torch.tensor(ends + ignored + unknown, device=DEVICE)
    (logits,) = random_tensors([(len(targets), V)], dtype)
    dloss = torch.linspace(0.5, 2, len(targets), device=DEVICE)
    twice, half = (Config((("BLOCK", 128), ("BLOCKS", blocks)), 1) for blocks in (0, V // 128 // 2))
    results: list[Tensor] = []
    for launch in (None, twice, half):
        with monkeypatch.context() as patch:
            if launch:
                patch.setitem(_chosen, ("rows", V, dtype.itemsize, softcap > 0), launch)
            behind = torch.full((len(targets), V + 64), 7.0, dtype=dtype, device=DEVICE)
            z = behind[:, :V].copy_(logits)
            for wants_grad in (False, True):
                loss = cross_entropy._triton_rows(z, targets, dloss, -100, z_loss, softcap, wants_grad)
                results.append(loss)
                if not wants_grad:
                    assert torch.equal(z, logits)
            assert (behind[:, V:] == 7).all()
            results.append(z)
    for found, expected in zip(results[3:], 2 * results[:3], strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, **({"rtol": 0, "atol": 0} if INTERPRETED else {}))
    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())

    loss, dz = results[1:3]
    assert loss[4:].isnan().all()
    assert dz[4:].isnan().all()
    assert not dz[3].any()
    exact = logits[:4].double()
    exact_loss = cross_entropy._reference_rows(exact, targets[:4], dloss[:4].double(), -100, z_loss, softcap, True)
    torch.testing.assert_close(loss[:4], exact_loss.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dz[:4], exact.to(dtype), rtol=4 * ROUNDING[dtype], atol=1e-6)


def test_rows_of_128_kb_are_held() -> None:
    def blocks(V: int, itemsize: int, capped: bool = False) -> int:
        return cross_entropy._rows_config(V, itemsize, capped)["BLOCKS"]

    assert [blocks(V, 2) for V in (50_304, 65_536, 65_537)] == [25, 32, 0]
    assert [blocks(V, 4) for V in (32_768, 50_304)] == [32, 0]
    assert [blocks(V, 2, capped=True) for V in (50_304, 51_201)] == [25, 0]


def test_the_tuner_also_tries_to_read_held_rows_or_half_of_them_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    def tried(V: int, dtype: torch.dtype = torch.bfloat16) -> list[int]:
        x, weight = (torch.empty(n, 8, dtype=dtype, device="meta") for n in (2048, V))
        found = [candidate.launches[0] for candidate in cross_entropy._launches(x, weight)]
        rows = [(shape, config) for kernel, shape, config in found if kernel == "rows"]
        assert all(shape == (V, dtype.itemsize, False) for shape, _ in rows)
        return [config["BLOCKS"] for _, config in rows]

    assert tried(50_304) == [0, 12]
    assert tried(32_000) == [0]
    assert tried(32_768, torch.float32) == [0]
    assert tried(151_936) == []


def test_every_launch_is_compiled_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with compiled_launches(cross_entropy):
        cases = [(V, BF16) for V in (256, 4096, 8192, 32_000, 50_257, 50_304, 65_536, 100_277, 151_936)]
        cases += [(V, FP32) for V in (8192, 32_000, 50_257, 151_936)]
        cases += [(V, FP16) for V in (8192, 32_000, 151_936)]
        for V, dtype in cases:
            z_CV = cross_entropy._logits_buffer(torch.empty(1, 16, dtype=dtype), 1, V)
            for softcap in (0.0, 30.0):
                for wants_grad in (False, True):
                    cross_entropy._triton_rows(
                        z_CV, torch.zeros(1, dtype=torch.long), torch.ones(1), -100, 0.0, softcap, wants_grad
                    )


@pytest.mark.parametrize(("backend", "dtype"), [case for case in EVERYWHERE if case[1] != torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@by_more_than_chance
def test_a_scale_known_ahead_is_as_exact_as_one_that_comes_later(
    backend: str, dtype: torch.dtype, reduction: str
) -> None:
    x, weight, targets, _ = draw(70, 64, 301, dtype)
    assert_as_exact_as_torch(
        lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction, scale=0.3, **OPTIONS[3], backend=backend),
        lambda x, w: 0.3 * plain(x, w, targets, reduction=reduction, **OPTIONS[3]),
        (x, 3 * weight),
        (torch.ones((), device=DEVICE),),
        ROUNDINGS,
    )


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 8), (torch.bfloat16, 4)])
def test_in_place_micro_batches_add_up(dtype: torch.dtype, roundings: int) -> None:
    """Each of 120 terms rounds the float32 total that it is added to: by some 3 units in the last place together."""
    weight = torch.nn.Parameter(draw(1, 8, 33, dtype)[1])
    accumulate_in_place([weight])
    expected = torch.zeros(33, 8, dtype=torch.float64, device=DEVICE)
    for _ in range(3):
        x, _, targets, _ = draw(40, 8, 33, dtype)
        held = weight.grad
        linear_cross_entropy(x.requires_grad_(), weight, targets, scale=1 / 3).backward()
        assert weight.grad is not None
        assert held is None or weight.grad is held
        assert weight.grad.dtype == torch.float32
        third = torch.tensor(1 / 3, dtype=torch.float64, device=DEVICE)
        expected += run(lambda x, w, t=targets: plain(x, w, t), (x.double(), weight.double()), (third,))[2]
    allowed = roundings * ROUNDING[dtype] * float(expected.abs().max())
    torch.testing.assert_close(weight.grad.double(), expected, rtol=0, atol=allowed)
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets, scale=1.0)
    assert weight.grad is held


def test_a_second_backward_pass_is_right_or_refused() -> None:
    """What the forward pass added in place can't be added again."""
    x, weight, targets, _ = draw(4, 8, 33, torch.float32)
    x, weight = x.requires_grad_(), torch.nn.Parameter(weight)
    loss = linear_cross_entropy(x, weight, targets, scale=1.0)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close((x.grad, weight.grad), (3 * once[0], 3 * once[1]))
    accumulate_in_place([weight])
    for given in (x, x.detach()):
        loss = linear_cross_entropy(given, weight, targets, scale=1.0)
        loss.backward(retain_graph=True)
        with pytest.raises(
            RuntimeError, match=r"a second backward pass of a loss with `scale`, .*compute the loss again"
        ):
            loss.backward()


def test_a_scale_that_cannot_be_is_refused() -> None:
    x, weight, targets, _ = draw(4, 8, 33, torch.float32)
    with pytest.raises(ValueError, match=r"scale\): 0.5 is invalid: None for reduction"):
        linear_cross_entropy(x, weight, targets, scale=0.5, reduction="none")
    with pytest.raises(ValueError, match=r"scale\)"):
        linear_cross_entropy(x.half(), weight.half(), targets, scale=0.5)
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match=r"the upstream gradient is 0.5; .* must be 1"):
            (linear_cross_entropy(x.requires_grad_(), weight, targets, scale=1.0) / 2).backward()

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.kernels import cross_entropy, linear_cross_entropy
from tests.kernels.compare import assert_as_exact_as_torch, run, strided, transposed

OPTIONS = [{}, {"z_loss": 1e-2}, {"softcap": 2.0}, {"softcap": 5.0, "z_loss": 0.1}]
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one short, on small inputs."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr(cross_entropy, "CHUNK_MIN_ROWS", 16)


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


def draw(N: int, D: int, V: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets, every seventh of them ignored."""
    targets = torch.randint(0, V, (N,))
    targets[3::7] = -100
    return torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), targets


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_exact_in_float64(options: dict, reduction: str) -> None:
    torch.manual_seed(0)
    x, weight, targets = draw(70, 8, 33)
    upstream = torch.randn(70 if reduction == "none" else (), dtype=torch.float64)
    results = [
        run(lambda x, w, f=f: f(x, w, targets, reduction=reduction, **options), (x, weight), (upstream,))
        for f in (linear_cross_entropy, plain)
    ]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]])
def test_as_exact_as_torch(dtype: torch.dtype, reduction: str, options: dict) -> None:
    torch.manual_seed(1)
    x, weight, targets = draw(257, 64, 301, dtype)
    weight = weight / 8
    upstream = torch.rand(257 if reduction == "none" else ())
    assert_as_exact_as_torch(
        lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction, **options),
        lambda x, w: plain(x, w, targets, reduction=reduction, **options),
        (x, weight),
        (upstream,),
    )


def test_gradcheck() -> None:
    torch.manual_seed(2)
    x, weight, targets = draw(20, 4, 7)
    x.requires_grad_()
    weight.requires_grad_()
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda x, w, r=reduction: linear_cross_entropy(x, w, targets, reduction=r, z_loss=0.01, softcap=3.0),
            (x, weight),
        )


def test_none_takes_every_upstream_gradient_by_itself() -> None:
    """A known bug elsewhere: all rows scaled by the first row's gradient."""
    torch.manual_seed(3)
    x, weight, targets = draw(40, 4, 9)
    upstream = torch.zeros(40, dtype=torch.float64)
    upstream[5] = 2.0
    _, dx, _ = run(lambda x, w: linear_cross_entropy(x, w, targets, reduction="none"), (x, weight), (upstream,))
    assert dx[5].any()
    dx[5] = 0
    assert not dx.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored_is_zero(reduction: str) -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.full((5,), -100), reduction=reduction, z_loss=0.1)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert weight.grad is not None
    assert not x.grad.any()
    assert not weight.grad.any()


def test_another_ignore_index() -> None:
    torch.manual_seed(4)
    x, weight, targets = draw(30, 4, 9)
    targets[targets < 0] = 3
    torch.testing.assert_close(
        linear_cross_entropy(x, weight, targets, ignore_index=3), plain(x, weight, targets, ignore_index=3)
    )


def test_empty_batch() -> None:
    x, weight = torch.empty(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(x, weight, torch.empty(0, dtype=torch.long), reduction=reduction)
        loss.sum().backward()
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert loss.sum() == 0


@pytest.mark.parametrize("layout", [strided, transposed])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_inputs_and_upstream_gradients(layout, reduction: str) -> None:
    torch.manual_seed(5)
    x, weight, targets = draw(40, 8, 33, torch.float32)
    upstream = torch.randn(40 if reduction == "none" else ())
    function = lambda x, w: linear_cross_entropy(x, w, strided_targets, reduction=reduction)  # noqa: E731
    strided_targets = torch.stack([targets, targets], 1)[:, 0]
    expected = run(lambda x, w: plain(x, w, targets, reduction=reduction), (x, weight), (upstream,))
    found = run(function, (layout(x), layout(weight)), (strided(upstream) if upstream.dim() else upstream,))
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)


def test_only_one_gradient_wanted_and_none() -> None:
    torch.manual_seed(6)
    x, weight, targets = draw(40, 8, 33)
    (_, dx, dw) = run(lambda x, w: plain(x, w, targets), (x, weight), (torch.ones((), dtype=torch.float64),))
    (found,) = torch.autograd.grad(linear_cross_entropy(x.requires_grad_(), weight, targets), x)
    torch.testing.assert_close(found, dx)
    (found,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight.requires_grad_(), targets), weight)
    torch.testing.assert_close(found, dw)
    with torch.no_grad():
        loss = linear_cross_entropy(x.requires_grad_(), weight, targets)
    assert not loss.requires_grad


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    x, weight, targets = draw(40, 8, 33)
    x.requires_grad_()
    scattered = []
    scatter_add_ = Tensor.scatter_add_
    monkeypatch.setattr(Tensor, "scatter_add_", lambda *args: scattered.append(1) or scatter_add_(*args))
    with torch.no_grad():
        linear_cross_entropy(x, weight, targets)
    loss = linear_cross_entropy(x, weight, targets, reduction="none")
    assert not scattered
    loss.sum().backward()
    assert scattered


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made, forward and backward, is a chunk of logits or a gradient, not [N, V]."""
    monkeypatch.setattr(cross_entropy, "CHUNK_MIN_ROWS", 8)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    N, D, V = 256, 4, 64
    x, weight, targets = draw(N, D, V, torch.bfloat16)
    x.requires_grad_()
    weight.requires_grad_()
    for reduction in REDUCTIONS:
        with Largest() as largest:
            linear_cross_entropy(x, weight, targets, reduction=reduction).sum().backward()
        assert largest.numel == max(N * D, 8 * V)


def test_weight_gradient_is_summed_in_float32() -> None:
    """Over many chunks a bf16 sum would drift; the sum of bf16 chunk products does not."""
    torch.manual_seed(8)
    x, weight, targets = draw(4096, 8, 5, torch.bfloat16)
    weight = torch.nn.Parameter(weight)
    weight.grad_dtype = torch.float32
    linear_cross_entropy(x, weight, targets, reduction="sum").backward()
    exact = weight.detach().double().requires_grad_()
    plain(x.double(), exact, targets, reduction="sum").backward()
    assert weight.grad is not None
    assert exact.grad is not None
    error = (weight.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 2e-3


def test_twice_backward_through_a_kept_graph() -> None:
    x, weight, targets = draw(20, 4, 9)
    loss = linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(2 * loss, (x, weight)), strict=True):
        torch.testing.assert_close(2 * a, b)


def test_extreme_logits_are_finite() -> None:
    x = torch.tensor([[300.0], [-300.0]]).bfloat16().requires_grad_()
    weight = torch.tensor([[3.0], [-3.0], [0.0]]).bfloat16()
    loss = linear_cross_entropy(x, weight, torch.tensor([1, 1]), reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([1800.0, 0.0]), rtol=0.01, atol=0)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_bad_arguments_are_refused() -> None:
    x, weight, targets = draw(6, 4, 9)
    for wrong in ((x[:, :3], weight, targets), (x, weight, targets[:5]), (x[0], weight, targets[:1])):
        with pytest.raises(ValueError, match="x, weight and targets"):
            linear_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="agree"):
        linear_cross_entropy(x, weight.float(), targets)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(x, weight, targets, reduction="average")
    with pytest.raises(ValueError, match="softcap"):
        linear_cross_entropy(x, weight, targets, softcap=0.0)
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, torch.full((6,), 9))

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from spt_fast import kernels
from spt_fast.kernels import chosen_backends, linear, linear_cross_entropy, rms_norm
from spt_fast.kernels.backend import OPS, Op, obstacle
from spt_fast.model.gpt import GPT, GPTConfig

X, W = torch.randn(4, 8), torch.randn(8)


def test_every_op_is_listed_with_its_backend_and_the_reason() -> None:
    chosen = chosen_backends()
    assert set(chosen) == set(OPS)
    for op, backend in kernels.auto_backends().items():
        assert chosen[op].startswith(f"{backend}: ")
        assert len(chosen[op]) > len(backend) + 5


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "problem"),
    [
        ("cpu", "cuda", torch.bfloat16, "the tensors are on cuda"),
        ("cpu", "cpu", torch.float16, "support float32 and bfloat16, not torch.float16"),
        ("triton", "cuda", torch.float64, "not torch.float64"),
        ("reference", "cuda", torch.float64, None),
        ("cpu", "cpu", torch.bfloat16, None),
        ("triton", "cuda", torch.bfloat16, None),
    ],
)
def test_where_a_backend_can_run(backend: str, device: str, dtype: torch.dtype, problem: str | None) -> None:
    found = obstacle(backend, device, dtype)
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_prefer_moves_a_backend_to_the_front_where_it_can_run() -> None:
    with kernels.prefer("reference"), ThreadPoolExecutor() as others:
        assert set(kernels.auto_backends().values()) == {"reference"}
        assert others.submit(kernels.auto_backends).result() == kernels.auto_backends()
    before = kernels.auto_backends()
    with kernels.prefer("auto"):
        assert kernels.auto_backends() == before
    misspelt = r"^prefer\(backend\): 'tirton' is invalid: unknown; there are .*\bsdpa\b"
    with pytest.raises(ValueError, match=misspelt), kernels.prefer("tirton"):
        pass  # would compare auto with auto
    assert kernels.auto_backends() == before


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_of_no_floating_dtype_are_refused(dtype: torch.dtype) -> None:
    """PyTorch's ops would compute something in it, or round the result to it."""
    x, w, one = X.to(dtype), W.to(dtype), torch.ones(8)
    for call in (
        lambda: rms_norm(x, w),
        lambda: linear_cross_entropy(x, x, torch.arange(4)),
        lambda: kernels.swiglu(x, x),
        lambda: kernels.embedding(torch.arange(4), x),
        lambda: kernels.rope(*[x.view(1, 2, 2, 8)] * 2, torch.ones(2, 8), torch.ones(2, 8)),
        lambda: kernels.flash_attention(*[x.view(1, 2, 2, 8)] * 3),
        lambda: kernels.adamw_step(w, one, one.clone(), one.clone(), step=1, lr=1.0),
    ):
        with pytest.raises(ValueError, match=rf"\(dtype\): {dtype} is invalid: a floating dtype, as of x.float\(\)"):
            call()


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_fast.kernels.backend.INTERPRETED", False)
    with pytest.raises(ValueError, match="'triton' is invalid: Triton kernels need a GPU"):
        rms_norm(X, W, backend="triton")
    assert kernels.auto_backends()["rms_norm"] in ("cpu", "triton" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr("spt_fast.kernels.backend.TRITON_VERSION", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        rms_norm(X, W, backend="triton")


def test_without_the_extension_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_fast.kernels.backend.CPU_LIBRARY", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set(kernels.auto_backends().values()) == {"reference"}
    with pytest.raises(ValueError, match="extension is not built"):
        rms_norm(X, W, backend="cpu")


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: Any = None) -> Any:
        self.names = {*getattr(self, "names", ()), str(function)}
        return function(*arguments, **(options or {}))


def test_an_op_is_a_plain_function_unless_something_looks_at_ops() -> None:
    """Then it is the registered op, of which results and gradients are the same bits."""

    def run() -> list[torch.Tensor]:
        leaves = [X.clone().requires_grad_(), W.clone().requires_grad_()]
        y = rms_norm(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    with torch.autograd.profiler.profile() as plain:
        found = run()
    assert not [event.name for event in plain.function_events if event.name.startswith("spt_fast::rms_norm")]
    with torch.autograd.profiler.profile() as looked_at, Seen() as seen:
        expected = run()
    names = {event.name for event in looked_at.function_events}
    assert names >= {"spt_fast::rms_norm", "spt_fast::rms_norm_backward"}
    assert seen.names >= {"spt_fast.rms_norm.default", "spt_fast.rms_norm_backward.default"}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    class Named(torch.Tensor):
        pass

    for x in (X.to("meta"), X.as_subclass(Named)):
        with torch.autograd.profiler.profile() as other:
            assert rms_norm(x, W.to(x.device)).shape == X.shape
        assert "spt_fast::rms_norm" in {event.name for event in other.function_events}


def test_a_gradient_of_a_gradient_is_refused_and_an_update_in_place_is_known_to_autograd() -> None:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        dx.sum().backward()
    param = torch.ones(3)
    y = (torch.ones(3, requires_grad=True) * param).sum()  # keeps param
    kernels.adamw_step(param, torch.ones(3), torch.zeros(3), torch.zeros(3), step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_transforms_that_cannot_differentiate_an_op_are_refused_in_words() -> None:
    """PyTorch's own answer in forward mode is a derivative of zero."""
    normed, shift = partial(rms_norm, weight=W), torch.ones_like(X)
    of_sum = lambda x: normed(x).square().sum()  # noqa: E731
    words = r"^rms_norm: forward mode and torch.func's grad, .* use backward\(\) or torch.autograd.grad$"
    refused: tuple[Callable[[], object], ...] = (
        lambda: torch.func.jvp(normed, (X,), (shift,)),
        lambda: torch.func.jvp(torch.func.vmap(normed), (X,), (shift,)),
        lambda: torch.func.jacfwd(of_sum)(X),
        lambda: torch.func.hessian(of_sum)(X),
        lambda: torch.func.grad(of_sum)(X),
        lambda: torch.func.vmap(torch.func.grad(of_sum))(X),
    )
    for attempt in refused:
        with pytest.raises(NotImplementedError, match=words):
            attempt()
    with torch.no_grad(), forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=words):
            normed(forward_ad.make_dual(X, shift))
        assert torch.equal(normed(X), rms_norm(X, W))
    beside = torch.func.jvp(lambda x: x * normed(X), (X,), (shift,))[1]  # what isn't differentiated may be anything
    assert torch.equal(beside, normed(X))


def test_an_op_that_has_not_run_yet_compiles_whole_and_so_does_a_scaled_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_fast.kernels.backend.OPS", {})
    op = Op("untried", {"cpu": {"reference": "for this test"}}, list)
    x, weight = torch.randn(6, 8), torch.randn(5, 8)

    def loss(x: torch.Tensor) -> torch.Tensor:
        assert op.pick("auto", x) == "reference"
        return linear_cross_entropy(x, weight, torch.arange(6) % 5, scale=0.5)

    inputs = [x.clone().requires_grad_() for _ in range(2)]
    losses = loss(inputs[0]), torch.compile(loss, fullgraph=True, backend="eager")(inputs[1])
    torch.testing.assert_close(*losses)
    for each in losses:
        each.backward()
    torch.testing.assert_close(*(each.grad for each in inputs))


def test_a_model_can_be_mapped_over_and_traced_without_memory() -> None:
    config = GPTConfig(layers=1, width=32, heads=2, kv_heads=1, ffn=48, context=16, vocab_size=64, qk_norm=True)
    for shape in (config, replace(config, qk_norm=False), replace(config, qk_norm=False, no_rope_layers=(0,))):
        model, tokens = GPT(shape), torch.arange(96).view(2, 3, 16) % 64
        torch.testing.assert_close(torch.func.vmap(model)(tokens), torch.stack([model(rows) for rows in tokens]))
        torch.func.vmap(partial(model, scale=0.5))(tokens, tokens)
    with FakeTensorMode() as mode:
        x, weight = torch.empty(64, 32, requires_grad=True), torch.empty(48, 32, requires_grad=True)
        linear_cross_entropy(linear(x, weight), torch.empty(5, 48), torch.empty(64, dtype=int), scale=0.5).backward()
        with torch.no_grad():
            assert linear(x, weight).fake_mode is mode

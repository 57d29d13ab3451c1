from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spt_fast import kernels
from spt_fast.kernels import chosen_backends
from spt_fast.kernels.backend import obstacle

X, W = torch.randn(4, 8), torch.randn(8)
Q = torch.randn(2, 3, 2, 4)
CALLS: dict[str, Callable[[str], object]] = {
    "rms_norm": lambda b: kernels.rms_norm(X, W, backend=b),
    "add_rms_norm": lambda b: kernels.add_rms_norm(X, X, W, backend=b),
    "rope": lambda b: kernels.rope(Q, Q, Q[0, :, 0], Q[0, :, 0], backend=b),
    "qk_norm_rope": lambda b: kernels.qk_norm_rope(Q, Q, W[:4], W[:4], Q[0, :, 0], Q[0, :, 0], backend=b),
    "swiglu": lambda b: kernels.swiglu(X, X, backend=b),
    "swiglu_packed": lambda b: kernels.swiglu_packed(X, backend=b),
    "flash_attention": lambda b: kernels.flash_attention(Q, Q, Q, backend=b),
    "linear_cross_entropy": lambda b: kernels.linear_cross_entropy(X, X, torch.tensor([0, 1, 2, 3]), backend=b),
    "adamw_step": lambda b: kernels.adamw_step(*(torch.ones(3) for _ in range(4)), step=1, lr=0.1, backend=b),
    "fp8_linear": lambda b: kernels.fp8_linear(torch.ones(4, 16), torch.ones(16, 16), backend=b),
    "embedding": lambda b: kernels.embedding(torch.tensor([0]), X, backend=b),
}


def test_every_op_is_listed_with_its_backend_and_the_reason() -> None:
    chosen = chosen_backends()
    assert set(chosen) == set(CALLS)
    for op, backend in kernels.auto_backends().items():
        assert chosen[op].startswith(f"{backend}: ")
        assert len(chosen[op]) > len(backend) + 5


@pytest.mark.parametrize("op", CALLS)
def test_backends(op: str) -> None:
    CALLS[op]("auto")
    CALLS[op]("reference")
    with pytest.raises(ValueError, match=rf"^{op}: backend 'tirton' cannot be used: unknown; the op has auto, "):
        CALLS[op]("tirton")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "problem"),
    [
        ("cpu", "cuda", torch.bfloat16, "the tensors are on cuda"),
        ("cpu", "cpu", torch.float16, "take float32 and bfloat16, not torch.float16"),
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
    with kernels.prefer("reference"):
        assert set(kernels.auto_backends().values()) == {"reference"}
    before = kernels.auto_backends()
    with kernels.prefer("abacus"):
        assert kernels.auto_backends() == before
    assert kernels.auto_backends() == before


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_fast.kernels.backend.INTERPRETED", False)
    with pytest.raises(ValueError, match="'triton' cannot be used: Triton kernels need a GPU"):
        CALLS["rms_norm"]("triton")
    assert kernels.auto_backends()["rms_norm"] in ("cpu", "triton" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr("spt_fast.kernels.backend.TRITON_VERSION", None)
    with pytest.raises(ValueError, match="triton is not installed"):
        CALLS["rms_norm"]("triton")


def test_without_the_extension_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spt_fast.kernels.backend.CPU_LIBRARY", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set(kernels.auto_backends().values()) == {"reference"}
    with pytest.raises(ValueError, match="extension is not built"):
        CALLS["rms_norm"]("cpu")

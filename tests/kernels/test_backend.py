from __future__ import annotations

import pytest
import torch

from spt_fast import kernels
from spt_fast.kernels import chosen_backends, rms_norm
from spt_fast.kernels.backend import OPS, obstacle

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

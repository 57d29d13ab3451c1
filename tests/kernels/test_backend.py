from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spt_fast import kernels
from spt_fast.kernels import chosen_backends

X, W = torch.randn(4, 8), torch.randn(8)
Q = torch.randn(2, 3, 2, 4)
CALLS: dict[str, Callable[[str], object]] = {
    "rms_norm": lambda b: kernels.rms_norm(X, W, backend=b),
    "add_rms_norm": lambda b: kernels.add_rms_norm(X, X, W, backend=b),
    "rope": lambda b: kernels.rope(Q, Q, Q[0, :, 0], Q[0, :, 0], backend=b),
    "qk_norm_rope": lambda b: kernels.qk_norm_rope(Q, Q, W[:4], W[:4], Q[0, :, 0], Q[0, :, 0], backend=b),
    "swiglu": lambda b: kernels.swiglu(X, X, backend=b),
    "flash_attention": lambda b: kernels.flash_attention(Q, Q, Q, backend=b),
    "linear_cross_entropy": lambda b: kernels.linear_cross_entropy(X, X, torch.tensor([0, 1, 2, 3]), backend=b),
    "adamw_step": lambda b: kernels.adamw_step(*(torch.ones(3) for _ in range(4)), step=1, lr=0.1, backend=b),
    "embedding": lambda b: kernels.embedding(torch.tensor([0]), X, backend=b),
}


def test_every_op_is_listed_with_its_backend() -> None:
    assert (
        set(chosen_backends())
        == set(CALLS)
        == set(kernels.__all__) - {"auto_backends", "chosen_backends", "keep_freed_memory"}
    )
    assert all(reason.startswith("reference: ") for reason in chosen_backends().values())


@pytest.mark.parametrize("op", CALLS)
def test_backends(op: str) -> None:
    CALLS[op]("auto")
    CALLS[op]("reference")
    with pytest.raises(ValueError, match=r"'triton' is not available here; available: auto, reference"):
        CALLS[op]("triton")
    with pytest.raises(ValueError, match=r"'tirton' is unknown; available: auto, reference"):
        CALLS[op]("tirton")


def test_attention_knows_its_own_backends() -> None:
    for backend in ("sdpa", "flash_attn"):
        with pytest.raises(ValueError, match="not available here"):
            CALLS["flash_attention"](backend)
        with pytest.raises(ValueError, match="unknown"):
            CALLS["rms_norm"](backend)

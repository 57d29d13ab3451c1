"""The flash-attn package in its versions, of which a machine may have several.

flash_attn_3   `flash_attn_interface`, for Hopper
flash_attn_4   `flash_attn.cute`, for Hopper and Blackwell
flash_attn_2   `flash_attn`, for Ampere and later
flash_attn     the first of these that there is

Whether there is one is found by importing it, once, when it is first asked for: a wheel that was built for another
PyTorch or another GPU is found on disk, and doesn't load. None of it has run here yet: there was no GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

VERSIONS = {
    "flash_attn_3": ("flash_attn_interface", (9,)),
    "flash_attn_4": ("flash_attn.cute", (9, 10, 11)),
    "flash_attn_2": ("flash_attn", (8, 9, 10, 11, 12)),
}
"""Where each is found, and the major numbers of the compute capabilities that it has kernels for."""

BACKENDS = ("flash_attn", *VERSIONS)


def obstacle(backend: str) -> str | None:
    """Why a version can't be used on the current GPU; None where it can."""
    if backend == "flash_attn":
        obstacles = {version: obstacle(version) for version in VERSIONS}
        return None if None in obstacles.values() else "; ".join(f"{name}: {why}" for name, why in obstacles.items())
    module, capabilities = VERSIONS[backend]
    major = torch.cuda.get_device_capability()[0]
    if major not in capabilities:
        return f"it has no kernels for GPUs of compute capability {major}.x"
    found = _functions(module)
    return f"it cannot be imported ({found})" if isinstance(found, str) else None


if torch.version.cuda:  # it imports all of torch.compile, a second that a machine without a GPU is spared
    obstacle = torch.compiler.assume_constant_result(obstacle)


@cache
def _functions(module: str) -> tuple[Callable, Callable] | str:
    """For rows of one length and for documents; else why there are none."""
    try:
        found = importlib.import_module(module)
        return found.flash_attn_func, found.flash_attn_varlen_func
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return str(error)


def attention(
    backend: str,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    cuts: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention inside rows, or between the cuts of B·T positions, no two further apart than T; `obstacle` must have
    found nothing."""
    if backend == "flash_attn":
        backend = next(version for version in VERSIONS if obstacle(version) is None)
    found = _functions(VERSIONS[backend][0])
    assert not isinstance(found, str)
    rows, documents = found
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    if cuts is None:
        o = rows(q_BTHD, k_BTHD, v_BTHD, **options)
        return o[0] if isinstance(o, tuple) else o
    T = q_BTHD.shape[1]
    options |= {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts, "max_seqlen_q": T, "max_seqlen_k": T}
    o = documents(q_BTHD.flatten(0, 1), k_BTHD.flatten(0, 1), v_BTHD.flatten(0, 1), **options)
    return (o[0] if isinstance(o, tuple) else o).view(q_BTHD.shape)

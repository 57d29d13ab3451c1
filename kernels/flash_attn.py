"""The flash-attn package in its versions, of which a machine may have several, and the one inside PyTorch.

flash_attn_3      `flash_attn_interface`, for Hopper
flash_attn_4      `flash_attn.cute`, for Hopper and Blackwell
flash_attn_2      `flash_attn`, for Ampere and later
flash_attn_torch  version 2 in PyTorch's `torch.nn.attention.varlen`, for Ampere and later
flash_attn        the first available one of these

Availability is tested by importing it, once, when it is first needed: a wheel built for another PyTorch or another GPU
exists on disk but doesn't load. None of these has run here yet.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

VERSIONS = {
    "flash_attn_3": ("flash_attn_interface", (9,)),
    "flash_attn_4": ("flash_attn.cute", (9, 10, 11)),
    "flash_attn_2": ("flash_attn", (8, 9, 10, 11, 12)),
    "flash_attn_torch": ("torch.nn.attention.varlen", (8, 9, 10, 11, 12)),
}
"""The module of each, and the major compute capabilities for which it has kernels."""

BACKENDS = ("flash_attn", *VERSIONS)


def obstacle(backend: str) -> str | None:
    """Why a version can't be used on the current GPU; None if it can."""
    if backend == "flash_attn":
        obstacles = {version: obstacle(version) for version in VERSIONS}
        return None if None in obstacles.values() else "; ".join(f"{name}: {why}" for name, why in obstacles.items())
    module, capabilities = VERSIONS[backend]
    major = torch.cuda.get_device_capability()[0]
    if major not in capabilities:
        return f"it has no kernels for GPUs of compute capability {major}.x"
    found = _functions(module)
    return f"it cannot be imported ({found})" if isinstance(found, str) else None


if torch.version.cuda:  # imports all of torch.compile, which takes a second
    obstacle = torch.compiler.assume_constant_result(obstacle)


@cache
def _functions(module: str) -> tuple[Callable, Callable] | str:
    """Functions for rows of one length and for documents; else the reason why there are none."""
    try:
        found = importlib.import_module(module)
        if module.startswith("torch."):
            return _of_pytorch(found.varlen_attn)
        return found.flash_attn_func, found.flash_attn_varlen_func
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return str(error)


def _of_pytorch(varlen_attn: Callable[..., Tensor]) -> tuple[Callable, Callable]:
    """PyTorch's function in the form of flash-attn's two; ImportError if it is of an earlier PyTorch."""
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        raise ImportError("varlen_attn of this PyTorch takes neither scale nor window_size")

    def documents(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,  # not passed on: PyTorch's backward pass asks the global setting
    ) -> Tensor:
        grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] and "enable_gqa" in parameters else {}
        visible = (window_size[0], 0) if causal else window_size
        ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return varlen_attn(q, k, v, *ends, *longest, scale=softmax_scale, window_size=visible, **grouped)

    def rows(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        B, T = q.shape[:2]
        ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": T, "max_seqlen_k": T}
        return documents(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **options).view(q.shape)

    return rows, documents


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
    returned None."""
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

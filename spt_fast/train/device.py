"""Where and in which dtype a process computes."""

from __future__ import annotations

import os

import torch


def pick_device() -> torch.device:
    """The current GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype: what the recipe says, or with "auto" bf16 where matmuls in it are fast."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def use_deterministic_algorithms() -> None:
    """Give the same bits every time, even where that is slower. To be called before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

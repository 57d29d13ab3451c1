"""The flash-attn package, where one can be imported: version 3 or 4 on Hopper, 4 on Blackwell, else 2.

Whether there is one is found by importing it, once, when it is first asked for: a wheel that was built for another
PyTorch or another GPU is found on disk, and doesn't load. None of it has run here yet: there was no GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MODULES = {9: ("flash_attn_interface", "flash_attn.cute", "flash_attn"), 10: ("flash_attn.cute", "flash_attn")}
"""Where versions 3, 4 and 2 are found, by the major number of the GPU's compute capability, the fastest first."""

_found: dict[int, tuple[Callable, Callable] | str] = {}


def obstacle() -> str | None:
    """Why flash-attn can't be used on the current GPU; None where it can."""
    major = torch.cuda.get_device_capability()[0]
    if major not in _found:
        _found[major] = _import(MODULES.get(major, ("flash_attn",)))
    found = _found[major]
    return f"flash-attn cannot be imported ({found})" if isinstance(found, str) else None


if torch.version.cuda:  # it imports all of torch.compile, a second that a machine without a GPU is spared
    obstacle = torch.compiler.assume_constant_result(obstacle)


def _import(modules: tuple[str, ...]) -> tuple[Callable, Callable] | str:
    """The functions for rows of one length and for documents, of the first module that has them; else why none has."""
    problems = []
    for name in modules:
        try:
            module = importlib.import_module(name)
            return module.flash_attn_func, module.flash_attn_varlen_func
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            problems.append(f"{name}: {error}")
    return "; ".join(problems)


def attention(
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
    found = _found[torch.cuda.get_device_capability()[0]]
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

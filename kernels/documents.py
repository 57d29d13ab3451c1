"""The positions of a batch's documents, in the forms that attention and rotary positions read, made once for all
layers.

Legend: B rows, T positions; cu_seqlens as in attention.py.

From cu_seqlens [n+1] to a number for every position takes a dozen small kernels. A model has the same cu_seqlens in
each layer, forward and backward, so the results are cached with the tensor until it is written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Made:
    """What was made of a tensor in one state, by function and arguments."""

    state: tuple
    results: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[set], tuple[()]]:
        """Nothing in a copied or pickled tensor, whose versions are its own: a set is among what torch.load reads."""
        return set, ()


def once(cu_seqlens: Tensor, make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """make(cu_seqlens, *arguments), or its cached result."""
    if torch.compiler.is_compiling() or cu_seqlens.is_inference():
        return make(cu_seqlens, *arguments)
    values = cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else None  # memory of an array has no version
    capturing = cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()  # a graph has to make its own
    state, made = (cu_seqlens._version, values, capturing), getattr(cu_seqlens, "made_once", None)
    if not isinstance(made, Made) or made.state != state:
        made = cu_seqlens.made_once = Made(state)  # type: ignore[attr-defined]
    if (make, arguments) not in made.results:
        with torch.inference_mode(False):
            made.results[make, arguments] = make(cu_seqlens, *arguments)
    return made.results[make, arguments]


def spans(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """int32 [2, B, T]: start and end in its row of each position's document; padding is at or after its end."""
    return once(cu_seqlens, _spans, B, T)


def first_keys(cu_seqlens: Tensor, B: int, T: int, window: int | None) -> Tensor:
    """int32 [B, T]: the first key in its row that each query sees; one past itself for padding."""
    return once(cu_seqlens, _first_keys, B, T, window)


def cut_by_rows(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """int32 [n + B + 2], cu_seqlens with the ends of rows among them."""
    return once(cu_seqlens, _cut_by_rows, B, T)


def _cut_by_rows(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    row_ends = torch.arange(0, B * T + 1, max(T, 1), device=cu_seqlens.device, dtype=torch.int32)
    return torch.cat((cu_seqlens, row_ends)).sort().values


def _spans(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    position = torch.arange(B * T, device=cu_seqlens.device, dtype=torch.int32)
    row_start = position - position % max(1, T)
    cu_seqlens = cu_seqlens.contiguous()
    end = torch.searchsorted(cu_seqlens, position, right=True)
    starts = torch.maximum(cu_seqlens[end - 1], row_start) - row_start
    ends = torch.minimum(cu_seqlens[end.clamp(max=len(cu_seqlens) - 1)], row_start + T) - row_start
    return torch.stack((starts, ends)).view(2, B, T)


def _first_keys(cu_seqlens: Tensor, B: int, T: int, window: int | None) -> Tensor:
    starts_BT, ends_BT = spans(cu_seqlens, B, T)
    position = torch.arange(T, device=cu_seqlens.device, dtype=torch.int32)
    first_BT = torch.where(ends_BT > position, starts_BT, position + 1)
    return first_BT if window is None else torch.maximum(first_BT, position + (1 - window))

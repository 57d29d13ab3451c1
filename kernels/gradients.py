"""Gradients that the ops add directly to a parameter's `.grad`.

They are summed in float32 (float64 for float64 parameters) whatever the parameter's dtype. They don't reach the
parameter's own node of the autograd graph, nor its hooks, which DeepSpeed needs; and `torch.autograd.grad` finds no
gradient. So `accumulate_in_place` is for callers of `backward()` that read `.grad`. It applies to all ops with large
weights: linear, swiglu_linear, embedding, and linear_cross_entropy with `scale`.

A norm's kernel sums its weight's gradient in parts, one for each program. Adding the parts takes a launch for each norm
and micro-batch; with `PartialSums` the parts of all norms stay in one tensor until a single launch adds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from spt_fast.kernels.backend import accumulation_dtype


@dataclass
class InPlace:
    """The ops' information on a parameter whose gradient they make in place."""

    memory: Tensor | None = None
    """Memory for a new gradient; None to allocate it."""
    parts: Callable[[], PartialSums | None] = lambda: None
    """A weak reference: a cycle would keep a model's memory until garbage collection."""
    in_fp8: Any = None
    """The parameter's fp8 copies of kernels/fp8.py."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None in a pickled parameter: gradients belong to the trainer of this one."""
        return type(None), ()


def accumulate_in_place(parameters: Iterable[Tensor], memory: Iterable[Tensor] | None = None) -> None:
    """From now on the ops add these leaves' gradients directly to their `.grad`, in float32 (float64 for float64
    parameters); if it is None they create it, in the `memory` for it if that is given."""
    places = repeat(None) if memory is None else memory
    for parameter, place in zip(parameters, places, strict=False):
        parameter.grad_dtype = accumulation_dtype(parameter)
        parameter.in_place = InPlace(place)  # type: ignore[attr-defined]


def in_place(parameter: Tensor | None) -> InPlace | None:
    """The `.grad` to which the backward pass of an op adds itself, returning none; None if autograd adds it."""
    return getattr(parameter, "in_place", None) if parameter is not None and parameter.requires_grad else None


def accumulates_in_place(parameter: Tensor | None) -> bool:
    """Whether the backward pass of an op adds to this parameter's `.grad` itself, and returns none."""
    return in_place(parameter) is not None


def gradient_of(parameter: Tensor) -> tuple[Tensor, bool]:
    """The `.grad` of a parameter that accumulates in place; whether it is new, with undefined values."""
    if parameter.grad is not None:
        if not parameter.grad.is_contiguous():  # a caller's own; kernels take contiguous ones
            parameter.grad = parameter.grad.contiguous()
        return parameter.grad, False
    memory: Tensor | None = parameter.in_place.memory  # type: ignore[attr-defined]
    dtype = accumulation_dtype(parameter)
    if memory is None or memory.dtype != dtype or memory.device != parameter.device:  # it was moved
        memory = parameter.new_empty(parameter.shape, dtype=dtype)  # contiguous
    parameter.grad_dtype = dtype
    parameter.grad = memory
    return memory, True


class PartialSums:
    """The gradients of vectors of one length, each as parts [programs, D], until they are added."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._parts: Tensor | None = None
        self._begun: set[int] = set()
        for parameter in parameters:
            parameter.in_place.parts = weakref.ref(self)  # type: ignore[attr-defined]

    def of(self, parameter: Tensor, programs: int) -> tuple[Tensor, bool]:
        """The parts [programs, D] of one of them, float32; whether they are new, with undefined values."""
        number = self._numbers[id(parameter)]
        if self._parts is None or self._parts.device != parameter.device:
            self._parts = parameter.new_empty(len(self._parameters), programs, len(parameter), dtype=torch.float32)
        new = number not in self._begun
        self._begun.add(number)
        return self._parts[number], new

    def add_up(self) -> None:
        """Add its parts to each parameter's `.grad`."""
        if self._parts is None or not self._begun:
            return
        totals = self._parts.sum(1)
        for number in self._begun:
            parameter, total = self._parameters[number], totals[number]
            parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)
        self._begun.clear()

    def forget(self) -> None:
        """Start again without parts."""
        self._begun.clear()


def sum_parts_at_last(parameters: Iterable[Tensor]) -> list[PartialSums]:
    """While the results live, ops that sum gradients of these vectors in parts leave them so until `add_up`. They must
    accumulate in place already."""
    alike: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        alike.setdefault(len(parameter), []).append(parameter)
    return [PartialSums(each) for each in alike.values()]

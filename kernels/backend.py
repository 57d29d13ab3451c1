"""Which implementation of an op runs.

Each op file ends with an `Op` that lists its implementations, the preferred one first; `auto` takes that one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CONTRACT_BACKENDS = ("auto", "triton", "cpu", "reference")

OPS: dict[str, Op] = {}


class Op:
    """An op's name and its implementations by backend, which all take the same positional arguments."""

    def __init__(
        self, name: str, implementations: dict[str, Callable], contract: tuple[str, ...] = CONTRACT_BACKENDS
    ) -> None:
        self.name, self.implementations, self.contract = name, implementations, contract
        OPS[name] = self

    @property
    def chosen(self) -> str:
        """What `auto` means on this machine."""
        return next(iter(self.implementations))

    def __getitem__(self, backend: str) -> Callable:
        """The implementation of that name; ValueError for a name that is unknown or not available here."""
        if backend == "auto":
            return self.implementations[self.chosen]
        if backend in self.implementations:
            return self.implementations[backend]
        problem = "not available here" if backend in self.contract else "unknown"
        available = ", ".join(("auto", *self.implementations))
        raise ValueError(f"{self.name}: backend {backend!r} is {problem}; available: {available}")


def auto_backends() -> dict[str, str]:
    """By op, the backend that `auto` means on this machine."""
    return {name: op.chosen for name, op in sorted(OPS.items())}


def chosen_backends() -> dict[str, str]:
    """By op, the backend that `auto` means on this machine, and why."""
    why = {True: "the only one available", False: "the first available"}
    return {name: f"{op.chosen}: {why[len(op.implementations) == 1]}" for name, op in sorted(OPS.items())}


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, the dtype of every sum inside an op, but float64 for float64 inputs, so that gradcheck means
    something."""
    return torch.promote_types(x.dtype, torch.float32)

"""The engine: how a step is computed. `local` is one process on one device, `zero` many; `engines` selects one.

The loop hands an engine a step's micro-batches and gets back figures that it reads one step later, so that no step
waits. Compute runs in an explicit dtype, never autocast: bf16 parameters with fp32 masters in the optimizer if the
hardware multiplies bf16 fast, otherwise fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spt_fast.config import Phase
from spt_fast.data.loader import Batch
from spt_fast.model.gpt import GPTConfig
from spt_fast.train.snapshot import Snapshot


class EngineInterface(Protocol):
    """The interface between the loop and an engine. With several processes, all methods are collective."""

    device: torch.device
    dtype: torch.dtype

    @property
    def config(self) -> GPTConfig: ...

    def describe(self) -> str: ...

    def untie(self) -> None:
        """Give the head its own copy of the embedding, if it has none. It takes effect at the next `begin`."""

    def begin(self, phase: Phase, start: Snapshot, *, current: Snapshot | None = None, micro_batches: int = 1) -> None:
        """A fresh optimizer for the phase, which takes over `current`, or else `start`.

        `start` is the target of an anchor. `phase.freeze` names the parameters that steps don't change. micro_batches:
        the number that this process runs in a step.
        """

    def step(self, micro_batches: Sequence[Batch], lr: float, interrupted: Callable[[], bool]) -> StepResult | None:
        """Forward, backward and update over one global batch; None, with nothing changed, if it was interrupted.

        A loss or gradient norm that is not finite leaves weights and state unchanged; then `skipped` is true. After an
        interruption the next call must be `begin`.
        """

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Nats of every target [B·T], fp32 on the device, for this process's own text."""
        ...

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the next token [B, T, V], on the device; every process passes the same tokens."""
        ...

    def snapshot(self, *, state: bool) -> Snapshot:
        """This process's part of the fp32 weights and, if `state` is true, of the optimizer's state."""
        ...


class Figures(NamedTuple):
    """The figures of one step."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """Before clipping."""
    skipped: bool
    """Whether the step was skipped."""
    done_s: float
    """When it was known to be complete, by time.monotonic()."""


class StepResult:
    """The figures of a step on their way to the host: reading them waits for that step, not for later ones."""

    def __init__(self, figures: Tensor) -> None:
        """figures: fp32 [3], loss, gradient norm, and 1 if the step was skipped."""
        self._arrived: torch.cuda.Event | None = None
        self._done_s = time.monotonic()  # on a CPU; on a GPU the step has only been queued
        if figures.is_cuda:
            self._figures = torch.empty(3, pin_memory=True).copy_(figures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._figures = figures

    def read(self) -> Figures:
        if self._arrived is not None:
            self._arrived.synchronize()
            self._done_s = time.monotonic()
        loss, grad_norm, skipped = self._figures.tolist()
        return Figures(loss, grad_norm, bool(skipped), self._done_s)

"""The engine: how a step is computed. `local` is one process on one device, `zero` many; `engines` chooses.

The loop hands an engine a step's micro-batches and gets back figures that it reads one step later, so that a step
waits for nothing. Compute runs in an explicit dtype: bf16 parameters with fp32 masters in the optimizer where the
hardware multiplies bf16 fast, fp32 otherwise; never autocast.
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
    """What the loop asks of an engine. Where there are several processes, all methods are collective."""

    device: torch.device
    dtype: torch.dtype

    @property
    def config(self) -> GPTConfig: ...

    def describe(self) -> str: ...

    def untie(self) -> None:
        """Give the head its own copy of the embedding, where it has none. The next `begin` sees it."""

    def begin(self, phase: Phase, start: Snapshot, *, current: Snapshot | None = None, micro_batches: int = 1) -> None:
        """A fresh optimizer of the phase, which takes over `current`, or else `start`.

        `start` is what an anchor holds on to. `phase.freeze` says which parameters no step moves. micro_batches: that
        this process runs through in a step.
        """

    def step(self, micro_batches: Sequence[Batch], lr: float, interrupted: Callable[[], bool]) -> StepResult | None:
        """Forward, backward and update over one global batch; None, with nothing changed, where it was interrupted.

        A loss or gradient norm that is not finite leaves weights and state as they are; `skipped` says so. After an
        interruption no further step is made before the next `begin`.
        """

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Nats of every target [B·T], fp32 on the device, of this process's own text."""
        ...

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Of what follows each token [B, T, V], on the device; every process gives the same tokens."""
        ...

    def snapshot(self, *, state: bool) -> Snapshot:
        """This process's part of the fp32 weights and, where `state` is true, of the optimizer's state."""
        ...


class Figures(NamedTuple):
    """What one step has to say."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """Before clipping."""
    skipped: bool
    """Whether the step was left out."""
    done_s: float
    """When it was known to be done, by time.monotonic()."""


class StepResult:
    """The figures of a step, already on their way to the host: reading them waits for that step, not for later ones."""

    def __init__(self, figures: Tensor) -> None:
        """figures: fp32 [3], loss, gradient norm, and 1 where the step was left out."""
        self._arrived: torch.cuda.Event | None = None
        self._done_s = time.monotonic()  # on a CPU; a GPU has only been told to begin
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

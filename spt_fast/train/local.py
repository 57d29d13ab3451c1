"""The engine of one process on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spt_fast.config import Phase
from spt_fast.data.loader import Batch
from spt_fast.kernels import accumulate_in_place, keep_freed_memory
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train.engine import StepResult
from spt_fast.train.optim import FROZEN, ModelOptimizer
from spt_fast.train.snapshot import Snapshot

STEPS_TO_WARM_UP = 3
"""Steps before one is recorded as a CUDA graph: libraries and allocator have settled then."""


class RecordedStep:
    """A step as a CUDA graph: the GPU starts its hundreds of kernels by itself, which pays for small models."""

    def __init__(self, compute: Callable[..., Tensor | None], like: Sequence[Batch]) -> None:
        self._batches = [Batch(torch.empty_like(b.tokens), torch.empty_like(b.targets), None) for b in like]
        self._lr = torch.zeros((), device=like[0].tokens.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            figures = compute(self._batches, self._lr, lambda: False)
        assert figures is not None
        self._figures = figures

    def __call__(self, micro_batches: Sequence[Batch], lr: float) -> Tensor:
        for recorded, batch in zip(self._batches, micro_batches, strict=True):
            recorded.tokens.copy_(batch.tokens, non_blocking=True)
            recorded.targets.copy_(batch.targets, non_blocking=True)
        self._lr.fill_(lr)
        self._graph.replay()
        return self._figures.clone()


class LocalEngine:
    """One process, one device. The model may be on the meta device, as its weights come with `begin`. `cuda_graphs`:
    record the step once it is warm; not for batches with documents."""

    def __init__(self, model: GPT, *, device: torch.device, dtype: torch.dtype, cuda_graphs: bool = False) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.device = device
        self.dtype = dtype
        self.cuda_graphs = cuda_graphs
        if model.embedding.is_meta:
            model = model.to(dtype).to_empty(device=device)
        self.model = model.to(device=device, dtype=dtype)
        self.optimizer: ModelOptimizer

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    def describe(self) -> str:
        return f"{self.device.type}, one process"

    def untie(self) -> None:
        self.model.untie()

    def begin(self, phase: Phase, start: Snapshot, *, current: Snapshot | None = None, micro_batches: int = 1) -> None:
        if hasattr(self, "optimizer"):
            del self.optimizer  # frees its state before the new one's is allocated
        self.steps_made = 0
        self.recorded: RecordedStep | None = None
        snapshot = start if current is None else current
        self.frozen = snapshot.only(FROZEN[phase.freeze])
        accumulate_in_place(self.model.parameters())  # where there are none yet
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param.requires_grad_(name not in FROZEN[phase.freeze])
                if not param.requires_grad:
                    param.data = self.frozen.weights[name].to(self.device, self.dtype, copy=True)  # not in a flat one
        self.optimizer = ModelOptimizer(self.model, phase.optimizer, phase.anchor)
        self.optimizer.restore(snapshot, anchor=start)

    def step(self, micro_batches: Sequence[Batch], lr: float, interrupted: Callable[[], bool]) -> StepResult | None:
        recordable = self.cuda_graphs and all(batch.cu_seqlens is None for batch in micro_batches)
        if recordable and self.recorded is None and self.steps_made == STEPS_TO_WARM_UP:
            self.recorded = RecordedStep(self._compute, micro_batches)
        if recordable and self.recorded is not None:
            if interrupted():
                return None
            return StepResult(self.recorded(micro_batches, lr))
        figures = self._compute(micro_batches, lr, interrupted)
        self.steps_made += 1
        return None if figures is None else StepResult(figures)

    def _compute(
        self, micro_batches: Sequence[Batch], lr: float | Tensor, interrupted: Callable[[], bool]
    ) -> Tensor | None:
        """The figures of a StepResult; None where it was interrupted."""
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches:
            if interrupted():
                self.optimizer.zero_grad()
                return None
            micro_loss = self.model(batch.tokens, batch.targets, batch.cu_seqlens, scale=1 / len(micro_batches))
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = self.optimizer.grad_norm()
        skip = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.optimizer.step(lr, norm, skip)
        self.optimizer.zero_grad()
        return torch.stack([loss, norm, skip.float()])

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(self.device)
        return self.model(tokens_BT.to(self.device), targets_BT.to(self.device), cu_seqlens, "none").float()

    def snapshot(self, *, state: bool) -> Snapshot:
        return self.optimizer.snapshot(state=state) | (self.frozen if state else self.frozen.without_state())

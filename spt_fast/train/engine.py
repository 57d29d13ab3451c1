"""The engine: how a step is computed. `LocalEngine` is one process on one device; spt_fast.train.zero has the other.

The loop hands an engine a step's micro-batches and gets back figures that it reads one step later, so that a step
waits for nothing. Compute runs in an explicit dtype: bf16 parameters with fp32 masters in the optimizer where the
hardware multiplies bf16 fast, fp32 otherwise; never autocast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from spt_fast.config import Engine, Optimizer
from spt_fast.data.loader import Batch
from spt_fast.errors import RecipeError
from spt_fast.kernels import keep_freed_memory
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train.optim import FROZEN, AdamW, Snapshot, frozen_in, weights_in
from spt_fast.train.world import ALONE, World, join_world


class EngineInterface(Protocol):
    """What the loop asks of an engine. Where there are several processes, all methods are collective."""

    device: torch.device
    dtype: torch.dtype

    @property
    def config(self) -> GPTConfig: ...

    def describe(self) -> str: ...

    def untie(self) -> None: ...

    def begin(
        self,
        settings: Optimizer,
        anchor_decay: float,
        start: Snapshot,
        *,
        current: Snapshot | None = None,
        micro_batches: int = 1,
        freeze: str = "none",
    ) -> None: ...

    def step(self, micro_batches: Sequence[Batch], lr: float, interrupted: Callable[[], bool]) -> StepResult | None: ...

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor: ...

    def snapshot(self, *, state: bool) -> Snapshot: ...


def pick_device() -> torch.device:
    """The current GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype: what the recipe says, or with "auto" bf16 where matrix products in it are fast."""
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


STEPS_TO_WARM_UP = 3
"""Steps before one is recorded as a CUDA graph: libraries and allocator have settled then."""


class StepResult:
    """What one step has to say, already on its way to the host: reading it waits for that step, not for later ones."""

    def __init__(self, figures: Tensor) -> None:
        """figures: fp32 [3], loss, gradient norm, and 1 where the step was left out."""
        self._arrived: torch.cuda.Event | None = None
        if figures.is_cuda:
            self._figures = torch.empty(3, pin_memory=True).copy_(figures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._figures = figures

    def read(self) -> tuple[float, float, bool]:
        """(loss in nats per token, gradient norm before clipping, whether the step was left out)."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm, skipped = self._figures.tolist()
        return loss, grad_norm, bool(skipped)


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
    """One process, one device. `cuda_graphs`: record the step once it is warm; not for batches with documents."""

    def __init__(self, model: GPT, *, device: torch.device, dtype: torch.dtype, cuda_graphs: bool = False) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.device = device
        self.dtype = dtype
        self.cuda_graphs = cuda_graphs
        self.model = model.to(device=device, dtype=dtype)
        self.optimizer: AdamW

    @property
    def config(self) -> GPTConfig:
        return self.model.config

    def describe(self) -> str:
        return f"{self.device.type}, one process"

    def untie(self) -> None:
        """Give the head its own copy of the embedding, where it has none."""
        self.model.untie()

    def begin(
        self,
        settings: Optimizer,
        anchor_decay: float,
        start: Snapshot,
        *,
        current: Snapshot | None = None,
        micro_batches: int = 1,
        freeze: str = "none",
    ) -> None:
        """Set up a fresh optimizer and take over `current` (or `start`); `start` is what an anchor holds on to.

        freeze: as in a recipe's phase, which parameters no step moves.
        """
        if hasattr(self, "optimizer"):
            del self.optimizer  # its state is let go before the new one's is claimed
        self.steps_made = 0
        self.recorded: RecordedStep | None = None
        snapshot = start if current is None else current
        self.frozen = frozen_in(snapshot, freeze)
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param.requires_grad_(name not in FROZEN[freeze])
                if not param.requires_grad:
                    param.copy_(self.frozen[f"weights/{name}"])
        self.optimizer = AdamW(self.model, settings, anchor_decay)
        self.optimizer.restore(snapshot, anchor=start)

    def step(self, micro_batches: Sequence[Batch], lr: float, interrupted: Callable[[], bool]) -> StepResult | None:
        """Forward, backward and update over one global batch; None, with nothing changed, where it was interrupted.

        A loss or gradient norm that is not finite leaves weights and moments as they are; `skipped` says so.
        """
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
            micro_loss = self.model(batch.tokens, batch.targets, batch.cu_seqlens) / len(micro_batches)
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = self.optimizer.grad_norm()
        skip = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.optimizer.step(lr, norm, skip)
        self.optimizer.zero_grad()
        return torch.stack([loss, norm, skip.float()])

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mean loss in nats per token, a 0-d fp32 tensor on the device."""
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(self.device)
        return self.model(tokens_BT.to(self.device), targets_BT.to(self.device), cu_seqlens).float()

    def snapshot(self, *, state: bool) -> Snapshot:
        return self.optimizer.snapshot(state=state) | (self.frozen if state else weights_in(self.frozen))


def uses_deepspeed(settings: Engine, processes: int) -> bool:
    """Whether the engine is DeepSpeed's: by name, or because only it serves many processes, offloading and its JSON."""
    wants_it = processes > 1 or settings.offload != "none" or settings.config is not None
    return settings.name == "deepspeed" or (settings.name == "auto" and wants_it)


def check_engine(settings: Engine, processes: int) -> None:
    """RecipeError where the engine cannot serve so many processes, or DeepSpeed or its JSON cannot be used."""
    if uses_deepspeed(settings, processes):
        from spt_fast.train.zero import check_deepspeed

        check_deepspeed(settings)
    elif processes > 1:
        raise RecipeError(
            f"engine.name: local is one process, and {processes} were started; write deepspeed, or start one"
        )


def join(settings: Engine) -> World:
    """This process's place among those that the launcher started. RecipeError in all where the engine can't serve."""
    world = join_world(process_group=uses_deepspeed(settings, 1))
    world.everywhere(lambda: check_engine(settings, world.size))
    return world


def make_engine(model: GPT, settings: Engine, *, world: World, dtype: torch.dtype) -> EngineInterface:
    """The engine that the recipe names, which `check_engine` found fit."""
    if uses_deepspeed(settings, world.size):
        from spt_fast.train.zero import ZeroEngine

        return ZeroEngine(model, settings, world=world, dtype=dtype)
    return LocalEngine(model, device=world.device, dtype=dtype, cuda_graphs=settings.cuda_graphs)


def weights_of(model: GPT, world: World = ALONE) -> Snapshot:
    """A model's weights as a snapshot: this process's part of it."""
    mine = world.share({f"weights/{name}": param.detach() for name, param in model.named_parameters()})
    return {name: param.float().cpu().clone() for name, param in mine.items()}


def untied(snapshot: Mapping[str, Tensor], embedding: str, head: str) -> Snapshot:
    """The snapshot of a tied model with the head's own copy of the embedding (and of its moments) added."""
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    copies = {f"{k}/{head}": snapshot[f"{k}/{embedding}"].clone() for k in kinds if f"{k}/{embedding}" in snapshot}
    return {**snapshot, **copies}

"""The engine of one process on one device."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spt_fast.config import Phase
from spt_fast.data.loader import Batch
from spt_fast.errors import SptWarning
from spt_fast.kernels import accumulate_in_place, keep_freed_memory
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train.engine import StepResult
from spt_fast.train.optim import FROZEN, ModelOptimizer
from spt_fast.train.snapshot import Snapshot

STEPS_TO_WARM_UP = 3
"""Steps before one is recorded as a CUDA graph, so that libraries and the allocator have settled."""
LONGEST_S = 5.0
"""A recorded step can't be interrupted between micro-batches; a step that takes longer doesn't gain from it anyway."""
MOST_RECORDINGS = 4


def capture(compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """The outputs of a computation, updated each time its recording is replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        figures = compute()
    return figures, graph.replay


class RecordedStep:
    """A step as a CUDA graph: the host no longer launches its hundreds of kernels, which speeds up launch-bound models.

    It serves batches of one shape, with at most as many documents as it has room for: unused entries of cu_seqlens
    are documents without tokens.
    """

    def __init__(self, compute: Callable[..., Tensor | None], like: Sequence[Batch]) -> None:
        most = max(0 if batch.cu_seqlens is None else len(batch.cu_seqlens) for batch in like)
        room = 1 << (2 * most - 1).bit_length()

        def empty(batch: Batch) -> Batch:
            cuts = None if batch.cu_seqlens is None else batch.cu_seqlens.new_empty(room)
            return Batch(torch.empty_like(batch.tokens), torch.empty_like(batch.targets), cuts)

        def run() -> Tensor:
            figures = compute(self._batches, self._lr, lambda: False)
            assert figures is not None
            return figures

        self._batches = [empty(batch) for batch in like]
        self._lr = torch.zeros((), device=like[0].tokens.device)
        self._load(like)
        self._figures, self._replay = capture(run)

    def takes(self, micro_batches: Sequence[Batch]) -> bool:
        return len(self._batches) == len(micro_batches) and all(map(_fits, micro_batches, self._batches))

    def __call__(self, micro_batches: Sequence[Batch], lr: float) -> Tensor:
        self._load(micro_batches)
        self._lr.fill_(lr)
        self._replay()
        return self._figures.clone()

    def _load(self, micro_batches: Sequence[Batch]) -> None:
        for recorded, batch in zip(self._batches, micro_batches, strict=True):
            recorded.tokens.copy_(batch.tokens, non_blocking=True)
            recorded.targets.copy_(batch.targets, non_blocking=True)
            if recorded.cu_seqlens is not None and batch.cu_seqlens is not None:
                documents = len(batch.cu_seqlens)
                recorded.cu_seqlens[:documents].copy_(batch.cu_seqlens, non_blocking=True)
                recorded.cu_seqlens[documents:].copy_(
                    batch.cu_seqlens[-1:].expand(len(recorded.cu_seqlens) - documents)
                )


def _fits(batch: Batch, room: Batch) -> bool:
    if batch.tokens.shape != room.tokens.shape or (batch.cu_seqlens is None) != (room.cu_seqlens is None):
        return False
    return batch.cu_seqlens is None or room.cu_seqlens is None or len(batch.cu_seqlens) <= len(room.cu_seqlens)


def _has_room_for_another_step(device: torch.device) -> bool:
    """Whether a step's memory besides weights and state fits twice: a recording keeps its own."""
    allocated, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated
    return 2 * (most - allocated) < free


class LocalEngine:
    """One process, one device. The model may be on the meta device, since its weights come with `begin`. `cuda_graphs`:
    whether steps are recorded after a warm-up; "auto": if it is a GPU with enough memory, and steps are short."""

    def __init__(
        self, model: GPT, *, device: torch.device, dtype: torch.dtype, cuda_graphs: bool | str = False
    ) -> None:
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
        self.recordings, self._step_s, self._called_s = 0, math.inf, -math.inf
        snapshot = start if current is None else current
        self.frozen = snapshot.only(FROZEN[phase.freeze])
        accumulate_in_place(self.model.parameters())  # unless the previous optimizer had them
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                param.requires_grad_(name not in FROZEN[phase.freeze])
                if not param.requires_grad:
                    param.data = self.frozen.weights[name].to(self.device, self.dtype, copy=True)
        self.optimizer = ModelOptimizer(self.model, phase.optimizer, phase.anchor)
        self.optimizer.restore(snapshot, anchor=start)

    def step(self, micro_batches: Sequence[Batch], lr: float, interrupted: Callable[[], bool]) -> StepResult | None:
        now_s = time.monotonic()
        self._step_s, self._called_s = min(self._step_s, now_s - self._called_s), now_s  # may include an evaluation
        if self.steps_made >= STEPS_TO_WARM_UP and self._is_to_be_recorded(micro_batches):
            self._record(micro_batches)
        if self.recorded is not None and self.recorded.takes(micro_batches):
            return None if interrupted() else StepResult(self.recorded(micro_batches, lr))
        figures = self._compute(micro_batches, lr, interrupted)
        self.steps_made += 1
        return None if figures is None else StepResult(figures)

    def _is_to_be_recorded(self, micro_batches: Sequence[Batch]) -> bool:
        if self.recordings == MOST_RECORDINGS or (self.recorded is not None and self.recorded.takes(micro_batches)):
            return False
        if self.cuda_graphs != "auto":
            return bool(self.cuda_graphs)
        if self.device.type != "cuda" or self._step_s > LONGEST_S or not _has_room_for_another_step(self.device):
            self.recordings = MOST_RECORDINGS
        return self.recordings < MOST_RECORDINGS

    def _record(self, micro_batches: Sequence[Batch]) -> None:
        self.recorded, self.recordings = None, self.recordings + 1
        try:
            self.recorded = RecordedStep(self._compute, micro_batches)
        except RuntimeError as error:
            self.cuda_graphs = False
            self.optimizer.zero_grad()
            torch.autograd.graph.increment_version(self.model.parameters())  # invalidates copies made from them
            problem = f"engine.cuda_graphs: a step could not be recorded ({error}); training continues without it"
            warnings.warn(problem, SptWarning, stacklevel=3)

    def _compute(
        self, micro_batches: Sequence[Batch], lr: float | Tensor, interrupted: Callable[[], bool]
    ) -> Tensor | None:
        """The figures of a StepResult; None if it was interrupted."""
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

    def logits(self, tokens_BT: Tensor) -> Tensor:
        return self.model(tokens_BT.to(self.device))

    def snapshot(self, *, state: bool) -> Snapshot:
        return self.optimizer.snapshot(state=state) | (self.frozen if state else self.frozen.without_state())

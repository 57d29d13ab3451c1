"""Losses on fixed text: the held-out halves and a fixed sample of the training windows of every source.

B windows, T context. The windows are cut once at the start, so every evaluation of a run reads the same text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spt_fast.data.heldout import heldout_tokens, training_windows
from spt_fast.train.plan import Plan

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Interrupted(Exception):
    """An evaluation or a run that was asked to stop."""


@dataclass(frozen=True)
class EvalSet:
    """Windows of one text: whole ones stacked, and at most one short one at the end."""

    full: np.ndarray  # [windows, T + 1] ids, consecutive windows sharing one token
    tail: np.ndarray  # [t + 1] ids, t < T

    @property
    def num_targets(self) -> int:
        return self.full.shape[0] * (self.full.shape[1] - 1) + max(0, len(self.tail) - 1)

    @classmethod
    def of_tokens(cls, tokens: np.ndarray, context: int) -> EvalSet:
        """Every token of `tokens` [n] but the first is scored exactly once; a view, so a memory map stays on disk."""
        windows = (len(tokens) - 1) // context
        if windows:
            full = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]
        else:
            full = np.empty((0, context + 1), tokens.dtype)
        return cls(full, tokens[windows * context :])


@torch.no_grad()
def mean_loss(
    loss: LossFunction,
    text: EvalSet,
    rows: int,
    *,
    eos_id: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> float:
    """Mean loss over every target of `text`, nats per token, summed in fp64.

    `rows` windows go through at a time. With `eos_id`, attention stays inside documents, which end with that id.
    Raises Interrupted between batches where `interrupted()` turns true.
    """
    batches = [text.full[i : i + rows] for i in range(0, len(text.full), rows)]
    if len(text.tail) > 1:
        batches.append(text.tail[None])
    total: Tensor | float = 0.0
    for batch in batches:
        if interrupted():
            raise Interrupted
        windows = torch.from_numpy(batch.astype(np.int64))
        tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        cuts = None if eos_id is None else document_cuts(tokens, eos_id)
        total = total + loss(tokens, targets, cuts).double() * targets.numel()
    return float(total) / text.num_targets


def document_cuts(tokens_BT: Tensor, eos_id: int) -> Tensor:
    """cu_seqlens int32 [n+1] over the flattened batch: a cut at every row's start and after every `eos_id`."""
    rows, context = tokens_BT.shape
    flat = tokens_BT.reshape(-1)
    after_eos = torch.nonzero(flat == eos_id).squeeze(-1) + 1
    row_starts = torch.arange(0, rows * context + 1, context)
    return torch.unique(torch.cat([row_starts, after_eos])).to(torch.int32)


def evaluation_texts(plan: Plan, tokens: int) -> dict[str, dict[str, EvalSet]]:
    """By "heldout" (the report half), "select" and "train", then by source; halves of `tokens` each."""
    context, half = plan.model.context, max(1, tokens // 2)
    texts: dict[str, dict[str, EvalSet]] = {"heldout": {}, "select": {}, "train": {}}
    for source, data in plan.heldout.items():
        texts["heldout"][source] = EvalSet.of_tokens(heldout_tokens(data, "report", half), context)
        texts["select"][source] = EvalSet.of_tokens(heldout_tokens(data, "select", half), context)
    for source, data in plan.train.items():
        texts["train"][source] = EvalSet(training_windows(data, context, half), np.empty(0, np.int64))
    return texts

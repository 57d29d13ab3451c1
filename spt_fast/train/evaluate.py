"""Losses on fixed text: the held-out halves and a fixed sample of the training windows of every source.

B windows, T context. The windows are cut once at the start, so every evaluation of a run reads the same text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spt_fast.data.heldout import Half, begins, heldout_stretches, heldout_tokens, training_starts, training_windows
from spt_fast.data.shards import TokenDataset
from spt_fast.errors import DataError
from spt_fast.train.plan import Plan
from spt_fast.train.world import ALONE, World

HALVES: dict[str, Half] = {"heldout": "report", "select": "select"}
"""By the name of a loss, the half of the held-out text that it is of."""

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Interrupted(Exception):
    """An evaluation or a run that was asked to stop."""


@dataclass(frozen=True)
class EvalSet:
    """Windows of one text: whole ones stacked, and at most one short one at the end."""

    full: np.ndarray  # [windows, T + 1] ids, consecutive windows sharing one token
    tail: np.ndarray  # [t + 1] ids, t < T
    full_begins: np.ndarray | None = None  # bool [windows, T]: which inputs begin a document, where that matters
    tail_begins: np.ndarray | None = None  # bool [t]

    @property
    def num_targets(self) -> int:
        return self.full.shape[0] * (self.full.shape[1] - 1) + max(0, len(self.tail) - 1)

    @classmethod
    def of_tokens(cls, tokens: np.ndarray, context: int, marks: np.ndarray | None = None) -> EvalSet:
        """Every token of `tokens` [n] but the first is scored exactly once; a view, so a memory map stays on disk.

        `marks`, bool [n], says which tokens begin a document.
        """
        windows = (len(tokens) - 1) // context
        if windows:
            full = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]
        else:
            full = np.empty((0, context + 1), tokens.dtype)
        cut = windows * context
        if marks is None:
            return cls(full, tokens[cut:])
        return cls(full, tokens[cut:], marks[:cut].reshape(windows, context), marks[cut:-1])


@torch.no_grad()
def mean_loss(
    loss: LossFunction,
    text: EvalSet,
    rows: int,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> float:
    """Mean loss over every target of `text`, nats per token, summed in fp64.

    `rows` windows go through at a time; the processes of `world` take turns, and all get the mean. Where the text says
    what begins a document, attention stays inside documents. Raises Interrupted between batches where `interrupted()`
    turns true.
    """
    marks = text.full_begins
    batches = [
        (text.full[i : i + rows], None if marks is None else marks[i : i + rows])
        for i in range(0, len(text.full), rows)
    ]
    if len(text.tail) > 1:
        batches.append((text.tail[None], None if text.tail_begins is None else text.tail_begins[None]))
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for turn in range(-(-len(batches) // world.size)):
        if interrupted():
            raise Interrupted
        mine = turn * world.size + world.rank
        # Every process makes as many forward passes, which may be collective: one without text left reads the first.
        batch, batch_begins = batches[mine if mine < len(batches) else 0]
        windows = torch.from_numpy(batch.astype(np.int64))
        tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        cuts = None if batch_begins is None else document_cuts(batch_begins)
        total += loss(tokens, targets, cuts).double() * (targets.numel() if mine < len(batches) else 0)
    return float(world.sum_(total)) / text.num_targets


def document_cuts(begins_BT: np.ndarray) -> Tensor:
    """cu_seqlens int32 [n+1] over the flattened batch: a cut at every row's start and where a document begins."""
    cuts = begins_BT.copy()
    cuts[:, 0] = True
    return torch.from_numpy(np.append(np.flatnonzero(cuts), cuts.size).astype(np.int32))


def evaluation_texts(plan: Plan, tokens: int, *, documents: bool) -> dict[str, dict[str, EvalSet]]:
    """By "heldout" (the report half), "select" and "train", then by source; halves of `tokens` each.

    `documents` keeps attention inside documents. Raises DataError for a text that is too short, or holds an id that the
    model doesn't have.
    """
    context, half = plan.model.context, max(1, tokens // 2)
    texts: dict[str, dict[str, EvalSet]] = {"heldout": {}, "select": {}, "train": {}}

    def checked(source: str, field: str, data: TokenDataset, ids: np.ndarray) -> np.ndarray:
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= plan.model.vocab_size:
            raise DataError(
                f"sources.{source}.{field}: {data.path} holds token id {least if least < 0 else most}, outside the "
                f"vocabulary of {plan.model.vocab_size}; prepare it with this run's tokenizer, or raise "
                "model.vocab_size"
            )
        return ids

    for source, data in plan.heldout.items():
        for split, name in HALVES.items():
            ids = checked(source, "heldout", data, heldout_tokens(data, name, half))
            marks = begins(data, heldout_stretches(data, name, half)) if documents else None
            texts[split][source] = EvalSet.of_tokens(ids, context, marks)
    for source, data in plan.train.items():
        windows = checked(source, "train", data, training_windows(data, context, half))
        starts = training_starts(data, context, half)
        marks = begins(data, np.stack([starts, starts + context], axis=1)) if documents else None
        texts["train"][source] = EvalSet(
            windows, np.empty(0, np.int64), None if marks is None else marks.reshape(-1, context)
        )
    return texts

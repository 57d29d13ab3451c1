"""Losses on fixed text: the held-out halves and a fixed sample of the training windows of every source.

B windows, T context. The windows are cut once at the start, so every evaluation of a run reads the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spt_fast.config import Phase
from spt_fast.data.heldout import (
    Half,
    begins,
    documents_at,
    documents_in,
    heldout_stretches,
    tokens_in,
    training_stretches,
)
from spt_fast.data.shards import TokenDataset
from spt_fast.train.plan import Plan, unknown_id
from spt_fast.train.state import Errors, Losses
from spt_fast.train.world import ALONE, World

HALVES: dict[str, Half] = {"heldout": "report", "select": "select"}
"""The half of the held-out text that each loss belongs to."""

FORWARD_SHARE = 1 / 3
"""The FLOPs of an evaluation, as a share of a training step's."""

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(tokens [B, T], targets [B, T], cu_seqlens) -> nats of every target [B·T]."""


class Interrupted(Exception):
    """An evaluation or a run was asked to stop."""


@dataclass(frozen=True)
class EvalSet:
    """Windows of one text: full ones stacked, and at most one shorter one at the end."""

    stacks: Sequence[tuple[np.ndarray, np.ndarray | None]]
    """Ids [windows, t + 1], t <= T; and, if needed, which inputs begin a document, bool [windows, t]."""
    documents: int | None = None
    """Number of documents; None if they aren't recorded."""
    document: np.ndarray | None = None
    """The document in which each window begins, int64 [windows]: errors of windows of one document are correlated."""

    @property
    def num_targets(self) -> int:
        return sum(ids[:, 1:].size for ids, _ in self.stacks)

    def size(self) -> dict[str, int | None]:
        return {"documents": self.documents, "tokens": self.num_targets}

    @classmethod
    def of_tokens(cls, tokens: np.ndarray, context: int, marks: np.ndarray | None = None) -> EvalSet:
        """Every token of `tokens` [n] but the first is scored exactly once; a view, so a memory map stays on disk.

        `marks`, bool [n], says which tokens begin a document.
        """
        cut = (len(tokens) - 1) // context * context
        stacks = []
        for part, width in ((slice(0, cut + 1), context), (slice(cut, None), len(tokens) - 1 - cut)):
            if len(tokens[part]) > 1:
                ids = np.lib.stride_tricks.sliding_window_view(tokens[part], width + 1)[::width]
                stacks.append((ids, None if marks is None else marks[part][:-1].reshape(-1, width)))
        return cls(stacks)

    @classmethod
    def of_stretches(cls, data: TokenDataset, stretches: np.ndarray, context: int, *, inside: bool) -> EvalSet:
        """From concatenated stretches, int64 [stretches, 2], of a dataset; `inside`: attention stays inside
        documents."""
        text = cls.of_tokens(tokens_in(data, stretches), context, begins(data, stretches) if inside else None)
        windows = sum(len(ids) for ids, _ in text.stacks)
        document = documents_at(data, stretches, np.arange(windows) * context)
        return replace(text, documents=documents_in(data, stretches), document=document)


@dataclass(frozen=True)
class Measured:
    """A loss, nats per token."""

    loss: float
    standard_error: float | None
    """Over documents, or over windows if those are shorter; None for one, and if the loss is not finite."""

    @classmethod
    def of(cls, text: EvalSet, nats: np.ndarray) -> Measured:
        """From the sum of nats of each window [windows]."""
        targets = np.concatenate([np.full(len(ids), ids.shape[1] - 1) for ids, _ in text.stacks])
        loss = float(nats.sum() / targets.sum())
        apart = np.arange(len(nats)) if text.document is None else np.unique(text.document, return_inverse=True)[1]
        off = np.bincount(apart, nats - loss * targets)
        n = len(off)
        known = n > 1 and np.isfinite(loss)
        return cls(loss, float(np.sqrt(n / (n - 1) * np.square(off).sum()) / targets.sum()) if known else None)


@torch.no_grad()
def measure(
    loss: LossFunction,
    text: EvalSet,
    rows: int,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> Measured:
    """Mean loss over every target of `text`, nats per token, summed in fp64.

    `rows` windows are scored at a time. The processes of `world` take turns, and all get the result. If the text marks
    the begins of documents, attention stays inside documents. Raises Interrupted between batches when `interrupted()`
    turns true.
    """
    batches = [
        (ids[i : i + rows], None if marks is None else marks[i : i + rows])
        for ids, marks in text.stacks
        for i in range(0, len(ids), rows)
    ]
    nats = [torch.zeros(len(ids), dtype=torch.float64, device=world.device) for ids, _ in batches]
    for turn in range(-(-len(batches) // world.size)):
        if interrupted():
            raise Interrupted
        mine = turn * world.size + world.rank
        # Every process makes the same number of forward passes, which may be collective: one without text reads the
        # first.
        batch, batch_begins = batches[mine if mine < len(batches) else 0]
        windows = torch.from_numpy(batch.astype(np.int64))
        tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        cuts = None if batch_begins is None else document_cuts(batch_begins)
        each = loss(tokens, targets, cuts).double().view(targets.shape)
        if mine < len(batches):
            nats[mine] = each.sum(dim=1)
    return Measured.of(text, world.sum_(torch.cat(nats)).cpu().numpy())


def measure_all(
    loss: LossFunction,
    texts: Mapping[str, Mapping[str, EvalSet]],
    rows: int,
    interrupted: Callable[[], bool],
    world: World,
) -> tuple[Losses, Errors]:
    """`measure` of every text, by split and source: losses and their standard errors."""
    measured = {
        split: {of: measure(loss, text, rows, interrupted=interrupted, world=world) for of, text in by.items()}
        for split, by in texts.items()
    }
    losses, errors = (
        {split: {of: getattr(one, name) for of, one in by.items()} for split, by in measured.items()}
        for name in ("loss", "standard_error")
    )
    return losses, errors


def document_cuts(begins_BT: np.ndarray) -> Tensor:
    """cu_seqlens int32 [n+1] over the flattened batch: each row begins a document, and so do the marks."""
    cuts = begins_BT.copy()
    cuts[:, 0] = True
    return torch.from_numpy(np.append(np.flatnonzero(cuts), cuts.size).astype(np.int32))


def evaluation_texts(plan: Plan, phase: Phase, *, windows: bool = True) -> dict[str, dict[str, EvalSet]]:
    """By "heldout" (the report half), "select" and "train", then by source; halves of the phase's `tokens` each.

    windows  see `split_heldout`

    Raises DataError for a text that is too short, or that holds an id outside the model's vocabulary.
    """
    context, half = phase.window(plan.model.context), max(1, phase.evaluation.tokens // 2)
    texts: dict[str, dict[str, EvalSet]] = {"heldout": {}, "select": {}, "train": {}}

    def checked(source: str, field: str, data: TokenDataset, text: EvalSet) -> EvalSet:
        least, most = (int(of([of(ids) for ids, _ in text.stacks])) for of in (np.min, np.max))
        if least < 0 or most >= plan.model.vocab_size:
            bad = least if least < 0 else most
            raise unknown_id(plan.recipe, f"sources.{source}.{field}", data, bad, plan.model)
        return text

    for source, data in plan.heldout.items():
        for split, name in HALVES.items():
            stretches = heldout_stretches(data, name, half, windows=windows)
            text = EvalSet.of_stretches(data, stretches, context, inside=phase.documents)
            texts[split][source] = checked(source, "heldout", data, text)
    for source, data in plan.train.items():
        stretches = training_stretches(data, context, half)
        ids = tokens_in(data, stretches + np.array([0, 1])).reshape(-1, context + 1)
        marks = begins(data, stretches).reshape(-1, context) if phase.documents else None
        document = documents_at(data, stretches, np.arange(len(stretches)) * context)
        text = EvalSet([(ids, marks)], documents_in(data, stretches), document)
        texts["train"][source] = checked(source, "train", data, text)
    return texts


def evaluated_tokens(plan: Plan, index: int) -> int:
    """Tokens scored by all evaluations of phase `index`: at its first and last step, in between, and for an average, in
    every arm."""
    planned = plan.phases[index]
    phase = planned.phase
    every = phase.evaluation.every.steps(planned.tokens_per_step, planned.steps)
    evaluations = len(phase.arms()) * (
        len(range(0, planned.steps, every)) + 1 + bool(phase.average) + len(phase.also_average)
    )
    texts = evaluation_texts(plan, phase)
    return evaluations * sum(text.num_targets for by_source in texts.values() for text in by_source.values())


def phase_flops(plan: Plan) -> list[float]:
    """FLOPs of training and evaluating every phase, all arms included."""
    found = []
    for planned in plan.phases:
        trained = planned.tokens * len(planned.phase.arms())
        evaluated = evaluated_tokens(plan, planned.index)
        found.append(plan.flops_per_token(planned.index) * (trained + FORWARD_SHARE * evaluated))
    return found

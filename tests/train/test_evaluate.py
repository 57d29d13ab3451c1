"""Evaluation texts: every token scored once, means over tokens, documents kept apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spt_fast.train.evaluate import EvalSet, Interrupted, document_cuts, mean_loss


def mean_target(tokens: Tensor, targets: Tensor, cuts: Tensor | None) -> Tensor:
    """A stand-in for a model: the "loss" of a token is the token itself."""
    assert (targets[:, :-1] == tokens[:, 1:]).all()
    return targets.float().mean()


@given(length=st.integers(2, 500), context=st.integers(1, 120), rows=st.integers(1, 9))
def test_every_token_but_the_first_is_scored_exactly_once(length: int, context: int, rows: int) -> None:
    seen: list[int] = []

    def record(tokens: Tensor, targets: Tensor, cuts: Tensor | None) -> Tensor:
        assert targets.shape[1] <= context
        assert targets.shape[0] <= rows
        seen.extend(targets.flatten().tolist())
        return mean_target(tokens, targets, cuts)

    text = EvalSet.of_tokens(np.arange(length), context)
    loss = mean_loss(record, text, rows)
    assert seen == list(range(1, length))
    assert text.num_targets == length - 1
    assert loss == pytest.approx(length / 2)


def test_windows_of_a_memory_map_are_views(tmp_path: pytest.TempPathFactory) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    text = EvalSet.of_tokens(tokens, 64)
    assert [ids.shape for ids, _ in text.stacks] == [(15, 65), (1, 40)]
    assert all(np.shares_memory(ids, tokens) for ids, _ in text.stacks)


def test_documents_are_cut_where_they_begin_and_at_rows() -> None:
    begins = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    before = begins.copy()
    cuts = document_cuts(begins)
    assert cuts.tolist() == [0, 2, 4, 8, 9, 12]
    assert cuts.dtype == torch.int32
    assert (begins == before).all(), "the marks are reused at the next evaluation"


@given(length=st.integers(2, 300), context=st.integers(1, 60), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_cuts_of_every_batch_are_where_documents_begin(length: int, context: int, rows: int, seed: int) -> None:
    begins = np.random.default_rng(seed).random(length) < 0.2
    seen: list[bool] = []

    def record(tokens: Tensor, targets: Tensor, cuts: Tensor | None) -> Tensor:
        assert cuts is not None
        marks = np.zeros(tokens.numel(), bool)
        marks[cuts[:-1].numpy()] = True
        assert cuts[-1] == tokens.numel()
        assert marks[:: tokens.shape[1]].all(), "a row begins anew"
        seen.extend(marks.tolist())
        return mean_target(tokens, targets, cuts)

    mean_loss(record, EvalSet.of_tokens(np.arange(length), context, begins), rows)
    expected = begins[:-1].copy()
    expected[::context] = True
    assert seen == expected.tolist()


def test_it_stops_between_batches_when_asked_to() -> None:
    text = EvalSet.of_tokens(np.arange(100), 4)
    looks = iter([False, False, True])
    with pytest.raises(Interrupted):
        mean_loss(mean_target, text, 2, interrupted=lambda: next(looks))

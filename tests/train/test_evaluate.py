"""Evaluation texts: every token scored once, means over tokens, documents kept apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spt_fast.train.evaluate import EvalSet, Interrupted, Measured, document_cuts, measure


def own_target(tokens: Tensor, targets: Tensor, cuts: Tensor | None) -> Tensor:
    """A stand-in for a model: the "loss" of a token is the token itself."""
    assert (targets[:, :-1] == tokens[:, 1:]).all()
    return targets.float().flatten()


@given(length=st.integers(2, 500), context=st.integers(1, 120), rows=st.integers(1, 9))
def test_every_token_but_the_first_is_scored_exactly_once(length: int, context: int, rows: int) -> None:
    seen: list[int] = []

    def record(tokens: Tensor, targets: Tensor, cuts: Tensor | None) -> Tensor:
        assert targets.shape[1] <= context
        assert targets.shape[0] <= rows
        seen.extend(targets.flatten().tolist())
        return own_target(tokens, targets, cuts)

    text = EvalSet.of_tokens(np.arange(length), context)
    loss = measure(record, text, rows).loss
    assert seen == list(range(1, length))
    assert text.num_targets == length - 1
    assert loss == pytest.approx(length / 2)


def test_the_standard_error_is_over_documents_that_are_longer_than_windows() -> None:
    """By hand: sums of nats of windows of two targets, 4 windows in document 0, 1 each in documents 1 and 2."""
    text = EvalSet.of_tokens(np.arange(13), 2)
    nats = np.array([2.0, 4.0, 2.0, 4.0, 8.0, 4.0])
    mean = 24 / 12
    for document, off in (
        (None, nats - 2 * mean),
        (np.array([0, 0, 0, 0, 1, 2]), np.array([12 - 8 * mean, 8 - 2 * mean, 4 - 2 * mean])),
    ):
        found = Measured.of(replace(text, document=document), nats)
        n = len(off)
        assert found.loss == mean
        assert found.standard_error == pytest.approx((n / (n - 1) * (off**2).sum()) ** 0.5 / 12)
    assert Measured.of(replace(text, document=np.zeros(6)), nats).standard_error is None
    assert Measured.of(text, np.full(6, np.nan)).standard_error is None


def test_every_targets_loss_is_counted_in_its_own_window() -> None:
    text = replace(EvalSet.of_tokens(np.arange(12), 4), document=np.array([0, 1, 2]))
    found = measure(lambda tokens, targets, _: targets.double().flatten(), text, 2)
    sums = np.array([1 + 2 + 3 + 4, 5 + 6 + 7 + 8, 9 + 10 + 11])
    assert found == Measured.of(text, sums.astype(float))
    assert found.loss == 6


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
        assert marks[:: tokens.shape[1]].all(), "each row begins a document"
        seen.extend(marks.tolist())
        return own_target(tokens, targets, cuts)

    measure(record, EvalSet.of_tokens(np.arange(length), context, begins), rows)
    expected = begins[:-1].copy()
    expected[::context] = True
    assert seen == expected.tolist()


def test_an_evaluation_stops_between_batches_on_request() -> None:
    text = EvalSet.of_tokens(np.arange(100), 4)
    looks = iter([False, False, True])
    with pytest.raises(Interrupted):
        measure(own_target, text, 2, interrupted=lambda: next(looks))

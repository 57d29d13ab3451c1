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
    assert np.shares_memory(text.full, tokens)
    assert np.shares_memory(text.tail, tokens)


def test_documents_are_cut_after_their_end_and_at_rows() -> None:
    tokens = torch.tensor([[1, 9, 2, 3], [4, 5, 6, 9], [9, 7, 7, 7]])
    assert document_cuts(tokens, 9).tolist() == [0, 2, 4, 8, 9, 12]


def test_it_stops_between_batches_when_asked_to() -> None:
    text = EvalSet.of_tokens(np.arange(100), 4)
    looks = iter([False, False, True])
    with pytest.raises(Interrupted):
        mean_loss(mean_target, text, 2, interrupted=lambda: next(looks))

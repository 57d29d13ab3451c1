"""The figures of weights on a dataset."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spt_fast.errors import SptWarning
from spt_fast.evaluation.score import Scored, scored
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.printing import as_json


@pytest.fixture
def score(tmp_path: Path) -> Callable[[float], Scored]:
    """Of weights whose logits are `scale` times those of others."""
    np.random.default_rng(0).integers(0, 64, 200).astype(np.uint16).tofile(tmp_path / "ids.bin")

    def score(scale: float) -> Scored:
        model = GPT(GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=16, context=16, vocab_size=64, tied=False))
        with torch.no_grad():
            model.head.mul_(scale)
        model.save_hf(tmp_path / "weights")
        return scored(tmp_path / "weights", tmp_path / "ids.bin", dtype="uint16", progress=False)

    return score


def test_the_perplexity_is_that_of_the_loss_or_beyond_all_numbers(score: Callable[[float], Scored]) -> None:
    small, large = score(1), score(1e6)
    assert small.perplexity == pytest.approx(np.exp(small.loss))
    assert (large.loss > 710, large.perplexity, as_json(large)["perplexity"]) == (True, math.inf, None)


def test_a_loss_that_is_not_finite_is_warned_of(score: Callable[[float], Scored]) -> None:
    with (
        pytest.warns(SptWarning, match="weights: 1 tensor holds NaN"),
        pytest.warns(SptWarning, match=r"ids\.bin: its loss is not finite, as the weights at .*weights are those of a"),
    ):
        found = score(math.nan)
    assert as_json(found)["loss"] is as_json(found)["perplexity"] is None

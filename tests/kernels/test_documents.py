"""Where documents lie, against a walk over them; and made once for all layers of a model."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch

from spt_fast.kernels.documents import first_keys, once, spans
from spt_fast.model.gpt import GPT, GPTConfig


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ends", [[0, 24], [0, 5, 5, 9, 24, 24, 24], [0, 3, 10, 19], [0, 24, 24], [0], [0, 8, 16]])
def test_spans_and_first_keys_are_those_of_a_walk(ends: list[int], window: int | None) -> None:
    """Documents over rows, empty ones, more entries than documents, and padding, to the last row's end and over it."""
    B, T = 3, 8
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    found, first = spans(cu_seqlens, B, T), first_keys(cu_seqlens, B, T, window)
    assert found.dtype == first.dtype == torch.int32
    for at in range(B * T):
        b, t = divmod(at, T)
        inside = [(low, high) for low, high in pairwise(ends) if low <= at < high]
        if inside:
            low, high = max(inside[0][0] - b * T, 0), min(inside[0][1] - b * T, T)
            assert found[:, b, t].tolist() == [low, high]
            assert first[b, t] == (low if window is None else max(low, t - window + 1))
        else:
            assert found[1, b, t] <= t
            assert first[b, t] == t + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_made_once_for_all_layers(dtype: torch.dtype) -> None:
    """And again where another batch is written to the same place."""
    config = GPTConfig(layers=3, width=32, heads=2, kv_heads=2, ffn=32, context=16, vocab_size=32, window=4)
    model = GPT(config).to(dtype)
    ids = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    cuts, others = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 5, 32, 32], [0, 9, 20, 32]))
    expected = [model(ids, ids, ends.clone()).detach() for ends in (cuts, others)]
    with torch.autograd.profiler.profile() as profiler:
        for ends, loss in zip((cuts, others), expected, strict=True):
            cuts.copy_(ends)
            found = model(ids, ids, cuts)
            found.backward()
            assert torch.equal(found.detach(), loss)
    names = [event.name for event in profiler.function_events]
    assert names.count("aten::searchsorted") == 2


def test_what_is_written_past_autograd_is_seen_too() -> None:
    array = np.array([0, 5, 12, 24], dtype=np.int32)
    shared = torch.from_numpy(array)
    spans(shared, 3, 8)
    array[1:3] = 9, 20
    assert torch.equal(spans(shared, 3, 8), spans(torch.tensor([0, 9, 20, 24], dtype=torch.int32), 3, 8))


def test_a_copy_has_its_own() -> None:
    """Whose number of writes says nothing about the original's. On the CPU values are compared, on no other device."""
    written, made = torch.zeros(3, dtype=torch.int32, device="meta").add_(1), []

    def make(cu_seqlens: torch.Tensor) -> torch.Tensor:
        made.append(cu_seqlens)
        return cu_seqlens + 1

    once(written, make)
    again = copy.deepcopy(written).add_(1)
    assert again._version == written._version
    once(again, make)
    once(written, make)
    assert len(made) == 2
    assert made[1] is again
    here = torch.zeros(3, dtype=torch.int32)
    before = len(pickle.dumps(here))
    spans(here, 30, 100)
    assert len(pickle.dumps(here)) < before + 1000


@pytest.mark.parametrize("kept", [None, ((0, None), {}), ((1, [0, 8, 24], False), {})])
def test_one_that_was_saved_is_read_and_used(kept: tuple | None) -> None:
    """As torch.load reads by default. kept: what earlier versions left with a tensor, and in its pickles."""
    ends = torch.tensor([0, 8, 24], dtype=torch.int32)
    expected = spans(ends, 3, 8)
    if kept is None:
        saved = io.BytesIO()
        torch.save(ends, saved)
        saved.seek(0)
        ends = torch.load(saved)
    else:
        ends.made_once = kept
    assert torch.equal(spans(ends, 3, 8), expected)

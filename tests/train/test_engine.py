"""The engine: figures of a step, interruption between micro-batches, and a step recorded as a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spt_fast.data.loader import Batch
from spt_fast.errors import SptWarning
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train.local import LocalEngine
from spt_fast.train.snapshot import weights_of
from tests import tiny

CONFIG = GPTConfig(layers=2, width=32, heads=2, kv_heads=1, ffn=64, context=16, vocab_size=64)
CPU = torch.device("cpu")


def engine(device: torch.device = CPU, freeze: str = "none", **options: Any) -> LocalEngine:
    model = GPT(dataclasses.replace(CONFIG, tied=freeze == "none"), seed=1)
    made = LocalEngine(model, device=device, dtype=torch.float32, **options)
    made.begin(tiny.phase(freeze=freeze), weights_of(model))
    return made


def micro_batches(seed: int, device: torch.device = CPU) -> list[Batch]:
    ids = torch.randint(64, (2, 4, 17), generator=torch.Generator().manual_seed(seed)).to(device)
    return [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None) for rows in ids]


def replayed(compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], object]]:
    """Replaces `capture`, which needs a GPU: replaying a recording recomputes it."""
    figures = torch.zeros(3)
    return figures, lambda: figures.copy_(compute())


def with_documents(batches: list[Batch], cuts: list[int]) -> list[Batch]:
    cu_seqlens = torch.tensor([0, *cuts, 64], dtype=torch.int32).to(batches[0].tokens.device)
    return [dataclasses.replace(batch, cu_seqlens=cu_seqlens) for batch in batches]


def test_recorded_steps_equal_eager_steps_for_any_number_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    recordings: list[int] = []
    captured = lambda compute: recordings.append(1) or replayed(compute)  # noqa: E731
    monkeypatch.setattr("spt_fast.train.local.capture", captured)
    cuts = [
        [],
        [5],
        [3, 20, 40],
        [16, 32, 48],
        [7],
        [9, 10, 11, 12],
        list(range(1, 12)),
        [30],
        list(range(1, 24)),
        None,
        [],
    ]
    found = []
    for cuda_graphs in (False, True):
        made, losses = engine(cuda_graphs=cuda_graphs), list[float]()
        for step, each in enumerate(cuts):
            batches = micro_batches(step) if each is None else with_documents(micro_batches(step), each)
            result = made.step(batches, 1e-2 / (1 + step), lambda: False)
            assert result is not None
            losses.append(result.read().loss)
        found.append((losses, made.snapshot(state=True).tensors()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(found[1][1][name], tensor) for name, tensor in found[0][1].items())
    assert len(recordings) == 4  # with room for 16 entries, then 64, without documents, and with room again


def test_a_step_is_recorded_when_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(cuda_graphs="auto")
    for step in range(5):
        made.step(micro_batches(step), 1e-3, lambda: False)
    assert made.recorded is None
    for room, seconds, expected in ((True, 0.1, True), (False, 0.1, False), (True, 60.0, False)):
        monkeypatch.setattr("spt_fast.train.local._has_room_for_another_step", lambda device, room=room: room)
        made.device, made.recordings, made._step_s = torch.device("cuda"), 0, seconds
        assert made._is_to_be_recorded(micro_batches(0)) == expected

    def refused(compute: object) -> None:
        raise RuntimeError("no graph today")

    monkeypatch.setattr("spt_fast.train.local.capture", refused)
    made = engine(cuda_graphs=True)
    for step in range(3):
        made.step(micro_batches(step), 1e-3, lambda: False)
    with pytest.warns(
        SptWarning, match=r"cuda_graphs: a step could not be recorded \(no graph today\); training continues without it"
    ):
        assert made.step(micro_batches(3), 1e-3, lambda: False) is not None
    assert made.step(micro_batches(4), 1e-3, lambda: False) is not None
    assert made.optimizer.count == 5


def test_a_learning_rate_on_the_device_gives_the_same_step() -> None:
    weights = []
    for lr in (1e-2, torch.tensor(1e-2)):
        made = engine()
        for seed in range(3):
            figures = made._compute(micro_batches(seed), lr, lambda: False)
            assert figures is not None
        assert made.optimizer.count == 3
        weights.append(torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()]))
    assert torch.equal(*weights)


def test_an_interruption_between_micro_batches_changes_nothing() -> None:
    made = engine()
    before = made.snapshot(state=True).tensors()
    looks = iter([False, True])
    assert made.step(micro_batches(0), 1e-2, lambda: next(looks)) is None
    after = made.snapshot(state=True).tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in made.model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize(("freeze", "documents"), [("none", False), ("embeddings", False), ("none", True)])
def test_a_recorded_step_equals_the_eager_step(freeze: str, documents: bool) -> None:
    device = torch.device("cuda", 0)
    losses, weights = [], []
    for cuda_graphs in (False, True):
        made = engine(device, freeze, cuda_graphs=cuda_graphs)
        results = []
        for seed in range(8):
            batches = micro_batches(seed, device)
            batches = with_documents(batches, [5, 20, 40][: seed % 4]) if documents else batches
            results.append(made.step(batches, 1e-2 / (1 + seed), lambda: False))
        losses.append([result.read()[0] for result in results if result is not None])
        weights.append(made.snapshot(state=True).tensors())
        assert (made.recorded is not None) == cuda_graphs
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)

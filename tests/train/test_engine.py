"""The engine: figures of a step, interruption between micro-batches, and a step recorded as a CUDA graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spt_fast.data.loader import Batch
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train.local import LocalEngine
from spt_fast.train.snapshot import weights_of
from tests import tiny

CONFIG = GPTConfig(layers=2, width=32, heads=2, kv_heads=1, ffn=64, context=16, vocab_size=64)
CPU = torch.device("cpu")


def engine(device: torch.device = CPU, freeze: str = "none", **options: bool) -> LocalEngine:
    model = GPT(dataclasses.replace(CONFIG, tied=freeze == "none"), seed=1)
    made = LocalEngine(model, device=device, dtype=torch.float32, **options)
    made.begin(tiny.phase(freeze=freeze), weights_of(model))
    return made


def micro_batches(seed: int, device: torch.device = CPU) -> list[Batch]:
    ids = torch.randint(64, (2, 4, 17), generator=torch.Generator().manual_seed(seed)).to(device)
    return [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None) for rows in ids]


def test_a_step_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which needs no GPU to tell; what is recorded does."""
    recordings = []

    class Recorded:
        def __init__(self, compute: object, like: object) -> None:
            recordings.append(like)

        def __call__(self, micro_batches: object, lr: float) -> torch.Tensor:
            return torch.zeros(3)

    monkeypatch.setattr("spt_fast.train.local.RecordedStep", Recorded)
    made = engine(cuda_graphs=True)
    for step in range(8):
        assert made.step(micro_batches(step), 1e-3, lambda: False) is not None
    assert len(recordings) == 1


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
@pytest.mark.parametrize("freeze", ["none", "embeddings"])
def test_a_recorded_step_is_the_step(freeze: str) -> None:
    device = torch.device("cuda", 0)
    losses, weights = [], []
    for cuda_graphs in (False, True):
        made = engine(device, freeze, cuda_graphs=cuda_graphs)
        results = [made.step(micro_batches(seed, device), 1e-2 / (1 + seed), lambda: False) for seed in range(8)]
        losses.append([result.read()[0] for result in results if result is not None])
        weights.append(made.snapshot(state=True).tensors())
        assert (made.recorded is not None) == cuda_graphs
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)

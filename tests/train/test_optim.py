"""AdamW over a model: torch's own as the reference, what is decayed, masters, clipping, snapshots."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spt_fast.config import Optimizer
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train.engine import LocalEngine, untied, weights_of
from spt_fast.train.optim import AdamW

CONFIG = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=8, vocab_size=32, qk_norm=True)


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 32, (4, 9), generator=generator) for _ in range(count)]


def backward(model: nn.Module, ids: torch.Tensor) -> None:
    model(ids[:, :-1], ids[:, 1:]).backward()


@pytest.mark.parametrize("clip", [None, 0.1])
def test_it_is_torchs_adamw_with_decay_on_matrices_only(clip: float | None) -> None:
    ours = GPT(CONFIG, seed=1)
    theirs = copy.deepcopy(ours)
    settings = Optimizer(lr=1e-2, weight_decay=0.3, clip=clip)
    optimizer = AdamW(ours, settings)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=settings.betas, eps=settings.eps)
    for ids in batches(6):
        backward(ours, ids)
        backward(theirs, ids)
        norm = optimizer.grad_norm()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip or 1e9)
        torch.testing.assert_close(norm, expected)
        optimizer.step(1e-2, norm, torch.tensor(False))
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, msg=name)


def test_bf16_parameters_are_rounded_masters_and_small_updates_add_up() -> None:
    model = GPT(CONFIG, seed=1).to(torch.bfloat16)
    optimizer = AdamW(model, Optimizer(lr=1e-6, weight_decay=0.0, clip=None))
    before = optimizer.snapshot(state=False)
    for ids in batches(3):
        backward(model, ids)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        optimizer.step(1e-6, optimizer.grad_norm(), torch.tensor(False))
        optimizer.zero_grad()
    moved = optimizer.snapshot(state=False)
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    for name, param in model.named_parameters():
        assert torch.equal(param, moved[f"weights/{name}"].bfloat16())


def test_a_skipped_step_moves_nothing() -> None:
    model = GPT(CONFIG, seed=1)
    optimizer = AdamW(model, Optimizer(lr=1e-2))
    before = optimizer.snapshot(state=True)
    backward(model, batches(1)[0])
    for param in model.parameters():
        assert param.grad is not None
        param.grad.fill_(float("nan"))
    optimizer.step(1e-2, optimizer.grad_norm(), torch.tensor(True))
    after = optimizer.snapshot(state=True)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_snapshot_restored_trains_on_bit_for_bit() -> None:
    def train(engine: LocalEngine, ids: torch.Tensor) -> None:
        backward(engine.model, ids)
        engine.optimizer.step(1e-2, engine.optimizer.grad_norm(), torch.tensor(False))
        engine.optimizer.zero_grad()

    def engine() -> LocalEngine:
        return LocalEngine(GPT(CONFIG, seed=1), device=torch.device("cpu"), dtype=torch.bfloat16)

    first, data = engine(), batches(6)
    start = weights_of(GPT(CONFIG, seed=1))
    first.begin(Optimizer(lr=1e-2), 0.1, start)
    for ids in data[:3]:
        train(first, ids)
    snapshot = first.snapshot(state=True)
    for ids in data[3:]:
        train(first, ids)
    second = engine()
    second.begin(Optimizer(lr=1e-2), 0.1, start, current=snapshot)
    for ids in data[3:]:
        train(second, ids)
    ours, theirs = first.snapshot(state=True), second.snapshot(state=True)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_untying_copies_the_embedding_and_its_moments() -> None:
    model = GPT(CONFIG, seed=1)
    optimizer = AdamW(model, Optimizer(lr=1e-2))
    backward(model, batches(1)[0])
    optimizer.step(1e-2, optimizer.grad_norm(), torch.tensor(False))
    snapshot = untied(optimizer.snapshot(state=True), "embedding", "head")
    model.untie()
    fresh = AdamW(model, Optimizer(lr=1e-2))
    fresh.restore(snapshot)
    assert torch.equal(fresh.exp_avg["head"], optimizer.exp_avg["embedding"])
    assert torch.equal(model.head_weight, model.embedding)
    assert model.head_weight.data_ptr() != model.embedding.data_ptr()

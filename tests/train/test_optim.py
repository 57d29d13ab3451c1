"""An optimizer over a model, AdamW: torch's own as the reference, what is decayed, masters, clipping, snapshots."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spt_fast import kernels
from spt_fast.config import recipe_from
from spt_fast.errors import RecipeError
from spt_fast.kernels import adamw_step_all
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.model.parameters import table
from spt_fast.optimizers import AdamW, Muon, Optimizer
from spt_fast.train import checkpoint
from spt_fast.train.local import LocalEngine
from spt_fast.train.optim import ModelOptimizer
from spt_fast.train.run import run
from spt_fast.train.snapshot import Snapshot, weights_of
from tests import tiny
from tests.train.momentum import Momentum
from tests.train.test_loop import StopAfter, assert_same_run

CONFIG = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=8, vocab_size=32, qk_norm=True)


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 32, (4, 9), generator=generator) for _ in range(count)]


def backward(model: nn.Module, ids: torch.Tensor) -> None:
    model(ids[:, :-1], ids[:, 1:]).backward()


def same(one: Snapshot, other: Snapshot) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_norm_of_millions_of_gradients_is_right_to_fp32() -> None:
    model = GPT(GPTConfig(layers=1, width=64, heads=2, kv_heads=1, ffn=64, context=8, vocab_size=50_000))
    optimizer = ModelOptimizer(model, AdamW(lr=1e-3))
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    exact = sum(param.grad.double().square().sum() for param in model.parameters() if param.grad is not None) ** 0.5
    assert float(optimizer.grad_norm()) == pytest.approx(float(exact), rel=1e-7)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_it_is_torchs_adamw_with_decay_on_matrices_only(clip: float | None) -> None:
    ours = GPT(CONFIG, seed=1)
    theirs = copy.deepcopy(ours)
    settings = AdamW(lr=1e-2, weight_decay=0.3, clip=clip)
    optimizer = ModelOptimizer(ours, settings)
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
    optimizer = ModelOptimizer(model, AdamW(lr=1e-6, weight_decay=0.0, clip=None))
    before = optimizer.snapshot(state=False)
    for ids in batches(3):
        backward(model, ids)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        optimizer.step(1e-6, optimizer.grad_norm(), torch.tensor(False))
        optimizer.zero_grad()
    moved = optimizer.snapshot(state=False)
    assert not same(before, moved)
    for name, param in model.named_parameters():
        assert torch.equal(param, moved.weights[name].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [AdamW(lr=1e-2, clip=0.1), Muon(lr=1e-2, clip=0.1)], ids=["adamw", "muon"])
def test_flat_tensors_change_no_bit(settings: Optimizer, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that an earlier flat optimizer has moved, with gradients allocated elsewhere; AdamW is one update."""
    calls = []

    def counted(*lists: list[torch.Tensor], **how: Any) -> None:
        calls.append(len(lists[0]))
        adamw_step_all(*lists, **how)

    monkeypatch.setattr(kernels, "adamw_step_all", counted)
    moved, left = (GPT(CONFIG, seed=1).to(dtype) for _ in range(2))
    ModelOptimizer(moved, settings)
    flat, lists = ModelOptimizer(moved, settings, 0.1), ModelOptimizer(left, settings, 0.1, flat=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for one, other in zip(moved.parameters(), left.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        norms = [optimizer.grad_norm() for optimizer in (flat, lists)]
        torch.testing.assert_close(*norms)
        versions = [param._version for param in moved.parameters()]
        for optimizer in (flat, lists):
            optimizer.step(1e-2, norms[0], torch.tensor(False))
            optimizer.zero_grad()
        assert all(param._version > version for param, version in zip(moved.parameters(), versions, strict=True))
    assert same(flat.snapshot(state=True), lists.snapshot(state=True))
    assert all(torch.equal(a, b) for a, b in zip(moved.parameters(), left.parameters(), strict=True))
    others = sum(not (row.kind.hidden and settings.whole_matrices) for row in table(CONFIG).values())
    assert calls == 2 * [1, others]


def test_gradients_of_a_step_replace_those_of_the_previous_one_in_place() -> None:
    model, plain = (GPT(CONFIG, seed=1).to(torch.bfloat16) for _ in range(2))
    optimizer = ModelOptimizer(model, AdamW(lr=1e-2))
    places = []
    for ids in batches(2):
        for _ in range(2):
            backward(model, ids)
            backward(plain, ids)
        places.append({param.grad.data_ptr() for param in model.parameters() if param.ndim > 1})
        optimizer.grad_norm()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=0.02, atol=0.002)
        optimizer.zero_grad()
        plain.zero_grad()
    assert places[0] == places[1]


def test_a_skipped_step_moves_nothing() -> None:
    model = GPT(CONFIG, seed=1)
    optimizer = ModelOptimizer(model, AdamW(lr=1e-2))
    before = optimizer.snapshot(state=True)
    backward(model, batches(1)[0])
    for param in model.parameters():
        assert param.grad is not None
        param.grad.fill_(float("nan"))
    optimizer.step(1e-2, optimizer.grad_norm(), torch.tensor(True))
    after = optimizer.snapshot(state=True)
    assert same(before, after)


def test_a_restored_snapshot_continues_bit_for_bit() -> None:
    def train(engine: LocalEngine, ids: torch.Tensor) -> None:
        backward(engine.model, ids)
        engine.optimizer.step(1e-2, engine.optimizer.grad_norm(), torch.tensor(False))
        engine.optimizer.zero_grad()

    def engine() -> LocalEngine:
        return LocalEngine(GPT(CONFIG, seed=1), device=torch.device("cpu"), dtype=torch.bfloat16)

    first, data = engine(), batches(6)
    start = weights_of(GPT(CONFIG, seed=1))
    first.begin(tiny.phase(anchor=0.1), start)
    for ids in data[:3]:
        train(first, ids)
    snapshot = first.snapshot(state=True)
    for ids in data[3:]:
        train(first, ids)
    second = engine()
    second.begin(tiny.phase(anchor=0.1), start, current=snapshot)
    for ids in data[3:]:
        train(second, ids)
    ours, theirs = first.snapshot(state=True), second.snapshot(state=True)
    assert same(ours, theirs)


def test_untying_copies_the_embedding_and_its_moments() -> None:
    model = GPT(CONFIG, seed=1)
    optimizer = ModelOptimizer(model, AdamW(lr=1e-2))
    backward(model, batches(1)[0])
    optimizer.step(1e-2, optimizer.grad_norm(), torch.tensor(False))
    snapshot = optimizer.snapshot(state=True).untied()
    model.untie()
    fresh = ModelOptimizer(model, AdamW(lr=1e-2))
    fresh.restore(snapshot)
    assert torch.equal(fresh.state["exp_avg"]["head"], optimizer.state["exp_avg"]["embedding"])
    assert torch.equal(model.head_weight, model.embedding)
    assert model.head_weight.data_ptr() != model.embedding.data_ptr()


@pytest.mark.parametrize("skip", [False, True])
def test_muon_updates_each_matrix_as_torchs_does_and_the_rest_as_adamw_does(skip: bool) -> None:
    """In bf16, as torch's: the matrices in one parameter are updated separately, and equal shapes are batched."""
    decay, lr = 0.1, 0.02
    ours = GPT(CONFIG, seed=1).to(torch.bfloat16)
    adamw, theirs = copy.deepcopy(ours), {}
    optimizer = ModelOptimizer(ours, Muon(lr=lr, weight_decay=decay, clip=None))
    other = ModelOptimizer(adamw, AdamW(lr=lr, weight_decay=decay, clip=None))
    before = {name: master.clone() for name, master in optimizer.masters.items()}
    for name, row in table(CONFIG).items():
        if row.kind.hidden:
            parts = before[name].split(row.stacked)
            theirs[name] = [nn.Parameter(part.clone()) for part in parts]
            assert len(parts) == {"wqkv": 3, "w_gate_up": 2}.get(row.name, 1)
    matrices = [matrix for parts in theirs.values() for matrix in parts]
    reference = torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, param in ours.named_parameters():
            param.grad = torch.randn(param.shape, generator=generator)
            adamw.get_parameter(name).grad = param.grad.clone()
            if name in theirs:
                for matrix, grad in zip(theirs[name], param.grad.split([len(m) for m in theirs[name]]), strict=True):
                    matrix.grad = grad.clone()
        for each in (optimizer, other):
            each.step(lr, torch.tensor(1.0), torch.tensor(skip))
        reference.step()
    for name, master in optimizer.masters.items():
        if skip:
            assert torch.equal(master, before[name])
        elif name in theirs:
            moved, expected = master - before[name], torch.cat(theirs[name]).detach() - before[name]
            assert (moved - expected).norm() < 0.01 * expected.norm(), name
        else:
            assert torch.equal(master, other.masters[name]), name
        assert torch.equal(ours.get_parameter(name), master.bfloat16())
    assert all(not tensor.any() for kind in optimizer.state.values() for tensor in kind.values()) == skip


def test_muon_pulls_toward_the_anchor() -> None:
    model = GPT(CONFIG, seed=1)
    optimizer = ModelOptimizer(model, Muon(lr=1e-2, weight_decay=0.0), anchor_decay=0.5)
    for name, master in optimizer.masters.items():
        master.add_(1.0)
        model.get_parameter(name).grad = torch.zeros_like(master)
    optimizer.step(1e-2, torch.tensor(0.0), torch.tensor(False))
    for name, master in optimizer.masters.items():
        torch.testing.assert_close(master - optimizer.anchor[name], torch.full_like(master, 0.995), msg=name)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        (Momentum(lr=1e-2, momentum=0.8), ["velocity"]),
        (Muon(lr=1e-2, momentum=0.8), ["exp_avg", "exp_avg_sq", "momentum"]),
    ],
)
def test_another_optimizer_is_its_class_and_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Optimizer, kinds: list[str]
) -> None:
    """Trained, interrupted and resumed to the same weights, with a state of its own kinds in the checkpoints."""
    tiny.write_corpora(tmp_path)
    runs = []
    for name in ("whole", "parts"):
        raw = tiny.raw_recipe(tmp_path, name)
        for phase in raw["phases"]:
            phase["optimizer"] = {"name": settings.name, "lr": 1e-2, "momentum": 0.8}
        raw["phases"][1] |= {"optimizer_state": "keep", "anchor": 0}
        runs.append(raw)
    assert recipe_from(runs[0]).phases[0].optimizer == settings
    run(recipe_from(runs[0]), progress=False)
    monkeypatch.setattr("spt_fast.train.run.StopRequest", StopAfter)
    monkeypatch.setattr(StopAfter, "looks", 85)
    while run(recipe_from(runs[1]), resume=True, progress=False)["status"] == "stopped":
        newest = checkpoint.newest(tmp_path / "parts" / "checkpoints")
        assert newest is not None
        current = checkpoint.load(newest.path)["current"]
        assert list(current.state) == kinds
        for kind, tensors in current.state.items():
            hidden = {name for name in current.weights if name.endswith(("wqkv", "wo", "w_gate_up", "w_down"))}
            others = current.weights.keys() - hidden
            assert tensors.keys() == {
                n for part in (hidden, others) if kind in settings.kinds_of(part is hidden) for n in part
            }
        StopAfter.looks = 85
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_unknown_optimizer_and_a_setting_of_another_are_named() -> None:
    raw = tiny.raw_recipe(Path("."))
    raw["phases"][0]["optimizer"] = {"name": "adam", "lr": 1}
    with pytest.raises(RecipeError, match=r"phases\[pretrain\]\.optimizer\.name: 'adam'.*did you mean 'adamw'"):
        recipe_from(raw)
    raw["phases"][0]["optimizer"] = {"name": "muon", "lr": 1, "momentum": 1}
    with pytest.raises(RecipeError, match=r"phases\[pretrain\]\.optimizer\.momentum: 1 is invalid: it must be below 1"):
        recipe_from(raw)
    raw["phases"][0]["optimizer"] = {"name": "momentum", "lr": 1, "betas": [0.9, 0.95]}
    with pytest.raises(RecipeError, match=r"phases\[pretrain\]\.optimizer\.betas: unknown key"):
        recipe_from(raw)


def test_a_model_and_its_optimizer_are_freed_at_once() -> None:
    """Not only at the next garbage collection: the next phase needs their memory."""
    gc.collect()
    gc.disable()
    try:
        model = GPT(CONFIG, seed=1)
        optimizer = ModelOptimizer(model, AdamW(lr=1e-2))
        backward(model, batches(1)[0])
        optimizer.step(1e-2, optimizer.grad_norm(), torch.tensor(False))
        held = [weakref.ref(each) for each in (model.embedding, model.final_norm, optimizer._parts[0])]
        del optimizer, model
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


def test_a_model_in_training_may_be_converted_and_is_saved_without_gradients() -> None:
    """After a conversion, gradients are not in the optimizer's tensor, which has another dtype."""
    model = GPT(CONFIG, seed=1)
    optimizer = ModelOptimizer(model, AdamW(lr=1e-2))
    backward(model, batches(1)[0])
    optimizer.grad_norm()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert all(param.in_place is None and param.grad is None for param in loaded.parameters())
    optimizer.zero_grad()
    wide = copy.deepcopy(GPT(CONFIG, seed=1)).double()
    for each in (model.to(torch.float64), wide, loaded):
        backward(each, batches(1)[0])
    for ours, exact, plain in zip(model.parameters(), wide.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, exact.grad, check_dtype=False)
        torch.testing.assert_close(plain.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)

"""What a run starts from: only the embedding of other weights, and an embedding that is frozen."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spt_fast.config import recipe_from
from spt_fast.data.loader import Batch
from spt_fast.errors import CheckpointError, RecipeError
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train import checkpoint
from spt_fast.train.evaluate import evaluation_texts, measure
from spt_fast.train.local import LocalEngine
from spt_fast.train.plan import make_plan
from spt_fast.train.run import run
from spt_fast.train.snapshot import weights_of
from spt_fast.train.weights import load_model
from tests import tiny
from tests.train.test_loop import StopAfter

SHAPE = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "ffn": 32, "context": tiny.CONTEXT, "vocab_size": 64}
STEP = 4 * tiny.CONTEXT
"""Tokens of a step."""


def phase(name: str, steps: int, mixture: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "tokens": steps * STEP,
        "mixture": mixture,
        "batch": {"sequences": 4, "micro": 2},
        "optimizer": {"lr": 1e-2},
        "schedule": {"name": "constant"},
        "eval": {"every": "1000 steps", "tokens": 200},
        **more,
    }


def raw_recipe(data: Path, name: str, *phases: dict[str, Any], **more: Any) -> dict[str, Any]:
    raw = tiny.raw_recipe(data, name)
    return {**raw, "model": dict(SHAPE), "phases": [*phases], "checkpoint": {"every": "2 steps", "keep": 99}, **more}


def trained(raw: dict[str, Any], *, resume: bool = False) -> dict[str, Any]:
    return run(recipe_from(raw), resume=resume, progress=False)


def weights(run_folder: str | Path, phase_name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run_folder) / "weights" / phase_name / "model.safetensors")


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# ------------------------------------------------------------------------------------------------ init_only


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_embedding_is_copied_and_the_rest_is_initialised_by_the_seed(data: Path, tied: bool) -> None:
    given = GPT(GPTConfig(**SHAPE, tied=tied), seed=5)
    given.save_hf(data / f"given-{tied}")
    raw = raw_recipe(data, "only", phase("all", 1, {"chem": 1}), seed=3, init=str(data / f"given-{tied}"), model={})
    start = make_plan(recipe_from(raw | {"init_only": "embeddings"})).starting_model()
    fresh = GPT(GPTConfig(**SHAPE, tied=tied), seed=3)
    assert start.config == fresh.config
    assert torch.equal(start.embedding, given.embedding)
    assert torch.equal(start.head_weight, given.embedding if tied else fresh.head_weight)
    for (name, ours), (_, drawn) in zip(start.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(ours, drawn) == (name != "embedding"), name


def test_a_run_begins_with_the_embedding_of_another_runs_weights(data: Path) -> None:
    before = raw_recipe(data, "before", phase("pretrain", 20, {"general": 1}))
    trained(before)
    raw = raw_recipe(
        data, "after", phase("all", 1, {"general": 1}), init=before["run"], init_only="embeddings", model={}
    )
    raw |= {"seed": 7, "precision": "fp32"}
    trained(raw)
    by_hand = GPT(GPTConfig(**SHAPE), seed=7)
    by_hand.embedding = load_model(Path(before["run"])).embedding
    plan = make_plan(recipe_from(raw))
    texts = evaluation_texts(plan, plan.phases[0].phase)["heldout"]
    for source, text in texts.items():
        expected = measure(partial(by_hand, reduction="none"), text, 8).loss
        assert tiny.metrics(Path(raw["run"]))[0]["heldout"][source] == pytest.approx(expected, rel=1e-5)


def test_a_plan_reports_missing_weights_as_a_run_does(data: Path) -> None:
    folder = data / "incomplete"
    GPT(GPTConfig(**SHAPE)).save_hf(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    recipe = recipe_from(raw_recipe(data, "none", phase("all", 1, {"chem": 1}), init=str(folder), model={}))
    with pytest.raises(CheckpointError, match=r"^init: .*incomplete: pytorch_model\.bin is a pickle"):
        make_plan(recipe)
    (folder / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"^init: .*model\.safetensors: is a link to a missing file"):
        make_plan(recipe)
    with pytest.raises(CheckpointError, match=r"^init: .*pytorch_model\.bin: is not a folder; give the folder that"):
        make_plan(replace(recipe, init=str(folder / "pytorch_model.bin")))


# ------------------------------------------------------------------------------------------------ freeze


@pytest.mark.parametrize(("precision", "fp8"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_a_frozen_embedding_does_not_change_and_is_trained_again_afterwards(
    data: Path, precision: str, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_fast.model.gpt.FP8_WIDTH", 16)
    raw = raw_recipe(
        data,
        f"frozen-{precision}-{fp8}",
        phase("pretrain", 4, {"general": 1}),
        phase("frozen", 4, {"chem": 1}, freeze="embeddings", untie=True, anchor=0.1, grid={"lr": [1e-2, 2e-2]}),
        phase("free", 4, {"chem": 1}, optimizer_state="keep"),
        precision=precision,
        engine={"fp8": fp8},
    )
    trained(raw)
    pretrain, frozen, free = (weights(raw["run"], name) for name in ("pretrain", "frozen", "free"))
    assert torch.equal(frozen[EMBEDDING], pretrain[EMBEDDING])
    assert not torch.equal(frozen[HEAD], pretrain[EMBEDDING])
    assert all(not torch.equal(frozen[name], pretrain[name]) for name in pretrain if name != EMBEDDING)
    assert all(not torch.equal(free[name], frozen[name]) for name in frozen)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_other_parameters_are_updated_as_by_torchs_adamw(clip: float | None) -> None:
    """A frozen embedding does not count in the norm either."""
    config = GPTConfig(**SHAPE, tied=False)
    theirs = GPT(config, seed=1)
    engine = LocalEngine(copy.deepcopy(theirs), device=torch.device("cpu"), dtype=torch.float32)
    begun = tiny.phase(weight_decay=0.3, clip=clip, freeze="embeddings")
    engine.begin(begun, weights_of(theirs))
    others = [param for name, param in theirs.named_parameters() if name != "embedding"]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        ids = torch.randint(64, (4, 9), generator=generator)
        result = engine.step([Batch(ids[:, :-1], ids[:, 1:], None)], 1e-2, lambda: False)
        assert result is not None
        theirs(ids[:, :-1], ids[:, 1:]).backward()
        norm = nn.utils.clip_grad_norm_(others, clip or 1e9)
        assert result.read()[1] == pytest.approx(norm.item(), rel=1e-5)
        reference.step()
        theirs.zero_grad()
    for (name, ours), param in zip(engine.model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, param, rtol=2e-5, atol=2e-6, msg=name)


def test_a_tied_embedding_cannot_be_frozen(data: Path) -> None:
    frozen = phase("frozen", 1, {"chem": 1}, freeze="embeddings")
    raw = raw_recipe(data, "tied", frozen)
    with pytest.raises(RecipeError, match=r"phases\[frozen\]\.freeze: the embedding is also the head.*frozen\]\.untie"):
        make_plan(recipe_from(raw))
    for more in ({"untie": True}, {}):
        raw["phases"] = [frozen | more]
        raw["model"]["tied"] = bool(more)
        make_plan(recipe_from(raw))
    raw["model"]["tied"] = True
    raw["phases"] = [phase("first", 1, {"chem": 1}, untie=True), frozen]
    make_plan(recipe_from(raw))


def test_a_run_with_a_frozen_embedding_resumes_to_itself_and_keeps_its_moments(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen between two phases that train it; the optimizer's state, the embedding's included, is kept throughout."""
    phases = [
        phase("first", 3, {"general": 1}, untie=True),
        phase("frozen", 3, {"chem": 1}, freeze="embeddings", optimizer_state="keep"),
        phase("free", 3, {"chem": 1}, optimizer_state="keep"),
    ]
    whole = raw_recipe(data, "whole", *phases, precision="bf16", checkpoint={"every": "1 steps", "keep": 99})
    trained(whole)
    parts = raw_recipe(data, "parts", *phases, precision="bf16")
    monkeypatch.setattr("spt_fast.train.run.StopRequest", StopAfter)
    monkeypatch.setattr(StopAfter, "looks", 37)
    lives = 1
    while trained(parts, resume=True)["status"] == "stopped":
        lives += 1
        assert lives < 20
    assert lives > 3
    assert tiny.metrics(Path(whole["run"])) == tiny.metrics(Path(parts["run"]))
    for planned in phases:
        ours, theirs = weights(whole["run"], planned["name"]), weights(parts["run"], planned["name"])
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    folders = checkpoint.listed(Path(whole["run"]) / "checkpoints")
    first, frozen, free = (
        [checkpoint.load(folder)["current"].tensors() for folder in folders if f"-p{i:02d}-" in folder.name]
        for i in range(3)
    )
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        name = f"{kind}/embedding"
        assert all(torch.equal(snapshot[name], frozen[0][name]) for snapshot in frozen)
        assert not torch.equal(frozen[0][name], first[-1][name])
        assert not torch.equal(free[-1][name], frozen[0][name])

"""The price of a run: the arithmetic by hand, the source of the speed, and the output of `plan`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_fast import cli
from spt_fast.cli import program
from spt_fast.config import Recipe, recipe_from
from spt_fast.errors import CheckpointError, RecipeError
from spt_fast.model.flops import block_matrices, train_flops_per_token
from spt_fast.optimizers import Muon
from spt_fast.train.evaluate import evaluation_texts
from spt_fast.train.plan import make_plan
from spt_fast.train.price import Machine, Speed, Way, evaluated_tokens, parse_bytes, phase_memory, price, speed_of
from spt_fast.train.run import run
from tests import tiny

H100 = 989e12


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    tiny.write_corpora(tmp_path)
    return tiny.recipe(tmp_path)


def machine_of(recipe: Recipe, **fields: Any) -> Machine:
    return Machine.of(recipe, **{"gpu": "H100", **fields})


def write_measurements(folder: Path, recipe: Recipe, rates: list[tuple[float, float | None]]) -> None:
    """A run folder with steps at these (tokens_per_s, mfu)."""
    folder.mkdir()
    tiny.write_recipe(folder, recipe.plain())
    lines = [{"kind": "train", "tokens_per_s": tokens_per_s, "mfu": mfu} for tokens_per_s, mfu in rates]
    lines.append({"kind": "eval"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_hours_and_cost_by_hand(recipe: Recipe) -> None:
    plan = make_plan(recipe)
    machine = machine_of(recipe, gpus=2, memory=10**9)
    priced = price(plan, machine, speed_of(plan, machine, mfu=0.5), per_gpu_hour=3.0)
    rate = 0.5 * H100 * 2
    a_token = train_flops_per_token(plan.model)
    pretrain, finetune = priced.times
    assert pretrain.step_s == pytest.approx(8 * 16 * a_token / rate)
    assert pretrain.hours == pytest.approx(30 * 8 * 16 * a_token / rate / 3600)
    assert finetune.arms == 2
    assert finetune.hours == pytest.approx(2 * 16 * 4 * 16 * a_token / rate / 3600)
    evaluation_hours = sum(evaluated_tokens(plan, i) * a_token / 3 / rate / 3600 for i in (0, 1))
    assert priced.hours == pytest.approx(pretrain.hours + finetune.hours + evaluation_hours)
    assert priced.cost == pytest.approx(priced.hours * 2 * 3.0)
    full = next(way for way in priced.ways if way.checkpointing == "full")
    training_hours = pretrain.hours + finetune.hours
    assert full.hours == pytest.approx(4 / 3 * training_hours + evaluation_hours)
    assert all(way.fits for way in priced.ways)
    assert not any(way.fits for way in price(plan, machine_of(recipe, memory=10**5), Speed(None, None, "")).ways)


def test_the_price_counts_the_tokens_that_the_run_evaluates(recipe: Recipe) -> None:
    raw = recipe.plain()
    raw["phases"][1]["stop"] = None
    recipe = recipe_from(raw)
    plan = make_plan(recipe)
    run(recipe, progress=False)
    records = [r for r in tiny.metrics(Path(recipe.run)) if r["kind"] == "eval"]
    for planned in plan.phases:
        texts = evaluation_texts(plan, planned.phase)
        targets = sum(text.num_targets for by_source in texts.values() for text in by_source.values())
        evaluations = sum(record["phase"] == planned.phase.name for record in records)
        assert evaluated_tokens(plan, planned.index) == evaluations * targets


def test_speed_is_stated_or_measured_or_assumed(recipe: Recipe, tmp_path: Path) -> None:
    plan, machine = make_plan(recipe), machine_of(recipe, gpus=4)
    assert speed_of(plan, machine) == Speed(0.4 * H100 * 4, 0.4, "assumed")
    write_measurements(Path(recipe.run), recipe, [(1.0, 0.1), (9.0, 0.3), (9.0, 0.5), (9.0, 0.35)])
    measured = speed_of(plan, machine)
    assert measured.mfu == 0.35  # the median without the first, which includes the start-up
    assert measured.source == f"measured in {Path(recipe.run) / 'metrics.jsonl'}"
    with pytest.raises(RecipeError, match=r"^mfu: 0\.0 is invalid: write a share above 0"):
        speed_of(plan, machine, mfu=0.0)
    assert speed_of(plan, machine, mfu=0.6) == Speed(0.6 * H100 * 4, 0.6, "stated")

    whole = recipe_from(recipe.plain() | {"run": str(tmp_path / "whole"), "engine": {"checkpointing": "full"}})
    write_measurements(tmp_path / "whole", whole, [(9.0, 0.3)])
    slower = speed_of(plan, machine, run=tmp_path / "whole")
    assert slower.mfu == pytest.approx(0.4)  # computes the forward pass twice
    assert slower.source.endswith("metrics.jsonl, where it is 30% with what checkpointing recomputes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_only_measured_tokens_give_a_time(recipe: Recipe, tmp_path: Path) -> None:
    plan, here = make_plan(recipe), Machine.of(recipe)
    assert speed_of(plan, here).flops_per_s is None
    assert speed_of(plan, here, mfu=0.5).flops_per_s is None
    priced = price(plan, here, speed_of(plan, here), per_gpu_hour=1.0)
    assert [getattr(priced, key) for key in ("hours", "cost", "hours_at_40_percent_mfu")] == [None] * 3
    write_measurements(Path(recipe.run), recipe, [(50.0, None), (100.0, None)])
    assert price(plan, here, speed_of(plan, here)).times[0].step_s == pytest.approx(8 * 16 / 100)
    assert speed_of(plan, here).source.endswith("metrics.jsonl, with as many processes as it had")

    other = recipe_from(recipe.plain() | {"run": str(tmp_path / "other"), "model": {"preset": "1m", "context": 16}})
    write_measurements(tmp_path / "other", other, [(100.0, None)])
    with pytest.raises(RecipeError, match=r"other: was measured on another kind of machine.*`mfu=40%`"):
        speed_of(plan, here, run=tmp_path / "other")
    with pytest.raises(CheckpointError, match="no training step is logged"):
        speed_of(plan, here, run=tmp_path / "absent")
    (tmp_path / "other" / "metrics.jsonl").write_text('{"kind": "train", "mfu": 0.3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: is damaged .*\(line 1: `tokens_per_s` is missing"):
        speed_of(plan, here, run=tmp_path / "other")


def test_memory_is_of_the_phase_that_needs_most(recipe: Recipe) -> None:
    plan, machine = make_plan(recipe), machine_of(recipe)
    needed = [phase_memory(plan, index, machine).total for index in (0, 1)]
    assert price(plan, machine, speed_of(plan, machine)).memory_bytes == max(needed)
    assert phase_memory(plan, 1, machine).optimizer == 16 * (20_704 + 64 * 32)  # the anchor, and a head of its own
    raw = recipe.plain()
    raw["phases"][1]["freeze"] = "embeddings"
    assert phase_memory(make_plan(recipe_from(raw)), 1, machine).optimizer == 16 * 20_704


def test_what_muon_needs_for_its_products_is_counted_and_named(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = recipe.plain()
    raw["phases"][0]["optimizer"] = {"name": "muon", "lr": 1e-3}
    plan, machine = make_plan(recipe_from(raw)), machine_of(recipe)
    square, tall = 5 * 6 * 32**3, 5 * (4 * 32**2 * 64 + 2 * 32**3)  # q and o; gate, up and down; k and v
    flops = 2 * (2 * square + 3 * tall + 2 * 5 * (4 * 16**2 * 32 + 2 * 16**3))
    share = flops / (plan.flops_per_token(0) * 8 * 16)
    said = price(plan, machine, speed_of(plan, machine)).left_out
    assert said[-1].startswith(f"muon's products of matrices in pretrain, {share:.0%} more FLOPs, unless the MFU")
    assert said[:-1] == tuple(price(make_plan(recipe), machine, speed_of(make_plan(recipe), machine)).left_out)
    stays = phase_memory(make_plan(recipe), 0, machine).optimizer - 4 * block_matrices(plan.model)
    monkeypatch.setattr(
        Muon, "update_bytes", lambda self, matrices, itemsize: itemsize * 10**9 * sum(matrices.values())
    )
    for gpus, matrices in ((1, 14), (3, 7)):
        needed = phase_memory(plan, 0, machine_of(recipe, gpus=gpus), Way(0, "none", "none"), micro=1)
        assert needed.optimizer == stays + 2 * 10**9 * matrices


def test_the_recipes_own_way_is_its_engines(recipe: Recipe) -> None:
    raw = recipe.plain() | {"engine": {"stage": 3, "offload": "all", "checkpointing": "full"}}
    raw["phases"][0]["batch"]["micro"] = raw["phases"][1]["batch"]["micro"] = 2
    for gpus, name, own in ((1, "local", (0, "none", "full")), (2, "auto", (3, "all", "full"))):
        raw["engine"]["name"] = name
        plan = make_plan(recipe_from(raw), world=gpus)
        machine = machine_of(plan.recipe, gpus=gpus)
        priced = price(plan, machine, speed_of(plan, machine, mfu=0.4))
        (way,) = (way for way in priced.ways if way.recipe)
        assert (way.stage, way.offload, way.checkpointing) == own
        assert (priced.hours is None) == (own[1] != "none")  # how long offloading takes is not known
        assert priced.memory_bytes == way.bytes.total
    raw["engine"]["name"] = "local"
    with pytest.raises(RecipeError, match=r"engine\.name: local is one process and can't be 2; write deepspeed"):
        make_plan(recipe_from(raw), world=2)


def test_the_command_prints_every_figure(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny.write_recipe(tmp_path, recipe.plain()))
    words = ["plan", path, "--gpu", "H100", "--gpus", "2", "--gpu-memory", "80GB", "--mfu", "50%", "--price", "2.5"]
    words += ["--set", "phases.pretrain.batch.micro=2", "--set", "phases.finetune.batch.micro=2"]
    cli.app(words, standalone_mode=False)
    said = capsys.readouterr().out
    for part in ("→", "window", "optimizer", "stated", "early stopping", "hours"):
        assert part in said
    cli.app([*words, "--json"], standalone_mode=False)
    plan = json.loads(capsys.readouterr().out)
    assert plan.keys() >= {
        *("phases", "parameters", "matmul_parameters", "flops_per_token", "tokens", "flops", "memory_bytes"),
        *("hours_at_40_percent_mfu", "hours", "cost", "mfu", "speed_from", "times", "ways", "left_out"),
    }
    assert len(plan["ways"]) == 24
    keys = ("stage", "offload", "checkpointing", "recipe", "bytes", "fits", "step_s", "hours", "cost")
    assert all(tuple(way) == keys for way in plan["ways"])
    assert (plan["gpus"], plan["gpu_memory_bytes"], plan["speed_from"]) == (2, 80 * 10**9, "stated")


def test_an_assumed_mfu_is_called_one_with_the_flag_for_another(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.out, "width", 500)
    words = ["plan", str(tiny.write_recipe(tmp_path, recipe.plain())), "--gpu", "H100"]
    cli.app(words, standalone_mode=False)
    assert "an MFU of 40% is assumed: give yours with --mfu; 49% at 124m" in capsys.readouterr().out
    cli.app([*words, "--mfu", "40%"], standalone_mode=False)
    assert "is assumed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "H2"), "--gpu: 'H2' is invalid: its peak is not known"),
        (("--gpu-memory", "80"), "--gpu-memory: '80' is invalid: write a size such as 80GB"),
        (("--mfu", "40"), "--mfu: '40' is invalid: write a share between 0 and 1"),
        (("--gpus", "3"), "does not divide among 3 processes"),
        (("--mfu-from", "absent"), "absent: no training step is logged"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_invalid_arguments_are_named(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["spt-fast", "plan", str(tiny.write_recipe(tmp_path, recipe.plain())), *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_memory_sizes() -> None:
    assert parse_bytes("80GB", "") == 80 * 10**9
    assert parse_bytes("79.5 GiB", "") == round(79.5 * 2**30)

"""`precision: auto` is the dtype that this machine multiplies faster: measured once, recorded, and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spt_fast.cli import app
from spt_fast.config import recipe_from
from spt_fast.errors import RecipeError
from spt_fast.kernels import measured
from spt_fast.model.config import GPTConfig
from spt_fast.study.study import study_from
from spt_fast.study.sweep import _keep_precision
from spt_fast.study.tree import expand
from spt_fast.train import precision
from spt_fast.train.dry_run import dry_run
from spt_fast.train.precision import pick_precision, precision_of, read_precision, shapes_of
from spt_fast.train.run import run
from tests import tiny
from tests.study.tiny_study import raw_study

CPU = torch.device("cpu")
SHAPE = GPTConfig(layers=3, width=64, heads=2, kv_heads=1, ffn=2000, context=8, vocab_size=5000)
Machine = Callable[..., list[int]]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Sets the measured rates; returns a list that grows by one at each measurement."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[int] = []

    def measures(bf16: float, fp32: float, *, instructions: bool = True) -> list[int]:
        def answer(shapes: Any) -> dict[str, Any]:
            asked.append(len(shapes))
            return {"bf16": bf16, "fp32": fp32, "date": "2026-11-28"}

        monkeypatch.setattr(precision, "multiplies_bf16", lambda: instructions)
        monkeypatch.setattr(precision, "_measure", answer)
        return asked

    return measures


def forget(folder: Path) -> None:
    for file in (folder / "cache" / "spt_fast").glob("precision-*.json"):
        file.unlink()


def test_auto_is_the_faster_dtype_by_measurement_and_not_by_instructions(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bf16, fp32, expected in ((160, 270, "fp32"), (842, 193, "bf16"), (200, 196, "fp32"), (210, 190, "bf16")):
        machine(bf16, fp32)
        forget(tmp_path)
        found = pick_precision("auto", CPU, SHAPE)
        says = f"{expected}: this CPU reaches {bf16} GFLOP/s in bf16 and {fp32} in fp32, measured 2026-11-28 with"
        assert str(found).startswith(says)
    asked = machine(1000, 1, instructions=False)
    assert asked == [4] * 4
    assert str(pick_precision("auto", CPU, SHAPE)) == "fp32: this CPU has no instructions that multiply bf16"
    assert [pick_precision(given, CPU, SHAPE).dtype for given in ("bf16", "fp32")] == [torch.bfloat16, torch.float32]
    for capability, dtype in (((7, 5), torch.float32), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert pick_precision("auto", torch.device("cuda"), SHAPE).dtype == dtype
    assert asked == [4] * 4


def test_a_measurement_is_kept_for_its_machine_and_shapes(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = machine(842, 193)
    first = pick_precision("auto", CPU, SHAPE)
    machine(1, 193)
    assert (pick_precision("auto", CPU, SHAPE), len(asked)) == (first, 1)
    pick_precision("auto", CPU)
    monkeypatch.setattr(measured, "_read", lambda path: "model name\t: Abacus\nflags\t\t: beads\n")
    assert pick_precision("auto", CPU, SHAPE).dtype == torch.float32
    assert len(asked) == 3, "other shapes, and another processor"
    (file, *_) = (tmp_path / "cache" / "spt_fast").glob("precision-*.json")
    for damaged in ("", "{}", "[1]", '{"key": {}, "found": 1}', '{"key": {}, "found": {}}', "\0"):
        for each in file.parent.glob("*.json"):
            each.write_text(damaged)
        assert pick_precision("auto", CPU, SHAPE).dtype == torch.float32
    (file,) = [each for each in file.parent.glob("*.json") if each.read_text() != "\0"]
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"found": kept["found"] | {"bf16": "200", "fp32": "100"}}))
    assert pick_precision("auto", CPU, SHAPE).dtype == torch.float32
    assert len(asked) == 10
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert pick_precision("auto", CPU, SHAPE).dtype == torch.float32
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert pick_precision("auto", CPU, SHAPE).dtype == torch.float32, "a user whom the list of users doesn't have"


def test_the_test_multiplies_the_models_own_matrices_in_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    D, F, V = 64, 2000, 5000
    assert shapes_of(SHAPE) == {
        (128, D): 3 * 128 * D,
        (D, D): 3 * D * D,
        (1024, D): 3 * 2 * F * D + V * D,
        (D, 1024): 3 * D * F,
    }
    rates = precision._measure({(16, 8): 1})
    assert rates.keys() == {"bf16", "fp32", "date"}
    assert min(rates["bf16"], rates["fp32"]) > 0
    calls: list[str] = []
    taken = measured.medians([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3, seconds=9)
    assert ("".join(calls), len(taken)) == ("abababab", 2)
    assert len(measured.medians([lambda: calls.append("c")], rounds=10**9, seconds=0)) == 1
    assert calls.count("c") == 1, "time is up"


def test_a_run_prints_and_records_its_precision_and_a_resume_keeps_it(
    machine: Machine, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = machine(160, 270)
    raw = tiny.raw_recipe(data, "decided")
    raw["phases"] = raw["phases"][:1]
    raw["phases"][0] |= {"tokens": 2 * 8 * tiny.CONTEXT, "schedule": {"name": "constant"}}
    raw["checkpoint"]["every"] = "1 steps"
    summary = run(recipe_from(raw))
    assert summary["precision"] == "float32"
    assert "precision: fp32: this CPU reaches 160 GFLOP/s in bf16" in " ".join(capsys.readouterr().err.split())
    (state,) = sorted((data / "decided" / "checkpoints").glob("step-*/state.json"))[-1:]
    compute = json.loads(state.read_text())["compute"]
    assert compute["dtype"] == "float32"
    assert compute["measured"] == {"precision": summary["precision_reason"], "kernels": {}}
    machine(842, 193)
    forget(tmp_path)
    raw["phases"][0]["tokens"] *= 2
    longer = run(recipe_from(raw), resume=True)
    assert [longer[key] for key in ("precision", "precision_reason")] == ["float32", summary["precision_reason"]]
    assert "precision: fp32: this CPU reaches 160 GFLOP/s" in " ".join(capsys.readouterr().err.split())
    assert len(asked) == 1

    (trial,) = dry_run(recipe_from(raw))
    assert trial.precision.startswith("bf16: this CPU reaches 842 GFLOP/s")
    recipe = tiny.write_recipe(tmp_path, raw)
    plan = CliRunner().invoke(app, ["plan", str(recipe), "--json"])
    assert json.loads(plan.stdout)["precision"] == trial.precision


def test_every_run_of_a_study_uses_the_precision_of_the_first(machine: Machine, tmp_path: Path) -> None:
    machine(160, 270)
    runs = expand(study_from(raw_study(tmp_path)))
    file = Path(str(runs[0].recipe.precision_file))
    assert {run.recipe.precision_file for run in runs} == {str(file)}
    assert precision_of(runs[0].recipe, CPU, SHAPE).dtype == torch.float32
    assert not file.exists(), "a plan or a dry run records nothing"
    assert precision_of(runs[0].recipe, CPU, SHAPE, record=True).dtype == torch.float32
    machine(842, 193)
    forget(tmp_path)
    for planned in runs[1:]:
        assert precision_of(planned.recipe, CPU, SHAPE, record=True).dtype == torch.float32
    assert pick_precision("auto", CPU, SHAPE).dtype == torch.bfloat16
    precision.write_precision(file, pick_precision("auto", CPU, SHAPE))
    assert read_precision(file).dtype == torch.float32, "the first one's stays"
    explicit = expand(study_from(raw_study(tmp_path, precision="bf16")))[0].recipe
    assert precision_of(explicit, CPU, SHAPE, record=True).dtype == torch.bfloat16
    assert not runs[0].recipe.changes(recipe_from(runs[0].recipe.plain() | {"precision_file": None}))

    file.write_text("{}")
    with pytest.raises(RecipeError, match=rf"precision_file: {file} cannot be read .*; put it back, or write"):
        precision_of(runs[0].recipe, CPU, SHAPE)
    file.unlink()
    begun = Path(runs[1].recipe.run)
    begun.mkdir(parents=True)
    (begun / "summary.json").write_text(json.dumps({"status": "done", "precision": "float32", "phases": {}}))
    _keep_precision(runs)
    assert str(precision_of(runs[0].recipe, CPU, SHAPE)) == f"fp32: from {file}, as in the earlier runs"

"""Task scores of several runs: over the same questions with the same settings, or the reason why a run is left out."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from spt_fast.cli import main
from spt_fast.evaluation.results import Metric, Settings, TaskResult, results_of, save
from spt_fast.report.page import page
from spt_fast.study.tasks import task_tables, with_results
from tests.study.fake_runs import fake_run
from tests.study.synthetic import spt_table
from tests.study.test_compare import NPT, SPT

TOKENIZER = "1" * 64
ALIKE = Settings(
    version="1", library="lm-eval 0.4.13", num_fewshot=0, limit=None, context=64, bos=None, dtype="float32"
)
BEFORE, NPT_AFTER, SPT_AFTER = np.random.default_rng(0).integers(0, 2, (3, 120)).astype(float).tolist()


def scored(folder: Path, weights: str, each: list[float], task: str = "notes.jsonl", **settings: Any) -> None:
    """Write a task result of weights, which are created if they are missing."""
    place = folder / "weights" / weights
    place.mkdir(parents=True, exist_ok=True)
    save_file({weights: torch.zeros(1)}, place / "model.safetensors", {"folder": str(folder)})
    metrics = {"acc": Metric.mean(each), "f1": Metric(0.5, None)}
    asked = replace(ALIKE, **settings)
    save(TaskResult(task=task, questions=len(each), metrics=metrics, settings=asked), place, TOKENIZER)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """NPT and SPT with finetunes that were scored with the same settings, and NPT's starting weights."""
    npt, spt = fake_run(tmp_path / "npt", NPT), fake_run(tmp_path / "spt", SPT, delta="1/20")
    scored(npt, "pretrain", BEFORE)
    scored(npt, "finetune", NPT_AFTER)
    scored(spt, "finetune", SPT_AFTER)
    return [npt, spt]


def paired(one: list[float], other: list[float]) -> tuple[float, float]:
    each = np.subtract(one, other)
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))


def test_differences_are_over_the_same_questions(runs: list[Path]) -> None:
    (table,) = task_tables(runs)
    assert (table.task, table.questions, table.notes) == ("notes.jsonl", 120, [])
    npt, _, spt, spt_f1 = table.scores
    assert npt.change is not None
    assert spt.against_first is not None
    assert (npt.change.value, npt.change.standard_error) == pytest.approx(paired(NPT_AFTER, BEFORE))
    assert (spt.against_first.value, spt.against_first.standard_error) == pytest.approx(paired(SPT_AFTER, NPT_AFTER))
    assert npt.against_first is spt.before is spt.change is None
    assert spt_f1.against_first is not None
    assert spt_f1.against_first.standard_error is None, "no mean over questions"


def test_results_are_of_the_weights_whatever_path_led_to_them(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = task_tables(runs)
    (kept,) = results_of(runs[0] / "weights" / "pretrain")
    for file in (runs[0] / "tasks").glob("pretrain-*"):
        file.unlink()
    monkeypatch.chdir(runs[0] / "weights" / "pretrain")
    save(kept, Path(), TOKENIZER)
    assert task_tables(runs) == [before]


def test_runs_scored_with_other_settings_are_left_out_by_name(runs: list[Path], tmp_path: Path) -> None:
    other = fake_run(tmp_path / "other", SPT, delta="1/10")
    scored(other, "finetune", SPT_AFTER, context=32, bos=1)
    scored(runs[1], "pretrain", BEFORE[:20], limit=20)
    (table,) = task_tables([*runs, other, fake_run(tmp_path / "none", NPT, seed=1)])
    assert {score.run for score in table.scores} == {"npt", "spt"}
    assert table.notes == [
        "spt: its starting weights are left out: it was scored with other settings (limit 20 instead of None); use "
        "the same ones",
        "other is left out: it was scored with other settings (context 32 instead of 64, bos 1 instead of None); use "
        "the same ones",
        "none is left out: it was not scored",
    ]
    save_file({"again": torch.zeros(1)}, runs[1] / "weights" / "finetune" / "model.safetensors")
    assert {score.run for score in task_tables(runs)[0].scores} == {"npt"}, "the results are of other weights"
    few = fake_run(tmp_path / "few", NPT, seed=2)
    scored(few, "finetune", [1.0, 0.0], task="arc_easy")
    assert task_tables([few])[0].notes[0].startswith("2 questions are few")


def test_the_newest_settings_of_a_changed_task_are_shown(runs: list[Path]) -> None:
    for version in ("3", "0", "2"):
        for weights, each in (("pretrain", BEFORE), ("finetune", NPT_AFTER)):
            scored(runs[0], weights, each, version=version)
        (table,) = task_tables(runs[:1])
        assert table.settings.version == version
        assert table.scores[0].change is not None


def test_a_finetune_is_compared_with_the_weights_of_the_run_that_it_starts_from(
    runs: list[Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"base": torch.zeros(1)}, base / "model.safetensors")
    recorded = TaskResult(task="notes.jsonl", questions=120, metrics={"acc": Metric.mean(BEFORE)}, settings=ALIKE)
    save(recorded, base, TOKENIZER)
    for init in (runs[0] / "weights" / "pretrain", base):
        tuned = fake_run(tmp_path / f"after-{init.name}", SPT, seed=5, change={"init": str(init)})
        recipe = (tuned / "recipe.yaml").read_text()
        (tuned / "recipe.yaml").write_text(_only_the_finetune(recipe))
        scored(tuned, "finetune", SPT_AFTER)
        (score, _) = task_tables([tuned])[0].scores
        assert score.change is not None
        assert (score.change.value, score.change.standard_error) == pytest.approx(paired(SPT_AFTER, BEFORE))


def _only_the_finetune(recipe: str) -> str:
    plain = yaml.safe_load(recipe)
    plain["phases"] = plain["phases"][1:]
    return yaml.safe_dump(plain)


def test_compare_and_report_show_task_scores(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["spt-fast", "compare", *map(str, runs), *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    (table,) = json.loads(said("--json"))["tasks"]
    assert [score["run"] for score in table["scores"]] == ["npt", "npt", "spt", "spt"], "the first given comes first"
    change = paired(SPT_AFTER, NPT_AFTER)
    assert table["scores"][2]["against_first"]["standard_error"] == pytest.approx(change[1])
    assert "each" not in table["scores"][0]["after"], "it is long"
    shown = said()
    assert "notes.jsonl: 120 questions, lm-eval 0.4.13, 0 examples, context 64" in shown
    assert f"{change[0]:+.3f}".replace("-", "−") in shown
    assert f"±{change[1]:.3f}" in shown
    study = tmp_path / "study"
    study.mkdir()
    (study / "runs").symlink_to(tmp_path)
    assert with_results([study, fake_run(tmp_path / "unscored", NPT)]) == [
        study / "runs" / "npt",
        study / "runs" / "spt",
    ]
    html = page(spt_table(seeds=(0,)).query("stage == 0 and delta == 0"), [], None, tasks=task_tables(runs))
    assert '<a href="#tasks">Tasks</a>' in html
    assert "<dt>acc, acc_norm</dt>" in html
    assert f"{paired(NPT_AFTER, BEFORE)[0]:+.3f}".replace("-", "−") in html

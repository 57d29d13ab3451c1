"""A training without a result says so, and its files are valid JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from typer.testing import CliRunner

from spt_fast import cli
from spt_fast.config import recipe_from
from spt_fast.errors import CheckpointError, SptWarning
from spt_fast.evaluation.score import scored
from spt_fast.model.gpt import GPT
from spt_fast.study.runs import FinishedRun, evaluations_of
from spt_fast.train import checkpoint
from spt_fast.train.health import too_many_skipped
from spt_fast.train.run import run
from spt_fast.train.state import SavedState
from tests import tiny


def raw_recipe(data: Path, name: str, steps: int, **phase: Any) -> dict[str, Any]:
    raw = tiny.raw_recipe(data, name) | {"precision": "fp32", "checkpoint": {"every": "2 steps", "keep": 9}}
    raw["phases"] = [raw["phases"][0] | {"tokens": steps * 8 * tiny.CONTEXT, "schedule": {"name": "constant"}} | phase]
    return raw


def strictly(text: str) -> Any:
    """JSON as other languages read it."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def files_of(folder: Path) -> list[Any]:
    """All JSON of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    states = [path.read_text() for path in folder.glob("checkpoints/*/state.json")]
    return [strictly(text) for text in ((folder / "summary.json").read_text(), *lines, *states)]


def poison(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Make the loss NaN at regular training steps; a step is two micro-batches."""
    real, calls = GPT.forward, iter(range(10**9))

    def forward(self: GPT, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = real(self, *args, **kwargs)
        return loss * math.nan if torch.is_grad_enabled() and next(calls) % (2 * every) == 0 else loss

    monkeypatch.setattr(GPT, "forward", forward)


def test_a_run_whose_last_loss_is_nan_has_failed_and_its_json_says_so(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = raw_recipe(data, "diverged", 6, optimizer={"lr": 1e38}, eval={"every": "2 steps", "tokens": 200})
    folder = Path(raw["run"])
    summary = run(recipe_from(raw))
    assert summary["status"] == "failed"
    assert "phases[pretrain]: 5 of 6 steps were skipped" in summary["reason"]
    assert "lower optimizer.lr" in summary["reason"]
    assert summary["phases"]["pretrain"]["heldout"] == {"general": None, "chem": None}
    assert summary["phases"]["pretrain"]["skipped"] == summary["skipped_steps"] == 5
    assert files_of(folder)[0] == summary
    assert not (folder / "weights").exists(), "these weights are no result"
    with pytest.raises(
        CheckpointError, match=r"its status is 'failed' \(phases\[pretrain\]: 5 of 6 .*correct the recipe"
    ):
        FinishedRun.read(folder)
    with pytest.warns(SptWarning, match=r"diverged: is failed \(phases\[pretrain\]: 5 of 6 .*; \S+step-0\S+ is used"):
        scored(folder, data / "chem.heldout")
    assert math.isnan(evaluations_of(folder)[-1]["heldout"]["chem"])
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: step 2 of pretrain was skipped" in said

    recipe = tiny.write_recipe(data, raw)
    monkeypatch.setattr(sys, "argv", ["spt-fast", "train", str(recipe), "--resume"])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 1
    assert "spt-fast: phases[pretrain]: 5 of 6 steps were skipped" in " ".join(capsys.readouterr().err.split())
    verdict = CliRunner().invoke(cli.app, ["checkpoint", "list", str(folder), "--json"])
    strictly(verdict.stdout)

    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    train = SavedState.read(found.state, found.path).train
    assert train.newest is not None
    assert train.best is not None
    assert math.isnan(train.newest.losses["select"]["chem"])
    assert math.isfinite(train.best.losses["select"]["chem"])


def test_a_base_whose_loss_is_nan_is_named_before_the_first_step(data: Path) -> None:
    raw = raw_recipe(data, "base", 1)
    run(recipe_from(raw), progress=False)
    base = Path(raw["run"]) / "weights" / "pretrain"
    model = GPT.from_hf(base)
    with torch.no_grad():
        model.final_norm[0] = math.nan
    model.save_hf(data / "damaged")
    raw = raw_recipe(data, "from-base", 30, grid={"lr": [1e-3, 1e-4]}) | {"init": str(data / "damaged"), "model": {}}
    summary = run(recipe_from(raw), progress=False)
    assert (summary["status"], summary["phases"], summary["skipped_steps"]) == ("failed", {}, 0)
    assert re.match(
        r"init: the weights at .*damaged give a loss that is not finite on general, before", summary["reason"]
    )


def test_a_phase_with_more_than_a_few_percent_of_skipped_steps_has_failed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, every=5)
    raw = raw_recipe(data, "skips", 12)
    summary = run(recipe_from(raw), progress=False)
    assert summary["status"] == "failed"
    assert "3 of 12 steps were skipped" in summary["reason"]
    skipped = [record["skipped"] for record in files_of(Path(raw["run"])) if record.get("kind") == "train"]
    assert skipped == [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    given = ((1, 1), (1, 2), (1, 12), (2, 12), (5, 100), (6, 100))
    assert [too_many_skipped(*steps) for steps in given] == [True, False, False, True, False, True]


def test_an_occasional_skipped_step_is_reported_at_the_end(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, every=20)
    recipe = tiny.write_recipe(data, raw_recipe(data, "odd", 12))
    monkeypatch.setattr(sys, "argv", ["spt-fast", "train", str(recipe)])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 0
    assert "skipped steps: 1, because the loss or its gradient was not finite" in capsys.readouterr().out


def test_a_phase_without_improvement_says_so(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(recipe_from(raw_recipe(data, "worse", 3, optimizer={"lr": 3.0}, eval={"every": "1 steps", "tokens": 200})))
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: phases[pretrain]: no evaluation was better than the first; the deciding loss, of general" in said
    run(recipe_from(raw_recipe(data, "better", 3, eval={"every": "1 steps", "tokens": 200})))
    assert "no evaluation was better" not in capsys.readouterr().err


def test_an_arm_that_diverges_loses_to_one_that_does_not(data: Path) -> None:
    for steps, name in ((8, "grid"), (30, "given-up")):
        raw = raw_recipe(data, name, steps, grid={"lr": ["1e38", "1e-3"]})
        summary = run(recipe_from(raw), progress=False)
        phase, hot = summary["phases"]["pretrain"], summary["phases"]["pretrain"]["grid"][0]
        assert (summary["status"], phase["arm"], phase["steps"], phase["skipped"]) == ("done", 1, steps, 0)
        assert (hot["heldout"]["chem"], hot["training"]["chem"]) == (None, None)
        assert (hot["skipped"], hot["steps"]) == ((7, 8) if name == "grid" else (21, 22)), "it was given up"
        assert summary["skipped_steps"] == hot["skipped"]
        files_of(Path(raw["run"]))

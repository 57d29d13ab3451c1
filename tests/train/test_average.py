"""Trained weights averaged with those that the phase started from: their values, their records, and interruptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

from spt_fast.config import recipe_from
from spt_fast.errors import RecipeError
from spt_fast.model import hf
from spt_fast.study.runs import FinishedRun
from spt_fast.study.runs_table import table_of
from spt_fast.train.audit import audit_run
from spt_fast.train.folder import recipe_of
from spt_fast.train.loop import Arm, Trainer
from spt_fast.train.origin import History
from spt_fast.train.resume import changes
from spt_fast.train.run import print_summary, run
from spt_fast.train.state import Evaluation
from tests import tiny
from tests.train.test_loop import assert_same_run

SHARE = 0.25


def raw_recipe(data: Path, name: str, average: object) -> dict[str, Any]:
    """A pretraining, then a finetune with an early stop and a grid, each arm of which is averaged."""
    raw = tiny.raw_recipe(data, name)
    raw["phases"][0] |= {"tokens": 10 * 8 * tiny.CONTEXT, "eval": {"every": "5 steps", "tokens": 400}}
    raw["phases"][1] |= {"anchor": 0.0, "tokens": 8 * 4 * tiny.CONTEXT, "average": average}
    return raw | {"precision": "fp32"}


@pytest.fixture(scope="module")
def averaged(data: Path) -> Path:
    for name, average in (("plain", 0), ("averaged", "25%")):
        assert run(recipe_from(raw_recipe(data, name, average)), progress=False)["status"] == "done"
    return data / "averaged"


def test_the_average_and_its_losses_are_passed_on(averaged: Path, data: Path) -> None:
    (_, start), (_, plain), (config, handed_on) = (
        hf.load(folder / "weights" / phase)
        for folder, phase in ((averaged, "pretrain"), (data / "plain", "finetune"), (averaged, "finetune"))
    )
    summary = json.loads((averaged / "summary.json").read_text())["phases"]["finetune"]
    trained = json.loads((data / "plain" / "summary.json").read_text())["phases"]["finetune"]
    assert (summary["arm"], summary["handed_on"]) == (trained["arm"], trained["handed_on"])  # or choose another recipe
    assert not config.tied
    for name, tensor in handed_on.items():
        began = start["embedding" if name == "head" else name]
        torch.testing.assert_close(tensor, (1 - SHARE) * plain[name] + SHARE * began)
    records = [record for record in tiny.metrics(averaged) if record["kind"] == "eval" and "average" in record]
    assert [(record["arm"], record["average"]) for record in records] == [(0, SHARE), (1, SHARE)]
    for record, arm in zip(records, summary["grid"], strict=True):
        assert (record["step"], record["tokens"]) == (arm["handed_on"], arm["handed_on"] * 4 * tiny.CONTEXT)
        assert (record["heldout"], record["select"], record["train"]) == (
            *(arm["heldout"], arm["select"], arm["training"]),
        )
        assert arm["standard_errors"] == record["standard_errors"]
    assert summary["heldout"] != trained["heldout"]


def test_the_history_and_the_summary_name_the_step_of_the_best_weights(averaged: Path, tmp_path: Path) -> None:
    summary = json.loads((averaged / "summary.json").read_text())
    tuned = summary["phases"]["finetune"] | {"handed_on": 6}
    summary["phases"]["finetune"] = tuned
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "recipe.yaml").write_bytes((averaged / "recipe.yaml").read_bytes())
    history = History.of(tmp_path, "finetune")
    assert history is not None
    assert [phase.tokens for phase in history.phases] == [10 * 8 * tiny.CONTEXT, 6 * 4 * tiny.CONTEXT]
    with (console := Console(width=80)).capture() as printed:
        print_summary(recipe_of(averaged), summary, console)
    assert "finetune: the weights and their losses are those after step 6, the best" in printed.get()
    lr = ("0.001", "0.02")[tuned["arm"]]
    assert f"finetune: the best of its grid is lr {lr}, by the select loss of chem" in printed.get()
    assert "pretrain: " not in printed.get()


def test_a_run_interrupted_in_every_average_equals_an_uninterrupted_one(
    data: Path, averaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average, interrupted = Trainer.average, set[int]()

    def asked_to_stop_in_it(trainer: Trainer, arm: Arm, trained: Evaluation) -> Evaluation:
        if trainer.state.arm not in interrupted:
            interrupted.add(trainer.state.arm)
            trainer.stop.received.append("SIGTERM")
        return average(trainer, arm, trained)

    monkeypatch.setattr(Trainer, "average", asked_to_stop_in_it)
    recipe = recipe_from(raw_recipe(data, "interrupted", "25%"))
    endings = [run(recipe, resume=True, progress=False)["status"] for _ in range(3)]
    assert endings == ["stopped", "stopped", "done"]
    assert_same_run(averaged, data / "interrupted")


def finetune(data: Path, name: str, **phase: Any) -> dict[str, Any]:
    """The second phase of `raw_recipe` alone, from the weights of the first."""
    raw = raw_recipe(data, name, 0)
    init = {"init": str(data / "averaged" / "weights" / "pretrain"), "model": {}}
    return raw | init | {"phases": [raw["phases"][1] | {"optimizer_state": "reset"} | phase]}


def told(folder: Path) -> dict[str, Any]:
    """The finetune in summary.json without its speed."""
    phase = json.loads((folder / "summary.json").read_text())["phases"]["finetune"]
    for reached in (phase, *phase["grid"]):
        del reached["tokens_per_s"]
    return phase


def test_runs_that_differ_only_in_their_average_are_trained_once(
    data: Path, averaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the averages of the second arm. Another of the runs was started separately and is not changed."""
    others = [{"share": share, "run": str(data / f"by-another-{share}")} for share in ("10%", "3/4")]
    (data / "by-another-3/4").mkdir(parents=True)
    recipe = recipe_from(finetune(data, "for-all", also_average=others))
    measure, calls = Trainer.measure, []

    def asked_to_stop_in_it(trainer: Trainer, arm: Arm, step: int, **more: float) -> Evaluation:
        calls.extend([trainer.state.arm] if more else [])
        if calls.count(1) == 2:
            trainer.stop.received.append("SIGTERM")
        return measure(trainer, arm, step, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "measure", asked_to_stop_in_it)
        assert run(recipe, progress=False)["status"] == "stopped"
    assert run(recipe, resume=True, progress=False)["status"] == "done"
    for name, average in (("alone-0", 0), ("alone-10%", "10%")):
        run(recipe_from(finetune(data, name, average=average)), progress=False)
    for ours, alone in (("for-all", "alone-0"), ("by-another-10%", "alone-10%")):
        found = [hf.load(data / name / "weights" / "finetune")[1] for name in (ours, alone)]
        assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
        assert told(data / ours) == told(data / alone)
        tables = [table_of([data / name], "chem", "general").drop(columns="run") for name in (ours, alone)]
        pd.testing.assert_frame_equal(*tables)
    other = data / "by-another-10%"
    assert changes(other, recipe_from(finetune(data, "by-another-10%", average="10%"))) == []
    assert not list((data / "by-another-3/4").iterdir())
    assert audit_run(other).keys() == audit_run(data / "alone-10%").keys()
    again = run(recipe_from(finetune(data, "by-another-10%", average="10%")), resume=True, progress=False)
    assert again["phases"]["finetune"]["arm"] == told(other)["arm"]
    for share, folder, field in (("30%", data / "x" / ".." / "for-all", "run"), ("0.1", data / "new", "share")):
        once_more = finetune(data, "for-all", also_average=[*others, {"share": share, "run": str(folder)}])
        with pytest.raises(RecipeError, match=rf"^phases\[finetune\].also_average\[2\].{field}: .* is invalid"):
            recipe_from(once_more)
    two = raw_recipe(data, "two", 0)
    two["phases"][1] |= {"also_average": others}
    with pytest.raises(RecipeError, match=r"^phases\[finetune\].also_average: the recipe has several phases"):
        recipe_from(two)


def test_tables_and_comparisons_use_the_average_as_the_end_of_its_finetune(averaged: Path, data: Path) -> None:
    table = table_of([data / "plain", averaged], "chem", "general")
    ends = table[table["handed_on"] & (table["stage"] == 1)]
    assert list(ends["average"]) == [0.0, SHARE]
    summary = json.loads((averaged / "summary.json").read_text())["phases"]["finetune"]
    assert ends["general_heldout"].iloc[1] == summary["heldout"]["general"]
    finished = FinishedRun.read(averaged)
    assert finished.treatment.key == "0.25 average 0.25"
    path = finished.finetune_path(summary["arm"])
    assert [tokens for tokens, *_ in path] == [0, summary["handed_on"] * 4 * tiny.CONTEXT]
    assert path[-1][1:] == (summary["heldout"]["chem"], summary["heldout"]["general"])

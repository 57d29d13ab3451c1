"""Changes to the recipe of a resumed run: which are allowed, which are refused by name, and longer runs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spt_fast.config import recipe_from
from spt_fast.errors import RecipeError
from spt_fast.train.resume import refused
from spt_fast.train.run import run
from tests import tiny
from tests.train.test_loop import stopped_run, weights

STEP = 8 * tiny.CONTEXT


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe with other values, by dotted path."""
    raw = copy.deepcopy(raw)
    for path, value in changes.items():
        node: Any = raw
        *head, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for key in head:
            node = node[key]
        node[last] = value
    return raw


FREE = {
    "phases.0.batch.micro": 2,
    "phases.0.eval.every": "7 steps",
    "log": {"every": "3 steps"},
    "checkpoint": {"every": "4 steps", "keep": 1},
    "engine": {"name": "local"},
}


def test_changes_without_effect_on_results_are_allowed(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folder = stopped_run(data, "free", monkeypatch, looks=45)
    run(recipe_from(changed(raw, FREE)), resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: phases[pretrain].batch.micro: 4 → 2, so not bit-identical from here" in said
    steps = [r["step"] for r in tiny.metrics(folder) if r["kind"] == "eval" and r["phase"] == "pretrain"]
    assert steps[-3:] == [21, 28, 30]
    run(recipe_from(raw | {"run": str(data / "undisturbed"), "phases": raw["phases"][:1]}), progress=False)
    ours, theirs = weights(folder, "pretrain"), weights(data / "undisturbed", "pretrain")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phases.0.optimizer.lr": 1e-4},
            r"phases\.0\.optimizer\.lr: 0\.003 → 0\.0001 \(the run has trained with it",
        ),
        ({"phases.0.batch.sequences": 16}, r"phases\.0\.batch\.sequences: 8 → 16 \(the run has trained with it"),
        ({"phases.1.eval.every": "3 steps"}, r"phases\.1\.eval\.every: 2 steps → 3 steps \(early stopping counts"),
        ({"phases.0.eval.tokens": 800}, r"phases\.0\.eval\.tokens: 400 → 800 \(losses before and after it would be"),
        ({"phases.0.name": "first"}, r"phases\.0\.name: pretrain → first \(its weights and figures are stored"),
        ({"phases.0.tokens": 40 * STEP}, r"phases\.0\.tokens: 3840 → 5120 \(only the last phase can be made longer"),
        ({"phases.1.tokens": 4 * STEP}, r"phases\.1\.tokens: 1024 → 512 \(only the last phase can be made longer, and"),
        ({"phases.1.tokens": "9K"}, r"phases\.1\.tokens: 1024 → 9000 \(its grid has chosen its weights"),
        ({"seed": 5}, r"seed: 0 → 5 \(it is fixed at the start"),
        ({"precision": "fp32"}, r"precision: auto → fp32 \(it is fixed at the start"),
        ({"engine": {"fp8": True}}, r"engine\.fp8: False → True \(it is fixed at the start"),
        ({"model.ffn": 128}, r"model\.ffn: 64 → 128 \(the weights depend on it"),
        ({"sources.chem.limit_tokens": 500}, r"sources\.chem\.limit_tokens: 400 → 500 \(the run has trained on it"),
    ],
)
def test_changes_that_affect_results_are_named_with_the_reason(
    data: Path, changes: dict[str, Any], message: str
) -> None:
    raw = tiny.raw_recipe(data)
    found = refused(recipe_from(raw), recipe_from(changed(raw, changes)))
    assert len(found) == 1, found
    assert re.match(message, found[0]), found[0]


def test_a_changed_recipe_is_refused_in_one_message_of_a_few_lines(data: Path) -> None:
    raw = tiny.raw_recipe(data, "refused")
    folder = Path(raw["run"])
    folder.mkdir()
    (folder / "heartbeat.json").write_text(json.dumps({"time": 1.0, "host": "here", "pid": 1}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_from(raw).plain()))
    other = changed(raw, {"model": {"preset": "1m"}, "phases": [{**raw["phases"][0], "name": "other"}]})
    with pytest.raises(RecipeError, match=r"undo this or choose another name:\n  model\.") as refusal:
        run(recipe_from(other), resume=True, progress=False)
    assert len(str(refusal.value).splitlines()) <= 14


SCHEDULES: list[tuple[dict[str, Any], str]] = [
    ({"schedule": {"name": "constant"}}, ""),
    ({"schedule": {"name": "constant", "warmup": "3 steps"}}, ""),
    ({"schedule": {"name": "cosine", "warmup": "3 steps", "horizon": "1M"}}, ""),
    ({"schedule": {"name": "constant", "warmup": "10%"}}, "its warm-up is a share of the phase"),
    ({"schedule": {"name": "cosine"}}, "its cosine schedule decays to the phase's end; add a phase instead"),
    ({"schedule": {"name": "wsd"}}, "its wsd schedule decays to the phase's end"),
    (
        {"schedule": {"name": "constant"}, "stop": {"on": "chem"}},
        "early stopping has chosen its weights, which need not be the last ones; add a phase",
    ),
]


@pytest.mark.parametrize(("phase", "reason"), SCHEDULES)
def test_the_last_phase_may_become_longer_if_its_finished_steps_stay_the_same(
    data: Path, phase: dict[str, Any], reason: str
) -> None:
    raw = tiny.raw_recipe(data)
    raw["phases"] = [raw["phases"][0] | phase]
    found = refused(recipe_from(raw), recipe_from(changed(raw, {"phases.0.tokens": "20K"})))
    assert [reason in problem for problem in found] == ([True] if reason else [])


def test_a_finished_run_made_longer_equals_the_longer_run_bit_for_bit(data: Path) -> None:
    """By a longer last phase and by phases on new text, as if the recipe had been as long from the first step."""
    tiny.write_dataset(data / "new", 5, 2000)
    short = tiny.raw_recipe(data, "longer") | {"checkpoint": {"every": "4 steps", "keep": 2}}
    short["phases"] = [short["phases"][0] | {"tokens": 10 * STEP, "schedule": {"name": "constant"}}]
    assert run(recipe_from(short), progress=False)["status"] == "done"
    assert run(recipe_from(short), resume=True, progress=False)["phases"]["pretrain"]["steps"] == 10

    long = changed(short, {"phases.0.tokens": 13 * STEP, "phases.0.eval.every": "5 steps"})
    long["sources"] = {**short["sources"], "new": {"train": str(data / "new")}}
    more = short["phases"][0] | {"mixture": {"new": 1}, "tokens": 3 * STEP, "optimizer_state": "keep"}
    long["phases"].append(more | {"name": "more", "schedule": {"continue": True}})
    summary = run(recipe_from(long), resume=True, progress=False)
    assert [phase["steps"] for phase in summary["phases"].values()] == [13, 3]
    whole = run(recipe_from(long | {"run": str(data / "at-once")}), progress=False)
    assert summary["status"] == whole["status"] == "done"
    for phase in ("pretrain", "more"):
        ours, theirs = weights(data / "longer", phase), weights(data / "at-once", phase)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [
        [(r["step"], r["loss"]) for r in tiny.metrics(data / name) if r["kind"] == "train"]
        for name in ("longer", "at-once")
    ]
    assert losses[0] == losses[1]
    assert json.loads((data / "longer" / "summary.json").read_text())["phases"]["more"]["epochs"]["new"] > 0


def test_a_phase_that_keeps_a_state_that_was_not_stored_is_refused(data: Path) -> None:
    short = tiny.raw_recipe(data)
    long = copy.deepcopy(short)
    long["phases"].append({"name": "more", "tokens": STEP, "mixture": {"chem": 1}, "optimizer": {"lr": 1e-3}})
    assert refused(recipe_from(short), recipe_from(long)) == []
    long["phases"][2]["optimizer_state"] = "keep"
    (problem,) = refused(recipe_from(short), recipe_from(long))
    assert problem.startswith("phases.2.optimizer_state: keep (the weights of finetune were stored without")

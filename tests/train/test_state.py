"""state.json of every version is read, and an unreadable one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spt_fast.errors import CheckpointError
from spt_fast.train.state import MIGRATIONS, VERSION, Evaluation, SavedState
from tests.train.test_before import RUNS

WHERE = Path("run/checkpoints/step")


def written(name: str = "mid-arm") -> dict[str, Any]:
    """state.json of a fixture, which version 1 wrote."""
    path = next((RUNS / name / "checkpoints").glob("step-*/state.json"))
    return json.loads(path.read_text())


def test_every_earlier_version_has_a_migration() -> None:
    assert list(MIGRATIONS) == list(range(1, VERSION))


def test_a_written_state_is_read_back_in_the_same_format() -> None:
    old = written()
    state = SavedState.read(old, WHERE)
    assert state.train.arms[0].values == {"lr": 0.01, "warmup": "2 steps"}
    new = json.loads(json.dumps(state.plain()))
    assert SavedState.read(new, WHERE) == state
    assert new.pop("version") == VERSION
    assert (old["train"].pop("evaluated"), new["train"].pop("newest")) == (False, None)
    assert (new.pop("texts"), new.pop("directory")) == ({}, ""), "what version 2 doesn't know"
    arms = [*new["train"]["arms"], *(arm for phase in new["train"]["finished"].values() for arm in phase["grid"])]
    assert {(arm.pop("skipped"), str(arm.pop("training"))) for arm in arms} == {(0, "{}")}
    for phase in new["train"]["finished"].values():
        assert (phase.pop("skipped"), phase.pop("training")) == (0, {})
    for reached in (*arms, *new["train"]["finished"].values()):
        assert (reached.pop("standard_errors"), reached.pop("scored")) == ({}, {}), "what version 4 doesn't know"
    assert (new["train"].pop("windows"), new["train"]["best"].pop("errors")) == (False, {})
    assert new["train"].pop("skipped_in_arm") == 0
    assert new["compute"].pop("measured") == {}
    assert new.pop("model").items() >= old.pop("model").items(), "a shape may have got fields since"
    assert new == old


def test_version_1_has_only_the_losses_of_its_best_evaluation() -> None:
    old = written("boundary")
    assert old["train"]["evaluated"]
    best = old["train"]["best"]
    assert SavedState.read(old, WHERE).train.newest == Evaluation(0, best["losses"])
    old["train"] |= {"step": 2}
    state = SavedState.read(old, WHERE).train
    assert state.evaluated, "and so not evaluated again"
    assert state.newest != state.best


def test_another_version_is_refused_by_name() -> None:
    state = SavedState.read(written(), WHERE).plain()
    with pytest.raises(
        CheckpointError,
        match=rf"step: state\.json: version: {VERSION + 1} is invalid: .* reads 1 to {VERSION}; update it",
    ):
        SavedState.read(state | {"version": VERSION + 1}, WHERE)
    with pytest.raises(CheckpointError, match=r"state\.json: version: 'new' is invalid"):
        SavedState.read(state | {"version": "new"}, WHERE)


@pytest.mark.parametrize(
    ("section", "field"),
    [("train", "stale"), ("model", "width"), ("compute", "engine"), ("train", "best"), ("train", "origin")],
)
def test_a_field_that_is_unknown_or_missing_is_named(section: str, field: str) -> None:
    state = json.loads(json.dumps(SavedState.read(written(), WHERE).plain()))
    state[section]["mood"] = "good"
    with pytest.raises(CheckpointError, match=rf"step: state\.json: {section}\.mood: is not known to this version"):
        SavedState.read(state, WHERE)
    del state[section]["mood"], state[section][field]
    with pytest.raises(CheckpointError, match=rf"step: state\.json: {section}\.{field}: is missing"):
        SavedState.read(state, WHERE)


def test_a_newer_field_of_the_model_has_its_default() -> None:
    state = json.loads(json.dumps(SavedState.read(written(), WHERE).plain()))
    del state["model"]["norm_eps"]
    assert SavedState.read(state, WHERE).model.norm_eps == 1e-6

"""Which measured choices a run uses, when it measures, and that a resumed run keeps its choices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from spt_fast.cli import app
from spt_fast.config import recipe_from
from spt_fast.errors import RecipeError, SptWarning
from spt_fast.kernels import auto_backends
from spt_fast.kernels.backend import OPS, Candidate, install
from spt_fast.kernels.judging import Question
from spt_fast.kernels.self_check import Fault
from spt_fast.train import precision, threads, tuning
from spt_fast.train.plan import make_plan
from spt_fast.train.run import run
from spt_fast.train.state import Compute
from spt_fast.train.tuning import asked_by, choose, without_unfit
from tests import tiny


def record(backend: str, date: str = "2026-11-28") -> dict[str, Any]:
    default, best = Candidate("auto").plain(), Candidate(backend).plain()
    seconds = {"default": [0.003, 0.006], "chosen": [0.002, 0.004]}
    return json.loads(json.dumps({"date": date, "default": default, "chosen": best, "seconds": seconds, "tried": {}}))


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    yield
    install({})


def asked_ops(raw: dict[str, Any]) -> set[str]:
    plan = make_plan(recipe_from(raw))
    return {each.op for each in asked_by(plan, precision.Precision(torch.float32, ""), torch.device("cpu"), 1)}


@pytest.fixture
def raw(data: Path) -> dict[str, Any]:
    raw = tiny.raw_recipe(data, "tuned") | {"precision": "fp32"}
    raw["phases"] = raw["phases"][:1]
    raw["phases"][0] |= {"tokens": 2 * 8 * tiny.CONTEXT, "schedule": {"name": "constant"}}
    raw["checkpoint"]["every"] = "1 steps"
    return raw


def test_a_run_uses_the_measured_choices_and_keeps_them_on_resume(
    raw: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Question] = []
    found = {"swiglu_mlp": record("reference"), "rope": record("auto")}
    monkeypatch.setattr(tuning, "known", lambda questions: (asked.extend(questions), found)[1])
    run(recipe_from(raw))
    said = " ".join(capsys.readouterr().err.split())
    assert "swiglu_mlp: reference: forward + backward 2 + 4 ms, 1.50 times as fast as by default, measured" in said
    assert "rope: auto" not in said
    shape = asked[0].shape
    assert {question.op for question in asked} >= {"qkv_attention", "linear_cross_entropy", "qk_norm_rope"}
    assert (shape["sequences"], shape["context"], shape["heads"], shape["documents"]) == (4, 16, 2, False)
    state = sorted((data / "tuned" / "checkpoints").glob("step-*/state.json"))[-1]
    compute = json.loads(state.read_text())["compute"]
    assert compute["backends"]["swiglu_mlp"] == "reference"
    kept = {op: {key: each[key] for key in each if key != "tried"} for op, each in found.items()}
    assert compute["measured"]["kernels"] == kept

    found = {"add_rms_norm": record("reference")}
    raw["phases"][0]["tokens"] *= 2
    run(recipe_from(raw), resume=True)
    assert "not bit-identical" not in capsys.readouterr().err
    assert (auto_backends()["swiglu_mlp"], auto_backends()["add_rms_norm"]) == ("reference", "cpu")
    run(recipe_from(raw | {"run": str(data / "another")}), progress=False)
    assert (auto_backends()["swiglu_mlp"], auto_backends()["add_rms_norm"]) == ("cpu", "reference")


def test_a_run_on_a_new_gpu_measures_first_and_says_so(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float]] = []

    def tune(asked: list[Question], *, seconds: float, say: Any, stop: Any) -> dict[str, Any]:
        calls.append((len(asked), seconds))
        return {question.op: record("reference") for question in asked}

    faults = [Fault("rope", "triton", "errs by 1")]
    monkeypatch.setattr(tuning, "self_check", lambda device, dtype, *, head_dim: faults)
    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(tuning, "known", lambda questions: {})
    gpu, cpu, said = torch.device("cuda"), torch.device("cpu"), list[str]()
    plan = make_plan(recipe_from(raw))
    choices = choose(plan, gpu, 1, say=said.append)
    assert (choices.faults, list(choose(plan, cpu, 1, say=said.append).faults)) == (faults, [])
    found = choices.kernels
    assert calls == [(7, 120.0)]
    assert said == ["timing kernels for this GPU and these shapes, once, up to 120 s (engine.tune_kernels)"]
    monkeypatch.setattr(tuning, "known", lambda questions: found)
    assert choose(plan, gpu, 1, say=said.append).kernels == found
    monkeypatch.setattr(tuning, "known", lambda questions: {})
    off = make_plan(recipe_from(raw | {"engine": {"tune_kernels": False}}))
    for choices in (choose(off, gpu, 1, say=said.append), choose(plan, cpu, 1, say=said.append), choose(plan, gpu, 1)):
        assert choices.kernels == {}
    assert (len(calls), len(said)) == (1, 1)


def test_the_command_shows_each_choice_and_its_measurement(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: False)
    shapes: list[dict[str, Any]] = []

    def tune(asked: list[Question], *, seconds: float, say: Any) -> dict[str, Any]:
        shapes.append({**asked[0].shape, "seconds": seconds})
        return {"add_rms_norm": record("reference")}

    def shown(*words: str) -> dict[str, Any]:
        return json.loads(CliRunner().invoke(app, ["kernels", *words, "--json"]).stdout)

    monkeypatch.setattr(tuning, "known", lambda questions: {})
    plain = shown()
    assert plain.keys() == {*OPS, "precision"}
    assert plain["add_rms_norm"].startswith("cpu: ")
    assert plain["precision"].startswith("fp32: this CPU has no instructions")
    monkeypatch.setattr(tuning, "tune", tune)
    tuned = shown(str(tiny.write_recipe(tmp_path, raw)), "--tune", "--seconds", "9")
    assert tuned["add_rms_norm"].startswith("reference: forward + backward 2 + 4 ms, 1.50 times")
    assert tuned["measured"]["add_rms_norm"]["date"] == "2026-11-28"
    assert (shapes[0]["width"], shapes[0]["seconds"]) == (32, 9.0)
    assert CliRunner().invoke(app, ["kernels", "--tune"]).exit_code == 0
    assert (shapes[1]["width"], shapes[1]["seconds"]) == (384, 300.0)
    refused = CliRunner().invoke(app, ["kernels", "--seconds", "9"])
    assert refused.exit_code == 2
    assert "--seconds is for measuring; add --tune" in refused.stderr
    with pytest.raises(RecipeError, match="--set: 'seed=1' is invalid: there is no recipe to change; give RECIPE too"):
        CliRunner().invoke(app, ["kernels", "--set", "seed=1"], catch_exceptions=False)


def test_choices_of_another_gpu_are_kept_if_this_one_can_run_them(raw: dict[str, Any]) -> None:
    records = {"rope": record("reference"), "embedding": record("later"), "swiglu_mlp": record("auto"), "gone": {}}
    asked = asked_by(make_plan(recipe_from(raw)), precision.Precision(torch.float32, ""), torch.device("cpu"), 1)
    said: list[str] = []
    assert list(without_unfit(records, asked, said.append)) == ["rope", "swiglu_mlp", "gone"]
    assert [line[:58] for line in said] == ["warning: embedding: later, which the run used before, rais"]


def test_the_ops_that_a_model_calls_are_tuned(raw: dict[str, Any]) -> None:
    """Selective checkpointing looks at ops, which are not fused then."""
    assert asked_ops(raw) >= {"swiglu_mlp", "qkv_attention"}
    raw["model"] |= {"qk_norm": False}
    assert asked_ops(raw) >= {"swiglu_mlp", "self_attention"}
    separate = asked_ops(raw | {"engine": {"checkpointing": "selective"}})
    assert separate >= {"swiglu_linear", "qkv_attention"}
    assert not separate & {"swiglu_mlp", "self_attention"}


def test_choices_of_a_checkpoint_hold_for_the_ops_that_replace_others(raw: dict[str, Any]) -> None:
    kept = {"swiglu_linear": record("reference"), "qkv_attention": record("reference"), "rope": record("auto")}
    before = Compute("float32", {}, "cpu, one process", {"kernels": kept})

    def resumed(raw: dict[str, Any]) -> dict[str, Any]:
        return dict(choose(make_plan(recipe_from(raw)), torch.device("cpu"), 1, before, say=print).kernels)

    assert resumed(raw) == {"swiglu_mlp": kept["swiglu_linear"], **{op: kept[op] for op in ("qkv_attention", "rope")}}
    raw["model"] |= {"qk_norm": False}
    assert resumed(raw).keys() == {"swiglu_mlp", "self_attention", "rope"}
    assert resumed(raw | {"engine": {"checkpointing": "selective"}}) == kept


def test_the_fastest_number_of_threads_is_used(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS")
    for module in (threads, tuning):
        monkeypatch.setattr(module, "USUAL", 4)
    assert threads.decided({1: 1.0, 2: 0.98, 4: 1.01})["chosen"] == 4
    assert threads.decided({1: 0.7, 2: 0.98, 4: 1.01})["chosen"] == 1
    monkeypatch.setattr(threads, "medians", lambda rivals, **_: [*[rival() or 1.0 for rival in rivals][:2], 2.0])
    before, plan = torch.get_num_threads(), make_plan(recipe_from(raw))
    asked = (plan.model, "fp32", 4, tiny.CONTEXT)
    assert threads.threads_of(*asked) is None
    found = threads.threads_of(*asked, measure=True)
    assert found is not None
    assert (found["chosen"], torch.get_num_threads()) == (1, before)
    assert found["seconds"] == {"1": 1.0, "2": 1.0, "4": 2.0}
    monkeypatch.setattr(threads, "medians", lambda rivals, **_: 1 / 0)
    try:
        torch.set_num_threads(2)
        choices = choose(plan, torch.device("cpu"), 1, say=print)
        assert (choices.threads, torch.get_num_threads(), choices.measured()["threads"]) == (1, 1, 1)
        assert next(choices.lines()).startswith("threads: 1 rather than ")
        assert choose(plan, torch.device("cpu"), 2, say=print).threads is None
        torch.set_num_threads(2)
        assert (choose(plan, torch.device("cpu"), 1).threads, torch.get_num_threads()) == (1, 1), "of a dry run"
        kept = Compute("float32", {}, "cpu, one process", {"threads": 3})
        choose(plan, torch.device("cpu"), 1, kept, say=print).install()
        assert torch.get_num_threads() == 3
        elsewhere = replace(kept, measured={"threads": 64})
        assert choose(plan, torch.device("cpu"), 1, elsewhere, say=print).threads == 4, "no more than there are cores"
        (file,) = (tmp_path / "spt_fast").glob("threads-*.json")
        file.write_text(file.read_text().replace('"chosen": 1', '"chosen": 64'))
        with pytest.warns(SptWarning, match="is damaged"):
            assert threads.threads_of(*asked) is None
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert choose(plan, torch.device("cpu"), 1, kept, say=print).threads is None
        assert choose(plan, torch.device("cpu"), 1, say=print).threads is None
    finally:
        torch.set_num_threads(before)

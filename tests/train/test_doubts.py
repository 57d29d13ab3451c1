"""Likely mistakes are warned of, with their figures, by plan, dry run and training."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from spt_fast import cli
from spt_fast.config import recipe_from
from spt_fast.data.overlap import overlap_share
from spt_fast.data.shards import TokenDataset
from spt_fast.errors import SptWarning
from spt_fast.train.doubts import doubts
from spt_fast.train.dry_run import dry_run
from spt_fast.train.evaluate import evaluation_texts
from spt_fast.train.plan import make_plan
from spt_fast.train.run import run
from spt_fast.train.weights import chosen
from tests import tiny

STEP = 8 * tiny.CONTEXT


def of(raw: dict[str, Any]) -> list[str]:
    """All but those about the small held-out text of these corpora."""
    return [doubt for doubt in doubts(make_plan(recipe_from(raw))) if not re.search(r"heldout:|eval\.tokens:", doubt)]


def test_a_sound_plan_has_no_warnings(data: Path) -> None:
    raw = tiny.raw_recipe(data)
    raw["phases"][1]["eval"] = {"every": "30%", "tokens": 150}
    assert of(raw) == []


def test_repetition_a_short_limit_costly_evaluations_and_a_jump_are_warned_of_with_figures(data: Path) -> None:
    raw = tiny.raw_recipe(data)
    first = raw["phases"][0]
    raw["phases"] = [first | {"tokens": 2000 * STEP, "schedule": {"name": "constant"}}]
    (chem,) = of(raw)
    tokens = make_plan(recipe_from(raw)).train["chem"].num_tokens
    times = f"{2000 * STEP / 4 / tokens:.0f} times; beyond about 40 repetitions nothing more is learned"
    assert chem.startswith(f"sources.chem: its {tokens} tokens are read {times}")

    raw = tiny.raw_recipe(data)
    raw["sources"]["chem"]["limit_tokens"] = 5
    raw["phases"] = [first | {"mixture": {"general": 1}}]
    (limit,) = of(raw)
    tokens = make_plan(recipe_from(raw)).train["chem"].num_tokens
    assert limit == f"sources.chem.limit_tokens: 5 is less than the first document, so its {tokens} tokens are read"

    raw = tiny.raw_recipe(data)
    raw["phases"] = [first | {"eval": {}, "tokens": 2 * STEP}]
    (evaluation,) = of(raw)
    assert evaluation.startswith("phases[pretrain].eval: evaluations score 2")
    assert "which takes longer than training on 256; write fewer `tokens`" in evaluation

    carried = first | {"name": "on", "schedule": {"continue": True}, "optimizer": {"lr": 3e-4}}
    raw["phases"] = [first, carried]
    assert of(raw) == [
        "phases[on].optimizer.lr: 0.0003 is the peak of a continued schedule, whose peak was 0.003, so the rate "
        "jumps to 0.1 of its last value"
    ]
    raw["phases"] = [first, carried | {"optimizer": {"lr": 3e-3}}]
    assert of(raw) == []


def test_a_number_without_a_unit_that_is_less_than_a_step_is_warned_of(data: Path) -> None:
    raw = tiny.raw_recipe(data)
    raw["phases"] = [raw["phases"][0] | {"tokens": 400 * STEP}]
    raw["checkpoint"]["every"], raw["log"]["every"] = 100, 10
    raw["phases"][0]["schedule"] = {"name": "wsd", "warmup": 20, "decay": 2 * STEP}
    raw["phases"][0] |= {"eval": {"every": STEP, "tokens": 4}, "grid": {"warmup": [127, "3 steps"]}}
    of_a_step = "tokens are less than a step of 128, so it is one step; write"
    assert of(raw) == [
        f"checkpoint.every: 100 {of_a_step} `100 steps` if steps are meant",
        f"log.every: 10 {of_a_step} `10 steps` if steps are meant",
        f"phases[pretrain].schedule.warmup: 20 {of_a_step} `20 steps` if steps are meant",
        f"phases[pretrain].grid.warmup[0]: 127 {of_a_step} `127 steps` if steps are meant",
    ]


def test_steps_where_tokens_are_counted_are_warned_of(data: Path) -> None:
    raw = tiny.raw_recipe(data)
    first = raw["phases"][0] | {"mixture": {"general": 1}, "eval": {"every": "100%", "tokens": 4}}
    raw["phases"] = [first | {"tokens": 100, "schedule": {"name": "constant"}}]
    assert of(raw) == ["phases[pretrain].tokens: 100 tokens are less than a step of 128; it counts tokens, not steps"]
    raw["phases"] = [first | {"schedule": {"horizon": 100}}]
    assert [doubt[:44] for doubt in of(raw)] == ["phases[pretrain].schedule.horizon: 100 token"]


def test_tokens_at_a_rate_of_0_are_warned_of(data: Path) -> None:
    raw = tiny.raw_recipe(data)
    first = raw["phases"][0] | {"schedule": {"name": "linear", "final": 0}}
    carried = first | {"name": "on", "schedule": {"continue": True}}
    raw["phases"] = [first, carried | {"tokens": 40 * STEP}]
    assert of(raw) == [
        "phases[on].schedule: the last 5,120 of its 5,120 tokens change nothing, since the rate of phases[pretrain] "
        "falls to 0 at 3,840 tokens; give that one a longer `horizon`, or a `final` above 0"
    ]
    first["schedule"]["horizon"] = 50 * STEP
    assert [doubt[:62] for doubt in of(raw)] == ["phases[on].schedule: the last 2,560 of its 5,120 tokens change"]
    for changed in ({"horizon": 70 * STEP}, {"final": "1%"}, {"name": "constant", "final": "10%"}):
        raw["phases"][0] = first | {"schedule": first["schedule"] | changed}
        assert of(raw) == []


def test_settings_that_the_others_leave_without_effect_are_warned_of(data: Path) -> None:
    raw = tiny.raw_recipe(data)
    (first, second) = raw["phases"]
    raw["engine"] = {"name": "local", "stage": 3, "offload": "all"}
    raw["checkpoint"]["keep_best"] = True
    del raw["sources"]["general"]["heldout"]
    first["schedule"] |= {"decay": "10%"}
    second["schedule"] |= {"final": 0}
    second["eval"] = {"every": "50%", "tokens": 200}
    assert of(raw) == [
        "engine.stage: 3 is not used by the local engine; write name: deepspeed, or leave it out",
        "engine.offload: all is not used by the local engine; write name: deepspeed, or leave it out",
        "phases[pretrain].schedule.decay: 10% is not used by cosine; leave it out",
        "checkpoint.keep_best: phases[pretrain] has no best weights without held-out text of 'general'; name it, or "
        "leave this out",
        "phases[finetune].schedule.final: 0 is not used by constant; leave it out",
        "phases[finetune].stop.patience: 2 can't end the phase early, with 1 evaluation between its first and last "
        "step; write a shorter `eval.every`",
    ]


def test_a_start_from_a_run_that_is_not_done_is_warned_of(data: Path, tmp_path: Path) -> None:
    raw = tiny.raw_recipe(data)
    raw["phases"] = raw["phases"][:1]
    base = tmp_path / "base"
    make_plan(recipe_from(raw)).starting_model().save_hf(base / "weights" / "pretrain")
    (base / "recipe.yaml").write_text(recipe_from(raw).as_yaml())
    raw |= {"init": str(base), "model": {}}
    for summary, says in (
        ({"status": "done"}, []),
        ({"status": "failed", "reason": "no"}, [f"init: {base}: is failed (no); {base}/weights/pretrain is used"]),
    ):
        (base / "summary.json").write_text(json.dumps({**summary, "phases": {}}))
        assert of(raw) == says
    assert of(raw | {"init": str(base / "weights" / "pretrain")}) == []
    whole = tiny.raw_recipe(data)  # of which the last phase's weights are gone
    (base / "recipe.yaml").write_text(recipe_from(whole).as_yaml())
    (base / "summary.json").write_text(json.dumps({"status": "done", "phases": {}}))
    assert of(raw) == [
        f"init: {base}/weights/finetune: is missing; {base}/weights/pretrain is used. Put it back, or name other "
        "weights"
    ]
    with pytest.warns(SptWarning, match=r"finetune: is missing; \S+pretrain is used"):
        chosen(base)


def test_a_text_that_two_sources_have_is_warned_of(data: Path) -> None:
    for kind in ("train", "heldout"):
        raw = tiny.raw_recipe(data)
        assert "limit_tokens" in raw["sources"]["chem"]
        raw["sources"]["chem"][kind] = raw["sources"]["general"][kind]
        (twin,) = (doubt for doubt in doubts(make_plan(recipe_from(raw))) if "is the text" in doubt)
        path = Path(f"{raw['sources']['general'][kind]}.bin")
        assert twin == f"sources.chem.{kind}: is the text of 'general', {path}; give each source its own"


def test_a_leak_of_text_without_documents_is_found_by_its_n_grams(data: Path) -> None:
    raw = tiny.raw_recipe(data)
    np.save(data / "ids.npy", TokenDataset.open(raw["sources"]["chem"]["train"]).tokens)
    raw["sources"]["chem"] = dict.fromkeys(("train", "heldout"), str(data / "ids.npy"))
    leaks = [doubt for doubt in of(raw) if "n-grams" in doubt]
    assert leaks == [
        "100.0% of the long n-grams of the held-out text of 'chem' are also in the training text of 'chem': the loss "
        "will look better than it is"
    ]


def test_a_leak_into_a_text_of_which_only_parts_are_searched_is_no_share_of_the_whole(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny.raw_recipe(data)
    raw["sources"]["general"]["heldout"] = raw["sources"]["general"]["train"]
    monkeypatch.setattr("spt_fast.train.plan._OVERLAPS", {})
    monkeypatch.setattr("spt_fast.data.overlap._STRETCH", 1000)
    monkeypatch.setattr("spt_fast.train.plan.overlap_share", partial(overlap_share, max_train_tokens=1000))
    path = data / "general.bin"
    searched = 1000 / make_plan(recipe_from(raw)).train["general"].num_tokens
    (leak,) = (doubt for doubt in of(raw) if "also in" in doubt)
    assert searched < 0.5
    assert leak.endswith(
        f" are also in the {searched:.2%} of the training text of 'general' that were searched: the loss will look "
        f"better than it is; `spt-fast inspect {path} --overlap {path}` searches all"
    )
    assert float(leak.split("%")[0]) < 60


def test_losses_on_little_text_are_warned_of_once_for_a_source(data: Path) -> None:
    raw = tiny.raw_recipe(data)
    raw["phases"] = [raw["phases"][0] | {"eval": {"tokens": 200}}, raw["phases"][1] | {"eval": {"tokens": 100_000}}]
    plan = make_plan(recipe_from(raw))
    chem = [doubt for doubt in doubts(plan) if "chem" in doubt]
    text = evaluation_texts(plan, plan.phases[0].phase)["heldout"]["chem"]
    more = evaluation_texts(plan, plan.phases[1].phase)["heldout"]["chem"]
    assert chem == [
        f"sources.chem.heldout: half of what is scored has {text.documents} documents, fewer than 30, so differences "
        "below its standard error mean nothing; raise the phase's `eval.tokens`, or hold out more text",
        f"phases[{raw['phases'][1]['name']}].eval.tokens: 100,000 asks for 50,000 of each half of the held-out text of "
        f"'chem', which has {more.num_targets + 1:,}; hold out more text",
    ]


def test_doubts_are_printed_by_plan_the_dry_run_and_the_log(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tiny.raw_recipe(data, "doubted")
    raw["phases"] = [raw["phases"][0] | {"eval": {}, "tokens": 2 * STEP}]
    raw["sources"]["chem"]["heldout"] = raw["sources"]["chem"]["train"]
    path = tiny.write_recipe(data, raw)
    told = json.loads(CliRunner().invoke(cli.app, ["plan", str(path), "--json"]).stdout)["warnings"]
    assert told == doubts(make_plan(recipe_from(raw)))
    leak = r"\d+\.\d% of the held-out documents of 'chem' and \d+\.\d% of their long n-grams are also in the training"
    assert sum(bool(re.match(leak, doubt)) for doubt in told) == 1
    with pytest.warns(SptWarning, match="evaluations score"):
        CliRunner().invoke(cli.app, ["plan", str(path)])
    with pytest.warns(SptWarning, match="evaluations score"):
        dry_run(recipe_from(raw))
    run(recipe_from(raw))
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"warning: {doubt}" in said for doubt in told)

"""A miniature of the demo, which differs only in size."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from spt_fast.config import load_recipe
from spt_fast.printing import as_json
from spt_fast.study import jobs
from spt_fast.study.compare import Comparison, compare
from spt_fast.study.demo import Scale, demo, next_steps, write_recipes
from spt_fast.study.findings import conclusion
from tests.study.tiny_study import HereAlone

pytestmark = pytest.mark.long

TINY = Scale(
    general_bytes=200_000,
    domain_bytes=100_000,
    vocab_size=512,
    model="{layers: 1, width: 32, heads: 1, ffn: 64, context: 64}",
    pretrain_tokens=20_000,
    delta=Fraction(1, 8),
    domain_tokens=2_000,
    finetune_tokens=6_000,
    heldout_tokens=2_000,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "Local", lambda recipes: HereAlone())
        return out, demo(out, TINY)


def test_the_demo_has_two_arms_of_two_seeds_with_the_requested_share(finished: tuple[Path, Comparison]) -> None:
    _, result = finished
    assert [(run.treatment.delta, run.seed) for run in result.runs] == [(0, 0), (0.125, 0), (0, 1), (0.125, 1)]
    assert (result.domain, result.general) == ("cpp", "prose")
    assert result.warnings == []
    assert [arm.key for arm in result.r_gain or {}] == ["0.125"]
    npt, spt = result.arms
    assert npt.domain_epochs.high == 0 < spt.domain_epochs.low


def test_the_demo_leaves_runs_a_comparison_and_a_picture(finished: tuple[Path, Comparison]) -> None:
    out, result = finished
    assert (out / "comparison.png").stat().st_size > 20_000
    assert json.loads((out / "comparison.json").read_text()) == as_json(result)
    again = compare([out / "runs" / name for name in ("npt-seed0", "npt-seed1", "spt-seed0", "spt-seed1")])
    assert again.verdict == result.verdict


def test_arms_differ_in_nothing_but_mixture_and_seed(finished: tuple[Path, Comparison]) -> None:
    out, _ = finished
    npt, spt = (load_recipe(out / "recipes" / f"{arm}-seed0.yaml") for arm in ("npt", "spt"))
    changed = {change.split(":")[0] for change in npt.changes(spt)}
    assert changed == {"phases.0.mixture.prose", "phases.0.mixture.cpp"}
    assert spt.phases[0].mixture == {"prose": Fraction(7, 8), "cpp": Fraction(1, 8)}
    assert len(npt.phases[-1].arms()) > 1


def test_a_second_call_repeats_nothing(finished: tuple[Path, Comparison]) -> None:
    out, result = finished
    written = {
        path: path.stat().st_mtime_ns for part in ("data", "recipes", "runs") for path in (out / part).rglob("*")
    }
    assert demo(out, TINY) == result
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_an_interrupted_demo_continues_where_it_stopped(finished: tuple[Path, Comparison], tmp_path: Path) -> None:
    """A signal during the runs gives exit code 75, and the same call later ends with the same figures."""
    shutil.copytree(finished[0] / "data", tmp_path / "data")
    one_seed = replace(TINY, seeds=(0,))

    def interrupt_once_training() -> None:
        while not list((tmp_path / "runs").glob("*/metrics.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    interrupter = threading.Thread(target=interrupt_once_training, daemon=True)
    interrupter.start()
    with pytest.raises(SystemExit) as stopped:
        demo(tmp_path, one_seed)
    interrupter.join()
    assert stopped.value.code == 75
    assert not (tmp_path / "comparison.json").exists()

    resumed = demo(tmp_path, one_seed)
    for ours, undisturbed in zip(resumed.runs, finished[1].runs[:2], strict=True):
        assert ours.paths == undisturbed.paths


def test_an_edited_recipe_is_kept(tmp_path: Path) -> None:
    first, *_ = write_recipes(tmp_path, TINY)
    first.write_text(first.read_text().replace("lr: 3e-3", "lr: 5e-3"))
    assert write_recipes(tmp_path, TINY)[0] == first
    assert load_recipe(first).phases[0].optimizer.lr == 5e-3


def test_a_folder_name_that_yaml_would_parse_is_quoted(tmp_path: Path) -> None:
    out = tmp_path / "a: #strange {name}"
    assert load_recipe(write_recipes(out, TINY)[0]).run == str(out / "runs" / "npt-seed0")


def test_the_default_recipes_repeat_the_domain_ten_times(tmp_path: Path) -> None:
    scale = Scale()
    assert 10 <= scale.pretrain_tokens * scale.delta / scale.domain_tokens <= 50
    for recipe in write_recipes(tmp_path, scale):
        assert load_recipe(recipe).phases[-1].stop is not None


def test_the_conclusion_tells_whether_the_difference_exceeds_the_spread(finished: tuple[Path, Comparison]) -> None:
    result = finished[1]
    arm = result.arms[1].treatment
    for position, figure in enumerate(("domain_after", "forgetting")):
        for exceeds, words in ((True, "more than the spread between 2 seeds"), (False, "this may be chance")):
            verdict = {arm: replace(result.verdict[figure][arm], exceeds=exceeds)}
            changed = replace(result, verdict=result.verdict | {figure: verdict})
            assert words in conclusion(changed)[position]


def test_next_steps_name_commands_that_exist(tmp_path: Path) -> None:
    from spt_fast.cli.program import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    commands = [line.split()[1] for line in next_steps(tmp_path).splitlines() if line.strip().startswith("spt-fast")]
    assert commands == ["init", "train", "train", "compare"]
    assert max(map(len, next_steps(Path("demo")).splitlines())) <= 80
    assert set(commands) <= known

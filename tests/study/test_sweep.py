"""Sweeps on tiny runs: a study is trained completely, once and in order, and its table has the runs' results."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from spt_fast.cli import app
from spt_fast.config import Recipe, load_recipe, recipe_from
from spt_fast.errors import CheckpointError, DataError, RecipeError, SptWarning
from spt_fast.locks import InUse
from spt_fast.study import jobs
from spt_fast.study import sweep as sweeping
from spt_fast.study.compare import compare
from spt_fast.study.costs import _speed, price, print_price
from spt_fast.study.jobs import Outcome
from spt_fast.study.load import load_study
from spt_fast.study.runs_table import COLUMNS, read_table
from spt_fast.study.study import study_from
from spt_fast.study.sweep import sweep
from spt_fast.study.tree import expand
from spt_fast.train.folder import owned
from spt_fast.train.lineage import parent_of
from spt_fast.train.plan import make_plan
from spt_fast.train.price import phase_time
from tests import tiny
from tests.study.tiny_study import STEP, HereAlone, raw_study
from tests.train.test_watch import until

pytestmark = pytest.mark.long


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """A finished study's folder and table."""
    folder = tmp_path_factory.mktemp("swept")
    table, outcome = sweep(study_from(raw_study(folder)), quiet(), workers=HereAlone())
    assert (outcome.interrupted, outcome.failed, outcome.skipped) == (False, {}, [])
    return folder / "study", table


def test_the_table_has_the_losses_of_the_runs(swept: tuple[Path, pd.DataFrame]) -> None:
    folder, table = swept
    assert list(table.columns) == list(COLUMNS)
    for name, rows in table.groupby("run"):
        recipe = load_recipe(folder / "recipes" / f"{name}.yaml")
        summary = json.loads((folder / "runs" / str(name) / "summary.json").read_text())
        last = summary["phases"][recipe.phases[-1].name]
        ended = rows[rows["handed_on"]].iloc[-1]
        assert ended["domain_heldout"] == last["heldout"]["chem"]
        assert ended["general_heldout"] == last["heldout"]["general"]
        assert ended["domain_select"] == last["select"]["chem"]
        assert ended["domain_error"] == last["standard_errors"]["heldout"]["chem"] > 0
        assert ended["general_documents"] == last["scored"]["heldout"]["general"]["documents"] > 0
        assert ended["params"] == summary["parameters"]
        assert set(rows["domain_tokens"]) == {summary["train_tokens"]["chem"]}
        assert rows["handed_on"].sum() == len(recipe.phases)
        assert rows["tokens"].is_monotonic_increasing
        assert rows["tokens"].is_unique


def test_pretraining_is_one_stage_with_every_budget_in_it(swept: tuple[Path, pd.DataFrame]) -> None:
    pretraining = swept[1].query("stage == 0 and delta > 0")
    assert pretraining["run"].nunique() == 1
    assert list(pretraining["tokens"]) == [0, *(5 * STEP * i for i in range(1, 5))]
    assert set(pretraining["delta"]) == {0.25}
    assert set(pretraining["start"]) == {"scratch"}
    assert (pretraining["pretrain_tokens"] == 0).all()
    assert pretraining["domain_before"].isna().all()
    np.testing.assert_allclose(pretraining["epochs"], 0.25 * pretraining["tokens"] / pretraining["domain_tokens"])
    per_token = pretraining["flops"].iloc[-1] / pretraining["tokens"].iloc[-1]
    np.testing.assert_allclose(pretraining["flops"], per_token * pretraining["tokens"])
    assert per_token > 6 * 2000


def test_finetunes_have_the_columns_of_their_pretraining(swept: tuple[Path, pd.DataFrame]) -> None:
    table = swept[1]
    tunes = table[table["stage"] == 1]
    past = {(name, *rows[["pretrain_tokens", "pretrain_delta"]].iloc[0]) for name, rows in tunes.groupby("run")}
    assert sorted(p[1:] for p in past) == [(b, d) for b in (10 * STEP, 20 * STEP) for d in (0, 0.25)]
    assert set(tunes["start"]) == {"pretrained"}
    assert set(tunes["delta"]) == {1.0}
    for _, rows in tunes.groupby("run"):
        first = rows[rows["tokens"] == 0].iloc[0]
        came_from = (table["tokens"] == first["pretrain_tokens"]) & (table["delta"] == first["pretrain_delta"])
        parent = table[(table["stage"] == 0) & came_from].iloc[0]
        assert first["domain_heldout"] == pytest.approx(parent["domain_heldout"], rel=1e-5)
        assert set(rows["domain_before"]) == {first["domain_heldout"]}
        assert set(rows["after"]) == {parent["run"]}
        assert rows["pretrain_epochs"].iloc[0] == pytest.approx(parent["epochs"])
        assert rows["flops"].iloc[0] == pytest.approx(parent["flops"])
        chosen = rows.loc[rows["domain_select"].idxmin()]
        assert chosen["handed_on"]


def test_finetunes_that_start_from_other_runs_can_be_compared(swept: tuple[Path, pd.DataFrame]) -> None:
    folder, table = swept
    tunes = table[table["stage"] == 1]
    result = compare([folder / "runs" / run for run in tunes["run"].unique()])
    assert (result.domain, result.general, result.tokens) == ("chem", "general", 20 * STEP)
    found = {(run.tokens, run.treatment.delta): run for run in result.runs}
    ended = tunes[tunes["handed_on"]]
    assert len(found) == len(ended) == 4
    for _, row in ended.iterrows():
        figures = found[row["pretrain_tokens"], row["pretrain_delta"]]
        assert figures.domain_after == row["domain_heldout"]
        assert figures.general_before == row["general_before"]
        assert figures.domain_epochs == pytest.approx(row["pretrain_epochs"], rel=0.05)
    (warning,) = result.warnings
    assert "so the losses may be of different tokens" in warning
    assert compare([folder]) == result, "a study stands for the runs of its last stage"


def test_a_study_read_by_folder_file_or_runs_gives_the_same_table(
    swept: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    folder, table = swept
    runs = sorted((folder / "runs").iterdir())
    for paths in ([folder], [folder / "table.csv"], [folder / "table.parquet"], [folder, folder / "table.csv"], runs):
        again, once = (
            one.sort_values(["run", "tokens"], ignore_index=True).fillna({"base": ""})
            for one in (read_table(paths, domain_source="chem"), table)
        )
        pd.testing.assert_frame_equal(again, once, check_dtype=False, rtol=1e-12)


def test_runs_of_two_studies_may_have_the_same_name(swept: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    """Their recipes differ in fields that names do not contain, such as the batch; equal rows are kept once."""
    table = swept[1]
    other = table.assign(lr=2 * table["lr"], domain_heldout=table["domain_heldout"] + 0.5)
    other.to_csv(tmp_path / "other.csv", index=False)
    both = read_table([swept[0], tmp_path / "other.csv", swept[0] / "table.csv"])
    assert len(both) == 2 * len(table)


def test_runs_with_the_same_name_in_two_studies_stay_separate(swept: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    folder, table = swept
    other = table.assign(domain_heldout=table["domain_heldout"] + 1)
    other.to_csv(tmp_path / "other.csv", index=False)
    both = read_table([folder, tmp_path / "other.csv"])
    assert len(both) == 2 * len(table)
    assert both["run"].nunique() == 2 * table["run"].nunique()
    tunes = both[both["stage"] == 1]
    assert set(tunes["after"]) <= set(both["run"][both["stage"] == 0])
    assert all(run.rpartition(":")[0] == after.rpartition(":")[0] for run, after in tunes[["run", "after"]].to_numpy())


def test_a_moved_study_finds_its_runs(swept: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    folder, table = swept
    moved = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", str(folder / "runs"), str(moved)], check=True)
    for recipe in moved.glob("*/recipe.yaml"):
        recipe.write_text(recipe.read_text().replace(str(folder), "/gone"))
    again = read_table(sorted(moved.iterdir()), domain_source="chem")
    assert sorted(again["pretrain_tokens"].dropna()) == sorted(table["pretrain_tokens"].dropna())


def test_a_base_may_be_in_a_folder_called_weights(tmp_path: Path) -> None:
    study = raw_study(tmp_path)
    foreign = tmp_path / "weights" / "foreign"
    recipe = recipe_from(expand(study_from(study))[0].recipe.plain() | {"init": str(foreign)})
    with pytest.raises(CheckpointError, match=r"the run .* is missing"):
        parent_of(tmp_path / "run", recipe)
    foreign.mkdir(parents=True)
    assert parent_of(tmp_path / "run", recipe) is None


def test_finished_runs_are_not_trained_again(swept: tuple[Path, pd.DataFrame]) -> None:
    folder, table = swept
    written = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}
    again, _ = sweep(study_from(raw_study(folder.parent)), quiet())
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}
    pd.testing.assert_frame_equal(again, table)


def test_an_edited_study_is_refused_before_anything_is_trained(swept: tuple[Path, pd.DataFrame]) -> None:
    folder, _ = swept
    logs = {path: path.stat().st_mtime_ns for path in folder.glob("logs/*")}
    raw = raw_study(folder.parent, seeds=[0, 1])
    raw["stages"][0]["budgets"].insert(0, 5 * STEP)
    for what in (lambda: price(study_from(raw), jobs=1), lambda: sweep(study_from(raw), quiet())):
        with pytest.raises(
            RecipeError, match=r"study: .*another recipe; undo this(.|\n)*phases\.0\.tokens: 1280 → 640"
        ):
            what()
    assert {path: path.stat().st_mtime_ns for path in folder.glob("logs/*")} == logs


def test_flags_of_ready_studies_are_refused_for_others(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(raw_study(tmp_path)))
    with pytest.raises(RecipeError, match="out: is for ready studies"):
        load_study(str(study), given={"general": None, "out": tmp_path / "elsewhere"})
    with pytest.raises(RecipeError, match=r"forgeting: neither a file .* study in YAML; did you mean 'forgetting'"):
        load_study("forgeting")
    raw = raw_study(tmp_path)
    raw["stages"][1]["name"] = "a/b"
    study.write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError, match=r"^.*\.yaml: stages\[a/b\]\.name: 'a/b' is invalid"):
        load_study(str(study))


def test_costs_are_those_of_the_remaining_runs(swept: tuple[Path, pd.DataFrame]) -> None:
    raw = raw_study(swept[0].parent)
    assert [(cost.runs, cost.done, cost.tokens) for cost in price(study_from(raw), jobs=2).stages] == [
        (2, 2, 0),
        (4, 4, 0),
    ]
    raw["seeds"] = 2
    pretrain, finetune = price(study_from(raw), jobs=2).stages
    assert (pretrain.runs, pretrain.done, pretrain.tokens) == (4, 2, 2 * 20 * STEP)
    assert (finetune.runs, finetune.done, finetune.tokens) == (8, 4, 4 * 2 * 16 * STEP // 4)
    assert pretrain.hours is not None
    assert pretrain.hours > 0
    h100 = price(study_from(raw), jobs=1, gpu="H100", mfu=0.5).stages[0]
    assert h100.hours == pytest.approx(h100.flops / (0.5 * 989.4e12) / 3600, rel=1e-3)


def test_a_study_takes_as_long_as_its_longest_chain_however_many_run_at_a_time(
    swept: tuple[Path, pd.DataFrame],
) -> None:
    raw = raw_study(swept[0].parent) | {"seeds": 2}
    one, many = (price(study_from(raw), jobs=jobs, gpu="H100", mfu=0.5, per_gpu_hour=2.0) for jobs in (1, 100))
    pretrain, finetune = many.stages
    assert pretrain.hours
    assert finetune.hours
    assert (one.jobs, many.jobs) == (1, 12)
    assert one.wall_hours == one.total.hours == pytest.approx(pretrain.hours + finetune.hours)
    assert many.wall_hours == pytest.approx(pretrain.hours / 2 + finetune.hours / 4)  # a run and a finetune of it
    assert one.cost == many.cost
    assert one.speed_from == "stated"


def test_the_price_of_a_study_says_that_its_speed_is_assumed(
    swept: tuple[Path, pd.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    raw = raw_study(swept[0].parent) | {"seeds": 2}
    print_price(price(study_from(raw), jobs=1, gpu="H100", mfu=None, per_gpu_hour=None), "s", Console(width=500))
    assert "an MFU of 40% is assumed: give yours with --mfu; 49% at 124m" in capsys.readouterr().out


def test_a_timed_step_is_priced_as_it_was_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpointing, whose recomputation was timed with it; only the first of its phases is tried."""
    tiny.write_corpora(tmp_path)
    plan = make_plan(tiny.recipe(tmp_path, engine={"checkpointing": "full"}))
    tried: list[str] = []

    def timed(recipe: Recipe) -> list[SimpleNamespace]:
        tried.extend(phase.name for phase in recipe.phases)
        return [SimpleNamespace(step_s=2.0) for _ in recipe.phases]

    monkeypatch.setattr("spt_fast.study.costs.dry_run", timed)
    assert phase_time(plan, 0, _speed(plan, [], jobs=1, gpu=None, mfu=None)).step_s == pytest.approx(2.0)
    assert tried == ["pretrain"]


def test_a_killed_sweep_continues_to_the_same_table(swept: tuple[Path, pd.DataFrame], tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    raw = raw_study(tmp_path)
    raw["stages"][0]["delta"] = ["1/4"]
    table = swept[1]
    table = table[(table["delta"] == 0.25) | (table["pretrain_delta"] == 0.25)]
    study.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "spt_fast", "sweep", str(study), "--json"]
    done = tmp_path / "study" / "runs"
    killed = 0
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        finished = len(list(done.glob("*/summary.json")))
        while process.poll() is None and len(list(done.glob("*/summary.json"))) <= finished:
            time.sleep(0.05)
        if signal_number == signal.SIGKILL:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(signal_number)
        said = process.communicate()[1].decode()
        killed += process.returncode == -signal.SIGKILL
        killed += process.returncode == 75 and "run the same command again" in said
    assert killed == 2
    finished_process = subprocess.run(command, capture_output=True, text=True, check=True)
    facts = json.loads(finished_process.stdout)
    assert (facts["runs"], facts["done"], facts["failed"]) == (3, 3, {})
    order = ["run", "tokens"]
    pd.testing.assert_frame_equal(
        read_table([facts["table"]]).sort_values(order, ignore_index=True),
        table.sort_values(order, ignore_index=True),
        check_dtype=False,
    )


def test_a_diverged_run_is_recorded_and_the_others_continue(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    raw["stages"][0] |= {"delta": ["1/4"], "lr": [3e-3, 1e30], "budgets": [10 * STEP, 40 * STEP]}
    raw["stages"][0]["optimizer"] = {"clip": None}
    table, outcome = sweep(study_from(raw), quiet())
    assert len(outcome.failed) == 1
    assert "not finite" in next(iter(outcome.failed.values()))
    assert len(outcome.skipped) == 2
    failed = table[table["status"] == "failed"]
    assert len(failed) == 1
    assert failed["domain_heldout"].isna().all()
    assert table[table["status"] == "done"]["run"].nunique() == 3


def test_arms_from_scratch_and_from_embeddings_are_marked_in_the_table(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    raw["stages"][0] |= {"delta": 0, "budgets": [10 * STEP]}
    raw["stages"][1] |= {"start": ["pretrained", "scratch", "embeddings", "frozen embeddings"], "untie": True}
    assert [cost.runs for cost in price(study_from(raw), jobs=1).stages] == [1, 4]
    table, outcome = sweep(study_from(raw), quiet(), workers=HereAlone())
    assert not outcome.failed
    tunes = table[table["delta"] == 1]
    assert dict(zip(tunes["start"], tunes["stage"], strict=True)) == {
        "pretrained": 1,
        "scratch": 0,
        "embeddings": 1,
        "frozen embeddings": 1,
    }
    first = tunes[tunes["tokens"] == 0].set_index("start")["domain_heldout"]
    assert first["embeddings"] == first["frozen embeddings"] != first["scratch"]
    assert first["pretrained"] < first["scratch"]


def test_a_users_mistake_stops_the_sweep(tmp_path: Path) -> None:
    study = study_from(raw_study(tmp_path))
    (study.folder / "runs").mkdir(parents=True)
    (study.folder / "runs" / expand(study)[0].name).write_text("in the way")
    with pytest.raises(RecipeError, match=r"failed with exit code 2(.|\n)* is a file; choose another name"):
        sweep(study, quiet())


def test_likely_mistakes_in_a_stage_are_warned_of_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "train_all", lambda *jobs, **how: Outcome())
    raw = raw_study(tmp_path)
    raw["stages"][1]["eval"] = {"every": "1 step", "tokens": 400}
    for work in (lambda: price(study_from(raw), jobs=1), lambda: sweep(study_from(raw), quiet())):
        with pytest.warns(SptWarning) as said:
            work()
        lines = [str(warning.message) for warning in said]
        costly = [
            line for line in lines if re.match(r"stages\[finetune\].eval: evaluations score .* takes longer", line)
        ]
        assert len(costly) == 1, lines
        assert len(set(lines)) == len(lines)
    raw["sources"]["general"]["train"] = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"sources\.general\.train: no token dataset at .*nowhere"):
        sweep(study_from(raw), quiet())


def test_trackers_of_the_study_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_from(raw_study(tmp_path, log={"to": ["csv", "wandb"]}))
    assert {run.recipe.log.to for run in expand(study)} == {("csv", "wandb")}
    monkeypatch.setattr("spt_fast.train.trackers.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"log\.to: csv is not installed"):
        sweep(study, quiet())
    assert not study.folder.exists()


def test_a_corpus_smaller_than_requested_is_refused_before_training(tmp_path: Path) -> None:
    raw = raw_study(tmp_path) | {"domain_tokens": [400, 5000]}
    message = r"domain_tokens: asks for 5,000 tokens, but \S*chem has 1,1\d\d; write that or less, or `domain_tok"
    with pytest.raises(RecipeError, match=message):
        sweep(study_from(raw), quiet())
    with pytest.raises(RecipeError, match=message):
        price(study_from(raw), jobs=1)
    assert not (tmp_path / "study" / "runs").exists()


def test_a_second_sweep_of_a_running_study_is_refused(swept: tuple[Path, pd.DataFrame]) -> None:
    who = rf"study: \S+: in use by process {os.getpid()} on .* since"
    with owned(swept[0], "study"), pytest.raises(InUse, match=who):
        sweep(study_from(raw_study(swept[0].parent)), quiet())


def test_a_run_that_outlives_its_sweep_keeps_the_study_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "command", lambda recipe: ["sleep", "600"])
    reader, writer = os.pipe()
    killed = os.fork()
    if killed == 0:
        with owned(tmp_path, "study", inherited=True):
            process: Any = jobs.Local(1).start(tmp_path / "recipe.yaml", tmp_path / "log")
            os.write(writer, str(process.pid).encode())
            os._exit(9)
    outlives = int(os.read(reader, 20))
    os.waitpid(killed, 0)
    with pytest.raises(InUse, match=f"in use by process {killed}"), owned(tmp_path, "study"):
        pass
    os.kill(outlives, signal.SIGKILL)

    def is_free() -> bool:
        with suppress(InUse), owned(tmp_path, "study"):
            return True
        return False

    until(is_free)


def test_a_dry_run_trains_nothing_and_prints_the_price(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(raw_study(tmp_path)))
    result = CliRunner().invoke(app, ["sweep", str(study), "--dry-run", "--json", "--price", "2.5", "--jobs", "2"])
    facts = json.loads(result.stdout)
    assert facts["total"]["runs"] == len(expand(study_from(raw_study(tmp_path)))) == 6
    assert facts["cost"] == pytest.approx(2.5 * facts["total"]["hours"])
    assert not (tmp_path / "study").exists()

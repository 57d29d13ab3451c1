"""The figures of a run reach its trackers, continue in the same place on resume, and never end the run."""

from __future__ import annotations

import csv
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spt_fast.config import recipe_from
from spt_fast.errors import RecipeError
from spt_fast.train import trackers
from spt_fast.train.dry_run import dry_run
from spt_fast.train.metrics import RunLog
from spt_fast.train.run import run
from spt_fast.train.trackers import KINDS, Entry, Followed
from tests import tiny
from tests.train.test_loop import StopAfter


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return tmp_path


def short(data: Path, name: str, *to: str) -> dict[str, Any]:
    raw = tiny.raw_recipe(data, name) | {"log": {"every": "1 steps", "to": [*to]}}
    return raw | {"phases": [raw["phases"][0] | {"tokens": 3 * 8 * tiny.CONTEXT}]}


def history(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(config, what was logged) of a run of W&B, whose file is a log as LevelDB writes it."""
    from wandb.proto.wandb_internal_pb2 import Record  # takes a second, which collecting the tests should not

    written, at, data = file.read_bytes(), 7, b""
    config, rows = dict[str, Any](), list[dict[str, Any]]()
    while at < len(written):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", written[at + 4 : at + 7])
        data += written[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(data)
            data = b""
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if items := record.history.item:
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return config, rows


def test_every_tracker_has_each_record_of_a_resumed_run_once(
    data: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tiny.raw_recipe(data, "tracked") | {"log": {"every": "1 steps", "to": list(KINDS)}}
    folder = Path(raw["run"])
    recipe = recipe_from(raw)
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.train.run.StopRequest", StopAfter)
        StopAfter.looks = 115
        assert run(recipe, progress=False)["status"] == "stopped"
    known = json.loads((folder / "trackers.json").read_text())
    assert run(recipe, resume=True, progress=False)["status"] == "done"
    assert json.loads((folder / "trackers.json").read_text()) == known
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    second = [record["loss"] for record in trained if (record["phase"], record["arm"]) == ("finetune", 1)]
    losses = [record["loss"] for record in trained]

    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["phase"], int(row["step"])) for row in rows] == [
        (record["kind"], record["phase"], record["step"]) for record in records
    ]
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == losses
    assert rows[0]["heldout/chem"] == str(records[0]["heldout"]["chem"])
    assert all(float(row["system/memory_gb"]) > 0.05 for row in rows if row["kind"] == "train")

    def points(board: Path, tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in EventAccumulator(str(board)).Reload().Scalars(tag)]

    whole = points(folder / "tensorboard", "train/loss")
    assert [step for step, _ in whole] == list(range(1, len(losses) + 1))
    assert [value for _, value in whole] == pytest.approx(losses)
    assert {"heldout/chem", "select/general", "train/chem", "train/lr"} <= set(
        EventAccumulator(str(folder / "tensorboard")).Reload().Tags()["scalars"]
    )
    of_arm = points(folder / "tensorboard" / "finetune-2", "train/loss")
    assert [value for _, value in of_arm] == pytest.approx(second)

    from mlflow import MlflowClient

    client = MlflowClient((offline / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("spt-fast").experiment_id])
    assert (found.info.run_id, found.info.run_name, found.info.status) == (known["mlflow"], "tracked", "FINISHED")
    assert found.data.params["phases.0.optimizer.lr"] == "0.003"
    assert found.data.params["arms.finetune-2.lr"] == "0.02"
    assert int(found.data.params["parameters"]) > 1000
    logged = {metric.step: metric.value for metric in client.get_metric_history(known["mlflow"], "train/loss")}
    assert [logged[step] for step in sorted(logged)] == losses
    logged = {m.step: m.value for m in client.get_metric_history(known["mlflow"], "finetune-2/train/loss")}
    assert [logged[step] for step in sorted(logged)] == second

    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.stem for file in files] == [f"run-{known['wandb']}"] * 2
    config, first = history(files[0])
    last = history(files[1])[1]
    assert config["phases"][0]["optimizer"]["lr"] == 0.003
    assert config["arms"] == {"finetune-1": {"lr": 0.001}, "finetune-2": {"lr": 0.02}}
    logged = {row["step"]: row["train/loss"] for row in [*first, *last] if "train/loss" in row}
    assert [logged[step] for step in sorted(logged)] == losses
    assert [row["finetune-2/train/loss"] for row in [*first, *last] if "finetune-2/train/loss" in row][-1] == second[-1]
    assert any("heldout/chem" in row and "train/general" in row for row in first)


def test_a_tracker_that_fails_or_hangs_is_reported_once_and_training_continues(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unreachable:
        place = "https://tracker.example/run"

        def __init__(self, followed: Followed) -> None: ...

        def write(self, entry: Entry) -> None:
            raise ConnectionError("no route to host\nand a long trace")

        def close(self, status: str) -> None:
            raise ConnectionError("still none")

    class Hanging(Unreachable):
        def write(self, entry: Entry) -> None:
            time.sleep(60)

    monkeypatch.setitem(KINDS, "wandb", Unreachable)
    monkeypatch.setitem(KINDS, "mlflow", Hanging)
    monkeypatch.setattr(trackers, "PATIENCE_S", -0.5)
    began_s = time.monotonic()
    assert run(recipe_from(short(data, "failing", "wandb", "mlflow", "csv")))["status"] == "done"
    assert time.monotonic() - began_s < 50
    said = " ".join(capsys.readouterr().err.split())
    assert (
        said.count("warning: log.to: wandb failed (no route to host); training continues, and metrics.jsonl has") == 1
    )
    assert said.count("warning: log.to: mlflow has not taken the last figures in time") == 1
    assert said.count("log.to") == 2
    assert "wandb: https://tracker.example/run" in said
    assert len((data / "failing" / "metrics.csv").read_text().splitlines()) == 1 + len(tiny.metrics(data / "failing"))


def test_losses_of_other_runs_averages_are_in_the_table_only(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Kept:
        place, losses = str(tmp_path), list[float]()

        def __init__(self, followed: Followed) -> None: ...

        def write(self, entry: Entry) -> None:
            self.losses.append(entry.figures["heldout/general"])

        def close(self, status: str) -> None: ...

    monkeypatch.setitem(KINDS, "tensorboard", Kept)
    raw = short(data, "averages", "tensorboard", "csv")
    raw["phases"][0]["average"] = "10%"
    log = RunLog(Followed(tmp_path, recipe_from(raw), {}, None), [1.0], keep_bytes=0, progress=True, mfu_label="")
    ended = {"phase": "pretrain", "arm": 0, "step": 3, "tokens": 384, "select": {}, "train": {}}
    for share in (0.0, 0.1, 0.25):
        losses = {"heldout": {"general": 1 + share}, "standard_errors": {"heldout": {"general": None}}}
        log.evaluation(ended | losses | ({"average": share} if share else {}), 3)
    assert log._domain_loss == "general 1.100"
    log.close()
    assert Kept.losses == [1.0, 1.1]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [(row["average"], row["heldout/general"]) for row in csv.DictReader(file)] == [
            *(("", "1.0"), ("0.1", "1.1"), ("0.25", "1.25")),
        ]
    said = capsys.readouterr().err
    assert "step 3 · general 1.000" in said
    assert "step 3, 25% averaged · general 1.250" in said


def test_a_tracker_that_cannot_be_started_is_refused_at_the_start_and_skipped_on_resume(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(followed: Followed) -> trackers.Tracker:
        raise PermissionError("log in first")

    raw = short(data, "begun") | {"checkpoint": {"every": "2 steps"}}
    assert run(recipe_from(raw), progress=False)["status"] == "done"
    assert not (data / "begun" / "tensorboard").exists()
    longer = raw | {"phases": [*raw["phases"], raw["phases"][0] | {"name": "more"}]}
    longer["log"] = {"to": "wandb"}
    monkeypatch.setitem(KINDS, "wandb", unknown)
    assert run(recipe_from(longer), resume=True)["status"] == "done"
    assert "warning: log.to: wandb cannot be started (log in first); training continues" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"log\.to: wandb cannot be started \(log in first\); fix that, or leave it"):
        run(recipe_from(short(data, "refused", "wandb")), progress=False)


def test_a_missing_library_is_named_before_training(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    recipe = recipe_from(short(data, "missing", "wandb"))
    for act in (run, dry_run):
        with pytest.raises(RecipeError, match=r"log\.to: wandb is not installed; pip install 'spt-fast\[wandb\]'"):
            act(recipe)
    assert not (data / "missing").exists()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mlflow_of_no_package").mkdir()
    with pytest.raises(RecipeError, match="not installed"):
        trackers.check_installed(["mlflow_of_no_package"])
    with pytest.raises(RecipeError, match=r"log\.to: 'wandd' is invalid: .*did you mean 'wandb'"):
        recipe_from(short(data, "typo", "wandd"))


def test_a_moved_run_continues_in_its_trackers_and_a_copy_begins_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, moved, copy = (tmp_path / name for name in ("began", "moved", "copy"))
    began.mkdir()
    for name in ("wandb", "mlflow"):
        trackers._remember(began, name, f"first-{name}")
    shutil.copytree(began, copy)
    for name in ("wandb", "mlflow"):
        assert trackers._known(began, name) == f"first-{name}"
        assert trackers._known(copy, name) is None
        trackers._remember(copy, name, f"second-{name}")
        assert trackers._known(copy, name) == f"second-{name}"
    (mounted := tmp_path / "mounted").symlink_to(began)
    with monkeypatch.context() as patched:  # a place that the path does not tell
        patched.setattr(Path, "resolve", lambda path, **how: path)
        assert trackers._known(mounted, "wandb") == "first-wandb"
    began.rename(moved)
    assert trackers._known(moved, "wandb") == "first-wandb"
    (moved / "trackers.json").write_text('{"wandb": "of an earlier version"}')
    assert trackers._known(moved, "wandb") == "of an earlier version"


def test_a_table_requested_on_resume_has_the_earlier_records(data: Path) -> None:
    raw = short(data, "later", "csv")
    run(recipe_from(raw), progress=False)
    table = data / "later" / "metrics.csv"
    once = table.read_text().splitlines()
    followed = Followed(data / "later", recipe_from(raw), {}, 3)
    KINDS["csv"](followed).close("done")
    assert table.read_text().splitlines() == once
    table.unlink()
    KINDS["csv"](followed).close("done")
    rows, before = list(csv.DictReader(table.read_text().splitlines())), list(csv.DictReader(once))
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in before]
    assert rows[0]["select/general"] == before[0]["select/general"] != ""

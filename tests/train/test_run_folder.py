"""A run's folder: no file of the user is replaced in it, and one process at a time works there."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from spt_fast.config import recipe_from
from spt_fast.errors import RecipeError
from spt_fast.locks import InUse
from spt_fast.study import doge
from spt_fast.train import loop
from spt_fast.train.folder import owned
from spt_fast.train.run import run
from spt_fast.train.signals import PATIENCE_S, StopRequest, interrupt_by_signals
from tests import tiny


def short(data: Path, name: str) -> dict[str, Any]:
    raw = tiny.raw_recipe(data, name)
    raw["phases"] = [raw["phases"][0] | {"tokens": 2 * 8 * 16}]
    return raw


@pytest.mark.parametrize("resume", [False, True])
def test_a_project_with_its_own_recipe_and_metrics_is_left_alone(data: Path, tmp_path: Path, resume: bool) -> None:
    raw = short(data, "x") | {"run": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text("# mine\n" + yaml.safe_dump(raw))
    (tmp_path / "metrics.jsonl").write_text("mine")
    (tmp_path / "summary.json").write_text("mine")
    (tmp_path / "heartbeat.json").write_text("[1]")
    (tmp_path / "checkpoints" / "step-final").mkdir(parents=True)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(RecipeError, match=r"run: folder \S+ holds a recipe\.yaml, but no run; choose another name"):
        run(recipe_from(raw), resume=resume, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("died_after", ["nothing", "the lock", "the heartbeat", "the recipe"])
def test_a_run_that_died_before_its_first_checkpoint_starts_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], died_after: str
) -> None:
    raw = short(data, "x") | {"run": str(tmp_path / "run")}
    folder = tmp_path / "run"
    folder.mkdir()
    files = {
        ".lock": '{"host": "there", "pid": 1, "since": "long ago"}',
        "heartbeat.json": '{"time": 1.0, "host": "here", "pid": 1}',
        "recipe.yaml": yaml.safe_dump(recipe_from(raw).plain()),
    }
    for name in list(files)[: ["nothing", "the lock", "the heartbeat", "the recipe"].index(died_after)]:
        (folder / name).write_text(files[name])
    if died_after == "the recipe":
        (folder / "metrics.jsonl").write_text("{}\n")
    assert run(recipe_from(raw), resume=True)["status"] == "done"
    assert not (folder / ".lock").exists()
    begun = "no checkpoint to resume from: starting at the first step" in capsys.readouterr().err
    assert begun == (died_after == "the recipe")


def test_a_run_continues_when_nothing_reads_what_it_prints(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as unread, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", unread)
        assert run(recipe_from(short(data, "unread")))["status"] == "done"
        assert stat.S_ISCHR(os.fstat(writer).st_mode), "the rest goes nowhere, also at the exit"


def test_a_second_process_in_a_folder_is_refused_and_names_the_first(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = rf"run: \S+: in use by process {os.getpid()} on \S+ since .*; wait until it has ended, or stop it"
    raw = short(data, "twice")
    train = loop.Trainer.train

    def meanwhile(trainer: loop.Trainer) -> None:
        for resume in (False, True):
            with pytest.raises((InUse, RecipeError)):
                run(recipe_from(raw), resume=resume, progress=False)
        with pytest.raises(InUse, match=who):
            run(recipe_from(raw), resume=True, progress=False)
        train(trainer)

    monkeypatch.setattr(loop.Trainer, "train", meanwhile)
    assert run(recipe_from(raw), progress=False)["status"] == "done"
    steps = [record["step"] for record in tiny.metrics(data / "twice") if record["kind"] == "train"]
    assert steps == [1, 2]
    with owned(data / "weights-of-sources", "out"), pytest.raises(InUse, match=who.replace("run", "out", 1)):
        doge.reweight(recipe_from(raw), data / "weights-of-sources", progress=False)
    assert not (data / "weights-of-sources").exists()


def test_files_have_the_mode_of_the_umask(data: Path) -> None:
    before = os.umask(0o027)
    try:
        raw = short(data, "modes") | {"checkpoint": {"every": "1 steps"}}
        run(recipe_from(raw), progress=False)
    finally:
        os.umask(before)
    files = [path for path in (data / "modes").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {"0o640"}


# ------------------------------------------------------------------------------------------------ signals


STORM = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


def test_many_signals_make_one_request_and_a_late_sigint_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {number: signal.getsignal(number) for number in STORM}
    at_s = 0.0
    monkeypatch.setattr("spt_fast.train.signals.time.monotonic", lambda: at_s)
    try:
        interrupt_by_signals()
        with StopRequest() as early:
            os.kill(os.getpid(), signal.SIGUSR2)
            with StopRequest() as stop:
                for number in STORM * 20:
                    os.kill(os.getpid(), number)
                assert (stop.signal, early.signal) == ("SIGUSR2", "SIGUSR2")
                at_s = PATIENCE_S + 1
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
        at_s = 0.0
        for number in STORM:
            os.kill(os.getpid(), number)  # only the end remains
        interrupt_by_signals()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_a_signal_in_the_handler_of_another_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic

    def interrupted_once() -> float:
        monkeypatch.setattr("spt_fast.train.signals.time.monotonic", now)
        os.kill(os.getpid(), signal.SIGINT)
        return now()

    with StopRequest() as early, StopRequest() as stop:
        monkeypatch.setattr("spt_fast.train.signals.time.monotonic", interrupted_once)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert early()


HEARD = """
import os
from spt_fast import cli
from spt_fast.train import signals
from spt_fast.train.signals import StopRequest
signals.PATIENCE_S = 600  # the end of a run may take longer than 10 s on a busy machine
enter = StopRequest.__enter__
def entered(request):
    enter(request)
    os.write(1, b"!")
    return request
StopRequest.__enter__ = entered
cli.main()
"""


def test_signals_from_before_the_first_step_to_the_end_give_exit_code_75(data: Path) -> None:
    path = tiny.write_recipe(data, tiny.raw_recipe(data, "storm"))
    command = [sys.executable, "-c", HEARD, "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    while process.poll() is None:
        for number in STORM:
            process.send_signal(number)
        time.sleep(0.01)
    said = process.stderr.read().decode()
    assert process.returncode == 75, said
    assert "and saved; run again with --resume" in said

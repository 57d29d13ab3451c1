"""The heartbeat, the stacks of a run that hangs, and losses that jump."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest

from spt_fast.train import watch
from spt_fast.train.watch import LossWatch, Watch


def until(condition: object, seconds: float = 300.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_the_heartbeat_holds_the_newest_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HEARTBEAT_EVERY_S", 0.02)
    file = tmp_path / "heartbeat.json"
    with Watch(tmp_path, 0, stall_s=60) as watching:
        began = time.time()
        watching.sign_of_life(phase="pretrain", step=7)
        until(lambda: file.exists() and json.loads(file.read_text()).get("step") == 7)
        beat = json.loads(file.read_text())
        assert beat["phase"] == "pretrain"
        assert began - 1 <= beat["time"] <= time.time()
        time.sleep(0.2)
        assert json.loads(file.read_text()) == beat, "no news, no beat"
    assert not list(tmp_path.glob("stacks-*"))


def test_a_run_that_hangs_writes_its_stacks_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stacks = tmp_path / "stacks-3.txt"

    def hang_here() -> None:
        until(lambda: stacks.exists() and "hang_here" in stacks.read_text())
        time.sleep(0.3)

    watching = Watch(tmp_path, 3, stall_s=0.1)
    watching.sign_of_life(phase="pretrain", step=7)
    with watching:
        hang_here()
    said = stacks.read_text()
    assert "hang_here" in said
    assert "'step': 7" in said
    assert said.count("nothing for") == 1
    assert re.search(r"no step for \d+ s in process 3", capsys.readouterr().err)
    assert not (tmp_path / "heartbeat.json").exists(), "that is the first process's"


def test_only_a_loss_far_above_the_recent_ones_is_a_jump() -> None:
    draw = random.Random(0)
    losses = LossWatch()
    falling = [6 / (1 + step / 50) + draw.gauss(0, 0.05) for step in range(300)]
    assert [losses.jump(loss) for loss in falling] == [None] * 300
    usual = losses.jump(falling[-1] + 1.5)
    assert usual is not None
    assert usual == pytest.approx(sorted(falling[-100:])[50], abs=0.05)
    assert losses.jump(falling[-1]) is None


def test_the_first_losses_are_never_a_jump() -> None:
    losses = LossWatch()
    assert [losses.jump(loss) for loss in (4.0, 9.0, 1.0, 50.0)] == [None] * 4

"""A short campaign of tests/fuzz.py: no damaged input ends in a traceback, a hang, or in being believed."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spt_fast.errors import DataError
from tests import fuzz
from tests.seed import SEED


def test_nothing_damaged_is_believed_and_nothing_crashes() -> None:
    """In a process of its own, since it forks and must have computed nothing."""
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "800", "--seed", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"seed {SEED}: 0 failures of 80" in done.stdout


def refuses(rng: random.Random) -> str:
    raise DataError("d.bin: is damaged")


def forgets(rng: random.Random) -> str:
    return [""][1]


def hangs(rng: random.Random) -> str:
    while True:
        time.sleep(0.01)


def test_what_the_campaign_calls_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CASE_SECONDS", 0.1)
    assert fuzz.outcome(refuses, 0, "dataset", 1) == (True, "refused")
    assert fuzz.outcome(forgets, 0, "dataset", 1)[0] is False
    fine, how = fuzz.outcome(hangs, 0, "dataset", 1)
    assert not fine
    assert how.startswith("TooLong")


def test_damage_depends_on_the_seed_alone_and_changes_something() -> None:
    tree = {"a": [1, 2, {"b": "c"}], "d": 3.5}
    for seed in range(50):
        damaged = [fuzz.damaged_tree(tree, random.Random(seed)) for _ in range(2)]
        assert repr(damaged[0]) == repr(damaged[1])
    assert tree == {"a": [1, 2, {"b": "c"}], "d": 3.5}
    changed = sum(
        fuzz.damaged_bytes(b"0123456789" * 9, random.Random(seed)) != b"0123456789" * 9 for seed in range(200)
    )
    assert changed > 180

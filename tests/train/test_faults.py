"""A short campaign of tests/faults.py, in a process of its own: it forks, which must come before any computation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.seed import SEED

pytestmark = pytest.mark.long


def survive(out: Path, *arguments: str) -> dict[str, Any]:
    """The results of a campaign without failures."""
    command = [sys.executable, "-m", "tests.faults", *arguments, "--seed", str(SEED), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-5000:]}{done.stderr[-2000:]}"
    return json.loads(out.read_text())["results"]


def test_a_run_survives_kills_signals_full_disks_damage_and_nan_losses(tmp_path: Path) -> None:
    parts = ["kills", "signals", "disk", "damage", "nan", "prepare", "train", "export"]
    results = survive(tmp_path / "results.json", *parts, "--chains", "1", "--kills", "4", "--each", "1")
    assert results["steps"] >= 200
    counts = results["counts"]
    assert counts["kills"] >= 4
    assert {name: count for name, count in counts.items() if "survived" in name} == {
        "chains of kills: survived": counts["chains of kills: survived"],
        "chains of SIGTERM: survived": 1,
        "full disks: survived": 1,
        "read-only folders: survived": 1,
        "damaged checkpoints: survived": 1,
        "losses that are not a number: survived": 1,
        "prepare killed at a call: survived": 8,
        "train killed at a call: survived": 2,
        "export killed at a call: survived": 4,
    }


def test_sigterm_to_one_of_two_processes_stops_both_and_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    results = survive(tmp_path / "results.json", "rank_stopped")
    assert results["counts"]["SIGTERM to one rank, bit-equal after it: survived"] == 1

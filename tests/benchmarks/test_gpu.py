from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu import Budget, Entry, _counts, op_benchmarks


def test_results_are_added_to_and_never_overwritten(tmp_path: Path) -> None:
    first = Entry.begin(tmp_path, "kernels")
    first.add("norm", {"rows": [1]})
    second = Entry.begin(tmp_path, "train")
    second.add("124m", {"rows": [2]})
    first.add("adamw", {"rows": [3]})
    assert second.path == first.path
    entries = {entry["stage"]: entry for entry in json.loads(first.path.read_text())}
    assert entries["kernels"]["parts"] == {"norm": {"rows": [1]}, "adamw": {"rows": [3]}}
    assert entries["train"]["parts"] == {"124m": {"rows": [2]}}
    assert "torch" in entries["train"]["machine"]
    assert "commit" in entries["train"]["machine"]


def test_a_stage_run_twice_in_a_day_stands_there_twice(tmp_path: Path) -> None:
    for number in range(2):
        entry = Entry.begin(tmp_path, "check")
        entry.record["began"] = f"2026-11-21T00:00:0{number}+00:00"
        entry.add("test_norm", {"tests": number})
    assert [entry["parts"]["test_norm"]["tests"] for entry in json.loads(entry.path.read_text())] == [0, 1]


def test_what_one_part_leaves_over_the_later_ones_have(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    given = []
    for name, seconds in Budget(100.0).shares({"a": 1, "b": 3, "c": 1}):
        given.append((name, seconds))
        now[0] += 10
    assert given == [("a", 20.0), ("b", 67.5), ("c", 80.0)]


def test_every_op_has_its_share() -> None:
    shares = op_benchmarks()
    assert (shares["attention"], shares["fp8"], shares["activation"]) == (4, 2, 1)


def test_failures_are_read_from_pytests_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped message="no GPU"/></testcase>'
        '<testcase name="c"><failure message="assert 1 == 2">at</failure></testcase></testsuite></testsuites>'
    )
    assert _counts(report) == {"tests": 3, "failed": 1, "skipped": 1, "failures": ["c: assert 1 == 2"]}
    assert _counts(tmp_path / "none.xml")["tests"] == 0

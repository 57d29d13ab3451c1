from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, profile_step
from benchmarks.gpu import OPS, PRINTED, Item, Results, Screen, items, run
from benchmarks.kernels.harness import Row
from benchmarks.machine import ROOT
from tests.train.test_watch import until

ITEM = """
import json, os, signal, sys, time
how, pause, file = sys.argv[1], float(sys.argv[2]), sys.argv[4]
open(os.path.join(os.environ["FOLDER"], "begun"), "a").write(f"{sys.argv[1]} {os.getpid()}\\n")
for part in range(3):
    with open(file + ".new", "w") as out:
        json.dump({"parts": list(range(part + 1)), "machine": {}}, out)
    os.replace(file + ".new", file)
    time.sleep(pause)
    if part == 1 and how == "hangs":
        time.sleep(60)
    if part == 1 and how == "breaks":
        print("illegal memory access", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
"""

COMMAND = """
import sys
from pathlib import Path
from benchmarks import gpu
gpu.POLL_SECONDS = 0.01
planned = [gpu.Item("stage", f"item {i}", 30, ["an_item", f"works{i}", "0.03"]) for i in range(5)]
gpu.run(planned, gpu.Results.open(Path(sys.argv[1]), None), 60, gpu.Screen())
"""


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "an_item.py").write_text(ITEM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setattr(gpu, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(gpu, "machine", lambda *_: {"date": "2026-11-28", "gpu": "NVIDIA H100"})


def item(how: str, seconds: float = 30.0, **more: Any) -> Item:
    return Item("check", how, seconds, ["an_item", how, "0.01"], **more)


def test_an_item_that_breaks_or_hangs_ends_no_other_and_a_second_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [item("breaks"), item("hangs", 0.7), item("works"), item("long", 1000), item("with", before=("no-such",))]
    first = Results.open(tmp_path / "out", None)
    run(planned, first, 500, Screen())
    kept = json.loads(first.path.read_text())["items"]
    states = {name: found["state"] for name, found in kept.items()}
    assert states == {"breaks": "failed", "hangs": "cut off", "works": "done", "long": "skipped", "with": "skipped"}
    assert kept["hangs"]["parts"] == [0, 1]
    assert (kept["breaks"]["parts"], kept["breaks"]["code"]) == ([0, 1], -signal.SIGSEGV)
    assert "illegal memory access" in kept["breaks"]["output"]
    assert "it takes 1000 s" in kept["long"]["why"]
    assert "there is no no-such" in kept["with"]["why"]
    assert "hangs: cut off" in capsys.readouterr().out

    earlier = tmp_path / "earlier.json"
    first.path.rename(earlier)
    second = Results.open(tmp_path / "out", earlier)
    order = [waiting.name for waiting in second.waiting([*planned, item("new")])]
    assert order == ["new", "long", "with", "hangs", "breaks"]
    run([*planned, item("new")], second, 500, Screen())
    kept = json.loads(second.path.read_text())
    assert kept["items"]["works"]["run"] == 0
    assert (kept["items"]["new"]["state"], kept["items"]["new"]["run"]) == ("done", 1)
    assert len(kept["runs"]) == 2


def test_killed_at_any_moment_its_file_is_whole_and_the_next_command_goes_on(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command, moments = [sys.executable, "-c", COMMAND, str(tmp_path / "out")], random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while not list((tmp_path / "out").glob("*.json")) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.2, 0.7))
        process.kill()
        process.wait()
        (file,) = (tmp_path / "out").glob("*.json")
        json.loads(file.read_text())
    subprocess.run(command, env=environment, check=True, capture_output=True)
    kept = json.loads(file.read_text())["items"]
    assert [found["state"] for found in kept.values()] == ["done"] * 5
    assert all(found["parts"] == [0, 1, 2] for found in kept.values())
    begun = (tmp_path / "begun").read_text().splitlines()
    assert len(begun) < 5 + 5, "what was done is not done again"


def test_an_item_ends_with_the_command_that_started_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    hangs = COMMAND.replace('f"works{i}"', '"hangs"')
    process = subprocess.Popen([sys.executable, "-c", hangs, str(tmp_path / "out")], env=environment)
    until(lambda: (tmp_path / "begun").exists() and len((tmp_path / "begun").read_text().split()) == 2)
    item_pid = int((tmp_path / "begun").read_text().split()[1])
    assert "an_item" in _command_of(item_pid)
    process.kill()
    process.wait()
    until(lambda: "an_item" not in _command_of(item_pid), seconds=20.0)  # by itself it takes a minute


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_figures_of_another_machine_or_of_a_dry_run_are_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = Results.open(tmp_path, None, dry=True)
    dry.put(item("works"), "done")
    assert Results.open(tmp_path, None).state(item("works")) == "never begun"
    assert Results.open(tmp_path, None, dry=True).state(item("works")) == "done"
    with pytest.raises(ValueError, match="a dry run"):
        Results.open(tmp_path, dry.path)
    here = Results.open(tmp_path, None)
    here.put(item("works"), "done")
    monkeypatch.setattr(gpu, "machine", lambda *_: {"date": "2026-11-29", "gpu": "NVIDIA H200", "commit": "later"})
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--from", str(here.path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "has figures of another machine (NVIDIA H100, not dry)" in capsys.readouterr().err


def test_items_of_an_earlier_command_are_named_with_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for commit in ("first", "second"):
        about = {"date": "2026-11-28", "gpu": "NVIDIA H100", "commit": commit}
        monkeypatch.setattr(gpu, "machine", lambda *_, about=about: about)
        planned = [item("works"), item(f"works {commit}")]
        monkeypatch.setattr(gpu, "items", lambda dry, planned=planned: planned)
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            gpu.main()
    assert "\nkept from commit first: works\n" in capsys.readouterr().out


def test_an_item_that_skipped_a_shape_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = Row("norm", "8", "all", "all", "", "skipped", "no time left").plain()
    content = json.dumps({"rows": [skipped]})
    (tmp_path / "a_check.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom spt_fast.files import write_text\n"
        f"write_text(Path(sys.argv[2]), {content!r})"
    )
    results = Results.open(tmp_path / "out", None)
    for told in (gpu._checked, gpu._rates):
        run([Item("check", told.__name__, 30, ["a_check"], told)], results, 60, Screen())
        assert results.record["items"][told.__name__]["state"] == "cut off"
        assert "norm 8: skipped" in capsys.readouterr().out


def test_the_screen_gets_ten_thousand_characters_and_the_end_is_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [
        Item("check", f"item {i}", 0.0 if i else 30.0, ["an_item", "breaks", "0"], lambda _: ["x" * 400] * 9)
        for i in range(2)
    ]
    monkeypatch.setattr(
        gpu, "items", lambda dry: planned + [item(f"skipped, for the time that is left {i}", 1e9) for i in range(60)]
    )
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "PRINTED_OF_ITEM", 9_000)
    with pytest.raises(SystemExit):
        gpu.main()
    printed = capsys.readouterr().out
    assert len(printed) <= PRINTED
    assert "item 1: " in printed
    assert printed.splitlines()[-1].startswith("all figures: ")
    assert "not done: item 0" in printed


def test_what_is_planned_is_there_and_fits() -> None:
    planned = items(dry=False)
    assert len({one.name for one in planned}) == len(planned)
    for one in [*planned, *items(dry=True)]:
        assert importlib.util.find_spec(one.command[0]), one.name
    assert {one.command[0] for one in planned} >= {f"benchmarks.kernels.bench_{op}" for op in (*OPS, "attention")}
    assert {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks" / "kernels").glob("bench_*.py")} == {
        *OPS, "attention",
    }  # fmt: skip
    assert {one.stage for one in items(dry=True)} == {one.stage for one in planned} - {"more"}
    alone = sum(one.seconds for one in planned if one.stage not in ("check", "more"))
    assert alone <= gpu.SECONDS + 60


def test_what_was_checked_and_timed_in_words() -> None:
    rows = [
        {"op": "norm", "shape": "8", "kind": "torch", "contender": "eager", "status": "right", "error": 0.1},
        {"op": "norm", "shape": "8", "kind": "ours", "contender": "ours, triton", "status": "right", "error": 0.15},
        {"op": "norm", "shape": "9", "kind": "ours", "contender": "ours, triton", "status": "wrong", "note": "by far"},
        {"op": "norm", "shape": "8", "kind": "ours", "contender": "ours, sdpa", "status": "absent"},
    ]
    said = ["ours, triton: 1 of 2 right, error at most 1.5 of eager's", "  norm 9: wrong by far"]
    assert gpu._checked({"rows": rows}) == said
    timed = {"op": "norm", "shape": "8", "pass": "forward", "of_ceiling": 0.9}
    rows = [
        {**timed, "kind": "ours", "contender": "ours, triton", "seconds": [1, 2, 3]},
        {**timed, "kind": "peer", "contender": "liger", "seconds": [2, 3, 4]},
    ]
    said = ["a copy: 3,000 GB/s", "norm 8: forward 90% 1.50x"]
    assert gpu._rates({"rows": rows, "ceilings": {"GB/s": 3000.0}}) == said


def test_a_profile_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "profile.json"
    monkeypatch.setattr(profile_step, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["profile_step", "--dry", "--preset", "10m", "--json", str(file)])
    profile_step.main()
    found = json.loads(file.read_text())
    assert found["kernels"][0]["ms"] >= found["kernels"][1]["ms"] > 0
    assert found["predicted"]["launches"] > 0
    assert "tokens/s" in gpu._profiled(found)[0]

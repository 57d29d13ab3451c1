"""Everything that wants a GPU, in three stages of under nine minutes each on one H100.

    python -m benchmarks.gpu [--stage check|kernels|train …] [--out DIR] [--dry]

check     the tests of the kernels, each file in a process of its own: one that breaks the device breaks no other
kernels   benchmarks.kernels, one op after another, each with its share of the time that is left
train     benchmarks.train_step, one preset after another

Each stage adds one entry to DIR/<date>-<gpu>.json (DIR: benchmarks/results): the machine with driver, power limit and
versions, the commit, what came out; after every part of it, so that nothing is lost where a stage is cut off. What the
time does not suffice for is named as skipped. --dry runs all of it on a CPU with tiny shapes.

Needs torch, and nothing installed: the extension is built where it isn't. Peers are taken from the environment or from
build/peers (`make peers`); SPT_COMMIT names the commit of a tree that came without its history.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import PEERS, ROOT, machine, version_of
from spt_fast import native
from spt_fast.files import write_text

STAGE_SECONDS = 520.0
GRACE_SECONDS = 20.0
"""Between the time that a benchmark is given and the end of its process."""

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""So that what one contender leaves in the cache has the form that the next one wants."""

TRAINED = {"124m": 2, "10m": 1, "350m": 3, "1b": 4, "1b fp8": 2}
"""The presets that the training step is measured with, and the shares of the time. The last is ours alone, in fp8
beside bf16, round by round: with batches that leave room for both."""
MIN_PART_SECONDS = 30.0
"""A part with less than that isn't begun."""


@dataclass
class Budget:
    """The time that a stage still has, dealt out by weight."""

    ends: float

    def left(self) -> float:
        return self.ends - time.monotonic()

    def shares(self, weights: dict[str, int]) -> Iterator[tuple[str, float]]:
        """Each name and its seconds when its turn comes: what one leaves over, the later ones have."""
        names = list(weights)
        for place, name in enumerate(names):
            yield name, self.left() * weights[name] / sum(weights[later] for later in names[place:])


@dataclass
class Entry:
    """One stage's part of the results file, rewritten whenever something is added."""

    path: Path
    stage: str
    record: dict[str, Any]

    @classmethod
    def begin(cls, folder: Path, stage: str) -> Entry:
        about = machine("torch", "triton", "transformers", *PEERS)
        name = re.sub(r"[^a-z0-9]+", "-", about.get("gpu", "cpu").lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "stage": stage,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": about,
            "parts": {},
        }
        return cls(folder / f"{about['date']}-{name}.json", stage, record)

    def add(self, part: str, found: dict[str, Any]) -> None:
        self.record["parts"][part] = found
        entries = json.loads(self.path.read_text()) if self.path.exists() else []
        mine = [i for i, entry in enumerate(entries) if (entry["stage"], entry["began"]) == self.key]
        entries = [entry for i, entry in enumerate(entries) if i not in mine]
        write_text(self.path, json.dumps([*entries, self.record], indent=1) + "\n")

    @property
    def key(self) -> tuple[str, str]:
        return self.stage, self.record["began"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, help="for each stage")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    options = parser.parse_args()
    if not native.is_built():
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
    failed = False
    for stage in options.stage:
        budget = Budget(time.monotonic() + options.seconds)
        entry = Entry.begin(options.out, stage)
        print(f"# {stage}\n\n" + ", ".join(f"{k} {v}" for k, v in entry.record["machine"].items()), flush=True)
        failed |= not STAGES[stage](entry, budget, options.dry)
        print(f"\n{entry.path}: added {stage}, {options.seconds - budget.left():.0f} s", flush=True)
    sys.exit(1 if failed else 0)


def check(entry: Entry, budget: Budget, dry: bool) -> bool:
    """Whether every test passed."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    names = [f.stem for f in files if f.stem != "test_aot"]  # which needs no GPU
    weights = dict.fromkeys(["test_allocator"] if dry else names, 1)
    environment = {"TRITON_INTERPRET": "1" if dry else "0"}
    parallel = ["-n", "4"] if version_of("pytest-xdist") != "absent" and not dry else []
    print("\n| | passed | failed | skipped | s | |\n|---|---|---|---|---|---|")
    right = True
    for name, share in budget.shares(weights):
        seconds = min(budget.left(), 3 * share)
        if seconds < MIN_PART_SECONDS:
            entry.add(name, {"skipped": "no time left"})
            print(f"| {name} | | | | | no time left |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                *parallel,
                f"--junitxml={report}",
                f"tests/kernels/{name}.py",
            ]
            said, took, code = _run(command, seconds, environment, show=False)
            found = {**_counts(report), "seconds": round(took, 1)}
        if code:
            right = False
            found["output"] = said[-4000:]
        entry.add(name, found)
        notes = "; ".join(found["failures"][:3]) or (said.strip()[-200:].replace("\n", " ") if code else "")
        passed = found["tests"] - found["failed"] - found["skipped"]
        print(f"| {name} | {passed} | {found['failed']} | {found['skipped']} | {took:.0f} | {notes} |", flush=True)
    return right


def _counts(report: Path) -> dict[str, Any]:
    """Of pytest's report: tests, failed, skipped, and the failures' names with their first line."""
    cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else []
    found: dict[str, Any] = {"tests": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in cases:
        found["tests"] += 1
        found["skipped"] += case.find("skipped") is not None
        for problem in (case.find("failure"), case.find("error")):
            if problem is not None:
                found["failed"] += 1
                found["failures"].append(f"{case.get('name')}: {(problem.get('message') or '')[:160]}")
    return found


def op_benchmarks() -> dict[str, int]:
    """The ops' benchmarks and their shares of the time: 1, or what a benchmark says."""
    names = sorted(file.stem for file in (ROOT / "benchmarks" / "kernels").glob("bench_*.py"))
    return {
        name.removeprefix("bench_"): getattr(importlib.import_module(f"benchmarks.kernels.{name}"), "SHARE", 1)
        for name in names
    }


def kernels(entry: Entry, budget: Budget, dry: bool) -> bool:
    """Whether every op's benchmark ran."""
    right = True
    for op, seconds in budget.shares(op_benchmarks()):
        arguments = ["--seconds", str(max(1.0, seconds - GRACE_SECONDS))]
        arguments += ["--dry", "--device=cpu", "--rounds=1", "--no-compile"] if dry else []
        right &= _part(entry, op, [f"benchmarks.kernels.bench_{op}", *arguments], seconds)
    return right


def train(entry: Entry, budget: Budget, dry: bool) -> bool:
    """Whether every preset was measured."""
    right = True
    for name, seconds in budget.shares({"10m": 1, "1b fp8": 1} if dry else TRAINED):
        preset, fp8 = name.split()[0], name.endswith("fp8")
        arguments = ["--preset", preset, "--steps=5", "--seconds", str(max(1.0, seconds - GRACE_SECONDS))]
        arguments += ["--fp8", "--batch=8"] if fp8 else []
        arguments += ["--dry", "--rounds=2", "--batch=2", "--no-compile"] if dry else []
        right &= _part(entry, name, ["benchmarks.train_step", *arguments], seconds)
    return right


def _part(entry: Entry, name: str, module_and_arguments: Sequence[str], seconds: float) -> bool:
    """Run a benchmark, print what it prints, keep its JSON; whether it came to its end."""
    if seconds < MIN_PART_SECONDS:
        entry.add(name, {"skipped": "no time left"})
        print(f"\n**{name}** skipped: no time left", flush=True)
        return True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        said, took, code = _run(
            [sys.executable, "-m", *module_and_arguments, "--json", str(file)], seconds, ALLOCATOR, show=True
        )
        found = json.loads(file.read_text()) if file.exists() else {}
    ended = code == 0
    found.pop("machine", None)
    entry.add(name, {**found, "seconds": round(took, 1), **({} if ended else {"output": said[-4000:]})})
    return ended


def _run(command: Sequence[str], seconds: float, more: dict[str, str], *, show: bool) -> tuple[str, float, int]:
    """(what it wrote, seconds taken, exit code); killed with all its children when its time is over."""
    began = time.monotonic()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        **more,
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    killer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    killer.start()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if show:
            print(line, end="", flush=True)
    if process.wait() < 0:
        lines.append(f"ended by signal {-process.returncode} after {time.monotonic() - began:.0f} s\n")
    killer.cancel()
    return "".join(lines), time.monotonic() - began, process.returncode


STAGES: dict[str, Callable[[Entry, Budget, bool], bool]] = {"check": check, "kernels": kernels, "train": train}


if __name__ == "__main__":
    main()

"""All measurements that need a GPU, in one command of under nine minutes on one H100, and a second that continues it.

    python -m benchmarks.gpu [--seconds 520] [--out DIR] [--from FILE] [--only STAGE …] [--dry]

check     attention and every op at the presets' shapes: at most twice the error of PyTorch's ops in the same dtype, the
          same bits twice; attention under compute-sanitizer, if there is one
tuner     its choices for the ops of a step at 124m, 350m and 1b
profile   where a step of ours with these choices spends its time, with MFU
plain     the step of a compiled plain GPT beside ours, with these choices and by default, round by round
graphs    10m, with and without CUDA graphs
memory    the memory-bound ops, against a copy, on cold caches
fp8       1b in fp8 against bf16
more      the plain GPT at 350m and 1b, and the tuner's choice of attention for documents, which don't fit in one
          command's time

A stage consists of items, each a process with its share of the time: one that breaks the device, or hangs, does not end
the others. An item's results are in DIR/<date>-<gpu>.json from that second on (DIR: $OUT, or benchmarks/results). The
file is replaced as a whole, so that it can be read whenever the command is killed. An existing file, or one given by
--from, is continued, if it is of the same GPU: unfinished items are run, first those that never began. The screen gets
at most 10,000 characters; items that did not fit in the time are named at the end.

It needs torch and nothing else installed: the extension is built if it isn't. Peers are taken from the environment or
from build/peers (`make peers`); SPT_COMMIT names the commit of a tree without its history. --dry runs every stage on a
CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import PEERS, ROOT, machine
from spt_fast import native
from spt_fast.files import write_text

SECONDS = 520.0
PRINTED, KEPT_FOR_THE_END, PRINTED_OF_ITEM = 10_000, 1_500, 900
"""Characters."""
GRACE_SECONDS = 12.0
"""Seconds between an item's own limit and the end of its process."""
POLL_SECONDS = 0.2
OUTPUT = 3000
"""Characters of a failed item's output that are kept."""
AT_ONCE = {"check": 4}
"""Items of a stage that may run side by side, since they measure no time."""
OPS = (
    "norm",
    "activation",
    "rotary",
    "embedding",
    "adamw",
    "linear",
    "feed_forward",
    "self_attention",
    "cross_entropy",
    "fp8",
)
PRESETS = ("124m", "350m", "1b")
CHOSEN = ("--tune", "10")
"""With the choices of the tuner's stage: the seconds are for what it did not reach."""
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""So that all contenders leave memory blocks of the same form in the cache."""
PR_SET_PDEATHSIG = 1

Found = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One process: `python -m` with `command`, and --json with the file for its results.

    seconds  its time limit; it isn't started with less
    told     the results, in lines for the screen
    before   a program that runs it, with its arguments
    """

    stage: str
    name: str
    seconds: float
    command: Sequence[str]
    told: Callable[[Found], list[str]] = lambda found: []
    before: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------ what is run


def items(*, dry: bool) -> list[Item]:
    if dry:
        return _dry_items()
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    whole = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a read past a tensor's end is one past an allocation's
    return [
        _check("attention", 100, "--dry", name="attention, sanitizer", before=sanitizer, environment=whole),
        *(_check(op, 60) for op in ("attention", *OPS)),
        *(_tuner(preset, 50) for preset in PRESETS),
        *(_profile(preset, 40, *CHOSEN) for preset in PRESETS),
        _plain("124m", 80, stage="plain"),
        _trained("graphs", "10m", 45, "--graphs"),
        *(_memory(op, 20) for op in ("norm", "activation", "rotary", "embedding", "adamw")),
        _trained("fp8", "1b", 60, "--fp8", "--batch", "8"),
        *(_plain(preset, 120, stage="more") for preset in PRESETS[1:]),
        _tuner("124m", 50, "--documents", "--ops", "self_attention", stage="more", name="documents 124m"),
    ]


def _dry_items() -> list[Item]:
    tiny = ("--dry", "--device=cpu")
    interpreted = {"TRITON_INTERPRET": "1"}
    return [
        *(_check(op, 60, *tiny, environment=interpreted) for op in ("norm", "attention")),
        _profile("10m", 60, "--dry"),
        _trained("plain", "10m", 60, "--dry", "--no-compile", "--rounds=2", "--batch=2"),
        _trained("graphs", "10m", 60, "--dry", "--graphs", "--rounds=2", "--batch=2"),
        Item("tuner", "tuner", 60, ["benchmarks.tune_ops", "--dry", "--seconds", "8"], _tuned),
        _memory("norm", 60, *tiny, "--rounds=1"),
        _trained("fp8", "10m", 60, "--dry", "--fp8", "--rounds=2", "--batch=2"),
    ]


def _planned(seconds: float) -> list[str]:
    return ["--seconds", str(seconds - GRACE_SECONDS)]


def _check(op: str, seconds: float, *more: str, name: str = "", **how: Any) -> Item:
    command = [f"benchmarks.kernels.bench_{op}", "--check", "--no-compile", *_planned(seconds), *more]
    return Item("check", f"check {name or op}", seconds, command, _checked, **how)


def _profile(preset: str, seconds: float, *more: str) -> Item:
    command = ["benchmarks.profile_step", "--preset", preset, "--seconds", "5", *more]
    return Item("profile", f"profile {preset}", seconds, command, _profiled)


def _tuner(preset: str, seconds: float, *more: str, stage: str = "tuner", name: str = "") -> Item:
    command = ["benchmarks.tune_ops", *_planned(seconds), "--preset", preset, *more]
    return Item(stage, name or f"tuner {preset}", seconds, command, _tuned)


def _plain(preset: str, seconds: float, *, stage: str) -> Item:
    sides = ("--sides", "ours by default", "plain, compiled")
    return _trained(stage, preset, seconds, *CHOSEN, *sides, name=f"plain {preset}")


def _trained(stage: str, preset: str, seconds: float, *more: str, name: str = "") -> Item:
    command = ["benchmarks.train_step", "--preset", preset, "--steps=3", *_planned(seconds), *more]
    return Item(stage, name or f"{stage} {preset}", seconds, command, _compared)


def _memory(op: str, seconds: float, *more: str) -> Item:
    command = [f"benchmarks.kernels.bench_{op}", "--no-compile", *_planned(seconds), *more]
    return Item("memory", f"memory {op}", seconds, command, _rates)


# ------------------------------------------------------------------------------------------------ in words


def _checked(found: Found) -> list[str]:
    """By backend how many shapes were right and the worst error beside eager's, and every one that wasn't."""
    lines: list[str] = []
    eager: dict[tuple[str, str], float] = {}
    by_backend: dict[str, list[Found]] = {}
    for row in found.get("rows", []):
        if row["status"] == "skipped":
            continue
        if row["kind"] == "torch":
            eager[row["op"], row["shape"]] = row.get("error", 0)
        elif row["status"] != "absent":
            by_backend.setdefault(row["contender"], []).append(row)
    for backend, rows in by_backend.items():
        right = [row for row in rows if row["status"] == "right"]
        ratios = [row["error"] / base for row in right if (base := eager.get((row["op"], row["shape"])))]
        worst = f", error at most {max(ratios):.2g} of eager's" if ratios else ""
        lines.append(f"{backend}: {len(right)} of {len(rows)} right{worst}")
        lines += [f"  {r['op']} {r['shape']}: {r['status']} {r.get('note', '')}" for r in rows if r not in right]
    return lines + _skipped(found)


def _skipped(found: Found) -> list[str]:
    """The shapes for which an op's benchmark had no time."""
    return [f"  {r['op']} {r['shape']}: skipped" for r in found.get("rows", []) if r.get("status") == "skipped"]


def _profiled(found: Found) -> list[str]:
    if "device_ms" not in found:
        return []
    predicted = f"predicted for an {found['predicted']['gpu']} {_percent(found['predicted']['mfu'])}"
    lines = [
        f"{found['tokens_per_s']:,.0f} tokens/s, mfu[{found['mfu_label']}] {_percent(found['mfu'])}, {predicted}; "
        f"{found['step_ms']['median']:.1f} ms a step, {found['device_ms']:.1f} of the device, "
        f"{found['launches']:.0f} launches"
    ]
    return lines + [f"  {row['share']:.1%} {row['calls']:g} x {row['kernel'][:60]}" for row in found["kernels"][:8]]


def _compared(found: Found) -> list[str]:
    lines = []
    for run in found.get("runs", []):
        ours = run["sides"].get("ours", {}).get("tokens_per_s", {}).get("median")
        for name, side in run["sides"].items():
            if "problem" in side:
                lines.append(f"{name}: {side['problem']}")
                continue
            rate = side["tokens_per_s"]["median"]
            ratio = f", ours is {ours / rate:.3f}x" if ours and name != "ours" else ""
            lines.append(
                f"{name}: {rate:,.0f} tokens/s, mfu[{run['mfu_label']}] {_percent(side['mfu'])}, "
                f"{side['rounds']} rounds of {side['sequences']} sequences{ratio}"
            )
        lines += [f"ours: {note}" for note in run["notes"]]
    return lines


def _tuned(found: Found) -> list[str]:
    return found.get("notes", [])


def _rates(found: Found) -> list[str]:
    """Ours by shape, pass by pass: share of the copy's rate, and how many times the best of the others."""
    lines = [f"a copy: {found['ceilings']['GB/s']:,.0f} GB/s"] if "ceilings" in found else []
    groups: dict[tuple[str, str], list[Found]] = {}
    for row in found.get("rows", []):
        if "seconds" in row:
            groups.setdefault((row["op"], row["shape"]), []).append(row)
    for (op, shape), rows in groups.items():
        said = []
        for row in rows:
            if row["kind"] == "ours" and not row["contender"].endswith("reference"):
                others = [r["seconds"][1] for r in rows if r["pass"] == row["pass"] and r["kind"] in ("torch", "peer")]
                than = f" {min(others) / row['seconds'][1]:.2f}x" if others else ""
                said.append(f"{row['pass']} {row['of_ceiling']:.0%}{than}")
        lines.append(f"{op} {shape}: {', '.join(said)}")
    return lines + _skipped(found)


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{share:.1%}"


# ------------------------------------------------------------------------------------------------ results


class Results:
    """The file, which is complete at every moment.

    By item: "state" (running, done, "cut off" by its time, failed or skipped), "run" (which of `runs`: machine, commit
    and time of each command that wrote to this file), "seconds", and the item's results.
    """

    def __init__(self, path: Path, record: Found, about: Found) -> None:
        self.path, self.record = path, record
        self.record["runs"].append({"began": datetime.now(UTC).isoformat(timespec="seconds"), "machine": about})
        self._write()

    @classmethod
    def open(cls, folder: Path, known: Path | None, *, dry: bool = False) -> Results:
        """ValueError for a known file of another GPU, or of a dry run, whose items have the same names."""
        about = machine("torch", "triton", "transformers", *PEERS) | ({"dry": True} if dry else {})
        gpu = "dry" if dry else re.sub(r"[^a-z0-9]+", "-", about.get("gpu", "cpu").lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{about['date']}-{gpu}.json"
        known = known or (path if path.exists() else None)
        record = json.loads(known.read_text()) if known else {"runs": [], "items": {}}
        for run in record["runs"]:
            theirs = run["machine"]
            if any(theirs.get(key) != about.get(key) for key in ("gpu", "dry")):
                kind = "a dry run" if theirs.get("dry") else f"{theirs.get('gpu', 'no GPU')}, not dry"
                raise ValueError(f"{known}: has figures of another machine ({kind}) and can't be continued here")
        return cls(path, record, about)

    def state(self, item: Item) -> str:
        return self.record["items"].get(item.name, {}).get("state", "never begun")

    def machine_of(self, item: Item) -> Found:
        """Of the command that ran it."""
        return self.record["runs"][self.record["items"][item.name]["run"]]["machine"]

    def waiting(self, planned: Sequence[Item]) -> list[Item]:
        """Unfinished items: first those that never began, last those that failed."""
        order = ("never begun", "skipped", "running", "cut off", "failed")
        return sorted((i for i in planned if self.state(i) != "done"), key=lambda i: order.index(self.state(i)))

    def put(self, item: Item, state: str, **found: Any) -> None:
        run = len(self.record["runs"]) - 1
        self.record["items"][item.name] = {"stage": item.stage, "state": state, "run": run, **found}
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.record, indent=1) + "\n")


class Screen:
    """A limited number of characters."""

    def __init__(self, left: int = PRINTED) -> None:
        self.left = left

    def say(self, text: str, *, most: int = PRINTED, keep: int = 0) -> None:
        """At most `most` characters, leaving `keep` for later."""
        most = min(most, self.left - keep - 1)
        if len(text) > most:
            text = f"{text[: most - 2]} …" if most > 20 else ""
        if text:
            self.left -= len(text) + 1
            print(text, flush=True)


# ------------------------------------------------------------------------------------------------ running


class Process:
    """A running item, in a session of its own; it ends with this process, however that ends."""

    def __init__(self, item: Item, folder: Path) -> None:
        self.item, self.began, self.seen = item, time.monotonic(), 0.0
        stem = re.sub(r"\W+", "-", item.name)
        self.json, self.log = folder / f"{stem}.json", folder / f"{stem}.log"
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [*item.before, sys.executable, "-m", *item.command, "--json", str(self.json)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ALLOCATOR, "PYTHONPATH": python_path, **item.environment},
                cwd=ROOT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self.began, 1)

    def found(self) -> Found:
        found = json.loads(self.json.read_text()) if self.json.exists() else {}
        found.pop("machine", None)
        return found

    def news(self) -> Found | None:
        """Its new output since the last call."""
        when = self.json.stat().st_mtime if self.json.exists() else 0.0
        if when == self.seen:
            return None
        self.seen = when
        return self.found()

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-OUTPUT:]

    def end(self) -> None:
        """Including all processes that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(planned: Sequence[Item], results: Results, seconds: float, screen: Screen) -> None:
    """Run every unfinished item while there is time."""
    deadline = time.monotonic() + seconds
    waiting = results.waiting(planned)
    at_work: list[Process] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or at_work:
                while waiting and _has_room(waiting[0], at_work):
                    item = waiting.pop(0)
                    obstacle = _obstacle(item, deadline)
                    if obstacle is None:
                        results.put(item, "running")
                        at_work.append(Process(item, Path(folder)))
                    elif results.state(item) in ("never begun", "skipped"):
                        results.put(item, "skipped", why=obstacle)
                time.sleep(POLL_SECONDS)
                at_work = [process for process in at_work if not _over(process, results, screen)]
        finally:
            for process in at_work:
                process.end()


def _has_room(item: Item, at_work: Sequence[Process]) -> bool:
    beside = all(process.item.stage == item.stage for process in at_work)
    return not at_work or (beside and len(at_work) < AT_ONCE.get(item.stage, 1))


def _obstacle(item: Item, deadline: float) -> str | None:
    if item.before and shutil.which(item.before[0]) is None:
        return f"there is no {item.before[0]}"
    left = max(0, deadline - time.monotonic())
    return None if left >= item.seconds else f"no time left: it takes {item.seconds:.0f} s, {left:.0f} were left"


def _over(process: Process, results: Results, screen: Screen) -> bool:
    """Whether it has ended, or was stopped; then its results are stored."""
    item, code = process.item, process.popen.poll()
    late = code is None and process.seconds > item.seconds
    if code is None and not late:
        if (news := process.news()) is not None:
            results.put(item, "running", **news)
        return False
    process.end()
    found = process.found()
    state = "cut off" if late or (code == 0 and _skipped(found)) else "done" if code == 0 else "failed"
    how = {} if state == "done" else {"output": process.output(), "code": code}
    results.put(item, state, seconds=process.seconds, **found, **how)
    said = [f"\n{item.name}: {state}, {process.seconds:.0f} s", *item.told(found)]
    if state == "failed":
        said.append(process.output().strip()[-300:])
    screen.say("\n".join(said), most=PRINTED_OF_ITEM, keep=KEPT_FOR_THE_END)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all of it")
    default = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=default, help="a folder (default: $OUT or benchmarks/results)")
    parser.add_argument("--from", dest="known", type=Path, help="an earlier command's results, to continue")
    parser.add_argument("--only", nargs="+", help="stages")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    options = parser.parse_args()
    ends = time.monotonic() + options.seconds
    if not native.is_built():
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)
    planned = items(dry=options.dry)
    stages = list(dict.fromkeys(item.stage for item in planned))
    unknown = set(options.only or ()) - set(stages)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} is invalid: expected some of {', '.join(stages)}")
    planned = [item for item in planned if not options.only or item.stage in options.only]
    try:
        results, screen = Results.open(options.out, options.known, dry=options.dry), Screen()
    except ValueError as problem:
        parser.error(f"--from: {problem}")
    screen.say(", ".join(f"{key} {value}" for key, value in results.record["runs"][-1]["machine"].items()), most=600)
    kept = [item for item in planned if results.state(item) == "done"]
    if kept:
        commits = dict.fromkeys(results.machine_of(item)["commit"] for item in kept)
        screen.say(f"kept from commit {', '.join(commits)}: {', '.join(item.name for item in kept)}", most=900)
    run(planned, results, ends - time.monotonic(), screen)
    left = [f"{item.name} ({results.state(item)})" for item in planned if results.state(item) != "done"]
    if left:
        screen.say(f"\nnot done: {', '.join(left)}", most=KEPT_FOR_THE_END - 500)
        screen.say(f"go on with --from {results.path}")
    screen.say(f"all figures: {results.path}")
    sys.exit(any(results.state(item) == "failed" for item in planned))


if __name__ == "__main__":
    main()

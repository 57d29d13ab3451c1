"""Several recipes trained side by side: a process and a fair share of the cores for each.

A small model gains little from a second thread, and two threads that wait for each other at every operation come almost
to a halt when anything else runs on the machine (measured on two busy cores: 2,000 tokens/s for one process with two
threads, 14,000 for two processes with one; 22,000 and 23,000 on idle ones).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from spt_fast.config import Recipe, load_recipe
from spt_fast.errors import RecipeError
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.signals import StopRequest

POLL_EVERY_S = 0.2
PLAIN_LINE_EVERY_S = 15.0
LAST_RECORD_BYTES = 4096


def train_side_by_side(recipes: Sequence[Path], logs: Path, console: Console) -> bool:
    """Train recipes, or go on with them: as many at a time as there are cores, or one after the other on a GPU.

    True when all are done; False after SIGINT or SIGTERM, when those under way are saved. A run's own output goes to
    LOGS/<recipe>.log. Where a run fails, raises RecipeError (RuntimeError where it isn't the user's mistake) with the
    end of that log; the others are saved then, too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = 1 if torch.cuda.is_available() else min(cores, len(recipes))
    environment = os.environ | {"OMP_NUM_THREADS": str(cores // jobs)}
    logs.mkdir(parents=True, exist_ok=True)
    loaded = {recipe: load_recipe(recipe) for recipe in recipes}
    waiting = [recipe for recipe in recipes if not (_is_done(loaded[recipe]) and _is_unchanged(loaded[recipe]))]
    running: dict[Path, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.callback(_terminate, running)
        display = stack.enter_context(_Display(loaded, console))
        while (waiting or running) and not stop():
            while waiting and len(running) < jobs:
                recipe = waiting.pop(0)
                log = stack.enter_context((logs / f"{recipe.stem}.log").open("wb"))
                command = [sys.executable, "-m", "spt_fast.train", str(recipe), "--resume"]
                running[recipe] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            for recipe, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[recipe]
                if process.returncode and not stop():
                    said = (logs / f"{recipe.stem}.log").read_text(errors="replace").strip().splitlines()[-5:]
                    error = RecipeError if process.returncode == 2 else RuntimeError
                    raise error("\n  ".join([f"{recipe}: failed with exit code {process.returncode}", *said]))
            display.update()
            time.sleep(POLL_EVERY_S)
        return not (waiting or running)


def _is_done(recipe: Recipe) -> bool:
    summary = summary_of(Path(recipe.run))
    return summary is not None and summary["status"] == "done"


def _is_unchanged(recipe: Recipe) -> bool:
    """Whether the run was made from this very recipe; one edited since is left to the trainer, to be refused."""
    return not recipe_of(Path(recipe.run)).changes(recipe)


def _terminate(running: dict[Path, subprocess.Popen[bytes]]) -> None:
    """Ask every process to save and end, and wait until it has."""
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.wait()


class _Display:
    """A bar per run and one for all of them on a terminal, a line now and then elsewhere."""

    def __init__(self, recipes: dict[Path, Recipe], console: Console) -> None:
        self._runs = {path.stem: recipe for path, recipe in recipes.items()}
        self._console = console
        self._began_s = self._last_line_s = time.monotonic()
        self._share_before = fmean(progress_of(recipe)[0] for recipe in self._runs.values())
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}% {task.fields[says]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {name: self._bars.add_task(name, total=1.0, says="") for name in (*self._runs, "in all")}

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.update()
        self._bars.stop()

    def update(self) -> None:
        states = {name: progress_of(recipe) for name, recipe in self._runs.items()}
        share = fmean(done for done, _ in states.values())
        elapsed_s = time.monotonic() - self._began_s
        fresh = share - self._share_before
        to_go = f" · ETA {minutes(elapsed_s / fresh * (1 - share))}" if fresh > 0.01 else ""
        states["in all"] = share, f"{minutes(elapsed_s)} so far{to_go}"
        for name, (done, says) in states.items():
            self._bars.update(self._tasks[name], completed=done, says=says)
        if not self._console.is_terminal and time.monotonic() - self._last_line_s >= PLAIN_LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            line = " · ".join(f"{name} {done:.0%}" for name, (done, _) in states.items())
            self._console.print(f"{line}: {states['in all'][1]}", soft_wrap=True)


def progress_of(recipe: Recipe) -> tuple[float, str]:
    """How much of a recipe's training (by tokens, all arms of grids counted) its run has behind it, and where it is."""
    if _is_done(recipe):
        return 1.0, "done"
    last = _last_record(Path(recipe.run) / "metrics.jsonl")
    if last is None:
        return 0.0, ""
    tokens = [phase.tokens * len(phase.arms()) for phase in recipe.phases]
    at = [phase.name for phase in recipe.phases].index(last["phase"])
    behind = sum(tokens[:at]) + last["arm"] * recipe.phases[at].tokens + last["tokens"]
    return min(1.0, behind / sum(tokens)), f"{last['phase']}, step {last['step']}"


def _last_record(metrics: Path) -> dict[str, Any] | None:
    """The last whole line of metrics.jsonl, which may be growing; None where there is none yet."""
    if not metrics.exists():
        return None
    with metrics.open("rb") as lines:
        lines.seek(max(0, metrics.stat().st_size - LAST_RECORD_BYTES))
        whole = lines.read().split(b"\n")[:-1]
    return json.loads(whole[-1]) if whole else None


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"

"""Trains many recipes, each in its own process: in parallel on this machine, or as jobs of a cluster.

On a CPU, the cores are divided evenly among the processes. A small model gains little from a second thread, and two
threads that wait for each other at every operation become very slow if other work runs on the machine (on two busy
cores: 2,000 tokens/s for one process with two threads, 14,000 for two processes with one; on idle ones 22,000 and
23,000). With GPUs, each process has one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from spt_fast.config import Recipe, load_recipe
from spt_fast.errors import CheckpointError, RecipeError, counted
from spt_fast.progress import Line, Screen, time_left
from spt_fast.quantities import duration
from spt_fast.train.folder import summary_of
from spt_fast.train.recorded import record_of
from spt_fast.train.resume import changes
from spt_fast.train.signals import StopRequest
from spt_fast.train.world import LAUNCHED_BY

POLL_EVERY_S = 0.2
LAST_RECORD_BYTES = 65_536
LAST_LINES = 5
USERS_MISTAKE = 2


class Process(Protocol):
    """A process that trains a recipe, such as a `subprocess.Popen`."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def terminate(self) -> None:
        """Ask the process to save and exit."""

    def wait(self) -> object:
        """Wait until the process has ended."""


class Workers(Protocol):
    """Starts processes, up to a limit at a time."""

    @property
    def free(self) -> int:
        """The number of processes that can be started now."""

    def start(self, recipe: Path, log: Path) -> Process: ...


class Local:
    """This machine: at most `jobs` processes, by default one per GPU, or per core without GPUs; at most `recipes`."""

    def __init__(self, recipes: int, jobs: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        devices: list[str | None] = visible_gpus() or [None]
        self.jobs = max(1, min(recipes, jobs or (cores if devices == [None] else len(devices))))
        self._threads = max(1, cores // self.jobs)
        self._devices = [devices[i % len(devices)] for i in range(self.jobs)]
        self._running: dict[int, Process] = {}
        """The running process of each slot, which is an index of `_devices`."""

    def _free_slots(self) -> list[int]:
        return [i for i in range(self.jobs) if i not in self._running or self._running[i].poll() is not None]

    @property
    def free(self) -> int:
        return len(self._free_slots())

    def start(self, recipe: Path, log: Path) -> Process:
        slot = self._free_slots()[0]
        ours = {name: value for name, value in os.environ.items() if name not in LAUNCHED_BY}
        environment = {"OMP_NUM_THREADS": str(self._threads), **ours}
        if (device := self._devices[slot]) is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with log.open("wb") as said:
            # It inherits open files: a study stays locked until its last run has ended, even if the sweep is killed.
            process = subprocess.Popen(command(recipe), stdout=said, stderr=said, env=environment, close_fds=False)
        self._running[slot] = process
        return process


def visible_gpus() -> list[str | None]:
    """The GPUs' names for CUDA_VISIBLE_DEVICES. If it is set, CUDA uses its list up to the first invalid entry."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in named.split(",")[:count]] if named else [str(i) for i in range(count)]


def command(recipe: Path) -> list[str]:
    """The command that trains a recipe or continues its training."""
    return [sys.executable, "-m", "spt_fast.train", str(recipe), "--resume"]


@dataclass(frozen=True)
class Job:
    """A recipe to train, and the recipe that it starts from."""

    recipe: Path
    after: Path | None = None


@dataclass
class Outcome:
    """The results of the jobs."""

    interrupted: bool = False
    failed: dict[Path, str] = field(default_factory=dict)
    """The end of the output of each failed recipe."""
    skipped: list[Path] = field(default_factory=list)
    """Recipes that start from failed ones."""


def train_side_by_side(recipes: Sequence[Path], logs: Path, console: Console) -> bool:
    """Train recipes, or continue them, as many at a time as this machine has GPUs or cores.

    Returns True when all are done, False after SIGINT or SIGTERM, when the running ones are saved. A run's output goes
    to LOGS/<recipe>.log. If a run fails, the others are saved, and RecipeError (RuntimeError if it isn't the user's
    mistake) has the end of that log.
    """
    jobs = [Job(recipe) for recipe in recipes]
    outcome = train_all(jobs, logs, console, Local(len(recipes)), keep_going=False)
    return not outcome.interrupted


def train_all(
    jobs: Sequence[Job],
    logs: Path,
    console: Console,
    workers: Workers,
    *,
    keep_going: bool = True,
    ended: Callable[[Path], object] = lambda recipe: None,
) -> Outcome:
    """Train unfinished jobs, each after the one that it starts from; `ended` is called after each.

    A run that fails during training (it diverged, memory ran out) is recorded, and the others continue. A user's
    mistake (exit code 2), or any failure if `keep_going` is false, stops all: the running ones are saved, and
    RecipeError, or RuntimeError, has the end of the run's log. After SIGINT or SIGTERM the running ones are saved too.
    """
    logs.mkdir(parents=True, exist_ok=True)
    queue = _Queue(jobs, logs, workers, keep_going)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.callback(_stop_all, queue.running)
        display = stack.enter_context(_Display(queue.recipes, queue.unfinished, console))
        while (queue.waiting or queue.running) and not stop():
            for recipe in chain(queue.start(), queue.collect(stop)):
                ended(recipe)
            display.show(queue.running, queue.unfinished)
            time.sleep(POLL_EVERY_S)
        queue.outcome.interrupted = bool(queue.waiting or queue.running)
    return queue.outcome


class _Queue:
    """The jobs of `train_all` that are not finished."""

    def __init__(self, jobs: Sequence[Job], logs: Path, workers: Workers, keep_going: bool) -> None:
        self.recipes = {job.recipe: load_recipe(job.recipe) for job in jobs}
        self.waiting = [job for job in jobs if not _is_made(self.recipes[job.recipe])]
        self.unfinished = {job.recipe for job in self.waiting}
        self.running: dict[Path, Process] = {}
        self.outcome = Outcome()
        self._logs, self._workers, self._keep_going = logs, workers, keep_going

    def start(self) -> Iterator[Path]:
        """Start the jobs that can start now. Yields those that a run which trains for several has also made."""
        for job in list(self.waiting):
            if job.after in self.outcome.failed or job.after in self.outcome.skipped:
                self.waiting.remove(job)
                self.outcome.skipped.append(job.recipe)
            elif job.after and job.after not in self.unfinished and _is_made(self.recipes[job.recipe]):
                self.waiting.remove(job)
                self.unfinished.remove(job.recipe)
                yield job.recipe
            elif job.after not in self.unfinished and self._workers.free:
                self.waiting.remove(job)
                self.running[job.recipe] = self._workers.start(job.recipe, self._log(job.recipe))

    def collect(self, stop: Callable[[], bool]) -> Iterator[Path]:
        """Yields the jobs that have ended by now. Raises for a failure that stops all."""
        for recipe, process in list(self.running.items()):
            if (code := process.poll()) is None:
                continue
            del self.running[recipe]
            if code == 0:
                self.unfinished.remove(recipe)
            elif not stop():
                self.outcome.failed[recipe] = _end_of(self._log(recipe))
                if code == USERS_MISTAKE or not self._keep_going:
                    error = RecipeError if code == USERS_MISTAKE else RuntimeError
                    raise error(f"{recipe}: failed with exit code {code}\n  {self.outcome.failed[recipe]}")
            yield recipe

    def _log(self, recipe: Path) -> Path:
        return self._logs / f"{recipe.stem}.log"


def _end_of(log: Path) -> str:
    """The last lines of a log, or more if the message of `spt-fast` is longer."""
    said = log.read_text(errors="replace", encoding="utf-8") if log.exists() else ""
    lines = (said.strip() or "it ended without output").splitlines()
    messages = [i for i, line in enumerate(lines) if line.startswith("spt-fast: ")]
    return "\n  ".join(lines[min([max(0, len(lines) - LAST_LINES), *messages[-1:]]) :])


def _stop_all(running: dict[Path, Process]) -> None:
    """Ask all processes to save and exit, and wait for them."""
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.wait()


def is_done(recipe: Recipe) -> bool:
    """Whether the recipe's run has finished."""
    summary = summary_of(Path(recipe.run))
    return summary is not None and summary["status"] == "done"


def _is_made(recipe: Recipe) -> bool:
    """Whether the run has finished with exactly this recipe; the trainer refuses an edited one."""
    return is_done(recipe) and not changes(Path(recipe.run), recipe)


class _Display(Screen):
    """Shows the progress of all runs together, and of each running one."""

    def __init__(self, recipes: Mapping[Path, Recipe], unfinished: Iterable[Path], console: Console) -> None:
        super().__init__(show=not console.quiet)
        self._recipes = recipes
        self._tokens = {path: _tokens(recipe) for path, recipe in recipes.items()}
        self._began_s = time.monotonic()
        self._share_before = self._share(set(unfinished), {path: progress_of(recipes[path]) for path in unfinished})

    def show(self, running: Iterable[Path], unfinished: set[Path]) -> None:
        states = {path: progress_of(self._recipes[path]) for path in running}
        share = self._share(unfinished, states)
        elapsed_s = time.monotonic() - self._began_s
        parts = [
            f"{len(self._recipes) - len(unfinished)} of {counted(len(self._recipes), 'run')} done",
            _percent(share),
            time_left(elapsed_s, share - self._share_before, 1 - share),
            f"{duration(elapsed_s)} so far",
        ]
        under_way = [Line([path.stem, _percent(part), where], part) for path, (part, where) in states.items()]
        self.update(Line(parts, share), *under_way)

    def _share(self, unfinished: set[Path], states: Mapping[Path, tuple[float, str]]) -> float:
        """The finished share of all tokens to train."""
        behind = sum(
            tokens * (states[path][0] if path in states else path not in unfinished)
            for path, tokens in self._tokens.items()
        )
        return behind / sum(self._tokens.values())


def progress_of(recipe: Recipe) -> tuple[float, str]:
    """The finished share of a recipe's training, by tokens of all arms of its grids; and its phase and step."""
    if is_done(recipe):
        return 1.0, "done"
    try:
        last = _last_record(Path(recipe.run) / "metrics.jsonl")
        names = [phase.name for phase in recipe.phases]
        if last is None or last["phase"] not in names:  # not started, or another recipe, which the trainer will refuse
            return 0.0, ""
        at = names.index(last["phase"])
        behind = sum(phase.tokens * len(phase.arms()) for phase in recipe.phases[:at])
        behind += last["arm"] * recipe.phases[at].tokens + last["tokens"]
        return min(1.0, behind / _tokens(recipe)), f"{last['phase']}, step {last['step']}"
    except CheckpointError:  # a damaged record, after which others may come
        return 0.0, ""


def _tokens(recipe: Recipe) -> int:
    """Tokens of all phases, with all arms of their grids."""
    return sum(phase.tokens * len(phase.arms()) for phase in recipe.phases)


def _last_record(metrics: Path) -> dict[str, Any] | None:
    """The last complete line of metrics.jsonl, which may still grow; None if there is none yet."""
    if not metrics.exists():
        return None
    with metrics.open("rb") as lines:
        lines.seek(max(0, metrics.stat().st_size - LAST_RECORD_BYTES))
        whole = lines.read().split(b"\n")[:-1]
    return record_of(whole[-1], metrics, 0) if whole else None


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"

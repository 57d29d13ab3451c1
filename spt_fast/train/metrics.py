"""What a run says while it runs: metrics.jsonl, its trackers, and one line on the screen.

metrics.jsonl is the record: a "train" object per logged step and an "eval" object per evaluation. It is cut back to a
checkpoint's length on resume, so that it never holds a step twice. The screen shows a progress bar on a terminal and
plain lines elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from spt_fast.errors import CheckpointError
from spt_fast.printing import as_json, terminal
from spt_fast.train.trackers import Followed, Trackers

PLAIN_LINE_EVERY_S = 15.0
LONGEST_LINE_BYTES = 1 << 20


class Display:
    """How far work has come: a progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, progress: bool) -> None:
        self._console = terminal(quiet=not progress, stderr=True)
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[more]}", markup=False),
            console=self._console,
            disable=not (progress and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=1, figures="", more="")
        self._bar.start()

    def say(self, message: str) -> None:
        """One line to the user, above the progress bar."""
        self._bar.console.print(message, soft_wrap=True)

    def begin(self, title: str, step: int, steps: int) -> None:
        """New work, of which `step` of `steps` steps are done already."""
        self._bar.reset(self._task, description=title, completed=step, total=steps, figures="", more="")
        self._title, self._steps, self._began, self._first = title, steps, time.monotonic(), step

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def show(self, step: int, figures: str, more: str = "") -> None:
        """The figures of a step, and what is shown behind the time that is left."""
        self._bar.update(self._task, figures=figures, more=more)
        if not self._console.is_terminal and time.monotonic() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            eta_s = (time.monotonic() - self._began) / max(1, step - self._first) * (self._steps - step)
            self.say(f"{self._title}: step {step}/{self._steps} · {figures} · ETA {eta_s:.0f} s{more}")

    def close(self, status: str = "done") -> None:
        """status: how a run ended."""
        self._bar.stop()


class RunLog(Display):
    """Writes a run's metrics to its folder and its trackers, and shows its progress."""

    def __init__(self, run: Followed, *, keep_bytes: int, progress: bool, mfu_label: str) -> None:
        path = run.folder / "metrics.jsonl"
        path.touch()
        size = path.stat().st_size
        whole_bytes = _whole_lines(path, min(keep_bytes, size))
        os.truncate(path, whole_bytes)
        self._file = path.open("a", encoding="utf-8")
        self._mfu_label = mfu_label
        self._last_eval = ""
        super().__init__(progress)
        self._trackers = Trackers(run, self.say)
        if size > 0 and run.resumed_at is None:
            self.say("no checkpoint to go on from: starting at the first step")
        if whole_bytes < keep_bytes:
            self.say(
                f"warning: {path}: has {whole_bytes:,} of the {keep_bytes:,} bytes that were written up to here; the "
                "records of some steps are missing, and stay so"
            )

    def train(self, record: dict[str, Any], total_step: int) -> None:
        """A logged training step; `total_step` counts over the whole run."""
        self._write({"kind": "train", **record}, total_step)
        mfu = "mfu n/a" if record["mfu"] is None else f"{record['mfu']:.1%} mfu[{self._mfu_label}]"
        skipped = f" · skipped steps: {record['skipped']}" if record["skipped"] else ""
        rates = f"loss {_loss(record['loss'])} · {record['tokens_per_s']:,.0f} tok/s · {mfu}{skipped}"
        self.show(record["step"], rates, self._last_eval)

    def evaluation(self, record: dict[str, Any], total_step: int) -> None:
        self._write({"kind": "eval", **record}, total_step)
        errors = record["standard_errors"]["heldout"]
        losses = " ".join(
            f"{source} {_loss(loss)}{_error(errors[source])}" for source, loss in record["heldout"].items()
        )
        self._last_eval = f" · held out at step {record['step']}: {losses}"
        self._bar.update(self._task, more=self._last_eval)
        for source, texts in record.get("samples", {}).items():
            for text in texts:
                self.say(f"sample of {source} at step {record['step']}: {text['prompt']!r} → {text['text']!r}")

    def _write(self, record: dict[str, Any], total_step: int) -> None:
        try:
            self._file.write(json.dumps(as_json(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name}: could not be written ({error.strerror}); make room, then go on with `resume=True`"
            ) from error
        self._trackers.write(record, total_step)

    def sync(self) -> int:
        """Everything written reaches the disk; returns the length of metrics.jsonl in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self, status: str = "done") -> None:
        self._trackers.close(status)
        super().close()
        self._file.close()


def _whole_lines(path: Path, end: int) -> int:
    """Where the last line ends that ends before `end` bytes."""
    with path.open("rb") as file:
        file.seek(max(0, end - LONGEST_LINE_BYTES))
        tail = file.read(end - file.tell())
    return end - len(tail) + tail.rfind(b"\n") + 1


def _loss(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "not finite"


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" ± {standard_error:.3f}"


class NoLog(Display):
    """RunLog's silence, for the processes that are not the first."""

    def __init__(self) -> None:
        super().__init__(progress=False)

    def train(self, record: dict[str, Any], total_step: int) -> None: ...

    def evaluation(self, record: dict[str, Any], total_step: int) -> None: ...

    def sync(self) -> int:
        return 0


class Clock:
    """Wall time of training alone, from where it is made: evaluations and checkpoints are left out.

    A lap ends where a step does, which may be known only later.
    """

    def __init__(self, before_s: float) -> None:
        """before_s: what `total_s` begins with."""
        self._before_s = before_s
        self._began_s = self._lap_began_s = time.monotonic()
        self._paused_s = self._lap_paused_s = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - began_s

    @property
    def total_s(self) -> float:
        return self._before_s + time.monotonic() - self._began_s - self._paused_s

    def lap(self, done_s: float) -> float:
        """Seconds from the end of the lap before to `done_s`, by time.monotonic(); no pause lies after `done_s`."""
        lap_s = done_s - self._lap_began_s - (self._paused_s - self._lap_paused_s)
        self._lap_began_s, self._lap_paused_s = done_s, self._paused_s
        return max(lap_s, 1e-9)

"""The output of a run while it trains: metrics.jsonl, its trackers, and one line on the screen.

metrics.jsonl is the record: a "train" object per logged step and an "eval" object per evaluation. It is cut back to a
checkpoint's length on resume, so that it never holds a step twice. The screen shows a line that changes in place on a
terminal, plain lines elsewhere, and the losses of every evaluation.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from spt_fast.errors import CheckpointError, counted
from spt_fast.printing import as_json, middle
from spt_fast.progress import Steps, clock
from spt_fast.quantities import percent, read
from spt_fast.train.plan import PhasePlan
from spt_fast.train.trackers import Followed, Trackers, is_own

LONGEST_LINE_BYTES = 1 << 20
LONGEST_SOURCE = 12


class RunLog(Steps):
    """Writes a run's metrics to its folder and its trackers, and shows its progress."""

    def __init__(
        self, run: Followed, work: Sequence[float], *, keep_bytes: int, progress: bool, mfu_label: str
    ) -> None:
        """work: each phase's share of the time, in any unit."""
        path = run.folder / "metrics.jsonl"
        path.touch()
        size = path.stat().st_size
        whole_bytes = _whole_lines(path, min(keep_bytes, size))
        os.truncate(path, whole_bytes)
        self._file = path.open("a", encoding="utf-8")
        self._mfu_label, self._work_of_phases = mfu_label, work
        self._recipe, self._domain, self._domain_loss = run.recipe, run.recipe.phases[-1].chosen_by, ""
        super().__init__(show=progress)
        self._trackers = Trackers(run, self.say)
        if size > 0 and run.resumed_at is None:
            self.say("no checkpoint to resume from: starting at the first step")
        if whole_bytes < keep_bytes:
            self.say(
                f"warning: {path}: has {whole_bytes:,} of the {counted(keep_bytes, 'byte')} written before the "
                "checkpoint; the records of some steps are lost"
            )

    def begin_arm(self, planned: PhasePlan, arm: int, step: int) -> None:
        """Begin an arm of a phase, or continue it after `step` steps."""
        arms = len(planned.phase.arms())
        title = planned.phase.name + (f" {arm + 1}/{arms}" if arms > 1 else "")
        work = self._work_of_phases[planned.index] / arms
        after = work * (arms - 1 - arm) + sum(self._work_of_phases[planned.index + 1 :])
        self.begin(title, step, planned.steps, work=work, after=after)

    def train(self, record: dict[str, Any], total_step: int) -> None:
        """Record a logged training step; `total_step` counts over the whole run."""
        self._write({"kind": "train", **record}, total_step)
        figures = [f"loss {_loss(record['loss'])}", self._domain_loss]
        skipped = f"skipped steps: {record['skipped']}" if record["skipped"] else ""
        mfu = "" if record["mfu"] is None else f"{record['mfu']:.1%} mfu[{self._mfu_label}]"
        self.show(record["step"], figures, [skipped, read("tokens_per_s", record["tokens_per_s"]), mfu])

    def evaluation(self, record: dict[str, Any], total_step: int) -> None:
        self._write({"kind": "eval", **record}, total_step)
        errors, heldout = record["standard_errors"]["heldout"], record["heldout"]
        losses = " · ".join(f"{source} {_loss(loss)}{_error(errors[source])}" for source, loss in heldout.items())
        average = f", {percent(record['average'])} averaged" if record.get("average") else ""
        if losses:
            self.say(f"{clock()} {self._title} · step {record['step']}{average} · {losses}")
        if self._domain in heldout and is_own(record, self._recipe):
            self._domain_loss = f"{middle(self._domain, LONGEST_SOURCE)} {_loss(heldout[self._domain])}"
        for source, texts in record.get("samples", {}).items():
            for text in texts:
                self.say(f"sample of {source} at step {record['step']}: {text['prompt']!r} → {text['text']!r}")

    def _write(self, record: dict[str, Any], total_step: int) -> None:
        try:
            self._file.write(json.dumps(as_json(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name}: could not be written ({error.strerror}); make room and use `resume=True`"
            ) from error
        self._trackers.write(record, total_step)

    def sync(self) -> int:
        """Flush everything to disk; returns the length of metrics.jsonl in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self, status: str = "done") -> None:
        self._trackers.close(status)
        super().close()
        with suppress(OSError) if status == "failed" else nullcontext():  # a full disk has been reported
            self._file.close()


def _whole_lines(path: Path, end: int) -> int:
    """The end of the last line that ends before `end` bytes."""
    with path.open("rb") as file:
        file.seek(max(0, end - LONGEST_LINE_BYTES))
        tail = file.read(end - file.tell())
    return end - len(tail) + tail.rfind(b"\n") + 1


def _loss(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "not finite"


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" ± {standard_error:.3f}"


class NoLog(Steps):
    """A RunLog without output, for the processes other than the first."""

    def __init__(self) -> None:
        super().__init__(show=False)

    def begin_arm(self, planned: PhasePlan, arm: int, step: int) -> None: ...

    def train(self, record: dict[str, Any], total_step: int) -> None: ...

    def evaluation(self, record: dict[str, Any], total_step: int) -> None: ...

    def sync(self) -> int:
        return 0


class Clock:
    """Wall time of training only, from its creation on, without the set-up of the engine, evaluations and checkpoints.

    A lap ends when a step does, which may be known only later.
    """

    def __init__(self, before_s: float) -> None:
        """before_s: the initial value of `total_s`."""
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
        """Seconds from the end of the previous lap to `done_s`, by time.monotonic(); no pause may come after
        `done_s`."""
        lap_s = done_s - self._lap_began_s - (self._paused_s - self._lap_paused_s)
        self._lap_began_s, self._lap_paused_s = done_s, self._paused_s
        return max(lap_s, 1e-9)

"""Signs that a run needs help: a heartbeat, the stacks of a run that hangs, and losses that jump."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import statistics
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from spt_fast.files import write_text
from spt_fast.printing import print_message
from spt_fast.train.folder import HEARTBEAT

HEARTBEAT_EVERY_S = 5.0

REMEMBERED_LOSSES = 100
FEWEST_LOSSES = 20
JUMP_DEVIATIONS = 8.0
"""Deviations (1.48 median deviations from the median, which outliers don't move) above the median that make a jump."""


class Watch:
    """Watches one process: heartbeat.json shows that steps are made; stacks-<rank>.txt shows where a process hangs.

    The first process writes heartbeat.json: `time` (seconds since 1970) of the newest progress, what it was, host and
    process id. After `stall_s` seconds without progress, the stacks of all threads are appended to the other file,
    once, with a message on standard error; the run continues.
    """

    def __init__(self, folder: Path, rank: int, stall_s: float) -> None:
        self._folder, self._rank, self._stall_s = folder, rank, stall_s
        self._last, self._where = time.monotonic(), {"doing": "starting"}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def sign_of_life(self, **where: Any) -> None:
        """A step or a batch of an evaluation is done."""
        self._last, self._where = time.monotonic(), where

    def __enter__(self) -> Watch:
        if self._rank == 0:
            self._write_heartbeat(time.time())
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        written = stalled = float("-inf")
        while not self._left.wait(min(HEARTBEAT_EVERY_S, self._stall_s / 4)):
            last, now = self._last, time.monotonic()
            if self._rank == 0 and last > written:
                written = last
                self._write_heartbeat(time.time() - (now - last))
            if now - last > self._stall_s and last > stalled:
                stalled = last
                self._dump_stacks(now - last)

    def _write_heartbeat(self, at: float) -> None:
        beat = {"time": round(at, 3), **self._where, "host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OSError):  # the checkpoint reports a full disk
            write_text(self._folder / HEARTBEAT, json.dumps(beat))

    def _dump_stacks(self, silent_s: float) -> None:
        path = self._folder / f"stacks-{self._rank}.txt"
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: nothing for {silent_s:.0f} s, last {self._where}\n")
            file.flush()
            faulthandler.dump_traceback(file)
        print_message(f"spt-fast: no step for {silent_s:.0f} s in process {self._rank}; stacks are in {path}")


class LossWatch:
    """Reports losses far above the earlier ones: a first sign of too high a rate, or of bad data."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=REMEMBERED_LOSSES)

    def jump(self, loss: float) -> float | None:
        """The median of the earlier losses, if `loss` is far above it."""
        median = None
        if len(self._recent) >= FEWEST_LOSSES:
            middle = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(x - middle) for x in self._recent)
            if loss > middle + JUMP_DEVIATIONS * deviation:
                median = middle
        self._recent.append(loss)
        return median

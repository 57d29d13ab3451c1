"""Wall time of training alone: evaluations and checkpoints are left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Runs from where it is made. A lap ends where a step does, which may be known only later."""

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

"""A request to stop: SIGTERM, SIGINT, SIGHUP, or a scheduler's notice, SIGUSR1 or SIGUSR2. The run stops at the next
safe place, with a checkpoint; further signals change nothing."""

from __future__ import annotations

import atexit
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE_S = 10.0
"""A SIGINT this long after the first request means that saving takes too long: it interrupts at once."""


class StopRequest:
    """A context in which the first of these signals sets a flag. A nested one takes over the outer one's signals."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self._previous: dict[int, Any] = {}

    @property
    def signal(self) -> str | None:
        """The name of the signal that asked for the stop."""
        return self.received[0] if self.received else None

    def __call__(self) -> bool:
        return bool(self.received)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            around = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            if isinstance(around, StopRequest):
                self.received = around.received  # shared, since a signal may come between any two lines
            for number in _handled():
                self._previous[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            _first_s.append(time.monotonic())  # first: the next signal may come before the next line and read it
            self.received.append(signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - _first_s[-1] > PATIENCE_S:
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


_first_s: list[float] = []
"""When the process was signalled to end, by time.monotonic()."""


def interrupt_by_signals() -> None:
    """Outside of a StopRequest, let the first of these signals interrupt like Ctrl-C and ignore further ones: the
    process is ending."""
    _first_s.clear()
    for number in _handled():
        signal.signal(number, _interrupt)
    atexit.register(_ignore)  # otherwise they would kill the process after Python restores its handlers


def _handled() -> list[signal.Signals]:
    """All signals except a SIGHUP that is ignored, as under nohup."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _first_s or (number == signal.SIGINT and time.monotonic() - _first_s[-1] > PATIENCE_S):
        _first_s.append(time.monotonic())
        raise KeyboardInterrupt


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

"""A request to stop: SIGTERM, SIGINT, SIGHUP, or a scheduler's notice, SIGUSR1 or SIGUSR2. The run stops at the next
safe place, with a checkpoint, however many more of them come."""

from __future__ import annotations

import atexit
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE_S = 10.0
"""A SIGINT that comes so long after the first request means that saving takes too long: it interrupts at once."""


class StopRequest:
    """A context in which the first of these signals sets a flag. One inside another takes over what that has heard."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            around = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
            for number in _heeded():
                self._previous[number] = signal.signal(number, self._request)
            if isinstance(around, StopRequest):
                self.signal = around.signal
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number).name
            _first_s.append(time.monotonic())
        elif number == signal.SIGINT and time.monotonic() - _first_s[-1] > PATIENCE_S:
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


_first_s: list[float] = []
"""When the signals came that ask this process to end, by time.monotonic()."""


def interrupt_by_signals() -> None:
    """Where no StopRequest heeds them, let the first of these signals interrupt as Ctrl-C does, and further ones do
    nothing: the process is ending."""
    _first_s.clear()
    for number in _heeded():
        signal.signal(number, _interrupt)
    atexit.register(_ignore)  # Python would have them kill the process from then on


def _heeded() -> list[signal.Signals]:
    """All but a SIGHUP that is ignored, as nohup leaves it."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _first_s or (number == signal.SIGINT and time.monotonic() - _first_s[-1] > PATIENCE_S):
        _first_s.append(time.monotonic())
        raise KeyboardInterrupt


def _ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

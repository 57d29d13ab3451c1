"""A process for trials that may crash it: an illegal memory access ends the process, and a wrong launch can hang.

It imports everything once, uses no GPU, and forks for each request. The fork answers with messages, JSON dictionaries
whose "at" names what it works on; None means that nothing can be at fault.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

START_S = 120.0
"""Time for a child to import what it needs."""
STUCK_S = 60.0
"""A candidate that takes longer, compilation included, is abandoned."""
GRACE_S = 5.0
"""Time that a child may need beyond its own limit."""
POLL_S = 0.5


class Undecided(Exception):
    """Nothing was found, and the reason."""


def serve(answers: int) -> None:
    """In the child: reads requests from stdin, one per line; a fork writes messages to `answers`."""
    with os.fdopen(answers, "w", encoding="utf-8") as out:

        def tell(**message: Any) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        tell(ready=True)
        for line in sys.stdin:
            request = json.loads(line)
            module, _, function = request["task"].partition(":")
            task = getattr(importlib.import_module(module), function)
            for source in request.get("imports", []):
                importlib.import_module(source)
            if (pid := os.fork()) == 0:
                task(request, tell)
                os._exit(0)
            tell(end=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


class Died(Exception):
    """The process that tries candidates has ended, or was ended because it hung."""


class _Stuck(Exception):
    """It does not answer."""


class Child:
    """The process that forks for trials; it is started when it is first used, and again if a fork hung."""

    def __init__(self, stop: Callable[[], bool] = lambda: False) -> None:
        self._stop = stop
        self._process: subprocess.Popen | None = None
        self._answers, self._unread = -1, b""

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            os.close(self._answers)
            self._process = None

    def ask(self, request: Mapping[str, Any], ends: float) -> Iterator[dict[str, Any]]:
        """Its messages until it is finished. `request["task"]` names the function as "module:name" that takes the
        request and a function that sends messages. Died if it ends earlier, or works on one thing for STUCK_S or until
        some time after `ends`; Undecided if no child can be started."""
        try:
            self.start()
            assert self._process is not None
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            patience, message = START_S, {}
            while "end" not in message:
                message = json.loads(self._line(min(patience, max(0.0, ends - time.monotonic()) + GRACE_S)))
                patience = STUCK_S if message.get("at") is not None else START_S if "at" in message else patience
                yield message
        except _Stuck as stuck:
            self.__exit__()
            raise Died(str(stuck)) from None
        if code := message["end"]:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Died(f"ended its process ({name})")

    def start(self) -> None:
        """Start it unless it runs: its imports take seconds, which should not count for the first op. Undecided if that
        fails."""
        if self._process is not None:
            return
        self._answers, theirs = os.pipe()
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from spt_fast.kernels.child import serve; serve({theirs})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs,),
            start_new_session=True,
            env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},  # the other check would initialise the GPU
        )
        os.close(theirs)
        try:
            self._line(START_S)
        except _Stuck as stuck:
            self.__exit__()
            raise Undecided(f"what tries it {stuck}") from None

    def _line(self, seconds: float) -> bytes:
        patient_until = time.monotonic() + seconds
        while b"\n" not in self._unread:
            if self._stop():
                self.__exit__()
                raise Undecided("the run was asked to stop")
            if not select.select([self._answers], [], [], POLL_S)[0]:
                if time.monotonic() < patient_until:
                    continue
                raise _Stuck(f"took longer than {seconds:.0f} s")
            if not (read := os.read(self._answers, 1 << 16)):
                raise _Stuck("cannot be started")
            self._unread += read
        line, self._unread = self._unread.split(b"\n", 1)
        return line

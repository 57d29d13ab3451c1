"""Which backend and launch of an op is the fastest on this machine at a run's shapes, found by trying.

A candidate is tried in a process of its own, since an illegal memory access ends the process that makes it, and a wrong
launch can hang. Where it ends or stands still, the candidate at work is out and another process goes on: a fork of one
that has imported all and touched no GPU. What lives is judged and timed (`judging`). The default is replaced only by
one that is more than LEAST_GAIN faster, or where it fails itself. Candidates that change the launch of one kernel each
are put together at last, the fastest of every kernel, and that is tried as well.

A record is kept (`measured`) for the machine, the text of the kernels, shape, dtype and determinism.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from spt_fast import native
from spt_fast.kernels.backend import Candidate
from spt_fast.kernels.judging import NOT_REACHED, Question
from spt_fast.kernels.measured import machine, recall, remembered

LEAST_GAIN = 0.03
START_S = 120.0
"""For a child to import what it needs."""
STUCK_S = 60.0
"""A candidate that takes longer, its compilation included, is out."""
GRACE_S = 5.0
"""What a child may need beyond its time, which it keeps itself."""
POLL_S = 0.5
FIRST_SHARE = 0.7
"""Of an op's time, before the fastest launches are put together."""


class Undecided(Exception):
    """Nothing was found, and why."""


def known(questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """By op, the records that this machine has."""
    found = {question.op: recall("kernels", _key(question)) for question in questions}
    return {op: record for op, record in found.items() if record is not None}


def tune(
    questions: Sequence[Question],
    *,
    seconds: float,
    say: Callable[[str], object] = print,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """By op, what was found, here or by an earlier process; ops that `seconds` didn't suffice for, or that came after
    it was asked to `stop`, are left out."""
    ends, records = time.monotonic() + seconds, {}
    with _Child(stop) as child:
        for number, question in enumerate(questions):
            share = (ends - time.monotonic()) / (len(questions) - number)
            decide = partial(_decide, question, child, share, say)
            try:
                records[question.op] = remembered("kernels", _key(question), decide)
            except Undecided as reason:
                say(f"{question.op}: left as it is by default, since {reason}")
    return records


def chosen(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Candidate]:
    """What records tell `install` to do."""
    return {op: Candidate.read(record["chosen"]) for op, record in records.items()}


def describe(record: Mapping[str, Any]) -> str:
    """How fast it is, and since when that is known."""
    best, default = (sum(record["seconds"][name]) for name in ("chosen", "default"))
    than = f", {default / best:.2f} times as fast as by default" if default > best else ""
    passes = " + ".join(f"{1000 * part:.3g}" for part in record["seconds"]["chosen"])
    return f"forward + backward {passes} ms{than}, measured {record['date']}"


# ------------------------------------------------------------------------------------------------ the decision


def _decide(question: Question, child: _Child, share: float, say: Callable[[str], object]) -> dict[str, Any]:
    if share > 0:
        child.start()
    began = time.monotonic()
    tried = _ask(question, child, began + FIRST_SHARE * share, [])
    if merged := _merged(tried):
        front = [tried[0].candidate, min(_passed(tried), key=_total).candidate, merged]
        with suppress(Undecided):
            again = _ask(question, child, began + share, front)
            tried = [*again, *(one for one in tried if one.candidate not in front)]
    default, rivals = tried[0], _passed(tried)
    if len(tried) > 1 and all(one.problem == NOT_REACHED for one in tried[1:]):
        raise Undecided("there was time for the default alone")
    if not rivals:
        raise Undecided("; ".join(f"{one.candidate} {one.problem}" for one in tried))
    best = min(rivals, key=_total)
    if default.seconds and _total(best) > (1 - LEAST_GAIN) * _total(default):
        best = default
    if default.problem:
        say(f"{question.op}: {default.candidate} {default.problem}; {best.candidate} is taken")
    return {
        "date": f"{date.today()}",
        "default": default.candidate.plain(),
        "chosen": best.candidate.plain(),
        "seconds": {"default": default.seconds, "chosen": best.seconds},
        "tried": {str(one.candidate): one.problem or round(1000 * _total(one), 6) for one in tried},
    }


@dataclass
class _Tried:
    """seconds: forward and backward, empty where it wasn't timed."""

    candidate: Candidate
    problem: str | None = None
    seconds: Sequence[float] = ()


def _passed(tried: Sequence[_Tried]) -> list[_Tried]:
    return [one for one in tried if one.seconds]


def _total(one: _Tried) -> float:
    return sum(one.seconds)


def _merged(tried: Sequence[_Tried]) -> Candidate | None:
    """The fastest launch of every kernel, where candidates that change one each were faster for at least two."""
    best: dict[str, _Tried] = {}
    for one in _passed(tried):
        plain = Candidate(one.candidate.backend)
        base = next((other for other in tried if other.candidate == plain), tried[0])
        if len(one.candidate.launches) == 1 and base.seconds and _total(one) < 0.99 * _total(base):
            kernel = one.candidate.launches[0][0]
            best[kernel] = min(best.get(kernel, one), one, key=_total)
    if len(best) < 2:
        return None
    candidates = [one.candidate for one in best.values()]
    return Candidate(candidates[0].backend, tuple(one.launches[0] for one in candidates))


def _ask(question: Question, child: _Child, ends: float, candidates: Sequence[Candidate]) -> list[_Tried]:
    """Every candidate, or all that the op has, with what became of it."""
    tried: list[_Tried] = []
    while time.monotonic() < ends:
        at, judged = None, [[i, one.problem] for i, one in enumerate(tried) if one.problem is not None]
        request = {
            "question": asdict(question),
            "candidates": [one.plain() for one in candidates],
            "judged": judged,
            "ends": ends,
            "threads": torch.get_num_threads(),
        }
        try:
            for message in child.ask(request, ends):
                at = message.get("at", at)
                if "candidates" in message and not tried:
                    tried = [_Tried(Candidate.read(plain)) for plain in message["candidates"]]
                for i, problem in message.get("problems", []):
                    tried[i].problem = problem
                for i, seconds in message.get("seconds", []):
                    tried[i].seconds = seconds
            return tried
        except _Died as death:
            if at is None:
                raise Undecided(f"what tries it {death}") from death
            tried[at].problem = str(death)
    raise Undecided("there was no time left")


def _key(question: Question) -> dict[str, Any]:
    """What a record depends on."""
    return {**asdict(question), **machine(torch.device(question.device)), "kernels": kernels_digest()}


@cache
def kernels_digest() -> str:
    """Of all that computes: the files of this folder and the compiled extension."""
    files = [*Path(__file__).parent.glob("*.py"), *Path(native.__file__).parent.glob("_C.*.so")]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in sorted(files))).hexdigest()


# ------------------------------------------------------------------------------------------------ the child


class _Died(Exception):
    """The process that tries candidates has ended, or was ended since it stood still."""


class _Stuck(Exception):
    """It says nothing."""


class _Child:
    """The process that forks those that try candidates; it is started when it is first asked, and again where one of
    these stood still."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop
        self._process: subprocess.Popen | None = None
        self._answers, self._unread = -1, b""

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            os.close(self._answers)
            self._process = None

    def ask(self, request: Mapping[str, Any], ends: float) -> Iterator[dict[str, Any]]:
        """What it says, until it is through. _Died where it ends before, or a candidate is at work for STUCK_S or until
        a while after `ends`."""
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
            raise _Died(str(stuck)) from None
        if code := message["end"]:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise _Died(f"ended its process ({name})")

    def start(self) -> None:
        """Unless it runs: it imports for seconds, which shall not be those of the op that comes first. Undecided where
        it cannot."""
        if self._process is not None:
            return
        self._answers, theirs = os.pipe()
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from spt_fast.kernels.judging import serve; serve({theirs})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs,),
            start_new_session=True,
            env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},  # the other check would begin to use the GPU
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

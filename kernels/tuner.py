"""Finds the fastest backend and launch of an op on this machine at a run's shapes, by trying them.

A candidate is tried in a separate process, since an illegal memory access ends the process, and a wrong launch can hang
(`child`). If it ends or hangs, the current candidate is dropped and another process continues. The others are checked
and timed (`judging`). The default is replaced only by a candidate that is more than LEAST_GAIN faster, or if it fails
itself. Candidates that change the launch of one kernel each are combined at the end, the fastest of every kernel, and
the combination is tried as well.

A record is kept (`measured`) per machine, text of the kernels, shape, dtype and determinism.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from spt_fast import native
from spt_fast.kernels.backend import Candidate
from spt_fast.kernels.child import Child, Died, Undecided
from spt_fast.kernels.judging import NOT_REACHED, Question
from spt_fast.kernels.measured import machine, recall, remembered

LEAST_GAIN = 0.03
FIRST_SHARE = 0.7
"""Share of an op's time that must remain when the fastest launches are combined."""


def known(questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """This machine's records, by op."""
    found = {question.op: recall("kernels", _key(question), _read) for question in questions}
    return {op: record for op, record in found.items() if record is not None}


def tune(
    questions: Sequence[Question],
    *,
    seconds: float,
    say: Callable[[str], object] = print,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """By op, what was found, here or by an earlier process. Ops for which `seconds` didn't suffice, or that came after
    it was asked to `stop`, are left out."""
    ends, records = time.monotonic() + seconds, {}
    with Child(stop) as child:
        for number, question in enumerate(questions):
            share = (ends - time.monotonic()) / (len(questions) - number)
            decide = partial(_decide, question, child, share, say)
            try:
                records[question.op] = remembered("kernels", _key(question), decide, _read)
            except Undecided as reason:
                say(f"{question.op}: keeps its default, since {reason}")
    return records


def chosen(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Candidate]:
    """What `install` should do according to the records."""
    return {op: Candidate.read(record["chosen"]) for op, record in records.items()}


def _read(record: Mapping[str, Any]) -> None:
    describe(record)
    for name in ("chosen", "default"):
        str(Candidate.read(record[name]))


def describe(record: Mapping[str, Any]) -> str:
    """How fast it is, and the date of the measurement."""
    best, default = (sum(record["seconds"][name]) for name in ("chosen", "default"))
    than = f", {default / best:.2f} times as fast as by default" if default > best else ""
    passes = " + ".join(f"{1000 * part:.3g}" for part in record["seconds"]["chosen"])
    return f"forward + backward {passes} ms{than}, measured {record['date']}"


# ------------------------------------------------------------------------------------------------ the decision


def _decide(question: Question, child: Child, share: float, say: Callable[[str], object]) -> dict[str, Any]:
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
        say(f"{question.op}: {default.candidate} {default.problem}; {best.candidate} is used")
    return {
        "date": f"{date.today()}",
        "default": default.candidate.plain(),
        "chosen": best.candidate.plain(),
        "seconds": {"default": default.seconds, "chosen": best.seconds},
        "tried": {str(one.candidate): one.problem or round(1000 * _total(one), 6) for one in tried},
    }


@dataclass
class _Tried:
    """seconds: forward and backward, empty if it wasn't timed."""

    candidate: Candidate
    problem: str | None = None
    seconds: Sequence[float] = ()


def _passed(tried: Sequence[_Tried]) -> list[_Tried]:
    return [one for one in tried if one.seconds]


def _total(one: _Tried) -> float:
    return sum(one.seconds)


def _merged(tried: Sequence[_Tried]) -> Candidate | None:
    """The fastest launch of every kernel, if single-kernel candidates were faster for at least two."""
    best: dict[tuple, _Tried] = {}
    for one in _passed(tried):
        plain = Candidate(one.candidate.backend)
        base = next((other for other in tried if other.candidate == plain), tried[0])
        if len(one.candidate.launches) == 1 and base.seconds and _total(one) < 0.99 * _total(base):
            kernel = one.candidate.launches[0][:2]
            best[kernel] = min(best.get(kernel, one), one, key=_total)
    if len(best) < 2:
        return None
    candidates = [one.candidate for one in best.values()]
    return Candidate(candidates[0].backend, tuple(one.launches[0] for one in candidates))


def _ask(question: Question, child: Child, ends: float, candidates: Sequence[Candidate]) -> list[_Tried]:
    """The result of every candidate, or of all that the op has."""
    tried: list[_Tried] = []
    while time.monotonic() < ends:
        at, judged = None, [[i, one.problem] for i, one in enumerate(tried) if one.problem is not None]
        request = {
            "task": "spt_fast.kernels.judging:judge",
            "imports": [question.source.partition(":")[0]],
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
        except Died as death:
            if at is None:
                raise Undecided(f"what tries it {death}") from death
            tried[at].problem = tried[at].problem or str(death)
    raise Undecided("there was no time left")


def _key(question: Question) -> dict[str, Any]:
    """Everything that a record depends on."""
    return {**asdict(question), **machine(torch.device(question.device)), "kernels": kernels_digest()}


@cache
def kernels_digest() -> str:
    """Digest of the code: the files of this folder and the compiled extension."""
    files = [*Path(__file__).parent.glob("*.py"), *Path(native.__file__).parent.glob("_C.*.so")]
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in sorted(files))).hexdigest()

"""summary.json and metrics.jsonl as a run's folder records them: a field of another type is refused when the file is
read, a missing one where it is needed, because earlier versions wrote fewer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spt_fast.config import Phase
from spt_fast.errors import CheckpointError, cut, shown
from spt_fast.files import check_regular

Kind = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words, and whether it is."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


COUNT: Kind = ("a whole number", lambda value: _is_number(value) and isinstance(value, int) and value >= 0)
NUMBER: Kind = ("a number", _is_number)
LOSS: Kind = ("a number or null", lambda value: value is None or _is_number(value))
TEXT: Kind = ("text", lambda value: isinstance(value, str))
NAME: Kind = ("text or null", lambda value: value is None or isinstance(value, str))
LIST: Kind = ("a list", lambda value: isinstance(value, list))

EACH = "*"
"""Every name that the fields beside it don't have."""
LOSSES = {EACH: LOSS}
PHASE = {
    **dict.fromkeys(("steps", "tokens", "handed_on", "arm", "context"), COUNT),
    **dict.fromkeys(("heldout", "select", "best_heldout"), LOSSES),
    "flops_per_token": NUMBER,
    "tokens_per_s": LOSS,
    "epochs": {EACH: NUMBER},
    "windows": {EACH: LIST},
    "scored": {EACH: {EACH: {EACH: LOSS}}},
    "standard_errors": {EACH: LOSSES},
}
FIELDS = {
    "status": TEXT,
    "reason": NAME,
    **dict.fromkeys(("parameters", "context", "seed", "skipped_steps"), COUNT),
    **dict.fromkeys(("flops_per_token", "seconds"), NUMBER),
    **dict.fromkeys(("precision", "heldout_halves", "directory"), TEXT),
    "tokenizer": NAME,
    "train_tokens": {EACH: COUNT},
    "data": {EACH: TEXT},
    "phases": {EACH: PHASE},
}
"""The fields of summary.json that are read, by name."""
RECORD = {
    **dict.fromkeys(("kind", "phase"), TEXT),
    **dict.fromkeys(("arm", "step", "tokens"), COUNT),
    **dict.fromkeys(("loss", "lr", "grad_norm", "mfu"), LOSS),
    **dict.fromkeys(("heldout", "select", "train"), LOSSES),
    **dict.fromkeys(("tokens_per_s", "average"), NUMBER),
    "standard_errors": {EACH: LOSSES},
}
"""Those of a record of metrics.jsonl."""


class Recorded(dict[str, Any]):
    """A mapping of summary.json or of a line of metrics.jsonl. To read a field that it lacks is a CheckpointError."""

    _file = Path("summary.json")
    _within = ""
    _line = 0

    @classmethod
    def of(cls, fields: Mapping[str, Any], file: Path, within: str = "", line: int = 0) -> Recorded:
        """within: the names that lead to the mapping, each with a dot. line: its number in metrics.jsonl, from 1."""
        part = cls(
            (name, cls.of(value, file, f"{within}{name}.", line) if isinstance(value, dict) else value)
            for name, value in fields.items()
        )
        part._file, part._within, part._line = file, within, line
        return part

    def arm_of(self, phase: Phase) -> int:
        """The kept arm of a phase's grid, whose part of summary.json this is; CheckpointError if the grid lacks it."""
        kept, count = self["arm"], len(phase.arms())
        if kept < count:
            return kept
        raise damaged(self._file, f"`{self._within}arm` is {kept}, but there are {count}")

    def __missing__(self, name: str) -> Any:
        raise damaged(self._file, f"`{self._within}{name}` is missing", " or of an earlier version", line=self._line)


def records_of(run: Path, kind: str | None = None) -> list[Recorded]:
    """The records of a run's metrics.jsonl, or those of a kind, "train" or "eval". CheckpointError if it cannot be
    read, also later for a field that a record lacks."""
    metrics = run / "metrics.jsonl"
    try:
        check_regular(metrics)
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{metrics}: cannot be read ({error}); {TRAIN_AGAIN}") from None
    records = [record_of(line, metrics, number) for number, line in enumerate(lines, 1)]
    return [record for record in records if kind is None or record["kind"] == kind]


def record_of(line: str | bytes, metrics: Path, number: int) -> Recorded:
    """A line of metrics.jsonl by its number, from 1. CheckpointError if it is no record."""
    try:
        found = json.loads(line)
        problem = next(mistyped(found, RECORD), None)
    except (ValueError, RecursionError) as error:
        problem = f"it is not JSON: {cut(str(error), 200)}"
    if problem:
        raise damaged(metrics, problem, line=number)
    return Recorded.of(found, metrics, line=number)


def with_nan(fields: dict[str, Any]) -> dict[str, Any]:
    """The same mapping with NaN in place of null, also in the mappings within: JSON has no number for it."""
    for name, value in fields.items():
        if value is None:
            fields[name] = math.nan
        elif isinstance(value, dict):
            with_nan(value)
    return fields


def mistyped(value: Any, expected: Any = FIELDS, where: str = "") -> Iterator[str]:
    """What is wrong with each value of another type than `expected`, which is a Kind or the fields of a mapping."""
    if isinstance(expected, tuple):
        words, fits = expected
        if not fits(value):
            yield f"`{where}` is {shown(value)}, not {words}"
    elif not isinstance(value, dict):
        yield f"`{where}` is {shown(value)}, not a mapping" if where else f"it is {shown(value)}, not a mapping"
    else:
        for name, inner in value.items():
            if found := expected.get(name, expected.get(EACH)):
                yield from mistyped(inner, found, f"{where}.{name}" if where else name)


WRITE_AGAIN = "delete it and resume the training, which writes it again"
TRAIN_AGAIN = "train the run again"


def damaged(file: Path, problem: str, more: str = "", line: int = 0) -> CheckpointError:
    """The error for summary.json, or for a line of metrics.jsonl by its number, from 1."""
    where, remedy = (f"line {line}: ", TRAIN_AGAIN) if line else ("", WRITE_AGAIN)
    return CheckpointError(f"{file}: is damaged{more} ({where}{problem}); {remedy}")

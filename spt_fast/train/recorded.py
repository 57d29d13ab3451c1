"""summary.json as a folder records it: a field of another type is refused when the file is read, a missing one where it
is needed, because earlier versions wrote fewer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spt_fast.config import Phase
from spt_fast.errors import CheckpointError, shown

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
"""The fields that are read, by name."""


class Recorded(dict[str, Any]):
    """A mapping of summary.json. To read a field that it lacks is a CheckpointError."""

    _file = Path("summary.json")
    _within = ""

    @classmethod
    def of(cls, fields: Mapping[str, Any], file: Path, within: str = "") -> Recorded:
        """within: the names that lead to the mapping, each with a dot."""
        part = cls(
            (name, cls.of(value, file, f"{within}{name}.") if isinstance(value, dict) else value)
            for name, value in fields.items()
        )
        part._file, part._within = file, within
        return part

    def arm_of(self, phase: Phase) -> int:
        """The kept arm of a phase's grid, whose part of summary.json this is; CheckpointError if the grid lacks it."""
        kept, count = self["arm"], len(phase.arms())
        if kept < count:
            return kept
        raise damaged(self._file, f"`{self._within}arm` is {kept}, but there are {count}")

    def __missing__(self, name: str) -> Any:
        raise damaged(self._file, f"`{self._within}{name}` is missing", " or of an earlier version")


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


def damaged(file: Path, problem: str, more: str = "") -> CheckpointError:
    return CheckpointError(
        f"{file}: is damaged{more} ({problem}); delete it and resume the training, which writes it again"
    )

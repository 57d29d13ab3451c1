"""Errors that users cause. Every message names the field or file, the value given, and the remedy.

The command line turns any of these into one message and exit code 2. Our own mistakes are `assert`s.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence


class SptError(ValueError):
    """Base of every error that a user can cause and fix.

    argument: the name that the message begins with is an argument of a function. The command line writes it as its
    flag, and does the same with a keyword argument in backticks, such as `resume=True`. A message is cut at `LONGEST`
    characters, however much of a file it quotes.
    """

    def __init__(self, message: str = "", *, argument: bool = False) -> None:
        super().__init__(readable(message))
        self.argument = argument


class RecipeError(SptError):
    """A recipe, study or command-line value that cannot be used."""


class DataError(SptError):
    """A text file, tokenizer or token dataset that cannot be used."""


class MissingKey(DataError):
    """A text without the key that its text is read from."""


class TooFewPieces(DataError):
    """A text with too few distinct pieces for a vocabulary of the size asked for."""


class CheckpointError(SptError):
    """A run folder, checkpoint or weights folder that cannot be used."""


class SptWarning(UserWarning):
    """What a user should know about a result, such as what could not be checked."""


class FailedElsewhere(Exception):
    """Another process of this run failed, and says why itself."""


LONGEST = 1900
"""Characters of a message."""
LONGEST_WORD = 300
SHOWN = 80
"""Characters of a value or key that a message shows."""


def readable(message: str) -> str:
    """A message cut at `LONGEST` characters; a word such as a path is cut in the middle at `LONGEST_WORD`."""
    half = LONGEST_WORD // 2
    return cut(re.sub(rf"\S{{{LONGEST_WORD},}}", lambda w: f"{w[0][:half]}…{w[0][-half:]}", message), LONGEST)


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut at `SHOWN` characters."""
    try:
        return cut(repr(value))
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return f"a {type(value).__name__}"


def shown_key(key: object) -> str:
    """A key as messages show it: as it was written, cut at `SHOWN` characters."""
    return cut(key) if isinstance(key, str) and key.isprintable() else shown(key)


def shown_path(path: object) -> str:
    """A path as messages show it; of text that was given in place of one, the beginning in quotes."""
    return written if (written := str(path)).isprintable() else shown(written)


def cut(text: str, characters: int = SHOWN) -> str:
    """`text`, or its beginning where it is longer."""
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def some(names: Sequence[str]) -> str:
    """The first three names of a list that may be long."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_OF_ONE = {"are": "is", "were": "was", "hold": "holds"}


def counted(number: int, what: str, verb: str = "") -> str:
    """1 document, 2,000 documents; with the verb of the latter also 1 document is, 2,000 documents are."""
    said = f"{number:,} {what}" if number == 1 else f"{number:,} {what}{'es' if what.endswith('s') else 's'}"
    return f"{said} {_OF_ONE[verb] if number == 1 else verb}" if verb else said


def invalid(field: str, given: object, expected: str) -> str:
    """The message for a value that cannot be used: `FIELD: VALUE is invalid: what is expected; the remedy`.

    field: a recipe's dotted path, a function's argument or a file. expected: what is valid, and the remedy where that
    is not obvious.
    """
    return f"{field}: {shown(given)} is invalid: {expected}"


def nearest(given: str, known: Iterable[str]) -> str:
    """A tail for an error message: the known name closest to `given`, or the list of them all."""
    known = sorted(known)
    meant = closest(given, known)
    return f"did you mean {meant!r}?" if meant is not None else f"known: {cut(', '.join(known), 5 * SHOWN)}"


def closest(given: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, in capitals or not; None if none is near."""
    by_case = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(given.casefold(), by_case, n=1)
    return by_case[close[0]] if close else None


def among(given: object, known: Iterable[str]) -> str:
    """What is expected of a value that has to be one of these names, and the name that was probably meant."""
    known = list(known)
    meant = closest(str(given), known)
    return f"write one of {', '.join(known)}{'' if meant is None else f'; did you mean {meant!r}?'}"

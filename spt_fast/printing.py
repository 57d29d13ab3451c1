"""Results as the commands print them: JSON with exact numbers; tables and facts with numbers as people read them."""

from __future__ import annotations

import codecs
import errno
import io
import math
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.table import Table

from spt_fast.errors import SptWarning
from spt_fast.quantities import heading, read


def plain(value: Any) -> Any:
    """Settings and results as plain data for YAML and JSON. An object with a method `as_json` converts itself; a field
    or key with a name for files (`key`) is written under that name."""
    if hasattr(value, "as_json"):
        value = value.as_json()
    elif is_dataclass(value):
        value = {item.metadata.get("key") or item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        return {getattr(key, "key", key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, (Fraction, Path)) else value


def as_json(result: Any) -> Any:
    """Plain data for JSON, with None for NaN and infinities."""
    return _finite(plain(result))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


MIN_WIDTH = 40
IN_ASCII = {"·": "-", "±": "+-", "→": "->", "←": "<-", "…": "~", "×": "x", "✗": "!", "–": "-", "−": "-", "²": "2"}
"""ASCII for our own signs on terminals whose encoding lacks them, of the same width if possible."""


def set_up() -> None:
    """Write characters that the terminal's encoding lacks in ASCII, or in names as escapes (\\u03b4), instead of
    failing, and each of our warnings as one sentence without its place in the code."""
    codecs.register_error("spt_fast", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spt_fast")
    warnings.formatwarning = _as_sentence
    warnings.filterwarnings("ignore", "Glyph")  # a character of a name that matplotlib's font lacks


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    sign = error.object[error.start]
    return IN_ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode(), error.start + 1


_format_elsewhere = warnings.formatwarning


def _as_sentence(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
    if issubclass(category, SptWarning):
        return _in_lines(f"spt-fast: warning: {message}")
    return _format_elsewhere(message, category, *where, **line)


class Lasting:
    """Standard output or error whose writes never fail: a run does not end because its terminal was closed, or because
    nothing reads its pipe any more. Later output is dropped, that of libraries too."""

    def __init__(self, name: str) -> None:
        """name: "stdout" or "stderr"."""
        self._name = name

    @property
    def _stream(self) -> Any:
        stream = getattr(sys, self._name)
        return getattr(stream, "rich_proxied_file", stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        self._try("write", text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, act: str, *arguments: str) -> None:
        if (stream := self._stream) is None:  # its descriptor was closed before the start
            return
        try:
            getattr(stream, act)(*arguments)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                with suppress(OSError), open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())


def terminal(*, stderr: bool = False, quiet: bool = False, lasting: bool = False) -> Console:
    """A console for people: names are printed as they are, brackets and colons included. A notebook gets plain text, as
    a pipe does: rich would write an output of HTML for every line. Standard error, or with `lasting` standard output,
    may be closed meanwhile."""
    how: dict[str, Any] = {"quiet": quiet, "markup": False, "emoji": False, "highlight": False}
    if stderr or lasting:
        how["file"] = Lasting("stderr" if stderr else "stdout")
    console = Console(**how)
    if console.is_jupyter:
        console = Console(**how, force_jupyter=False, force_terminal=False)
    if console.width < MIN_WIDTH:  # the width is unknown, as with COLUMNS=0: nothing would be visible
        console.width = 80
    return console


def print_note(console: Console, note: str) -> None:
    """Print a sentence: wrapped at words on a terminal, as one line elsewhere, so that logs keep one line."""
    console.print(note, soft_wrap=not console.is_terminal)


def print_message(message: str) -> None:
    """Print a sentence on standard error, above a line that changes there."""
    changes = isinstance(sys.stderr, FileProxy)  # which prints it above the line
    print(_in_lines(message), end="", file=sys.stderr if changes else Lasting("stderr"))


def _in_lines(message: str) -> str:
    """What `print_note` prints on standard error."""
    console = terminal(stderr=True)
    with console.capture() as printed:
        print_note(console, message)
    return printed.get()


SHORTEST_NAME = 8
WIDE = 10_000


def print_table(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table under the names of its fields, formatted by `spt_fast.quantities`. On a narrow terminal headings
    take several lines and long names are cut in the middle; on a narrower one every row becomes a list."""
    if title:
        console.print(title, style="table.title", soft_wrap=True)
    rows = list(rows)
    cells = [[read(name, cell) for name, cell in zip(columns, row, strict=True)] for row in rows]
    names = [any(isinstance(row[i], (str, Path)) for row in rows) for i in range(len(columns))]
    headings = [heading(name) for name in columns]
    longest = console.width
    if _width(headings, cells, names, longest) > console.width:
        headings = [of.replace(" ", "\n") for of in headings]
    while longest > SHORTEST_NAME and _width(headings, cells, names, longest) > console.width:
        longest -= 1
    if _width(headings, cells, names, longest) > console.width:
        for row in cells:
            _print_pairs(console, zip(map(heading, columns), row, strict=True))
            console.print()
        return
    table = Table()
    for of, is_name in zip(headings, names, strict=True):
        table.add_column(of, justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name)
    for row in cells:
        table.add_row(*(middle(cell, longest) if is_name else cell for cell, is_name in zip(row, names, strict=True)))
    console.print(table)


def print_fields(console: Console, title: str, columns: Sequence[str], items: Iterable[object]) -> None:
    """`print_table` with a row for each item: these fields of it."""
    print_table(console, title, columns, [[getattr(item, column) for column in columns] for item in items])


def _width(headings: Sequence[str], cells: Sequence[Sequence[str]], names: Sequence[bool], longest: int) -> int:
    """The width of a table whose names are cut to `longest`."""
    width = 1 + 3 * len(headings)  # the lines between the columns
    for i, (of, is_name) in enumerate(zip(headings, names, strict=True)):
        written = max((cell_len(line) for row in cells for line in row[i].splitlines()), default=0)
        width += max(*map(cell_len, of.splitlines()), min(written, longest) if is_name else written)
    return width


def print_named(console: Console, title: str, facts: Mapping[str, str]) -> None:
    """Print a row for each run, checkpoint or op, under its own name."""
    if title:
        console.print(title, style="table.title", soft_wrap=True)
    _print_pairs(console, facts.items())


def print_facts(console: Console, title: str, facts: Any) -> None:
    """Print a row for each known fact of a mapping or dataclass, nested ones included; keys are names of fields."""
    if title:
        console.print(title, style="table.title", soft_wrap=True)
    pairs = []
    for key, value in as_json(facts).items():
        nested = value.items() if isinstance(value, Mapping) else [("", value)]
        for inner, leaf in nested:
            if leaf is not None:
                pairs.append((f"{heading(key)} {heading(inner)}".strip(), read(inner or key, leaf)))
    _print_pairs(console, pairs)


def print_grid(console: Console, table: Table) -> None:
    """The table itself, or every row as a list if the terminal is too narrow for its words."""
    options = console.options

    def cuts(width: int) -> int:
        return sum(segment.text.count("…") for segment in console.render(table, options.update(width=width)))

    if cuts(console.width) == cuts(WIDE):
        console.print(table)
        return
    if table.title:
        console.print(table.title)
    headings = [str(column.header).replace("-\n", "").replace("\n", " ") for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        _print_pairs(console, zip(headings, (str(cell).replace("\n±", " ±") for cell in cells), strict=True))
        console.print()


def _print_pairs(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    table = Table(show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, value)
    console.print(table)


def middle(text: str, width: int) -> str:
    """`text` in at most `width` cells of a terminal, cut in the middle if it is longer."""
    cut, keep = text, len(text)
    while cell_len(cut) > width and keep > 1:
        keep -= 1
        cut = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    return cut

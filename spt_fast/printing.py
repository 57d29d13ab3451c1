"""Results as the commands print them: JSON; tables and facts, numbers to four digits and counts in groups of three."""

from __future__ import annotations

import io
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from spt_fast.errors import SptWarning


def plain(value: Any) -> Any:
    """Settings and results as YAML and JSON write them. What has a method `as_json` says itself what it is made of; a
    field or key with a name for files (`key`) is called that."""
    if hasattr(value, "as_json"):
        value = value.as_json()
    elif is_dataclass(value):
        value = {item.metadata.get("key") or item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        return {getattr(key, "key", key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Fraction) else value


def as_json(result: Any) -> Any:
    """Plain data for JSON, in which what is not a number is None."""
    return _finite(plain(result))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress_bar(what: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on standard error with the time left; the function that is given moves it on by so much of `total`."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TextColumn("ETA"))
    left = TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, left, console=terminal(stderr=True), disable=not show) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


MIN_WIDTH = 40


def set_up() -> None:
    """Write what the terminal's encoding lacks as an escape (\\u2192) instead of ending there, and our warnings as one
    line each."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _as_one_line
    warnings.filterwarnings("ignore", "Glyph")  # of a name, that matplotlib's font lacks


_format_elsewhere = warnings.formatwarning


def _as_one_line(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
    if issubclass(category, SptWarning):
        return f"spt-fast: warning: {message}\n"
    return _format_elsewhere(message, category, *where, **line)


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Where people read: names are printed as they are, brackets and colons included."""
    console = Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
    if console.width < MIN_WIDTH:  # of a terminal that doesn't know its own, such as COLUMNS=0: nothing would be seen
        console.width = 80
    return console


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, show_header: bool = True
) -> None:
    """A row of cells each; what is unknown (None) is n/a."""
    if title:
        console.print(title, style="table.title", soft_wrap=True)
    table = Table(show_header=show_header)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(_written, row))
    console.print(table)


def print_facts(console: Console, title: str, facts: Any) -> None:
    """A row for each fact of a mapping or dataclass that is known, and for each inner one."""
    rows = []
    for key, value in as_json(facts).items():
        nested = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(f"{key} {inner}".replace("_", " ").strip(), leaf) for inner, leaf in nested if leaf is not None]
    print_table(console, title, ["", ""], rows, show_header=False)


def _written(cell: Any) -> str:
    if cell is None:
        return "n/a"
    return f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)


def size(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.3g} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:,.3g} MB"

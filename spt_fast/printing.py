"""Tables and facts as the commands print them: numbers to four digits, counts in groups of three."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, show_header: bool = True
) -> None:
    """A row of cells each; what is unknown (None) is n/a."""
    table = Table(*columns, title=title, title_justify="left", show_header=show_header)
    for row in rows:
        table.add_row(*map(_written, row))
    console.print(table)


def print_facts(console: Console, title: str, facts: Mapping[str, Any]) -> None:
    """A row for each fact that is known, and for each inner one of a mapping."""
    rows = []
    for key, value in facts.items():
        nested = value.items() if isinstance(value, Mapping) else [("", value)]
        rows += [(f"{key} {inner}".replace("_", " ").strip(), leaf) for inner, leaf in nested if leaf is not None]
    print_table(console, title, ["", ""], rows, show_header=False)


def _written(cell: Any) -> str:
    if cell is None:
        return "n/a"
    return f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)

"""What README.md and the pages of docs/ hold: fenced blocks, and the command lines in them."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spt_fast.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Block(page.name, text.count("\n", 0, found.start()) + 1, found[1], found[2])


def commands_of(block: Block) -> list[str]:
    """Its `spt-fast` command lines, without prompt, comment and continuation."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    found = [re.sub(r"\s+#.*", "", line.removeprefix("$ ")).strip() for line in lines]
    return [line for line in found if line.startswith("spt-fast ")]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def run(command: str) -> int:
    """The exit code of a command line, run in this process."""
    sys.argv = shlex.split(command, comments=True)
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0

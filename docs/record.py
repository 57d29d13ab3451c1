"""Runs the commands of a page and writes their real output into it: `python docs/record.py docs/tutorial.md FOLDER`.

Python blocks, files (a YAML block begins with `# NAME`) and `console` blocks are run in order, in FOLDER, where trained
runs are kept. An output that the page cuts with `…` is cut at the same line again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(console|python|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COLUMNS = 100
CUT = "…"


def output_of(command: str, folder: Path) -> list[str]:
    """A command's output, without progress and warnings, which are on stderr."""
    words = [sys.executable, "-m", "spt_fast", *shlex.split(command, comments=True)[1:]]
    environment = os.environ | {"COLUMNS": str(COLUMNS)}
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}\n{ended.stderr}"
    return [line.rstrip() for line in ended.stdout.strip("\n").splitlines()]


def commands_of(block: str) -> list[tuple[str, list[str]]]:
    """The commands of a console block, and the lines that each prints."""
    found = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    return [(command, printed.splitlines()) for command, printed in found]


def recorded(block: str, folder: Path) -> str:
    """A console block with the current output of its commands."""
    lines = []
    for command, old in commands_of(block):
        now = output_of(command, folder)
        if CUT in old:
            now = [*now[: old.index(CUT)], CUT]
        lines += [f"$ {command}", *now]
    return "\n".join(lines) + "\n"


def record(page: Path, folder: Path) -> None:
    os.chdir(folder)
    text = page.read_text(encoding="utf-8")
    for language, block in BLOCK.findall(text):
        if language == "python":
            exec(block, {})
        elif language == "yaml":
            Path(block.split()[1]).write_text(block, encoding="utf-8")
        else:
            text = text.replace(block, recorded(block, folder))
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    record(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())

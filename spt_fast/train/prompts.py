"""Prompts in a file."""

from __future__ import annotations

import json
from pathlib import Path

from spt_fast.errors import DataError

KEY = "prompt"


def read_prompts(file: Path) -> list[str]:
    """The text under "prompt" in each line of a .jsonl file, or each line of any other file; empty lines are skipped.

    DataError names the file and line that cannot be used.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # not UTF-8, or no name of a file
        raise DataError(f"prompts: {file} cannot be read ({error}); give a UTF-8 text file", argument=True) from None
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"prompts: {file} is empty; write at least one prompt", argument=True)
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt(line, f"prompts: {file}, line {number}") for number, line in numbered]


def _prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: is not JSON ({error}); write an object with the key {KEY!r}", argument=True
        ) from None
    prompt = record.get(KEY) if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise DataError(f"{where}: has no text under {KEY!r}; write an object with this key", argument=True)
    return prompt

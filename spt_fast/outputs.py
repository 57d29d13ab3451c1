"""Checks of output paths: only an earlier result of the same kind may be replaced."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from spt_fast.errors import SptError, invalid

HEAD_BYTES = 4096
RUN_FOLDERS = ("checkpoints", "weights")


def check_name(path: str | os.PathLike[str], argument: str) -> None:
    """SptError, which names the argument, if no file can have this path: it holds a NUL byte or half of a surrogate
    pair, or is too long."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            given = invalid(argument, os.fspath(path), "no file can have that name; choose another")
            raise SptError(given, argument=True) from None


def check_output(file: Path, argument: str, is_ours: Callable[[Path], bool]) -> None:
    """SptError, which names the argument, if `file` exists and is neither empty nor (by `is_ours`) of the kind to be
    written, or if it would be among a run's own files. Call it before any work is done."""
    check_name(file, argument)
    if run := run_around(file):
        problem = f"is inside the run {run}; choose another place"
    elif file.is_symlink():
        problem = f"is a link; name the file that it leads to, {file.resolve()}"
    elif not file.exists():
        return
    elif not file.is_file():
        problem = "is not a regular file; name one"
    elif file.stat().st_size and not is_ours(file):
        problem = "is another kind of file and would be replaced; choose another name, or delete it"
    else:
        return
    raise SptError(f"{argument}: {file} {problem}", argument=True)


def check_folder(folder: Path, argument: str) -> None:
    """SptError, which names the argument, if the folder for results is a file."""
    check_name(folder, argument)
    if folder.exists() and not folder.is_dir():
        raise SptError(f"{argument}: {folder} is a file; name a folder", argument=True)


def run_around(file: Path) -> Path | None:
    """The run whose own files a file would be among; None for a file outside of runs."""
    for folder in file.absolute().parents:
        inside = folder == file.absolute().parent or file.absolute().relative_to(folder).parts[0] in RUN_FOLDERS
        if inside and (folder / "recipe.yaml").exists() and (folder / "checkpoints").is_dir():
            return folder
    return None


def head(file: Path) -> bytes:
    """The first bytes of a file."""
    with file.open("rb") as opened:
        return opened.read(HEAD_BYTES)


def is_tokenizer(file: Path) -> bool:
    """Whether these are tiktoken ranks from 0 on, as the tokenizer's training writes them."""
    lines = [line for line in head(file).split(b"\n")[:-1] if not line.startswith(b'#{"')]
    ranks = [re.fullmatch(rb"[A-Za-z0-9+/]+=* ([0-9]+)", line) for line in lines]
    return bool(ranks) and all(rank and int(rank[1]) == i for i, rank in enumerate(ranks))


def is_json_with(*keys: str) -> Callable[[Path], bool]:
    """A check for a JSON object that has all these keys."""

    def check(file: Path) -> bool:
        try:
            found = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and found.keys() >= set(keys)

    return check


def is_figure(file: Path) -> bool:
    """Whether Matplotlib drew this PNG."""
    return head(file).startswith(b"\x89PNG") and b"Matplotlib" in head(file)

"""The files of text that inputs stand for: files, pipes, and every such file of a folder.

A folder stands for every file below it that is named as text, sorted by path. Ignored items are counted and named:
other and hidden files, links to folders, and a text that is there twice, such as a.jsonl and a.jsonl.gz.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spt_fast.errors import DataError, SptWarning, invalid, shown_path

Inputs = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

STDIN = Path("-")
FORMATS = (".jsonl", ".ndjson", ".txt", ".parquet")
COMPRESSIONS = ("", ".gz", ".zst", ".xz", ".bz2")

HELD_OUT = re.compile(r"(?:^|[._-])(?:heldout|valid|validation|val|test|dev|eval)(?=[._-]|$)", re.IGNORECASE)
"""Matches the names that people give to files of text that is not trained on."""

_NAMED = 5  # of the ignored files


@dataclass(frozen=True)
class Found:
    """The files that inputs stand for, in reading order, and those that are ignored, by reason."""

    files: list[Path]
    passed_over: dict[str, list[Path]]


def find_files(inputs: Inputs) -> Found:
    """The files that `inputs` (paths, folders, "-") stand for. Warns of ignored ones; DataError for missing ones."""
    files: list[Path] = []
    passed_over: dict[str, list[Path]] = {}
    for given in [inputs] if isinstance(inputs, str | os.PathLike) else inputs:
        path = Path(given)
        if not os.fspath(given):
            raise DataError(
                invalid("inputs", given, "name files or folders; . is the working directory"), argument=True
            )
        exists = path == STDIN or os.path.exists(path)  # False too for text in place of a path
        if exists and (is_pipe(path) or path.is_file()):
            split_name(path)
            files.append(path)
        elif exists and path.is_dir():
            found = _files_in(path, passed_over)
            if not found:
                said = f"; {_listed(passed_over)}" if passed_over else ""
                raise DataError(
                    f"{path}: holds no {known_names()} file{said}; rename files of plain text to end in .txt"
                )
            _say_held_out(path, found)
            files += found
        else:
            raise DataError(f"{shown_path(path)} doesn't exist; give files, folders, or - for standard input")
    if not files:
        raise DataError("no input given; give files, folders, or - for standard input")
    if passed_over:
        warnings.warn(f"input: {_listed(passed_over)}", SptWarning, stacklevel=1)  # not again for another caller
    texts = Counter(text for path in files for text in _texts_of(path))
    if again := sorted({path.name for path in files if any(texts[text] > 1 for text in _texts_of(path))}):
        warnings.warn(f"input: the same text is read more than once: {few(again)}", SptWarning, stacklevel=1)
    return Found(files, passed_over)


def _files_in(folder: Path, passed_over: dict[str, list[Path]]) -> list[Path]:
    files: list[Path] = []
    texts: set[object] = set()
    closed: list[Path] = []
    below = [
        Path(parent, name)
        for parent, folders, names in os.walk(folder, onerror=lambda error: closed.append(Path(error.filename)))
        for name in (*folders, *names)
    ]
    for path in sorted(below):
        why = "folder that can't be read" if path in closed else _not_read(path, folder)
        if why is None and path.is_file() and is_text(path):
            if texts.isdisjoint(_texts_of(path)):
                files.append(path)
            else:
                why = "same text twice"
            texts.update(_texts_of(path))
        if why:
            passed_over.setdefault(why, []).append(path)
    if folder in closed:
        raise DataError(f"{folder} can't be read; give this user permission to list it")
    return files


def _say_held_out(folder: Path, files: list[Path]) -> None:
    """Warn of a folder that holds, beside other text, files or folders named as those that are not trained on."""
    names = [path.relative_to(folder) for path in files]
    apart = [str(name) for name in names if any(map(HELD_OUT.search, name.parts))]
    if 0 < len(apart) < len(files):
        warnings.warn(
            f"input: {folder} holds {few(apart)}, which by name is held out, and it is read with the rest; name the "
            "files to read if it should stay out",
            SptWarning,
            stacklevel=1,
        )


def _texts_of(path: Path) -> list[object]:
    """Identifies a file: one key is the same for links to it and for the file compressed, one for hard links to it;
    empty for a pipe."""
    if is_pipe(path):
        return []
    status = path.stat()
    return [os.path.realpath(path).removesuffix(split_name(path)[1]), (status.st_dev, status.st_ino)]


def _not_read(path: Path, folder: Path) -> str | None:
    """Why an item of a folder isn't read; None if it is, or is a folder, or hidden and no text."""
    if any(part.startswith(".") for part in path.relative_to(folder).parts):
        return "hidden file" if path.is_file() and is_text(path) else None
    if path.is_dir():
        return "link to a folder" if path.is_symlink() else None
    if not path.is_file():
        return "broken link" if path.is_symlink() else "not a file"
    return None if is_text(path) else "other file"


def _listed(passed_over: Mapping[str, list[Path]]) -> str:
    kinds = [f"{len(p)} × {why} ({few([path.name for path in p])})" for why, p in passed_over.items()]
    return f"ignored: {'; '.join(kinds)}"


def few(names: list[str]) -> str:
    """The first of a list of names."""
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def split_name(path: Path) -> tuple[str, str]:
    """File name without its compression, and the compression. Raises DataError for an unknown format."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS[1:] if name.endswith(ending)), "")
    stem = name.removesuffix(compression)
    if not is_pipe(path) and not stem.endswith(FORMATS):
        raise DataError(
            f"{path}: is not a {known_names()} file; rename it if it is one under another name (plain text to .txt, a "
            f".json with one object per line to .jsonl), or write its rows as JSON Lines{_how_to_convert(stem)}"
        )
    return stem, compression


def _how_to_convert(name: str) -> str:
    """For tables that pandas reads."""
    reader = {".csv": "read_csv", ".tsv": "read_table", ".json": "read_json", ".xlsx": "read_excel"}
    known = reader.get(Path(name).suffix)
    return f" (pandas.{known}(…).to_json(…, orient='records', lines=True))" if known else ""


def is_text(path: Path) -> bool:
    """Whether it is named as a file of documents."""
    return path.name.lower().endswith(tuple(form + packed for form in FORMATS for packed in COMPRESSIONS))


def is_pipe(path: Path) -> bool:
    """Standard input, a named pipe, or a shell's `<(command)`."""
    is_descriptor = path == Path("/dev/stdin") or path.parent in (Path("/dev/fd"), Path("/proc/self/fd"))
    return path == STDIN or path.is_fifo() or path.is_char_device() or (is_descriptor and path.exists())


def known_names() -> str:
    return f"{', '.join(FORMATS)} (plain, {', '.join(COMPRESSIONS[1:])})"

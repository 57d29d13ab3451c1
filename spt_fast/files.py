"""Helpers for files, used everywhere."""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spt_fast.errors import SptError, invalid


def expanded(path: str) -> str:
    """A path with ~, ~user, $NAME and ${NAME} expanded where the environment defines them."""
    return os.path.expanduser(os.path.expandvars(path))


NO_PATH = "the path is empty; name a file or folder, or write . for the working directory"
NO_USER = "this machine has no such user; write ./~… for the name of a file"


def place(given: object, argument: str, error: type[SptError] = SptError) -> Path:
    """The path that a call was given as `argument`, `expanded`. Raises `error` for what is no path."""
    if not isinstance(given, (str, os.PathLike)):
        raise error(invalid(argument, given, "give a path"), argument=True)
    found = expanded(str(os.fspath(given)))
    if not found or found.startswith("~"):
        raise error(invalid(argument, given, NO_USER if found else NO_PATH), argument=True)
    return settled(found)


def settled(expanded: str) -> Path:
    """A path that stays as it is if it is expanded again, as that of ./~x."""
    path = Path(expanded)
    return path.absolute() if str(path).startswith("~") else path


def looked_in(path: Path) -> str:
    """Where a relative path that leads nowhere was looked for, as the end of a message."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def download(folder: Path) -> str | None:
    """How to get a model's or tokenizer's folder, where the path is a name on Hugging Face or a place in its cache."""
    if folder.is_dir():
        inside = sorted(folder.glob("snapshots/*/"))
        with suppress(OSError, UnicodeError):
            newest = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
            inside += [newest] if newest in inside else []
        return f"give the folder {inside[-1]}" if inside else None
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder)) and not folder.parent.exists():
        return (
            f"nothing is downloaded here: run `hf download {folder} --local-dir {folder.name}` where there is a "
            "network, and give that folder"
        )
    return None


def check_regular(path: Path) -> None:
    """OSError for a pipe or device, from which reading might never end; a shell's `<(command)` is accepted."""
    if path.exists() and not (path.is_file() or path.is_dir()) and path.parts[1:2] not in (("dev",), ("proc",)):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, even in a crash."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write, which replaces `path` once it is complete and on the disk.

    Its name is unique to this process. Files that dead processes left are removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            owner = left.name.split(".")[-2]
            if left == temporary or (owner.isdecimal() and not lives(int(owner))):
                left.unlink(missing_ok=True)
        with naming_file(path, temporary):
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
            yield temporary
            sync(temporary)
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def naming_file(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """An OSError names `path` where it names no file, as that of a full disk, or names `temporary`."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)
        raise


def lives(pid: int) -> bool:
    """Whether a process of this host has that id; True where that can't be known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def with_usual_mode(path: Path) -> Iterator[None]:
    """Give the temporary file the umask's mode: safetensors makes it readable by its owner only."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def is_temporary(path: Path) -> bool:
    """Whether this is a temporary file that a crash left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on the disk. Some file systems can't do that for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)

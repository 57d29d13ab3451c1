"""Locks on folders that one process at a time may write to. The error names the process that holds the lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from spt_fast.errors import SptError
from spt_fast.files import lives, naming_file

NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""The errors of a file system without flock."""


class InUse(SptError):
    """Another process holds the lock. The message names it."""


@contextmanager
def locked(file: Path, what: str, *, argument: bool = False, inherited: bool = False) -> Iterator[None]:
    """Hold the lock `file`, which names its owner while it exists, and remove it at the end.

    what       begins the message of InUse, such as "run: runs/a"
    argument   whether that begins with an argument's name
    inherited  whether processes that this one starts hold it too, until the last of them has ended

    The kernel releases the lock of a process that dies, and the next one takes its file over. On a file system without
    locks the recorded owner decides: a dead process of this host owns nothing.
    """
    descriptor = _taken(file)
    if descriptor is None:
        owner = _owner(file)
        who = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
        raise InUse(f"{what}: in use by {who}; wait until it has ended, or stop it", argument=argument)
    try:
        os.set_inheritable(descriptor, inherited)
        with naming_file(file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _taken(file: Path) -> int | None:
    """The lock's open file; None where another process has it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE or _lives_elsewhere(_owner(file)):
                os.close(descriptor)
                return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.lstat()):
                return descriptor
        os.close(descriptor)  # its last owner removed it between our open and our lock


_OWNER = {"host": str, "pid": int, "since": str}


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}


def _owner(file: Path) -> dict[str, Any]:
    """The owner that the lock file names; empty while it names none."""
    try:
        found = json.loads(file.read_bytes())
        return found if {key: type(value) for key, value in found.items()} == _OWNER else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _lives_elsewhere(owner: dict[str, Any]) -> bool:
    """Whether the owner may be running: a live process of this host, or any process of another host."""
    return bool(owner) and (owner["host"] != socket.gethostname() or lives(owner["pid"]))

"""Locks: one owner at a time, named to the next; nothing that a dead process holds; no litter, no link followed."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spt_fast import locks
from spt_fast.locks import InUse, locked

HOLD = """
import sys
from pathlib import Path
from spt_fast.locks import locked
with locked(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_told_who_holds_the_lock_and_a_dead_process_holds_none(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    named = rf"run: runs/a: in use by process {first.pid} on {socket.gethostname()} since 20\d\d-.*; wait until"
    with pytest.raises(InUse, match=named), locked(file, "run: runs/a"):
        pass
    first.kill()
    first.wait()
    assert file.exists()
    with locked(file, "run: runs/a"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
        with pytest.raises(InUse, match=f"process {os.getpid()}"), locked(file, "run"):
            pass
    assert not file.exists()


def test_without_locks_the_owners_name_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    file, ended = tmp_path / ".lock", subprocess.Popen(["true"])
    ended.wait()
    here, anywhere = socket.gethostname(), "an other host"
    for host, pid, is_free in ((here, ended.pid, True), (here, os.getpid(), False), (anywhere, ended.pid, False)):
        file.write_text(json.dumps({"host": host, "pid": pid, "since": "then"}))
        if is_free:
            with locked(file, "x"):
                pass
        else:
            with pytest.raises(InUse, match=f"process {pid} on {host} since then"), locked(file, "x"):
                pass


def test_a_damaged_lock_names_no_owner_and_blocks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    for content in ("", "{", "[1]", '{"host": 1}', json.dumps({"host": socket.gethostname(), "pid": "x", "since": ""})):
        (tmp_path / ".lock").write_text(content)
        with locked(tmp_path / ".lock", "x"):
            pass


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / ".lock", "x"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_full_disk_is_reported_with_the_locks_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as failure, locked(tmp_path / ".lock", "x"):
        pass
    assert failure.value.filename == str(tmp_path / ".lock")
    assert list(tmp_path.iterdir()) == []

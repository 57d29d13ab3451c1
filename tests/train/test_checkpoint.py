"""A checkpoint is complete or absent: every kind of damage is found, named and skipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from spt_fast.errors import CheckpointError
from spt_fast.train import checkpoint
from spt_fast.train.snapshot import Snapshot
from spt_fast.train.world import ALONE

NAMES = [f"step-{i:010d}-p00-a000" for i in (5, 10, 100)]


def write(folder: Path, name: str, value: float, keep: int = 9) -> Path:
    snapshot = Snapshot({"a": torch.full((3, 2), value)}, count=torch.tensor(value))
    writer = checkpoint.Writer(folder, ALONE, checkpoint.Retention(keep))
    writer.save(name, {"value": value}, {"current": snapshot, "best": snapshot})
    writer.finish()
    return folder / name


def test_a_saved_checkpoint_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path, NAMES[0], 1.5)
    state, snapshots = checkpoint.read(path), checkpoint.load(path)
    assert state == {"value": 1.5}
    assert set(snapshots) == {"current", "best"}
    assert torch.equal(snapshots["best"].weights["a"], torch.full((3, 2), 1.5))
    assert [p.name for p in tmp_path.iterdir()] == [NAMES[0]], "no temporaries are left"


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for i, name in enumerate(NAMES):
        write(tmp_path, name, i, keep=2)
    assert [path.name for path in checkpoint.listed(tmp_path)] == NAMES[1:]


def test_files_of_users_beside_checkpoints_are_ignored(tmp_path: Path) -> None:
    run, folder = tmp_path, tmp_path / "checkpoints"
    for i, name in enumerate(NAMES):
        write(folder, name, i)
    foreign = [f"{NAMES[2]}.bak", "step-final", "step-99999999999-p00-a000", f"{NAMES[2]} copy", ".step-mine.tmp"]
    for name in foreign:
        shutil.copytree(folder / NAMES[2], folder / name)
    (folder / "step-8888888888-p00-a000").symlink_to(folder / NAMES[0])
    (folder / "step-7777777777-p00-a000").write_text("a file")
    (folder / f".{NAMES[0]}.tmp").mkdir()
    (folder / ".best.123.tmp").touch()
    assert [path.name for path in checkpoint.listed(folder)] == NAMES
    assert list(checkpoint.verdicts_of(run)) == NAMES
    found = checkpoint.newest(folder)
    assert found is not None
    assert (found.path.name, found.skipped) == (NAMES[2], {})
    last = "step-0000000200-p00-a000"
    write(folder, last, 5, keep=2)
    left = {*foreign, NAMES[2], last, "step-8888888888-p00-a000", "step-7777777777-p00-a000"}
    assert {path.name for path in folder.iterdir()} == left


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_an_unreadable_checkpoint_is_damaged_and_an_unreadable_folder_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    for i, name in enumerate(NAMES[:2]):
        write(tmp_path, name, i)
    real = checkpoint._sha256

    def failing(path: Path) -> str:
        if path.parent.name == NAMES[1]:
            raise error
        return real(path)

    monkeypatch.setattr(checkpoint, "_sha256", failing)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.path.name == NAMES[0]
    assert str(error.strerror) in found.skipped[tmp_path / NAMES[1]]

    def unreadable(path: Path) -> NoReturn:
        raise error

    monkeypatch.setattr(Path, "iterdir", unreadable)
    with pytest.raises(OSError, match=str(error.strerror)):
        checkpoint.newest(tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def change_state(path: Path) -> None:
    (path / "state.json").write_text(json.dumps({"value": 7.0}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (
        lambda p: (p / "current-00000.safetensors").write_bytes((p / "current-00000.safetensors").read_bytes()[:-9]),
        r"has [0-9,]+ instead of [0-9,]+ bytes",
    ),
    "flipped": (lambda p: flip(p / "best-00000.safetensors"), "best-00000.safetensors does not match its hash"),
    "missing": (lambda p: (p / "best-00000.safetensors").unlink(), "best-00000.safetensors is missing"),
    "state": (change_state, "state.json"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "not a whole checkpoint"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "not a whole checkpoint"),
    "manifest is a list": (lambda p: (p / "manifest.json").write_text("[]"), "not a whole checkpoint"),
    "manifest edited": (
        lambda p: replace(p / "manifest.json", '"format": 2', '"format": 3'),
        "does not match its own hash",
    ),
    "its name": (lambda p: replace(p / "manifest.json", NAMES[2], NAMES[1]), "does not match its own hash"),
    "swapped": (
        lambda p: (p / "state.json").write_bytes((p / "manifest.json").read_bytes()),
        "state.json",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_newest_whole_checkpoint_is_used(tmp_path: Path, kind: str) -> None:
    for i, name in enumerate(NAMES):
        write(tmp_path, name, i)
    damage, says = DAMAGE[kind]
    damage(tmp_path / NAMES[2])
    with pytest.raises(CheckpointError, match=says):
        checkpoint.read(tmp_path / NAMES[2])
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.state, found.path.name) == ({"value": 1}, NAMES[1])
    assert list(found.skipped) == [tmp_path / NAMES[2]]
    assert NAMES[2] in found.skipped[tmp_path / NAMES[2]]
    checkpoint.set_aside([tmp_path / NAMES[2]])
    assert [path.name for path in checkpoint.listed(tmp_path)] == NAMES[:2]


@pytest.mark.parametrize("elsewhere", ["../other/state.json", "./state.json", "{absolute}", None])
def test_a_manifest_that_does_not_cover_its_own_folder_is_refused(tmp_path: Path, elsewhere: str | None) -> None:
    """Even if its own hash matches: only hashed files may be read."""
    path, other = write(tmp_path, NAMES[0], 1), write(tmp_path / "step", "other", 1)
    other.rename(tmp_path / "other")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    facts = manifest["files"].pop("state.json")
    if elsewhere is not None:
        manifest["files"] |= {"state.json": facts, elsewhere.format(absolute=path / "state.json"): facts}
    fitting = checkpoint.own_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": fitting}))
    with pytest.raises(CheckpointError, match=r"lists no state\.json|is outside this folder"):
        checkpoint.read(path)


def test_a_checkpoint_of_another_format_is_refused_by_name_and_not_skipped(tmp_path: Path) -> None:
    write(tmp_path, NAMES[0], 0)
    path = write(tmp_path, NAMES[1], 1) / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 3}
    del manifest["sha256"]
    path.write_text(json.dumps(manifest | {"sha256": checkpoint.own_hash(manifest)}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: format: 3 is invalid: .* reads format 2"):
        checkpoint.newest(tmp_path)


def test_no_checkpoint_and_no_whole_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") is None
    flip(write(tmp_path, NAMES[0], 0) / "current-00000.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        checkpoint.newest(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_while_saving_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just before the rename: the temporary folder is no checkpoint, and the next save removes it."""
    write(tmp_path, NAMES[0], 0)

    def killed(self: Path, target: Path) -> None:
        raise SystemExit  # in a thread, which ends at once

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        write(tmp_path, NAMES[2], 1)
    assert [path.name for path in checkpoint.listed(tmp_path)] == NAMES[:1]
    write(tmp_path, NAMES[1], 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES[:2]


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written.*make room"):
        write(tmp_path / "file", NAMES[0], 0)

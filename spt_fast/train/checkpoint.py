"""Checkpoints: whole or not there.

A checkpoint is a folder `step-<total steps>-p<phase>-a<arm>`:

    state.json              where the run stands: plain data
    current.safetensors     fp32 weights, moments and step count
    start|best|kept.safetensors   snapshots that an anchor, early stopping or a grid still need
    manifest.json           bytes and sha256 of every file, and of the manifest itself

Everything is written to a temporary folder and synced, the manifest last, and the folder is renamed into place: a
crash at any moment leaves the older checkpoints and no half of a new one. Reading checks every hash; nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spt_fast.errors import CheckpointError
from spt_fast.files import sync
from spt_fast.train.optim import Snapshot

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, and why newer ones were passed over."""

    path: Path
    state: dict[str, Any]
    snapshots: dict[str, Snapshot]
    skipped: dict[Path, str]


def save(folder: Path, name: str, state: Mapping[str, Any], snapshots: Mapping[str, Snapshot], keep: int) -> Path:
    """Write checkpoint `name` into `folder`, then drop all but the newest `keep`. CheckpointError if it fails."""
    temporary, final = folder / f".{name}.tmp", folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in folder.glob(".step-*.tmp"):
            shutil.rmtree(left_by_a_crash)
        temporary.mkdir()
        for kind, snapshot in snapshots.items():
            save_file(snapshot, temporary / f"{kind}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(temporary.iterdir())
        }
        manifest = {"format": FORMAT, "name": name, "files": files}
        (temporary / "manifest.json").write_text(json.dumps({**manifest, "sha256": _own_hash(manifest)}, indent=1))
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final}: could not be written ({error}); make room or fix the folder, then run again with "
            "--resume: older checkpoints are untouched"
        ) from error
    for old in listed(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def listed(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first (their names sort by steps, phase, arm)."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read(path: Path) -> tuple[dict[str, Any], dict[str, Snapshot]]:
    """State and snapshots of one checkpoint, every hash checked. CheckpointError says what is damaged."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        stated = manifest.pop("sha256", None)
        if stated != _own_hash(manifest):
            raise CheckpointError(f"{path}: manifest.json does not match its own hash")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: has format {manifest['format']}; this version reads {FORMAT}")
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.exists():
                raise CheckpointError(f"{path}: {name} is missing")
            if file.stat().st_size != facts["bytes"]:
                raise CheckpointError(f"{path}: {name} has {file.stat().st_size} bytes instead of {facts['bytes']}")
            if _sha256(file) != facts["sha256"]:
                raise CheckpointError(f"{path}: {name} does not match its hash")
        state = json.loads((path / "state.json").read_text())
        snapshots = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except (
        OSError,
        SafetensorError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise CheckpointError(f"{path}: is no whole checkpoint ({error!r})") from error
    return state, snapshots


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none at all.

    Raises CheckpointError where checkpoints exist and every one is damaged.
    """
    skipped: dict[Path, str] = {}
    for path in reversed(listed(folder)):
        try:
            return Checkpoint(path, *read(path), skipped)
        except CheckpointError as error:
            skipped[path] = str(error)
    if skipped:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole: {'; '.join(skipped.values())}; delete the run folder to start afresh"
        )
    return None


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint to damaged-<name>, so that it is neither read nor counted again."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

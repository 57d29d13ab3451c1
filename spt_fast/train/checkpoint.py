"""Checkpoints: complete or absent, and independent of the engine and number of processes that wrote them.

A checkpoint is a folder `step-<total steps>-p<phase>-a<arm>`; its manifest has the same name. Other folders beside it,
such as a copy that a user made, are left alone:

    state.json                      the state of the run: plain data
    current-<process>.safetensors   fp32 weights, moments and step count: whole tensors, those that this process wrote
    start|best|kept-<process>.safetensors   snapshots that an anchor, an average, early stopping or a grid needs
    manifest.json                   bytes and sha256 of every file, and of the manifest itself

Readers don't depend on which process wrote a tensor, or how many there were: any number of processes, any engine and
any ZeRO stage can resume from the same folder. With several hosts it must be on a shared file system.

Everything is written to a temporary folder and synced, the manifest last, and the folder is renamed into place. A
crash at any moment leaves the older checkpoints and no partial new one. Reading checks every hash; nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spt_fast.errors import CheckpointError, counted, cut, invalid
from spt_fast.files import is_temporary, sync, with_usual_mode, write_text
from spt_fast.model.stored import Stored, contents, fill
from spt_fast.printing import as_json
from spt_fast.train.folder import CHECKPOINT, listed, own_hash
from spt_fast.train.snapshot import Snapshot
from spt_fast.train.world import ALONE, World

FORMAT = 2
WHOLE = "whole"
BEST = "best"
"""A file with the name of the checkpoint that had the best evaluation."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, and why newer ones were skipped."""

    path: Path
    state: dict[str, Any]
    skipped: dict[Path, str]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the `newest`, those at multiples of `every_steps` of the whole run, and the best."""

    newest: int
    every_steps: int | None = None

    def keeps(self, total_steps: int) -> bool:
        """Whether a checkpoint after so many steps stays, however many follow."""
        return self.every_steps is not None and total_steps % self.every_steps == 0

    def drops(self, folder: Path) -> list[Path]:
        name = ""
        with suppress(OSError, ValueError):
            name = (folder / BEST).read_text(encoding="utf-8")
        return [path for path in listed(folder)[: -self.newest] if path.name != name and not self.keeps(_steps(path))]


class OtherFormat(CheckpointError):
    """A checkpoint that another version of spt_fast wrote."""


class Writer:
    """Writes the checkpoints of a run, one at a time, while training continues; each process writes its part.

    `save` and `finish` are collective. The failure of one checkpoint is reported by the next call: `save` then waits
    for its own, and raises CheckpointError if that fails too; `finish` raises.
    """

    def __init__(self, folder: Path, world: World, retention: Retention) -> None:
        self._folder, self._world, self._retention = folder, world, retention
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def save(
        self, name: str, state: Mapping[str, Any], snapshots: Mapping[str, Snapshot], *, best: bool = False
    ) -> str | None:
        """Begin to write checkpoint `name`; the tensors must not change any more. `best`: it becomes the best one.

        Returns the failure of the previous checkpoint, if it failed and this one is whole.
        """
        failed = next(filter(None, self._world.exchange(str(self._outcome() or ""))), None)
        self._world.on_first(lambda: self._make_room(name))
        text = json.dumps(as_json(state), indent=1, allow_nan=False)
        self._thread = threading.Thread(target=self._write, args=(name, text, snapshots, best), daemon=True)
        self._thread.start()
        if failed:
            self.finish()
        return failed

    def is_writing(self) -> bool:
        """Whether this process is still writing its part. Not collective."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Wait until the last checkpoint is whole on the disk."""
        self._world.agree(self._outcome())

    def _outcome(self) -> CheckpointError | None:
        """The failure of this process's part of the last checkpoint, after it has ended."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        return error

    def _make_room(self, name: str) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self._folder)
            self._temporary(name).mkdir()
        except OSError as error:
            raise self._failure(name, str(error)) from error

    def _write(self, name: str, state: str, snapshots: Mapping[str, Snapshot], best: bool) -> None:
        temporary, world = self._temporary(name), self._world
        mine: dict[str, Any] | str
        try:
            if world.is_first:
                (temporary / "state.json").write_text(state, encoding="utf-8")
            written = [temporary / "state.json"] if world.is_first else []
            for kind, snapshot in snapshots.items():
                written.append(temporary / f"{kind}-{world.rank:05d}.safetensors")
                with with_usual_mode(written[-1]):
                    save_file(dict(snapshot.tensors()), written[-1])
            mine = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in written}
            for path in written:
                sync(path)
        except Exception as error:  # any error must reach the other processes
            mine = str(error) or repr(error)
        try:
            files: dict[str, Any] = {}
            for part in world.exchange(mine, aside=True):
                if isinstance(part, str):
                    raise OSError(part)
                files |= part
            if world.is_first:
                self._complete(name, files, best)
        except Exception as error:
            if world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            self._error = self._failure(name, str(error))

    def _complete(self, name: str, files: Mapping[str, Any], best: bool) -> None:
        temporary, final = self._temporary(name), self._folder / name
        manifest = {"format": FORMAT, "name": name, "files": dict(sorted(files.items()))}
        text = json.dumps({**manifest, "sha256": own_hash(manifest)}, indent=1)
        (temporary / "manifest.json").write_text(text, encoding="utf-8")
        sync(temporary / "manifest.json")
        sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(self._folder)
        if best:
            write_text(self._folder / BEST, name)
        for old in self._retention.drops(self._folder):
            shutil.rmtree(old, ignore_errors=True)

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{name}.tmp"

    def _failure(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self._folder / name}: could not be written ({why}); make room or fix the folder, then run "
            "again with `resume=True`: older checkpoints are untouched"
        )


def remove_unfinished(folder: Path) -> None:
    """Remove what a crash left among the checkpoints; no other process may be writing there."""
    for path in folder.iterdir() if folder.exists() else ():
        if is_temporary(path) and CHECKPOINT.fullmatch(path.name[1:-4]):
            shutil.rmtree(path)
        elif is_temporary(path) and path.name.startswith(f".{BEST}."):
            path.unlink()


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; CheckpointError if there are none."""
    found = listed(run / "checkpoints")
    if not found:
        raise CheckpointError(f"{run}: holds no checkpoints; give the folder of a run that has written one")
    return found


def verdicts_of(run: Path) -> dict[str, str]:
    """By checkpoint, `WHOLE` or the damage. CheckpointError if there are none."""
    verdicts = {}
    for path in checkpoints_of(run):
        try:
            read(path)
            verdicts[path.name] = WHOLE
        except CheckpointError as error:
            verdicts[path.name] = str(error)
    return verdicts


def read(path: Path) -> dict[str, Any]:
    """The state of one checkpoint, after a check of every hash. CheckpointError names the damage."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        stated = manifest.pop("sha256", None)
        if stated != own_hash(manifest):
            raise CheckpointError(f"{path}: manifest.json does not match its own hash")
        if manifest["format"] != FORMAT:
            known = f"this version of spt_fast reads format {FORMAT}; use the version that wrote it"
            raise OtherFormat(invalid(f"{path}: manifest.json: format", manifest["format"], known))
        if "state.json" not in manifest["files"]:
            raise CheckpointError(f"{path}: manifest.json lists no state.json")
        for name, facts in manifest["files"].items():
            if damage := _damage(path, name, facts):
                raise CheckpointError(f"{path}: {damage}")
        unlisted = {file.name for file in path.glob("*.safetensors")} - set(manifest["files"])
        if unlisted:
            raise CheckpointError(f"{path}: {min(unlisted)} does not belong to this checkpoint")
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not a whole checkpoint ({cut(repr(error), 200)})") from error


def _damage(folder: Path, name: str, facts: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that the manifest lists."""
    if Path(name).name != name:
        return f"manifest.json lists {name!r}, which is outside this folder"
    file = folder / name
    if not file.exists():
        return f"{name} is missing"
    if (size := file.stat().st_size) != facts["bytes"]:
        return f"{name} has {size:,} instead of {counted(facts['bytes'], 'byte')}"
    return None if _sha256(file) == facts["sha256"] else f"{name} does not match its hash"


def load(path: Path, world: World = ALONE) -> dict[str, Snapshot]:
    """By kind, this process's part of the tensors of a checkpoint that `read` found whole. They are read from its files
    when needed, so the files must stay."""
    places: dict[str, dict[str, tuple[Path, Tensor]]] = {}
    for file in sorted(path.glob("*.safetensors")):
        held = {name: (file, like) for name, like in contents(file).items()}
        places.setdefault(file.stem.rpartition("-")[0], {}).update(held)
    return {kind: Snapshot.of(_stored(world.share(held))) for kind, held in places.items()}


def _stored(places: Mapping[str, tuple[Path, Tensor]]) -> Stored:
    def read(name: str) -> Tensor:
        file, like = places[name]
        whole = torch.empty_like(like, device="cpu")
        fill(whole, file, name)
        return whole

    return Stored({name: like for name, (_, like) in places.items()}, read)


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; None if there is none at all.

    Raises CheckpointError if checkpoints exist and all are damaged, and OtherFormat for one that is intact but of
    another version.
    """
    skipped: dict[Path, str] = {}
    for path in reversed(listed(folder)):
        try:
            return Checkpoint(path, read(path), skipped)
        except OtherFormat:
            raise
        except CheckpointError as error:
            skipped[path] = str(error)
    if skipped:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole: {'; '.join(skipped.values())}; delete the run folder to start again"
        )
    return None


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints to damaged-<name>, so that they are not read or counted again."""
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(FileNotFoundError):
            path.rename(aside)


def _steps(path: Path) -> int:
    return int(path.name.split("-")[1])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

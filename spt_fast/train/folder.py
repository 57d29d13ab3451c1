"""A run's folder: its recipe, its summary, its lock, its checkpoints, and whether work in it may begin."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spt_fast.config import Recipe, recorded_recipe
from spt_fast.errors import CheckpointError, RecipeError, cut
from spt_fast.files import check_regular, is_temporary, write_text
from spt_fast.locks import locked
from spt_fast.outputs import check_folder
from spt_fast.train.recorded import Recorded, damaged, mistyped

LOCK = ".lock"
HEARTBEAT = "heartbeat.json"
CHECKPOINT = re.compile(r"step-[0-9]{10,}(-p[0-9]{2,}-a[0-9]{3,})?")
"""The name of a checkpoint's folder."""
MOST_LISTED = 12
"""Most changes that a message lists."""


def recipe_of(run: Path) -> Recipe:
    """The resolved recipe of a run; CheckpointError if the folder holds none that can be read."""
    path = run / "recipe.yaml"
    if not path.exists():
        raise CheckpointError(f"{run}: holds no recipe.yaml; give the folder of a run")
    try:
        return recorded_recipe(path)
    except RecipeError as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(
            f"{path}: is damaged ({problem}); put back the recipe that the run was started with"
        ) from None


def summary_of(run: Path) -> dict[str, Any] | None:
    """summary.json of a run, None if it has none yet. CheckpointError if it cannot be read, and later when a field is
    read that it lacks."""
    path = run / "summary.json"
    if not path.exists():
        return None
    try:
        check_regular(path)
        found = json.loads(path.read_text(encoding="utf-8"))
        problem = next(mistyped(found), None)
    except (OSError, ValueError, RecursionError) as error:
        problem = cut(repr(error), 200)
    if problem:
        raise damaged(path, problem)
    summary = Recorded.of(found, path)
    for name in ("status", "phases"):
        summary[name]  # every version wrote them
    return summary


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    write_text(run / "summary.json", json.dumps(summary, indent=1, allow_nan=False))


@contextmanager
def owned(folder: Path, field: str, *, inherited: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is created for it and removed again if it stays empty; see `locked`."""
    check_folder(folder, field)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / LOCK, f"{field}: {folder}", argument=True, inherited=inherited):
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def listed(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first (their names sort by steps, phase, arm); OSError if they can't be listed."""
    try:
        return sorted(path for path in folder.iterdir() if _is_checkpoint(path))
    except FileNotFoundError:
        return []


def own_hash(manifest: Mapping[str, Any]) -> str:
    """Of a checkpoint's manifest, without the hash that it states."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint was written here, damaged ones included; a renamed copy doesn't count. A name that only
    damage changed isn't a copy's."""
    if not CHECKPOINT.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
        return False
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        renamed = manifest.get("name", path.name) != path.name
        return not (renamed and manifest.pop("sha256", None) == own_hash(manifest))
    except (OSError, ValueError, AttributeError, RecursionError):
        return True


def is_run(folder: Path) -> bool:
    """Whether a run was started here, by files that only a run writes: any folder may have a recipe.yaml."""
    with suppress(OSError, ValueError):
        beat = json.loads((folder / HEARTBEAT).read_text(encoding="utf-8"))
        if isinstance(beat, dict) and beat.keys() >= {"time", "host", "pid"}:
            return True
    with suppress(CheckpointError):
        if summary_of(folder):
            return True
    return bool(listed(folder / "checkpoints"))


def is_begun(folder: Path, field: str, holds: str, changes: Callable[[], list[str]], *, resume: bool) -> bool:
    """True if work in `folder` continues, False if it begins. RecipeError, naming `field`, rather than overwrite
    files or continue different work.

    holds: a file that exists once the work has begun. changes: the settings that differ from those at the start.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{field}: {folder} is a file; choose another name", argument=True)
    if not (folder / holds).exists():
        own = (LOCK, HEARTBEAT)
        if folder.exists() and not all(is_temporary(path) or path.name in own for path in folder.iterdir()):
            says = f"{field}: folder {folder} holds other files; choose another name or empty it"
            raise RecipeError(says, argument=True)
        return False
    if not resume:
        says = f"{field}: folder {folder} exists; add `resume=True` to continue it, choose another name, or delete it"
        raise RecipeError(says, argument=True)
    if found := changes():
        listed = "\n  ".join([*found[:MOST_LISTED], *(["…"] if found[MOST_LISTED:] else [])])
        says = (
            f"{field}: folder {folder} was started with another recipe; undo this or choose another name:\n  {listed}"
        )
        raise RecipeError(says, argument=True)
    return True

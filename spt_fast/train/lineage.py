"""The runs that a run's starting weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spt_fast.config import Phase, Recipe
from spt_fast.data.formats import sampled_digest
from spt_fast.errors import CheckpointError
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.recorded import Recorded


def weights_digest(folder: Path) -> str:
    """Identifies the weights in a folder by samples of its safetensors."""
    return sampled_digest(*sorted(file for file in folder.glob("*.safetensors") if file.is_file()))


def parent_of(folder: Path, recipe: Recipe) -> tuple[Path, str] | None:
    """The run and the phase whose weights a run started from; None for a start from scratch or from foreign weights.

    The path of `init` is tried from here, from the directory of the training, and, in case the study was moved, beside
    this run. CheckpointError if it is missing or holds other weights.
    """
    weights = Path(recipe.init or "")
    if weights.parent.name != "weights":
        return None
    summary = summary_of(folder) or {}
    named, digest = weights.parent.parent, summary.get("data", {}).get("init")
    places = (named, summary.get("directory", "") / named, folder.resolve().parent / named.name)
    found = [run for run in places if (run / "recipe.yaml").exists()]
    for run in found:
        theirs = run / "weights" / weights.name
        if digest is None or not theirs.exists() or weights_digest(theirs) == digest:
            return run, weights.name
    if not found and weights.exists():
        return None
    what = "holds other weights now" if found else "is missing"
    raise CheckpointError(
        f"{folder}: started from {recipe.init}, but the run {named} {what}; put the original beside {folder}"
    )


@dataclass(frozen=True)
class Trained:
    """A phase of a run."""

    recipe: Recipe
    summary: dict[str, Any]
    phase: Phase

    @property
    def done(self) -> Recorded:
        """The phase's part of summary.json."""
        return self.summary["phases"][self.phase.name]


def trained_before(folder: Path, recipe: Recipe) -> list[Trained]:
    """The phases of other runs that led to a run's starting weights, oldest first. CheckpointError if one of these runs
    is missing or hasn't finished the phase."""
    parent = parent_of(folder, recipe)
    if parent is None:
        return []
    run, last = parent
    summary, theirs = summary_of(run), recipe_of(run)
    if summary is None or last not in summary["phases"]:
        raise CheckpointError(f"{run}: has not finished {last!r}, which {folder} started from; finish it first")
    own = [Trained(theirs, summary, phase) for phase in theirs.up_to(last)]
    return trained_before(run, theirs) + own

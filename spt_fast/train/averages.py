"""Further runs from one training: they differ only in `average`.

metrics.jsonl of the run has the losses of all these averages; each of the other runs gets its own part of it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spt_fast.config import Averaged, Phase
from spt_fast.files import write_text
from spt_fast.model import hf
from spt_fast.train.folder import recipe_of, write_summary
from spt_fast.train.health import failure, standing
from spt_fast.train.recorded import records_of, with_nan
from spt_fast.train.state import ArmResult, Evaluation, PhaseResult
from spt_fast.train.world import World

METRICS = "metrics.jsonl"


def of_average(arm: ArmResult, found: Evaluation) -> ArmResult:
    """The result of an arm, with the losses of another average."""
    losses, diverged = found.losses, not all(map(math.isfinite, arm.training.values()))
    return replace(
        arm,
        heldout=losses["heldout"],
        select=losses["select"],
        training=arm.training if diverged else losses["train"],
        standard_errors=found.errors,
    )


@dataclass(frozen=True, kw_only=True)
class Other(Averaged):
    """A run that shares the training of another, `trained`, which has one `phase`. Its methods are collective."""

    trained: Path
    world: World
    phase: Phase

    @property
    def kept(self) -> str:
        """The name of the snapshot of its best arm."""
        return f"kept-{self.share.numerator}-of-{self.share.denominator}"

    def _arms(self, finished: Sequence[ArmResult]) -> list[ArmResult]:
        """The finished arms with this average; only those whose losses were recorded."""
        found = {
            record["arm"]: Evaluation(
                record["step"],
                {split: with_nan(record[split]) for split in ("heldout", "select", "train")},
                record["standard_errors"],
            )
            for record in records_of(self.trained, "eval")
            if record.get("average") == float(self.share)
        }
        return [of_average(arm, found[index]) for index, arm in enumerate(finished) if index in found]

    def is_best(self, reached: ArmResult, found: Evaluation, before: Sequence[ArmResult]) -> bool:
        """Whether an arm's result with this average, whose losses were found, is better than all arms before it."""
        mine = standing(of_average(reached, found), self.phase)
        theirs = self.world.on_first(lambda: self._arms(before))
        return all(mine < standing(arm, self.phase) for arm in theirs)

    def result(self, own: PhaseResult) -> PhaseResult | None:
        """The phase with this average. None if the other run was started separately, or if its weights are unusable,
        which it then reports itself."""
        if self.world.on_first(lambda: Path(self.run).exists()):
            return None
        arms = self.world.on_first(lambda: self._arms(own.grid))
        best = min(range(len(arms)), key=lambda i: standing(arms[i], self.phase), default=0)
        if len(arms) < len(own.grid) or failure(arms[best]):
            return None
        return replace(own, arm=best, grid=arms)

    @property
    def _unfinished(self) -> Path:
        """The temporary folder in which its folder is written."""
        return Path(f"{self.run}.unfinished")

    def begin(self) -> Path:
        """The folder for its weights."""
        self.world.on_first(lambda: shutil.rmtree(self._unfinished, ignore_errors=True))
        return self._unfinished / "weights" / self.phase.name

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Complete its folder, which already holds its weights."""
        self.world.on_first(lambda: self._finish(facts))

    def _finish(self, facts: Mapping[str, Any]) -> None:
        folder, recipe = self._unfinished, recipe_of(self.trained)
        phase = replace(recipe.phases[0], average=self.share, also_average=())
        share = float(self.share)
        own = [json.dumps(record) for record in records_of(self.trained) if record.get("average", share) == share]
        hf.carry(self.trained, folder)
        if (self.trained / hf.BASE_CONFIG).exists():
            shutil.copyfile(self.trained / hf.BASE_CONFIG, folder / hf.BASE_CONFIG)
        write_text(folder / METRICS, "\n".join(own) + "\n")
        write_summary(folder, {"status": "done", **facts})
        write_text(folder / "recipe.yaml", replace(recipe, run=self.run, phases=(phase,)).as_yaml())
        os.rename(folder, self.run)


def others(trained: Path, world: World, phase: Phase) -> list[Other]:
    """The runs that share the training of this run's phase."""
    return [Other(**vars(other), trained=trained, world=world, phase=phase) for other in phase.also_average]

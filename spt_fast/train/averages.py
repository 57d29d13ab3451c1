"""Further runs from one training: they differ only in `average`.

metrics.jsonl of the run has the losses of all these averages; each of the other runs gets its own part of it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
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


def arms_of(run: Path, arms: Sequence[ArmResult], other: Averaged) -> list[ArmResult]:
    """The finished arms of a run, with the losses of another average; only those whose losses were recorded."""
    found = {
        record["arm"]: Evaluation(
            record["step"],
            {split: with_nan(record[split]) for split in ("heldout", "select", "train")},
            record["standard_errors"],
        )
        for record in records_of(run, "eval")
        if record.get("average") == float(other.share)
    }
    return [of_average(arm, found[index]) for index, arm in enumerate(arms) if index in found]


def kept(other: Averaged) -> str:
    """The name of the snapshot of its best arm."""
    return f"kept-{other.share.numerator}-of-{other.share.denominator}"


def is_best(
    run: Path,
    world: World,
    other: Averaged,
    phase: Phase,
    reached: ArmResult,
    found: Evaluation,
    arms: Sequence[ArmResult],
) -> bool:
    """Whether an arm's result with another average, whose losses were found, is better than all arms before it."""
    mine = standing(of_average(reached, found), phase)
    before = world.on_first(lambda: arms_of(run, arms, other))
    return all(mine < standing(theirs, phase) for theirs in before)


def result(run: Path, world: World, other: Averaged, own: PhaseResult, phase: Phase) -> PhaseResult | None:
    """The phase with another average. None if that run was started separately, or if its weights are unusable, which
    it then reports itself."""
    if world.on_first(lambda: Path(other.run).exists()):
        return None
    arms = world.on_first(lambda: arms_of(run, own.grid, other))
    best = min(range(len(arms)), key=lambda i: standing(arms[i], phase), default=0)
    if len(arms) < len(own.grid) or failure(arms[best]):
        return None
    return replace(own, arm=best, grid=arms)


def begin(other: Averaged, phase: Phase, world: World) -> Path:
    """The weights folder of the other run."""
    world.on_first(lambda: shutil.rmtree(_unfinished(other), ignore_errors=True))
    return _unfinished(other) / "weights" / phase.name


def _unfinished(other: Averaged) -> Path:
    """The temporary folder in which its folder is written."""
    return Path(f"{other.run}.unfinished")


def finish(run: Path, world: World, other: Averaged, facts: Mapping[str, Any]) -> None:
    """Complete the folder of the other run, which already holds its weights."""
    world.on_first(lambda: _finish(run, other, facts))


def _finish(run: Path, other: Averaged, facts: Mapping[str, Any]) -> None:
    folder, recipe = _unfinished(other), recipe_of(run)
    phase = replace(recipe.phases[0], average=other.share, also_average=())
    share = float(other.share)
    own = [json.dumps(record) for record in records_of(run) if record.get("average", share) == share]
    hf.carry(run, folder)
    if (run / hf.BASE_CONFIG).exists():
        shutil.copyfile(run / hf.BASE_CONFIG, folder / hf.BASE_CONFIG)
    write_text(folder / METRICS, "\n".join(own) + "\n")
    write_summary(folder, {"status": "done", **facts})
    write_text(folder / "recipe.yaml", replace(recipe, run=other.run, phases=(phase,)).as_yaml())
    os.rename(folder, other.run)

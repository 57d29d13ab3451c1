"""Checks whether a training gave usable weights: skipped steps, and losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

from spt_fast.config import Phase
from spt_fast.errors import counted
from spt_fast.train.state import ArmResult, TrainState

MAX_SKIPPED_IN_A_ROW = 20
"""This many steps in a row with a loss or gradient that is not finite end the run."""

MAX_SKIPPED_SHARE = 0.05
"""A phase with a larger share of skipped steps has failed."""


REMEDY = "lower optimizer.lr or lengthen schedule.warmup, in a run of another name"


class Diverged(RuntimeError):
    """The weights of a phase are unusable. The message names the phase, the reason and the remedy."""


def too_many_skipped(skipped: int, steps: int) -> bool:
    """Whether this many of these steps are more than the occasional skip."""
    return skipped > max(1, MAX_SKIPPED_SHARE * steps) or 2 * skipped > steps


def failure(arm: ArmResult) -> str | None:
    """Why a finished arm's weights are unusable; None if they are not."""
    if too_many_skipped(arm.skipped, arm.steps):
        skipped = f"{arm.skipped} of {counted(arm.steps, 'step', 'were')} skipped"
        return f"{skipped}, because the loss or its gradient was not finite"
    for split, losses in (("held-out", arm.heldout), ("select", arm.select), ("training", arm.training)):
        for source, loss in losses.items():
            if not math.isfinite(loss):
                return f"the {split} loss of {source} is not finite at the end"
    return None


def check_start(init: str | None, state: TrainState) -> None:
    """Raises Diverged if the newest loss, of weights that `init` names and no step has changed, is not finite."""
    if init is None or state.total_steps or state.newest is None:
        return
    for source, loss in state.newest.losses["train"].items():
        if not math.isfinite(loss):
            raise Diverged(
                f"init: the weights at {init} give a loss that is not finite on {source}, before any step; copy them "
                "again, or start from others"
            )


def check(arm: ArmResult, phase: Phase) -> None:
    """Raises Diverged if the weights of the kept arm of a phase are unusable."""
    if reason := failure(arm):
        raise Diverged(f"phases[{phase.name}]: {reason}; {REMEDY}")


def never_better(select: Mapping[str, float], phase: Phase) -> str:
    return (
        f"warning: phases[{phase.name}]: no evaluation was better than the first; the deciding loss, of "
        f"{phase.chosen_by}, is {deciding(select, phase):.3f}: lower optimizer.lr, or train on other text"
    )


def deciding(select: Mapping[str, float], phase: Phase) -> float:
    """The `select` loss that decides early stopping and the grid; infinite if it is NaN or not measured."""
    loss = select.get(phase.chosen_by, math.inf)
    return math.inf if math.isnan(loss) else loss


def standing(arm: ArmResult, phase: Phase) -> float:
    """The criterion among the arms of a grid, lower is better: one that failed loses to any other."""
    return math.inf if failure(arm) else deciding(arm.select, phase)

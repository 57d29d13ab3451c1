"""Which changes to the recipe of a resumed run are allowed, and why others are not.

Allowed are the run's folder, logging, checkpoints, the engine except fp8, micro-batches, how often losses are measured
unless an early stop counts on it, and other paths to the same content. A run may also be made longer, with more tokens
in its last phase or with more phases: it reaches what the longer recipe would have reached from the first step.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from spt_fast.config import Phase, Recipe
from spt_fast.errors import CheckpointError
from spt_fast.model.config import GPTConfig
from spt_fast.train.folder import recipe_of
from spt_fast.train.weights import read_config

REASONS = {
    r"phases\.\d+\.name": "its weights and figures are stored under the name",
    r"phases\.\d+\.tokens": "only the last phase can be made longer, and none shorter",
    r"phases\.\d+\.eval\.every": "early stopping counts evaluations",
    r"phases\.\d+\.eval\.tokens": "losses before and after it would be on different text",
    r"phases\..*": "the run has trained with it so far",
    r"model\..*|init|init_only": "the weights depend on it",
    r"sources\..*|tokenizer": "the run has trained on it so far",
    r".*": "it is fixed at the start of a run",
}


def changes(folder: Path, now: Recipe) -> list[str]:
    """`Recipe.changes` since the run in `folder` was started."""
    before = recipe_of(folder)
    return before.changes(now) and before.changes(now, shape_of(now))


def shape_of(recipe: Recipe) -> GPTConfig | None:
    """The shape of a run's model, from its base or from its trained weights; None if neither exists."""
    for place in (recipe.init, recipe.run) if recipe.init else (recipe.run,):
        with suppress(CheckpointError):
            return read_config(Path(place))
    return None


def refused(before: Recipe, now: Recipe, shape: GPTConfig | None = None) -> list[str]:
    """The changes that prevent a run started with `before` from continuing with `now`, each with its reason."""
    last, added = before.phases[-1], now.phases[len(before.phases) :]
    phases, obstacle = list(now.phases[: len(before.phases)]), ""
    if len(phases) == len(before.phases) and phases[-1].tokens > last.tokens:
        obstacle = _obstacle(last)
        phases[-1] = phases[-1] if obstacle else replace(phases[-1], tokens=last.tokens)
    read = {source for phase in phases for source in (*phase.mixture, *([phase.stop.on] if phase.stop else []))}
    sources = {name: source for name, source in now.sources.items() if name in before.sources or name in read}
    problems = []
    for change in before.changes(replace(now, phases=tuple(phases), sources=sources), shape):
        key = change.split(":")[0]
        reason = next(reason for pattern, reason in REASONS.items() if re.fullmatch(pattern, key, re.DOTALL))
        longer = key == f"phases.{len(before.phases) - 1}.tokens" and obstacle
        problems.append(f"{change} ({longer or reason})")
    if added and added[0].optimizer_state == "keep" and (last.stop or last.grid):
        problems.append(
            f"phases.{len(before.phases)}.optimizer_state: keep (the weights of {last.name} were stored "
            "without the optimizer's state; write reset)"
        )
    return problems


def _obstacle(phase: Phase) -> str:
    """Why a phase can't be made longer: its finished steps would have been different."""
    schedule = phase.schedule
    if phase.grid or phase.stop:
        chose = "its grid" if phase.grid else "early stopping"
        return f"{chose} has chosen its weights, which need not be the last ones; add a phase instead"
    if not schedule.carry_on and schedule.name != "constant" and not schedule.horizon:
        return f"its {schedule.name} schedule decays to the phase's end; add a phase instead"
    if schedule.warmup.unit == "share" and schedule.warmup.amount:
        return "its warm-up is a share of the phase; add a phase instead"
    return ""


def rounding(before: Recipe, now: Recipe) -> list[str]:
    """Warnings: allowed changes that change the rounding of a step."""
    return [
        f"phases[{old.name}].batch.micro: {old.batch.micro} → {new.batch.micro}, so not bit-identical from here"
        for old, new in zip(before.phases, now.phases, strict=False)
        if old.batch.micro != new.batch.micro
    ]

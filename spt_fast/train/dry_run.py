"""One real step of every phase, in memory only: what would go wrong in the first minute goes wrong now."""

from __future__ import annotations

import time
from typing import Any

from spt_fast.config import Recipe
from spt_fast.train.engine import LocalEngine, pick_device, pick_dtype, weights_of
from spt_fast.train.plan import make_plan


def dry_run(recipe: Recipe) -> list[dict[str, Any]]:
    """Per phase: name, loss and seconds of one step of the starting weights on its first batch. Writes nothing.

    Raises what `run` would raise before its first step, an out-of-memory error of the step itself included.
    """
    plan = make_plan(recipe)
    device = pick_device()
    engine = LocalEngine(plan.starting_model(), device=device, dtype=pick_dtype(recipe.precision, device))
    results = []
    for phase in plan.phases:
        if phase.phase.untie:
            engine.model.untie()
        engine.begin(phase.phase.optimizer, phase.phase.anchor, weights_of(engine.model))
        with plan.loader(phase.index, dict.fromkeys(plan.recipe.sources, 0), device=device, last_step=1) as loader:
            for _, micro_batches in loader:
                began = time.monotonic()
                result = engine.step(micro_batches, phase.phase.optimizer.lr, lambda: False)
                assert result is not None
                loss, _, _ = result.read()
                results.append({"phase": phase.phase.name, "loss": loss, "seconds": time.monotonic() - began})
    return results

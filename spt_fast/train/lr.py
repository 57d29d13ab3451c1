"""The learning rate at a step: a pure function of the schedule and the step."""

from __future__ import annotations

import math

from spt_fast.config import Schedule

PLATEAU = 0.9
"""The share of the peak rate below which a checkpoint is not comparable with a run that ends there."""


def learning_rate(schedule: Schedule, peak: float, step: int, phase_steps: int, tokens_per_step: int) -> float:
    """The rate for the step after `step` finished ones.

    Linear warm-up reaches `peak` at its last step; then the shape runs until the horizon (in steps; by default the
    phase's own length), where it is at `final` · peak and stays. A phase that ends before the horizon cuts the shape
    off, as in SPT (arXiv 2603.16177).
    """
    warmup = schedule.warmup.steps(tokens_per_step, phase_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    horizon = round(schedule.horizon / tokens_per_step) if schedule.horizon else phase_steps
    final = float(schedule.final)
    done = min(1.0, (step - warmup) / max(1, horizon - warmup))
    if schedule.name == "constant":
        return peak
    if schedule.name == "cosine":
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
    if schedule.name == "linear":
        return peak * (final + (1 - final) * (1 - done))
    fall = max(1, schedule.decay.steps(tokens_per_step, horizon))
    return peak * (final + (1 - final) * min(1.0, max(0, horizon - step) / fall))

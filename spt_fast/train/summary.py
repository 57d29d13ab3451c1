"""The content of summary.json, except for how the run ended; and the result that the library makes of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spt_fast.model.flops import parameters
from spt_fast.printing import as_json
from spt_fast.train.engine import EngineInterface
from spt_fast.train.plan import Plan
from spt_fast.train.state import PhaseResult, TrainState
from spt_fast.train.tuning import Choices
from spt_fast.train.world import dtype_name


def facts(
    plan: Plan,
    engine: EngineInterface,
    choices: Choices,
    state: TrainState,
    finished: Mapping[str, PhaseResult],
    seconds: float,
) -> dict[str, Any]:
    return {
        "parameters": parameters(plan.model),
        "flops_per_token": plan.flops_per_token(0),
        "tokenizer": plan.tokenizer_digest,
        "context": plan.model.context,
        "train_tokens": {source: data.num_tokens for source, data in plan.train.items()},
        "precision": dtype_name(engine.dtype),
        "precision_reason": choices.precision.reason,
        "device": str(engine.device),
        "seed": plan.recipe.seed,
        "seconds": round(seconds, 2),
        "skipped_steps": state.skipped,
        "heldout_halves": "windows" if state.windows and plan.has_long_heldout else "documents",
        "data": plan.digests(),
        "directory": os.getcwd(),
        "phases": as_json(plan.figures(finished)),
    }


@dataclass(frozen=True)
class TrainedPhase:
    """A finished phase. Losses are nats per token of the weights at its end, by source."""

    steps: int
    tokens: int
    epochs: Mapping[str, float]
    """Epochs of each source, in this phase."""
    heldout: Mapping[str, float | None]
    best_heldout: Mapping[str, float | None]
    tokens_per_s: float
    weights: Path
    """The folder of the weights."""


@dataclass(frozen=True)
class TrainedRun:
    """How a run ended, and its finished phases."""

    run: Path
    status: str
    """"done", "stopped" or "failed"."""
    reason: str | None
    """Why it was stopped or failed."""
    parameters: int
    """At the start; `untie` adds as many as the embedding has."""
    seconds: float
    skipped_steps: int
    """Steps whose loss or gradient was not finite."""
    phases: Mapping[str, TrainedPhase]
    summary: Mapping[str, Any]
    """All of summary.json."""

    @classmethod
    def of(cls, run: Path, summary: Mapping[str, Any]) -> TrainedRun:
        named = ("steps", "tokens", "epochs", "heldout", "best_heldout", "tokens_per_s")
        phases = {
            name: TrainedPhase(**{key: done[key] for key in named}, weights=run / "weights" / name)
            for name, done in summary["phases"].items()
        }
        return cls(
            run=run,
            status=summary["status"],
            reason=summary.get("reason"),
            parameters=summary["parameters"],
            seconds=summary["seconds"],
            skipped_steps=summary["skipped_steps"],
            phases=phases,
            summary=summary,
        )

    def as_json(self) -> Mapping[str, Any]:
        return self.summary

"""What summary.json says of a run besides how it ended."""

from __future__ import annotations

import os
from collections.abc import Mapping
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

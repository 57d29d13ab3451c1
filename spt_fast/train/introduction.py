"""The lines that a run prints before its first step: what runs where, and what the user should know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spt_fast.model.flops import parameters
from spt_fast.model.gpt import GPT
from spt_fast.quantities import count
from spt_fast.train.checkpoint import Checkpoint
from spt_fast.train.doubts import doubts
from spt_fast.train.engine import EngineInterface
from spt_fast.train.plan import Plan
from spt_fast.train.state import Compute, SavedState
from spt_fast.train.tuning import Choices


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run resumes from, and its content."""

    checkpoint: Checkpoint
    state: SavedState
    warnings: Sequence[str] = ()
    """Warnings about what it does not record."""


def introduction(
    folder: Path,
    engine: EngineInterface,
    model: GPT,
    plan: Plan,
    choices: Choices,
    backends: Mapping[str, str],
    resumed: Resumed | None,
) -> Iterator[str]:
    """Lines of text. backends: the current ones, by op."""
    kind = "bf16, fp32 masters" if engine.dtype == torch.bfloat16 else "fp32"
    if model.fp8:
        how = "in fp8" if engine.device.type == "cuda" else "with emulated fp8, which is slower on a CPU"
        kind += f" ({model.fp8_share:.0%} of the blocks' matmuls {how})"
    yield f"{folder}: {count(parameters(plan.model))} parameters in {kind} on {engine.describe()}"
    if plan.recipe.precision == "auto":
        yield f"precision: {choices.precision}"
    by_backend = {
        name: [op for op, backend in backends.items() if backend == name] for name in sorted(set(backends.values()))
    }
    yield "kernels: " + "; ".join(f"{name} for {', '.join(ops)}" for name, ops in by_backend.items())
    yield from choices.lines()
    if plan.heldout:
        yield "evaluations: the held-out loss of each source ± its standard error, in nats per token"
    if resumed is None:
        yield from (f"warning: {warning}" for warning in doubts(plan))
        return
    yield from (f"skipped a damaged checkpoint: {reason}" for reason in resumed.checkpoint.skipped.values())
    yield f"resuming from {resumed.checkpoint.path.name}"
    yield from (f"warning: {warning}" for warning in resumed.warnings)
    if changed := _changes(resumed.state.compute, engine, backends):
        yield f"warning: other kernels or processes than before, so not bit-identical: {', '.join(changed)}"


def _changes(before: Compute, engine: EngineInterface, backends: Mapping[str, str]) -> list[str]:
    changed = [
        f"{op} {before.backends.get(op)} → {backend}"
        for op, backend in backends.items()
        if before.backends.get(op) != backend
    ]
    return changed + ([] if before.engine == engine.describe() else [f"{before.engine} → {engine.describe()}"])

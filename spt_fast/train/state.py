"""Where a run stands: everything besides tensors that a later process needs to go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from spt_fast.errors import CheckpointError

Losses = dict[str, dict[str, float]]
"""By "heldout", "select" and "train", then by source; nats per token."""


@dataclass
class ScheduleOrigin:
    """Whose learning-rate schedule is running, and how far it had got when this phase began."""

    phase: int
    arm: int = 0
    """The arm of its grid that was kept."""
    tokens: int = 0


@dataclass
class TrainState:
    """One position in the run. `phase`, `arm` and `step` say where; the rest is what was carried there."""

    phase: int = 0
    arm: int = 0
    step: int = 0
    """Steps of this arm that are done."""
    evaluated: bool = False
    """The evaluation due at this step has been made."""
    total_steps: int = 0
    """Steps of the whole run, every grid arm counted."""
    counts: dict[str, int] = field(default_factory=dict)
    """Windows of each source read before this phase."""
    origin: ScheduleOrigin = field(default_factory=lambda: ScheduleOrigin(0))
    best: dict[str, Any] | None = None
    """The arm's best evaluation so far: {"step", "losses"}."""
    stale: int = 0
    """Evaluations since the best one."""
    arms: list[dict[str, Any]] = field(default_factory=list)
    """The finished arms of this phase."""
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Summaries of the finished phases."""
    skipped: int = 0
    """Steps left out because the loss or the gradient was not finite."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Wall time of the run so far, over all its processes."""
    train_seconds: float = 0.0
    """Wall time of this arm's training steps."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this point; after a crash it is cut back to this."""

    def next_arm(self) -> None:
        """Back to the phase's start, for the next arm of its grid."""
        self.arm, self.step, self.evaluated = self.arm + 1, 0, False
        self.best, self.stale, self.train_seconds = None, 0, 0.0

    def next_phase(self) -> None:
        self.phase, self.arm, self.arms = self.phase + 1, 0, []

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any]) -> TrainState:
        if set(raw) != {item.name for item in fields(cls)}:
            raise CheckpointError(
                "state.json does not hold the fields of a training state; was it written by another version?"
            )
        return cls(**{**raw, "origin": ScheduleOrigin(**raw["origin"])})

    @property
    def name(self) -> str:
        """Of the checkpoint at this position; names sort in the order of training."""
        return f"step-{self.total_steps:010d}-p{self.phase:02d}-a{self.arm:03d}"

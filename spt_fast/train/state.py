"""The state of a run: everything besides tensors that a later process needs to continue it.

`SavedState` is state.json of a checkpoint. Adding, renaming or removing a field needs a new VERSION and an entry in
MIGRATIONS, so that checkpoints of all earlier versions can be read. (A new field of GPTConfig needs only its default.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from spt_fast.errors import CheckpointError, invalid
from spt_fast.fields import optional
from spt_fast.model.config import GPTConfig
from spt_fast.printing import plain
from spt_fast.train.recorded import with_nan

VERSION = 6

Errors = dict[str, dict[str, float | None]]
"""Standard errors of losses; None if there is one document."""
Losses = dict[str, dict[str, float]]
"""By "heldout", "select" and "train", then by source; nats per token. One that is not finite is null in JSON."""


@dataclass(frozen=True)
class Evaluation:
    """The losses after `step` steps of an arm, and their standard errors."""

    step: int
    losses: Losses
    errors: Errors = field(default_factory=dict)


@dataclass
class ScheduleOrigin:
    """The phase whose learning-rate schedule is running, and its step when this phase began."""

    phase: int = 0
    arm: int = 0
    """The kept arm of its grid."""
    tokens: int = 0


@dataclass(frozen=True)
class ArmResult:
    """A finished arm. Losses are by source, for the weights at its end, those after step `handed_on`."""

    values: dict[str, Any]
    """The arm's values by axis of the grid; in JSON these are beside the other fields."""
    steps: int
    tokens: int
    tokens_per_s: float
    skipped: int
    """Steps skipped because the loss or the gradient was not finite."""
    handed_on: int
    select: dict[str, float]
    heldout: dict[str, float]
    training: dict[str, float]
    best_heldout: dict[str, float]
    """Losses at the best evaluation by the `select` loss."""
    standard_errors: Errors
    """Standard errors of `heldout`, `select` and training losses, over documents; empty before version 5, as the
    next."""
    scored: dict[str, dict[str, dict[str, int | None]]]
    """The `documents` (None if they aren't recorded) and `tokens` of these losses."""

    def reached(self) -> dict[str, Any]:
        return {name: item for name, item in vars(self).items() if name != "values"}

    def as_json(self) -> dict[str, Any]:
        return {**self.values, **self.reached()}


@dataclass(frozen=True)
class PhaseResult:
    """A finished phase; in JSON the kept arm's results are beside these fields."""

    epochs: dict[str, float]
    windows: dict[str, list[int]]
    """By source, the first window that the phase read and the first one after it."""
    arm: int
    """The kept arm's place in `grid`."""
    grid: list[ArmResult]

    def as_json(self) -> dict[str, Any]:
        return {**self.grid[self.arm].reached(), **vars(self)}


@dataclass
class TrainState:
    """One position in the run: `phase`, `arm` and `step`, and the state there."""

    counts: dict[str, int]
    """Windows of each source, of this phase's length, read before this phase."""
    phase: int = 0
    arm: int = 0
    step: int = 0
    """Finished steps of this arm."""
    total_steps: int = 0
    """Steps of the whole run, all grid arms counted."""
    origin: ScheduleOrigin = field(default_factory=ScheduleOrigin)
    newest: Evaluation | None = None
    """The arm's newest evaluation."""
    best: Evaluation | None = None
    """The arm's best evaluation."""
    stale: int = 0
    """Evaluations since the best one."""
    arms: list[ArmResult] = field(default_factory=list)
    """The finished arms of this phase."""
    finished: dict[str, PhaseResult] = field(default_factory=dict)
    skipped: int = 0
    """Steps skipped because the loss or the gradient was not finite."""
    skipped_in_arm: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Wall time of the run so far, over all its processes."""
    train_seconds: float = 0.0
    """Wall time of this arm's training steps."""
    windows: bool = True
    """Whether held-out halves consist of windows of documents; runs started before version 5 keep whole documents."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this point; after a crash it is cut back to this."""

    @property
    def evaluated(self) -> bool:
        """Whether the evaluation due at this step has been made."""
        return self.newest is not None and self.newest.step == self.step

    @property
    def at_best(self) -> bool:
        """Whether the weights are those of the arm's best evaluation."""
        return self.best is not None and self.best.step == self.step

    def next_arm(self) -> None:
        """Reset to the phase's start, for the next arm of its grid."""
        self.arm, self.step = self.arm + 1, 0
        self.newest, self.best, self.stale, self.train_seconds = None, None, 0, 0.0
        self.skipped_in_arm = self.skipped_in_a_row = 0

    def next_phase(self) -> None:
        self.phase, self.arm, self.arms = self.phase + 1, 0, []

    @property
    def name(self) -> str:
        """The name of the checkpoint at this position; names sort in the order of training."""
        return f"step-{self.total_steps:010d}-p{self.phase:02d}-a{self.arm:03d}"


@dataclass(frozen=True)
class Compute:
    """How steps are computed: a resumed run keeps it, or reports the change."""

    dtype: str
    backends: dict[str, str]
    """By op."""
    engine: str
    measured: dict[str, Any]
    """The reasons: for "precision" in words, for "kernels" the tuner's results by op; empty before version 6."""


@dataclass(frozen=True)
class KnownText:
    """A dataset as a run reads it."""

    tokens: int
    """After `limit_tokens`."""
    modified_ns: int
    """When its files were last written, in nanoseconds since 1970."""


@dataclass(frozen=True)
class SavedState:
    """The content of a run's checkpoint besides its tensors."""

    model: GPTConfig
    train: TrainState
    data: dict[str, str]
    """By recipe field the digest of every dataset; from version 3 also of the tokenizer and of `init`."""
    compute: Compute
    texts: dict[str, KnownText]
    """Every dataset, by recipe field; none before version 3."""
    directory: str
    """The directory of the recipe's relative paths; empty before version 3."""

    def plain(self) -> dict[str, Any]:
        return {"version": VERSION, **plain(vars(self))}

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: Path) -> SavedState:
        """From state.json of the checkpoint at `where`, of any version so far.

        CheckpointError for a newer version, and for a field that is unknown or missing, which it names.
        """
        version = raw.get("version", 1)
        if version not in range(1, VERSION + 1):
            known = f"this version of spt_fast reads 1 to {VERSION}; update it"
            raise CheckpointError(invalid(f"{where}: state.json: version", version, known))
        current = {key: value for key, value in raw.items() if key != "version"}
        for migrate in (MIGRATIONS[older] for older in range(version, VERSION)):
            current = migrate(current)
        return _read(cls, current, f"{where}: state.json: ")


def _read(cls: type[Any], raw: Mapping[str, Any], where: str) -> Any:
    """A dataclass from all its fields; only fields of GPTConfig with defaults may be missing."""
    known = {item.name: item for item in fields(cls)}
    for name in raw:
        if name not in known:
            raise CheckpointError(f"{where}{name}: is not known to this version of spt_fast; update it")
    for name, item in known.items():
        if name not in raw and (cls is not GPTConfig or item.default is MISSING):
            raise CheckpointError(f"{where}{name}: is missing; continue with the version of spt_fast that wrote this")
    return cls(**{name: PARTS[name](item, f"{where}{name}.") if name in PARTS else item for name, item in raw.items()})


def _losses(raw: Mapping[str, float | None], where: str) -> dict[str, float]:
    return with_nan({**raw})


def _arm(raw: Mapping[str, Any], where: str) -> ArmResult:
    own = {item.name for item in fields(ArmResult)} - {"values"}
    values = {key: value for key, value in raw.items() if key not in own}
    return _read(ArmResult, {"values": values, **{key: raw[key] for key in own & raw.keys()}}, where)


def _phase(raw: Mapping[str, Any], where: str) -> PhaseResult:
    own = {item.name for item in fields(PhaseResult)}
    return _read(PhaseResult, {key: raw[key] for key in own & raw.keys()}, where)


PARTS: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("heldout", "select", "training", "best_heldout"), _losses),
    "losses": lambda raws, where: {split: _losses(raw, where) for split, raw in raws.items()},
    "model": partial(_read, GPTConfig),
    "train": partial(_read, TrainState),
    "compute": partial(_read, Compute),
    "texts": lambda raws, where: {field: _read(KnownText, raw, where) for field, raw in raws.items()},
    "origin": partial(_read, ScheduleOrigin),
    "newest": optional(partial(_read, Evaluation)),
    "best": optional(partial(_read, Evaluation)),
    "arms": lambda raws, where: [_arm(raw, where) for raw in raws],
    "grid": lambda raws, where: [_arm(raw, where) for raw in raws],
    "finished": lambda raws, where: {name: _phase(raw, where) for name, raw in raws.items()},
}
"""Readers of the fields that hold dataclasses, by field name."""


def _keep_the_newest_evaluation(state: dict[str, Any]) -> dict[str, Any]:
    """Version 1 has `evaluated`, not the losses. They are needed only at an arm's last step, and there version 1 wrote
    a checkpoint only if they were the best."""
    train = dict(state["train"])
    here, best = {"step": train["step"], "losses": {}}, train["best"]
    at_best = best is not None and best["step"] == train["step"]
    train["newest"] = (best if at_best else here) if train.pop("evaluated") else None
    return {**state, "train": train}


def _know_no_texts(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "texts": {}, "directory": ""}


def _with_in_every_arm(train: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """The state with these fields added to every finished arm."""

    def arms(before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**arm, **added} for arm in before]

    finished = {name: {**phase, "grid": arms(phase["grid"])} for name, phase in train["finished"].items()}
    return {**train, "arms": arms(train["arms"]), "finished": finished}


def _count_skipped_steps_by_arm(state: dict[str, Any]) -> dict[str, Any]:
    """Version 3 counts only those of the whole run, and doesn't keep the arms' losses on training text."""
    train = _with_in_every_arm(state["train"], {"skipped": 0, "training": {}})
    return {**state, "train": {**train, "skipped_in_arm": 0}}


def _know_no_standard_errors(state: dict[str, Any]) -> dict[str, Any]:
    """Version 4 has none, and puts whole documents in the held-out halves."""
    train = _with_in_every_arm(state["train"], {"standard_errors": {}, "scored": {}})
    seen = {name: train[name] and {**train[name], "errors": {}} for name in ("newest", "best")}
    return {**state, "train": {**train, **seen, "windows": False}}


def _know_no_measurements(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "compute": {**state["compute"], "measured": {}}}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _keep_the_newest_evaluation,
    2: _know_no_texts,
    3: _count_skipped_steps_by_arm,
    4: _know_no_standard_errors,
    5: _know_no_measurements,
}
"""By version, the function from its state.json (as plain data) to the next version's."""

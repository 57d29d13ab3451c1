"""What is known of weights besides their tensors, so that they are used in the way they were trained.

A run writes it to the metadata of its weights' safetensors, and an export keeps it. For a checkpoint it comes from its
state.json and the run's recipe, for weights of an earlier version from the run's summary and recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from spt_fast.config import Recipe
from spt_fast.data.hf_tokenizer import HF_FILE
from spt_fast.data.shards import TokenDataset
from spt_fast.data.tokenizer import FILE, Tokenizer
from spt_fast.errors import CheckpointError, DataError, shown
from spt_fast.model import hf
from spt_fast.train import checkpoint
from spt_fast.train.folder import is_run, recipe_of, summary_of
from spt_fast.train.state import SavedState
from spt_fast.train.weights import is_checkpoint, locate

_KEY = "spt_fast"
"""Of the metadata."""
_KINDS = {"tokenizer": str, "documents": bool, "dtype": str, "context": int, "eos_id": int, "bos_id": int}
"""Types of an Origin's fields that a file may state."""


@dataclass(frozen=True)
class Part:
    """One of the models of an average."""

    path: str
    digest: str
    share: str
    """Exact, such as 9/10."""
    history: History | None = None
    merged: Sequence[Part] = ()
    """The models of this one, if it is an average too."""

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Part:
        merged = [cls.read(part) for part in raw.get("merged", ())]
        return cls(**raw | {"history": History.read(raw.get("history")), "merged": merged})


@dataclass(frozen=True)
class PhaseFacts:
    """A phase in the history of weights."""

    name: str
    tokens: int
    """Read by the weights at its end, so without the steps after the best one."""
    mixture: dict[str, str]
    lr: float
    optimizer: str
    anchor: float
    average: str
    heldout: dict[str, float | None]
    """Losses of the weights at its end, by source; nats per token."""
    standard_errors: dict[str, float | None]


@dataclass(frozen=True)
class History:
    """What a run trained weights on; only the last part of each path is kept."""

    base: str | None
    digests: dict[str, str]
    """Digests of the base (`init`), the tokenizer and every dataset, by recipe field."""
    names: dict[str, str]
    """Names of every dataset, by recipe field."""
    phases: list[PhaseFacts]

    @classmethod
    def of(cls, run: Path, last: str) -> History | None:
        """The history up to phase `last`; None if the run has not finished it."""
        recipe, summary = recipe_of(run), summary_of(run) or {"phases": {}}
        if last not in summary["phases"]:
            return None
        digests = summary.get("data", {})
        return cls(
            base=recipe.init and named(Path(recipe.init)),
            digests=digests,
            names={
                f"sources.{source}.{kind}": ", ".join(Path(part).name for part in prefixes)
                for source, of in recipe.sources.items()
                for kind, given in (("train", of.train), ("heldout", of.heldout))
                if (prefixes := (given,) if isinstance(given, str) else given)
            },
            phases=[
                PhaseFacts(
                    name=phase.name,
                    tokens=done["tokens"] * done["handed_on"] // done["steps"],
                    mixture={source: str(share) for source, share in phase.mixture.items()},
                    lr=phase.with_overrides(phase.arms()[done.arm_of(phase)]).optimizer.lr,
                    optimizer=phase.optimizer.name,
                    anchor=phase.anchor,
                    average=str(phase.average),
                    heldout=done["heldout"],
                    standard_errors=done.get("standard_errors", {}).get("heldout", {}),
                )
                for phase in recipe.up_to(last)
                if (done := summary["phases"].get(phase.name))
            ],
        )

    @classmethod
    def read(cls, raw: dict[str, Any] | None) -> History | None:
        return cls(**raw | {"phases": [PhaseFacts(**phase) for phase in raw["phases"]]}) if raw else None


def named(weights: Path) -> str:
    """runs/npt/weights/pretrain is npt/pretrain."""
    in_run = weights.parent.name == "weights"
    return f"{weights.parents[1].name}/{weights.name}" if in_run else weights.name


@dataclass(frozen=True)
class Origin:
    """How weights were trained; None means unknown."""

    tokenizer: str | None = None
    """The digest of the tokenizer of their ids."""
    documents: bool | None = None
    """Whether attention and positions stayed inside a document."""
    dtype: str | None = None
    """The compute dtype, such as bfloat16."""
    merged: Sequence[Part] = ()
    """The models of an average."""
    context: int | None = None
    """Tokens of a window."""
    eos_id: int | None = None
    """The token that ended each document."""
    bos_id: int | None = None
    """The token that began each document."""
    history: History | None = None
    """Exports only; for a run's weights it is beside them."""

    def as_metadata(self) -> dict[str, str]:
        return {_KEY: json.dumps(asdict(self))}


def run_of(path: Path) -> Path | None:
    """The run that weights or a checkpoint belong to; None if they are in no run."""
    inside = path.resolve().parent
    folders = [path, *([inside.parent] if inside.name in ("weights", "checkpoints") else [])]
    return next((folder for folder in folders if (folder / "recipe.yaml").exists() and is_run(folder)), None)


def tokenizer_file(weights: Path) -> Path | None:
    """The tokenizer beside weights or in their run: a file of ranks, else a tokenizer.json."""
    run = run_of(weights)
    files = [folder / FILE for folder in (weights, run) if folder] + [(run or weights) / HF_FILE]
    return next((file for file in files if file.exists()), None)


def tokenizer_digest(weights: Path) -> str | None:
    """The digest of the tokenizer that weights were trained with: the recorded one, else that of the tokenizer beside a
    base; None if there is neither, or if it cannot be read."""
    if (digest := origin_of(weights).tokenizer) is None and (place := tokenizer_file(weights)):
        with suppress(DataError):
            return Tokenizer.load(place).digest
    return digest


def carrier_of(weights: Path) -> Path | None:
    """The folder with the files that belong to weights: their own; for a checkpoint of a run that began with a base,
    the run's."""
    folders = {weights: hf.CONFIG, run_of(weights): hf.BASE_CONFIG}
    return next((folder for folder, file in folders.items() if folder and (folder / file).exists()), None)


def _with_ends(origin: Origin, recipe: Recipe) -> Origin:
    """With the tokens that begin and end documents, if a dataset made by the weights' tokenizer is still at its
    path."""
    for source in recipe.sources.values():
        with suppress(DataError):
            data = TokenDataset.open(source.train, source.dtype)
            if data.eos_id is not None and data.tokenizer_digest == origin.tokenizer:
                return replace(origin, eos_id=data.eos_id, bos_id=data.bos_id)
    return origin


def origin_of(path: Path) -> Origin:
    """The origin of the weights at `path`: a run, its weights/<phase>, a checkpoint or a Hugging Face folder."""
    path = locate(path)
    if is_checkpoint(path):
        return _of_checkpoint(path)
    if (stated := hf.read_metadata(path).get(_KEY)) is not None:
        return _read(stated, path)
    run = run_of(path)
    summary = summary_of(run) if run else None
    if run is None or summary is None:
        return Origin()
    documents = next((phase.documents for phase in recipe_of(run).phases if phase.name == path.name), None)
    return Origin(summary.get("tokenizer"), documents, summary.get("precision"))


def _of_checkpoint(path: Path) -> Origin:
    state = SavedState.read(checkpoint.read(path), path)
    known = Origin(state.data.get("tokenizer"), dtype=state.compute.dtype)
    if (run := run_of(path)) is None:
        return known
    recipe = recipe_of(run)
    phase = recipe.phases[state.train.phase]
    return _with_ends(replace(known, documents=phase.documents, context=phase.window(state.model.context)), recipe)


def _read(stated: str, path: Path) -> Origin:
    """From the metadata of the weights at `path`. CheckpointError if it is damaged."""
    try:
        known = json.loads(stated)
        for name, kind in _KINDS.items():
            value = known.get(name)
            if value is not None and (type(value) is not kind or (isinstance(value, int) and value < 0)):
                raise ValueError(f"{name} is {shown(value)}")
        known["merged"] = [Part.read(part) for part in known.get("merged", ())]
        known["history"] = History.read(known.get("history"))
        return Origin(**{field.name: known.get(field.name) for field in fields(Origin)})
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error}); copy it again") from None


def with_history(path: Path) -> Origin:
    """`origin_of`; for a run's weights/<phase> with the files beside them, as far as they can be read."""
    origin, run = origin_of(path), run_of(path)
    with suppress(CheckpointError):
        return replace(origin, history=History.of(run, path.name)) if run else origin
    return origin

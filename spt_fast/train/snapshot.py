"""Weights and optimizer state at one moment, fp32 on the CPU or still in files; and the names of their tensors on
disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from spt_fast.model.stored import Stored, picked, unread
from spt_fast.train.world import ALONE, World

WEIGHTS, COUNT = "weights", "count"


def tensor_name(kind: str, name: str) -> str:
    """The checkpoint's name of a parameter's tensor of `kind` (WEIGHTS, or one of the optimizer's)."""
    return f"{kind}/{name}"


def kind_and_name(given: str) -> tuple[str, str]:
    """The parts of a `tensor_name`; (COUNT, "") for the number of updates."""
    kind, _, name = given.partition("/")
    return kind, name


@dataclass(frozen=True)
class Snapshot:
    """One process's part of a snapshot: all of it if there is one process."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights by parameter."""
    state: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """The optimizer's state, by kind and parameter; empty if only weights were saved."""
    count: Tensor | None = None
    """Updates by the optimizer, a 0-d tensor."""

    def tensors(self) -> Stored:
        """All tensors by their checkpoint names: "weights/NAME", "KIND/NAME" and "count"."""
        kinds = {WEIGHTS: self.weights, **self.state, COUNT: {} if self.count is None else {"": self.count}}
        places = {
            COUNT if kind == COUNT else tensor_name(kind, name): (kind, name)
            for kind, tensors in kinds.items()
            for name in tensors
        }

        def read(given: str) -> Tensor:
            kind, name = places[given]
            return kinds[kind][name]

        return Stored({given: unread(kinds[kind])[name] for given, (kind, name) in places.items()}, read)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Snapshot:
        """The inverse of `tensors()`."""
        kinds: dict[str, dict[str, str]] = {WEIGHTS: {}}
        for given in tensors:
            kind, name = kind_and_name(given)
            if kind != COUNT:
                kinds.setdefault(kind, {})[name] = given
        parts = {kind: picked(tensors, names) for kind, names in kinds.items()}
        return cls(parts.pop(WEIGHTS), parts, tensors.get(COUNT))

    def in_memory(self) -> Snapshot:
        """With everything read from its files."""
        return Snapshot(dict(self.weights), {kind: dict(held) for kind, held in self.state.items()}, self.count)

    def without_state(self) -> Snapshot:
        return Snapshot(self.weights)

    def only(self, names: Collection[str]) -> Snapshot:
        """The part for these parameters."""
        return Snapshot(
            {name: self.weights[name] for name in names if name in self.weights},
            {kind: {name: held[name] for name in names if name in held} for kind, held in self.state.items()},
        )

    def untied(self) -> Snapshot:
        """The snapshot of a tied model with the head's own copy of the embedding (and of its state) added."""

        def added(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            if "embedding" not in tensors:
                return tensors
            if isinstance(tensors, Stored):
                return picked(tensors, {**dict(zip(tensors, tensors, strict=True)), "head": "embedding"})
            return {**tensors, "head": tensors["embedding"].clone()}

        state = {kind: added(tensors) for kind, tensors in self.state.items()}
        return replace(self, weights=added(self.weights), state=state)

    def averaged(self, start: Snapshot, share: float, world: World) -> Snapshot:
        """With (1 − share) of these weights and `share` of those of `start`, which may be distributed differently over
        the processes."""
        weights = dict(self.weights)
        for name, tensor in world.spread(start.weights):
            if name in weights:
                weights[name] = weights[name].lerp(tensor.to(weights[name]), share)
        return replace(self, weights=weights)

    def __or__(self, other: Snapshot) -> Snapshot:
        """The union of both, with this one's count."""
        kinds = self.state.keys() | other.state.keys()
        state = {kind: {**self.state.get(kind, {}), **other.state.get(kind, {})} for kind in kinds}
        return replace(self, weights={**self.weights, **other.weights}, state=state)


def weights_of(model: nn.Module, world: World = ALONE) -> Snapshot:
    """A model's weights: this process's part of them."""
    mine = world.share({name: param.detach() for name, param in model.named_parameters()})
    return Snapshot({name: param.float().cpu().clone() for name, param in mine.items()})

"""The interface of an optimizer: settings from a recipe, kinds of state for every parameter, and an update of tensors.

Settings are read without torch, whose import takes longer than reading and fitting the runs in `spt-fast fit`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from spt_fast.fields import number, optional, setting, text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Parameters that are updated together; the other lists hold a tensor for each, of its shape.

    Parameters are whole, or under ZeRO the flat fp32 partitions of them in this process.
    """

    params: Sequence[Tensor]
    state: dict[str, list[Tensor]]
    """By kind, fp32."""
    decayed: Sequence[int]
    """For each parameter, how many of its first numbers get weight decay."""
    masters: Sequence[Tensor] | None = None
    """fp32; they are updated and rounded into the parameters. None if these are fp32 themselves."""
    anchors: Sequence[Tensor] | None = None
    """fp32, the target of the anchor's decay."""
    matrices: Sequence[tuple[int, ...]] | None = None
    """If the parameters are matrices of blocks and the optimizer needs them whole: for each the rows of its matrices,
    one below the other."""

    @property
    def grads(self) -> list[Tensor]:
        """fp32, one for every parameter."""
        grads = [param.grad for param in self.params if param.grad is not None]
        assert len(grads) == len(self.params), "a parameter has no gradient"
        return grads


@dataclass(frozen=True)
class Update:
    """The numbers of one update. Tensors are 0-d and on the group's device: nothing waits for them."""

    count: Tensor
    """The number of the update, from 1."""
    lr: float | Tensor
    anchor_decay: float
    """Decoupled decay toward the anchors."""
    scale: float | Tensor = 1.0
    """Factor of the gradients."""
    skip: Tensor | None = None
    """If true, nothing changes."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Settings that all optimizers have. A subclass gives `name` its default, adds its own and is registered."""

    name: str = setting(text)
    """The optimizer; it decides which other keys there are."""
    lr: float = setting(number(0.0, open_low=True))
    """Peak learning rate."""
    weight_decay: float = setting(number(0.0), 0.1)
    """Decoupled weight decay. It applies to matrices, not to norms and biases."""
    clip: float | None = setting(optional(number(0.0, open_low=True)), 1.0)
    """Largest global gradient norm; null turns clipping off."""

    kinds: ClassVar[tuple[str, ...]] = ()
    """The names of its state, as checkpoints have them: fp32, of a parameter's shape, zero at the start."""
    whole_matrices: ClassVar[bool] = False
    """Whether it updates a block's matrix as a whole. ZeRO's stages 2 and 3 split matrices, so it cannot run there."""

    def kinds_of(self, hidden: bool) -> tuple[str, ...]:
        """The kinds of state of a parameter; hidden: a matrix of a block."""
        return self.kinds

    def update_bytes(self, matrices: Mapping[tuple[int, int], int], itemsize: int) -> int:
        """Temporary memory of an update of so many matrices of blocks, by shape, in numbers of `itemsize` bytes."""
        return 0

    def update_flops(self, matrices: Mapping[tuple[int, int], int]) -> int:
        """FLOPs of an update's products of matrices."""
        return 0

    def update(self, group: Group, by: Update) -> None:
        """Update a group's parameters (through their masters) and state in place."""
        raise NotImplementedError


OPTIMIZERS: dict[str, type[Optimizer]] = {}
"""Optimizers by name."""

Kind = TypeVar("Kind", bound=type[Optimizer])


def register(kind: Kind) -> Kind:
    """A decorator that registers an optimizer for recipes."""
    OPTIMIZERS[kind.name] = kind
    return kind

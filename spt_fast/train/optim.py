"""An optimizer over a model's parameters: the layout of their fp32 masters and state, and their groups.

Parameters in bf16 have an fp32 master copy that is updated and rounded back into them; parameters in fp32 are
their own master. Gradients arrive in fp32 (`p.grad_dtype`), summed over micro-batches. The host never waits for a
device tensor here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spt_fast.kernels import accumulate_in_place
from spt_fast.kernels.gradients import sum_parts_at_last
from spt_fast.kernels.total_norm import total_norm
from spt_fast.model.gpt import GPT
from spt_fast.model.parameters import Parameter, table
from spt_fast.optimizers import Group, Optimizer, Update
from spt_fast.train.snapshot import Snapshot

FROZEN = {"none": (), "embeddings": ("embedding",)}
"""The parameters that `freeze` names."""

ALIGNMENT = 64
"""Every parameter begins at a multiple of this many numbers of its flat tensor; the padding stays 0."""


class Line:
    """Tensors of these shapes, consecutive in a flat tensor."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], whole: Tensor) -> None:
        self.whole = whole
        lengths = [self.length({name: shape}) for name, shape in shapes.items()]
        parts = zip(shapes.items(), whole.split(lengths), strict=True)
        self.views = {name: part[: math.prod(shape)].view(*shape) for (name, shape), part in parts}

    @staticmethod
    def length(shapes: Mapping[str, Sequence[int]]) -> int:
        return sum(-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for shape in shapes.values())


class ModelOptimizer:
    """The parameters that require a gradient: frozen ones have no state here and don't count in the norm.

    Parameters that are updated alike are in flat tensors, one for parameters, for masters, for each kind of state, for
    the anchor, so that one kernel updates them: first those with weight decay, then the others. All gradients are in
    one flat tensor, and one kernel computes their norm. Gradients stay there from step to step and are never set to 0,
    since the ops overwrite them (`accumulate_in_place`).
    """

    def __init__(
        self,
        model: GPT,
        settings: Optimizer,
        anchor_decay: float = 0.0,
        own: Callable[[str], bool] = lambda name: True,
        *,
        flat: bool = True,
    ) -> None:
        """own: the parameters whose state it holds and which it updates. flat: whether parameters and gradients are
        moved to flat tensors; DeepSpeed has its own."""
        self.settings = settings
        self.anchor_decay = anchor_decay
        self.params: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.count = torch.zeros((), device=next(iter(self.params.values())).device)
        self.masters: dict[str, Tensor] = {}
        self.state: dict[str, dict[str, Tensor]] = {kind: {} for kind in settings.kinds}
        self.anchor: dict[str, Tensor] = {}
        known = table(model.config)
        alike: dict[bool, dict[str, Parameter]] = {}
        for name in sorted(filter(own, self.params), key=lambda name: not known[name].kind.decayed):
            alike.setdefault(known[name].kind.hidden and settings.whole_matrices, {})[name] = known[name]
        lengths = [Line.length({name: row.shape for name, row in rows.items()}) for rows in alike.values()]
        for param in self.params.values():
            param.grad_dtype = torch.float32
        if flat:
            accumulate_in_place(self.params.values())  # frees the gradients of the previous optimizer
        self._all_gradients = self.count.new_zeros(sum(lengths)) if flat else None
        self._gradients: dict[str, Tensor] = {}
        parts = [None] * len(lengths) if self._all_gradients is None else self._all_gradients.split(lengths)
        self._groups = [
            self._group(rows, whole, part) for (whole, rows), part in zip(alike.items(), parts, strict=True)
        ]
        if flat:
            accumulate_in_place(self.params.values(), (self._gradients[name] for name in self.params))
        vectors = [param for param in self.params.values() if param.ndim == 1] if flat else []
        self._parts = sum_parts_at_last(vectors)

    def _group(self, rows: dict[str, Parameter], whole: bool, gradients: Tensor | None) -> Group:
        """gradients: their destination; None to use those of the parameters as they are."""
        shapes = {name: row.shape for name, row in rows.items()}
        params: dict[str, Tensor] = {name: self.params[name].detach() for name in rows}
        dtype, hidden = next(iter(params.values())).dtype, next(iter(rows.values())).kind.hidden
        together = gradients is not None and not whole

        def line(values: Mapping[str, Tensor] = {}, dtype: torch.dtype = torch.float32) -> Line:
            made = Line(shapes, self.count.new_zeros(Line.length(shapes), dtype=dtype))
            for name, value in values.items():
                made.views[name].copy_(value)
            return made

        def tensors(line: Line) -> list[Tensor]:
            return [line.whole] if together else list(line.views.values())

        updated: list[Tensor] = [self.params[name] for name in rows]
        if gradients is not None:
            moved, at = line(params, dtype), Line(shapes, gradients)
            for name, view in moved.views.items():
                self.params[name].data = params[name] = view
            self._gradients |= at.views
            updated = [tensor.detach() for tensor in tensors(moved)]
            for tensor, gradient in zip(updated, tensors(at), strict=True):
                tensor.grad_dtype, tensor.grad = torch.float32, gradient
        masters = None if dtype == torch.float32 else line(params)
        self.masters |= params if masters is None else masters.views
        decaying = {name: row for name, row in rows.items() if row.kind.decayed}
        decayed = [row.size if name in decaying else 0 for name, row in rows.items()]
        if together:
            decayed = [Line.length({name: row.shape for name, row in decaying.items()})]
        state = {kind: line() for kind in self.settings.kinds_of(hidden)}
        for kind, made in state.items():
            self.state[kind] |= made.views
        anchors = line({name: self.masters[name] for name in rows}) if self.anchor_decay else None
        if anchors is not None:
            self.anchor |= anchors.views
        return Group(
            updated,
            {kind: tensors(made) for kind, made in state.items()},
            decayed,
            masters=None if masters is None else tensors(masters),
            anchors=None if anchors is None else tensors(anchors),
            matrices=[row.stacked for row in rows.values()] if whole else None,
        )

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients, a 0-d fp32 tensor on the device."""
        self._gather()
        if self._all_gradients is not None:
            return total_norm([self._all_gradients])
        return total_norm([p.grad for p in self.params.values() if p.grad is not None])

    def _gather(self) -> None:
        """Move gradients that autograd or others have allocated elsewhere to the flat tensor: those of norms, in one
        kernel."""
        for parts in self._parts:
            parts.add_up()
        moved = [(place, self.params[name]) for name, place in self._gradients.items()]
        moved = [(place, param) for place, param in moved if param.grad is not place]
        if moved:
            grads = [param.grad for _, param in moved if param.grad is not None]
            assert len(grads) == len(moved), "a parameter has no gradient"
            torch._foreach_copy_([place for place, _ in moved], grads)
        for place, param in moved:
            param.grad = place

    @torch.no_grad()
    def step(self, lr: float | Tensor, norm: Tensor, skip: Tensor) -> None:
        """One update of every parameter, clipped to `settings.clip` by the given norm; no update if `skip` is true.

        lr, like norm and skip, may be a 0-d tensor on the device.
        """
        self._gather()
        clip, count = self.settings.clip, self.count + 1
        lr = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=count.dtype, device=count.device)
        scale = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip else torch.ones_like(norm)
        for group in self._groups:
            self.settings.update(group, Update(count, lr, self.anchor_decay, scale, skip))
        torch.autograd.graph.increment_version(self.params.values())  # they share memory with what was updated
        self.count.copy_(torch.where(skip, self.count, count))

    def zero_grad(self) -> None:
        for parts in self._parts:
            parts.forget()
        for param in self.params.values():
            param.grad = None

    def snapshot(self, *, state: bool) -> Snapshot:
        """Copies of the fp32 weights and, if `state` is true, of the state and the number of updates."""
        kinds = {kind: _on_cpu(tensors) for kind, tensors in self.state.items()} if state else {}
        return Snapshot(_on_cpu(self.masters), kinds, self.count.to("cpu", copy=True) if state else None)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot, *, anchor: Snapshot | None = None) -> None:
        """Load a snapshot: the weights, and its state if it has any. `anchor`: the snapshot to decay toward."""
        for name, param in self.params.items():
            self.masters[name].copy_(snapshot.weights[name])
            param.copy_(self.masters[name])
            if self.anchor_decay:
                self.anchor[name].copy_((anchor or snapshot).weights[name])
        for kind, tensors in self.state.items():
            held = snapshot.state.get(kind, {})
            for name in tensors.keys() & held.keys():
                tensors[name].copy_(held[name])
        if snapshot.count is not None:
            self.count.copy_(snapshot.count)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

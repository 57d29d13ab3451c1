"""An optimizer over a model's parameters: where their fp32 masters and their state live, and what goes together.

Parameters in bf16 have an fp32 master copy that takes the update and is rounded back into them; parameters in fp32 are
their own master. Gradients arrive in fp32 (`p.grad_dtype`), summed over micro-batches. Nothing here reads a device
tensor from the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spt_fast.model.gpt import GPT
from spt_fast.model.parameters import Parameter, table
from spt_fast.optimizers import Group, Optimizer, Update
from spt_fast.train.snapshot import Snapshot

FROZEN = {"none": (), "embeddings": ("embedding",)}
"""The parameters that a phase's `freeze` means."""

NORM_PIECE = 1 << 16
"""Values whose norm a CPU takes at a time."""


class ModelOptimizer:
    """The parameters that require a gradient: frozen ones have no state here and no part in the norm."""

    def __init__(
        self, model: GPT, settings: Optimizer, anchor_decay: float = 0.0, own: Callable[[str], bool] = lambda name: True
    ) -> None:
        """own: which parameters it has the state of, and updates."""
        self.settings = settings
        self.anchor_decay = anchor_decay
        self.params: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, param in self.params.items():
            param.grad_dtype = torch.float32
            if own(name):
                self.masters[name] = param.detach() if param.dtype == torch.float32 else param.detach().float()
        known = table(model.config)
        self.state: dict[str, dict[str, Tensor]] = {kind: {} for kind in settings.kinds}
        for name, master in self.masters.items():
            for kind in settings.kinds_of(known[name].kind.hidden):
                self.state[kind][name] = torch.zeros_like(master)
        self.anchor = {name: master.clone() for name, master in self.masters.items()} if anchor_decay else {}
        self.count = torch.zeros((), device=next(iter(self.params.values())).device)
        alike: dict[tuple[bool, bool], dict[str, Parameter]] = {}
        for name in self.masters:
            what = known[name].kind
            alike.setdefault((what.decayed, what.hidden and settings.whole_matrices), {})[name] = known[name]
        self._groups = [self._group(rows, decayed, whole) for (decayed, whole), rows in alike.items()]

    def _group(self, rows: dict[str, Parameter], decayed: bool, whole: bool) -> Group:
        names = list(rows)
        params = [self.params[name] for name in names]
        in_place = all(param.dtype == torch.float32 for param in params)
        return Group(
            params,
            {kind: [tensors[name] for name in names] for kind, tensors in self.state.items() if names[0] in tensors},
            decayed,
            masters=None if in_place else [self.masters[name] for name in names],
            anchors=[self.anchor[name] for name in names] if self.anchor else None,
            matrices=[row.stacked for row in rows.values()] if whole else None,
        )

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients, a 0-d fp32 tensor on the device."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        if self.count.is_cuda:
            return torch.nn.utils.get_total_norm(grads)
        # A CPU adds up in order: in fp32 the norm of three million values is off by up to 6e-5. In pieces, since
        # each is copied to float64.
        pieces = [piece for grad in grads for piece in grad.flatten().split(NORM_PIECE)]
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
        return torch.linalg.vector_norm(torch.stack(norms)).float()

    @torch.no_grad()
    def step(self, lr: float | Tensor, norm: Tensor, skip: Tensor) -> None:
        """One update of every parameter, clipped to `settings.clip` by the given norm; none where `skip` is true.

        lr, like norm and skip, may be a 0-d tensor on the device.
        """
        clip, count = self.settings.clip, self.count + 1
        lr = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=count.dtype, device=count.device)
        scale = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip else torch.ones_like(norm)
        for group in self._groups:
            self.settings.update(group, Update(count, lr, self.anchor_decay, scale, skip))
        self.count.copy_(torch.where(skip, self.count, count))

    def zero_grad(self) -> None:
        for param in self.params.values():
            param.grad = None

    def snapshot(self, *, state: bool) -> Snapshot:
        """Copies of the fp32 weights and, where `state` is true, of the state and the number of updates."""
        kinds = {kind: _on_cpu(tensors) for kind, tensors in self.state.items()} if state else {}
        return Snapshot(_on_cpu(self.masters), kinds, self.count.to("cpu", copy=True) if state else None)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot, *, anchor: Snapshot | None = None) -> None:
        """Take over a snapshot: weights always, state where it has some. `anchor`: the snapshot to decay toward."""
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

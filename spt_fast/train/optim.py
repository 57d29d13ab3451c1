"""AdamW over a model's parameters: which are decayed, where the fp32 master weights live, one fused update for all.

Parameters in bf16 have an fp32 master copy that takes the update and is rounded back into them; parameters in fp32 are
their own master. Gradients arrive in fp32 (`p.grad_dtype`), summed over micro-batches. Nothing here reads a device
tensor from the host.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spt_fast.config import Optimizer
from spt_fast.kernels import adamw_step_all

Snapshot = dict[str, Tensor]
"""CPU copies by "weights/NAME" (fp32), and with the optimizer's state "exp_avg/NAME", "exp_avg_sq/NAME" and "count"."""

FROZEN = {"none": (), "embeddings": ("embedding",)}
"""The parameters that a phase's `freeze` means."""


def weights_in(snapshot: Mapping[str, Tensor]) -> Snapshot:
    """A snapshot without the optimizer's state."""
    return {name: tensor for name, tensor in snapshot.items() if name.startswith("weights/")}


def frozen_in(snapshot: Mapping[str, Tensor], freeze: str) -> Snapshot:
    """What a snapshot says of the parameters that `freeze` means; no step changes any of it."""
    return {name: tensor for name, tensor in snapshot.items() if name.partition("/")[2] in FROZEN[freeze]}


class AdamW:
    """Decoupled weight decay on matrices, none on vectors; optional decay of every parameter toward an anchor.

    Of the parameters that require a gradient: frozen ones have no state here and no part in the norm.
    """

    def __init__(self, model: nn.Module, settings: Optimizer, anchor_decay: float = 0.0) -> None:
        self.settings = settings
        self.anchor_decay = anchor_decay
        self.params: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        self.exp_avg: dict[str, Tensor] = {}
        self.exp_avg_sq: dict[str, Tensor] = {}
        for name, param in self.params.items():
            param.grad_dtype = torch.float32
            self.masters[name] = param.detach() if param.dtype == torch.float32 else param.detach().float()
            self.exp_avg[name] = torch.zeros_like(self.masters[name])
            self.exp_avg_sq[name] = torch.zeros_like(self.masters[name])
        self.anchor = {name: master.clone() for name, master in self.masters.items()} if anchor_decay else {}
        self.count = torch.zeros((), device=next(iter(self.params.values())).device)

    def grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients, a 0-d fp32 tensor on the device."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])

    @torch.no_grad()
    def step(self, lr: float | Tensor, norm: Tensor, skip: Tensor) -> None:
        """One update of every parameter, clipped to `settings.clip` by the given norm; none where `skip` is true.

        lr, like norm and skip, may be a 0-d tensor on the device.
        """
        s = self.settings
        count = self.count + 1
        lr = lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=count.dtype, device=count.device)
        scale = torch.clamp(s.clip / (norm + 1e-6), max=1.0) if s.clip else torch.ones_like(norm)
        missing = [name for name, param in self.params.items() if param.grad is None]
        assert not missing, missing
        matrices = [name for name, param in self.params.items() if param.ndim >= 2]
        vectors = [name for name, param in self.params.items() if param.ndim < 2]
        for names, weight_decay in ((matrices, s.weight_decay), (vectors, 0.0)):
            params = [self.params[name] for name in names]
            in_place = all(param.dtype == torch.float32 for param in params)
            adamw_step_all(
                params,
                [param.grad for param in params if param.grad is not None],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                step=count,
                lr=lr,
                betas=s.betas,
                eps=s.eps,
                weight_decay=weight_decay,
                anchors=[self.anchor[name] for name in names] if self.anchor else None,
                anchor_decay=self.anchor_decay,
                grad_scale=scale,
                skip=skip,
                masters=None if in_place else [self.masters[name] for name in names],
            )
        self.count.copy_(torch.where(skip, self.count, count))

    def zero_grad(self) -> None:
        for param in self.params.values():
            param.grad = None

    def snapshot(self, *, state: bool) -> Snapshot:
        """CPU copies of the fp32 weights and, where `state` is true, of the moments and the step count."""
        tensors = {f"weights/{name}": master.detach().to("cpu", copy=True) for name, master in self.masters.items()}
        if state:
            for kind, moments in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
                tensors |= {f"{kind}/{name}": moment.to("cpu", copy=True) for name, moment in moments.items()}
            tensors["count"] = self.count.to("cpu", copy=True)
        return tensors

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor], *, anchor: Mapping[str, Tensor] | None = None) -> None:
        """Take over a snapshot: weights always, moments where it has them. `anchor`: the snapshot to decay toward."""
        for name, param in self.params.items():
            self.masters[name].copy_(snapshot[f"weights/{name}"])
            param.copy_(self.masters[name])
            if f"exp_avg/{name}" in snapshot:
                self.exp_avg[name].copy_(snapshot[f"exp_avg/{name}"])
                self.exp_avg_sq[name].copy_(snapshot[f"exp_avg_sq/{name}"])
            if self.anchor_decay:
                self.anchor[name].copy_((anchor or snapshot)[f"weights/{name}"])
        if "count" in snapshot:
            self.count.copy_(snapshot["count"])

"""An optimizer that spt_fast does not have, as another file of spt_fast/optimizers would define it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spt_fast.fields import number, setting, text
from spt_fast.optimizers.base import Group, Optimizer, Update, register


@register
@dataclass(frozen=True, kw_only=True)
class Momentum(Optimizer):
    """Gradient descent with momentum: v <- momentum v + scale g; w <- w - lr v."""

    name: str = setting(text, "momentum")
    momentum: float = setting(number(0.0, 1.0), 0.9)

    kinds = ("velocity",)

    def update(self, group: Group, by: Update) -> None:
        masters = group.masters or group.params
        left_out = torch.tensor(False) if by.skip is None else by.skip
        for param, master, grad, velocity in zip(
            group.params, masters, group.grads, group.state["velocity"], strict=True
        ):
            moved = self.momentum * velocity + by.scale * grad
            velocity.copy_(torch.where(left_out, velocity, moved))
            master.copy_(torch.where(left_out, master, master - by.lr * moved))
            param.copy_(master)

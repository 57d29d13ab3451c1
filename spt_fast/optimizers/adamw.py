"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), with an optional decay toward an anchor (arXiv 2502.06042)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spt_fast.errors import RecipeError, invalid
from spt_fast.fields import number, setting, text
from spt_fast.optimizers.base import Group, Optimizer, Update, register


def _betas(value: object, where: str) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise RecipeError(invalid(where, value, "write two numbers, such as [0.9, 0.95]"))
    first, second = (number(0.0, 1.0)(v, f"{where}[{i}]") for i, v in enumerate(value))
    if 1.0 in (first, second):
        raise RecipeError(invalid(where, value, "both must be below 1"))
    return first, second


@register
@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Its moments are `exp_avg` and `exp_avg_sq`, its update is one fused kernel for all tensors of a group."""

    name: str = setting(text, "adamw")
    betas: tuple[float, float] = setting(_betas, (0.9, 0.95))
    """Decay rates of the first and second moment."""
    eps: float = setting(number(0.0, open_low=True), 1e-8)
    """Added to the root of the second moment."""

    kinds: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def update(self, group: Group, by: Update) -> None:
        from spt_fast.kernels import adamw_step_all

        adamw_step_all(
            group.params,
            group.grads,
            group.state["exp_avg"],
            group.state["exp_avg_sq"],
            step=by.count,
            lr=by.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decayed=group.decayed,
            anchors=group.anchors,
            anchor_decay=by.anchor_decay,
            grad_scale=by.scale,
            skip=by.skip,
            masters=group.masters,
        )

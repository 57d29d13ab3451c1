"""Optimizers by the name that a recipe gives them. To add one, add its file here and its import below."""

from __future__ import annotations

from collections.abc import Mapping

from spt_fast.fields import build, one_of
from spt_fast.optimizers.adamw import AdamW as AdamW
from spt_fast.optimizers.base import OPTIMIZERS, Group, Optimizer, Update
from spt_fast.optimizers.muon import Muon as Muon

__all__ = ["OPTIMIZERS", "Group", "Optimizer", "Update", "parse_optimizer"]


def parse_optimizer(raw: object, where: str) -> Optimizer:
    """A recipe's `optimizer` section, whose `name` decides its settings. RecipeError for settings that it doesn't
    have."""
    name = raw.get("name", AdamW.name) if isinstance(raw, Mapping) else AdamW.name
    return build(OPTIMIZERS[one_of(*OPTIMIZERS)(name, f"{where}.name")], raw, where)

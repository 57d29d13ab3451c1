"""The choice of an engine, and its processes."""

from __future__ import annotations

import torch

from spt_fast.config import Engine
from spt_fast.errors import RecipeError
from spt_fast.model.gpt import GPT
from spt_fast.train.engine import EngineInterface
from spt_fast.train.local import LocalEngine
from spt_fast.train.world import World, join_world
from spt_fast.train.zero import ZeroEngine, check_deepspeed


def uses_deepspeed(settings: Engine, processes: int) -> bool:
    """Whether the engine is DeepSpeed's: by name, or because many processes, offloading or a DeepSpeed JSON need it."""
    wants_it = processes > 1 or settings.offload != "none" or settings.config is not None
    return settings.name == "deepspeed" or (settings.name == "auto" and wants_it)


def check_engine(settings: Engine, processes: int) -> None:
    """RecipeError if the engine can't run that many processes, or if DeepSpeed or its JSON cannot be used."""
    if uses_deepspeed(settings, processes):
        check_deepspeed(settings)
    elif processes > 1:
        raise RecipeError(
            f"engine.name: local is one process, and {processes} were started; write deepspeed, or start one"
        )


def join(settings: Engine) -> World:
    """This process's rank among those of the launcher. RecipeError in all processes if the engine can't run them."""
    world = join_world(process_group=uses_deepspeed(settings, 1))
    world.everywhere(lambda: check_engine(settings, world.size))
    return world


def make_engine(model: GPT, settings: Engine, *, world: World, dtype: torch.dtype) -> EngineInterface:
    """The engine of the recipe, which `check_engine` has accepted. model: its weights come with `begin`."""
    if uses_deepspeed(settings, world.size):
        return ZeroEngine(model, settings, world=world, dtype=dtype)
    return LocalEngine(model, device=world.device, dtype=dtype, cuda_graphs=settings.cuda_graphs)

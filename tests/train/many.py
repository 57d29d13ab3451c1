"""What each process of a distributed test runs: the recipes of a JSON file, one after the other, watched.

    torchrun --nproc_per_node=N -m tests.train.many PLAN.json

The file holds a list of {"recipe", "resume", and optionally "stop_at", "poison_at", "die_at"}: steps (of the process's
whole life in that run) at which the last process gets SIGTERM, gets a loss that is not a number, or is killed. Every
process writes down the tokens of every step: `<run>.tokens-<rank>.npz`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spt_fast.config import recipe_from
from spt_fast.data.loader import Batch
from spt_fast.model.gpt import GPT
from spt_fast.train import engines, loop
from spt_fast.train.run import run
from tests.train import momentum as momentum  # an optimizer by that name

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Watched:
    """An engine that does what the plan says at its steps, and notes what it was given."""

    def __init__(self, inner: Any, plan: dict[str, Any]) -> None:
        self._inner, self._plan = inner, plan
        self.steps = 0
        self.tokens: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self, micro_batches: Sequence[Batch], *rest: Any) -> Any:
        if RANK == SIZE - 1 and self.steps == self._plan.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if RANK == SIZE - 1 and self.steps == self._plan.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        Poison.on = RANK == SIZE - 1 and self.steps == self._plan.get("poison_at")
        result = self._inner.step(micro_batches, *rest)
        Poison.on = False
        if result is not None:
            self.steps += 1
            self.tokens.append(np.stack([batch.tokens.numpy() for batch in micro_batches]))
        return result


class Poison:
    """Makes the model's loss NaN, and so every gradient."""

    on = False
    forward = GPT.forward

    @staticmethod
    def poisoned(model: GPT, *arguments: Any, **named: Any) -> torch.Tensor:
        return Poison.forward(model, *arguments, **named) * (float("nan") if Poison.on else 1.0)


def main(path: Path) -> None:
    GPT.forward = Poison.poisoned  # type: ignore[method-assign, assignment]
    for plan in json.loads(path.read_text()):
        made: list[Watched] = []

        def make(*arguments: Any, _plan: dict[str, Any] = plan, _made: list[Watched] = made, **named: Any) -> Watched:
            _made.append(Watched(engines.make_engine(*arguments, **named), _plan))
            return _made[-1]

        loop.make_engine = make  # type: ignore[assignment]
        run(recipe_from(plan["recipe"]), resume=plan.get("resume", False), progress=False)
        for watched in made:
            np.savez(f"{plan['recipe']['run']}.tokens-{RANK}.npz", *watched.tokens)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

"""What each process of a distributed test runs: recipes, one after the other, with a record of each step.

    torchrun --nproc_per_node=N -m tests.train.many PLANS.json

The file holds a list of {"recipe", "resume", and optionally "recipe_of_last", which the last process gets instead,
"stop_at", "poison_at", "infinite_at", "fail_at", "die_at"}: steps (of the process's whole life in that run) at which
the last process gets SIGTERM, gets a loss that is not a number, gets an infinite loss with finite gradients, raises an
error, or is killed; or {"command"}, words for `spt-fast`. Every process records the tokens of every step:
`<run>.tokens-<rank>.npz`.

A fresh interpreter takes seconds to import torch and DeepSpeed. So `Ranks` forks its processes from a server that has
imported them, and hands them the variables that torchrun would.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spt_fast import cli
from spt_fast.config import recipe_from
from spt_fast.data.loader import Batch
from spt_fast.errors import DataError
from spt_fast.model.gpt import GPT
from spt_fast.train import engines, loop
from spt_fast.train.run import run
from tests.train import momentum as momentum  # an optimizer by that name


def is_last() -> bool:
    return int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1


class Watched:
    """An engine that acts at its steps as the plan says, and records its inputs."""

    def __init__(self, inner: Any, plan: dict[str, Any]) -> None:
        self._inner, self._plan = inner, plan
        self.steps = 0
        self.tokens: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self, micro_batches: Sequence[Batch], *rest: Any) -> Any:
        if is_last() and self.steps == self._plan.get("stop_at"):
            os.kill(os.getpid(), signal.SIGTERM)
        if is_last() and self.steps == self._plan.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if is_last() and self.steps == self._plan.get("fail_at"):
            raise DataError("chem.bin: cannot be read")
        Poison.on = is_last() and self.steps == self._plan.get("poison_at")
        Poison.infinite = is_last() and self.steps == self._plan.get("infinite_at")
        result = self._inner.step(micro_batches, *rest)
        Poison.on = Poison.infinite = False
        if result is not None:
            self.steps += 1
            self.tokens.append(np.stack([batch.tokens.numpy() for batch in micro_batches]))
        return result


class Poison:
    """Makes the model's loss and every gradient NaN, or only the loss infinite."""

    on = infinite = False
    forward = GPT.forward

    @staticmethod
    def poisoned(model: GPT, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = Poison.forward(model, *arguments, **named) * (float("nan") if Poison.on else 1.0)
        return loss + float("inf") if Poison.infinite else loss


def train(plans: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    GPT.forward = Poison.poisoned  # type: ignore[method-assign, assignment]
    for plan in plans:
        if "command" in plan:
            sys.argv = ["spt-fast", *plan["command"]]
            cli.main()
            continue
        made: list[Watched] = []

        def make(*arguments: Any, _plan: dict[str, Any] = plan, _made: list[Watched] = made, **named: Any) -> Watched:
            _made.append(Watched(engines.make_engine(*arguments, **named), _plan))
            return _made[-1]

        loop.make_engine = make  # type: ignore[assignment]
        loop.peak_flops = lambda device: PEAK_FLOPS  # type: ignore[assignment]
        recipe = plan.get("recipe_of_last", plan["recipe"]) if is_last() else plan["recipe"]
        run(recipe_from(recipe), resume=plan.get("resume", False), progress=False)
        for watched in made:
            np.savez(f"{plan['recipe']['run']}.tokens-{os.environ.get('RANK', '0')}.npz", *watched.tokens)


PEAK_FLOPS = 1e9
"""The peak that each process takes its device to have."""
DEEPSPEED = ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")
"""What DeepSpeed imports in every process, most of it when an engine is made."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, *DEEPSPEED])


class Ranks:
    """`processes` processes on this host that run the plans, or one on each of so many hosts as far as they know
    (`apart`); their output goes into one file."""

    def __init__(self, processes: int, plans: list[dict[str, Any]], said_in: Path, *, apart: bool = False) -> None:
        self._said_in = said_in
        job = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": 1 if apart else processes, "MASTER_ADDR": "127.0.0.1"}
        job = job | {"MASTER_PORT": free_port()} if processes > 1 else {}
        jobs = [job | {"RANK": i, "LOCAL_RANK": 0 if apart else i} if job else {} for i in range(processes)]
        self._ranks = [SERVER.Process(target=_rank, args=(each, plans, said_in)) for each in jobs]
        for rank in self._ranks:
            rank.start()

    def wait(self, seconds: float) -> None:
        """Until each of them has ended by itself, or for `seconds`."""
        deadline = time.monotonic() + seconds
        for rank in self._ranks:
            rank.join(max(0.0, deadline - time.monotonic()))

    def end(self, seconds: float) -> tuple[bool, str]:
        """Whether all of them ended well, and their output. One that fails or hangs ends the others."""
        deadline = time.monotonic() + seconds
        codes: list[int | None] = [None]
        while None in codes and not any(codes) and time.monotonic() < deadline:
            self._ranks[codes.index(None)].join(0.05)
            codes = [rank.exitcode for rank in self._ranks]
        for rank in self._ranks:
            rank.kill()
            rank.join()
        return codes == [0] * len(self._ranks), self._said_in.read_text()


def _rank(environment: dict[str, Any], plans: list[dict[str, Any]], said_in: Path) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    said = os.open(said_in, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    train(plans)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()))

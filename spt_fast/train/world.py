"""The processes that train one model together, as started by torchrun or deepspeed, and their devices.

Every process makes the same decisions at the same time: what only one can know (a signal, an error, a file) is
exchanged here first. Messages between hosts go over gloo, so that they don't wait for a GPU.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from spt_fast.errors import FailedElsewhere, RecipeError, counted, invalid
from spt_fast.model.stored import unread

Result = TypeVar("Result")

PATIENCE = timedelta(minutes=1)
"""How long a process with an error waits for the others. They import at different speeds."""
LAUNCHED_BY = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_STEP_NUM_TASKS",
    "TORCHELASTIC_RESTART_COUNT",
)
"""The variables of launchers that are read here; without them a process is alone."""


@dataclass(frozen=True)
class World:
    """One process among `size`, on `device`. All methods but `share` and `telling` are collective: every process calls
    them."""

    rank: int
    size: int
    device: torch.device
    aside: dist.ProcessGroup | None = None
    """A separate group for a thread of each process, whose messages may overlap the main thread's."""
    failures: dist.Store | None = None
    """Where the first process that fails outside of `everywhere` leaves its reason."""
    local_rank: int = 0
    """Its rank among the processes on its host."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        if self.size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def exchange(self, mine: Result, *, aside: bool = False) -> list[Result]:
        """The objects of all processes, by rank. `aside`: for the one thread beside the main one."""
        if self.size == 1:
            return [mine]
        found: list[Result] = [mine] * self.size
        dist.all_gather_object(found, mine, group=self.aside if aside else None)
        return found

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def everywhere(self, act: Callable[[], Result]) -> Result:
        """The result of `act`; if it raises in some process, one process raises its error, the others
        FailedElsewhere."""
        try:
            answer = act()
        except Exception as error:
            self.agree(error)
            raise
        self.agree(None)
        return answer

    def agree(self, error: Exception | None) -> None:
        """Raise if some process had an error: the first of these its own error, all others FailedElsewhere."""
        problems = self.exchange(None if error is None else str(error) or type(error).__name__)
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise FailedElsewhere(f"process {failed[0]}: {problems[failed[0]]}")

    def on_first(self, act: Callable[[], Result]) -> Result:
        """The result of `act` in the first process, in every process; if it raises, all do."""
        answer = [self.everywhere(lambda: act() if self.is_first else None)]
        if self.size > 1:
            dist.broadcast_object_list(answer, src=0)
        return answer[0]  # type: ignore[return-value]

    @contextmanager
    def telling(self) -> Iterator[None]:
        """If one process fails in this context, the messages of the others break: these raise FailedElsewhere with its
        reason, rather than what broke."""
        try:
            yield
        except BaseException as error:
            mine = [self.rank, str(error) or type(error).__name__]
            rank, reason = mine if self.failures is None else _first_of(self.failures, mine)
            if isinstance(error, RuntimeError) and reason != mine[1]:
                raise FailedElsewhere(f"process {rank}: {reason}") from error
            raise

    def share(self, items: Mapping[str, Result]) -> dict[str, Result]:
        """This process's part of named items, such as tensors, that every process knows."""
        return {name: items[name] for name in sorted(items)[self.rank :: self.size]}

    def spread(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that some process holds, one at a time on the device of each, sorted by name."""
        if self.size == 1:
            yield from ((name, tensors[name]) for name in sorted(tensors))
            return
        mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in unread(tensors).items()}
        holders = {name: (rank, *kind) for rank, held in enumerate(self.exchange(mine)) for name, kind in held.items()}
        for name, (rank, shape, dtype) in sorted(holders.items()):
            if rank == self.rank:
                tensor = tensors[name].to(self.device).contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
            dist.broadcast(tensor, src=rank)
            yield name, tensor

    def collect(self, tensors: Mapping[str, Tensor], act: Callable[[Iterator[tuple[str, Tensor]]], None]) -> None:
        """Give `act`, in the first process, every tensor that some process holds, one at a time; if it raises, all
        do."""
        arriving = self.spread(tensors)

        def receive() -> None:
            try:
                if self.is_first:
                    act(arriving)
            finally:
                deque(arriving, 0)  # the others send their tensors even if `act` failed

        self.everywhere(receive)


ALONE = World(0, 1, torch.device("cpu"))
"""A single process."""


def join_world(*, process_group: bool, timeout: timedelta | None = None) -> World:
    """This process's rank among those of the launcher (RANK, WORLD_SIZE, LOCAL_RANK; a single one without them).

    `process_group`: set up torch.distributed even for a single process, as DeepSpeed needs it. `timeout`: how long to
    wait for the others, by default half an hour; RuntimeError after it.
    RecipeError if there are more processes on this host than GPUs, or some of the launcher's variables are missing.
    """
    if _whole("SLURM_STEP_NUM_TASKS", 1) > 1 and "RANK" not in os.environ:
        raise RecipeError(
            "launch: srun started several processes that don't know of each other; start one per host, torchrun, "
            "which starts the rest (docs/distributed.md)"
        )
    rank, size, local_rank = _launched()
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise RecipeError(
                f"launch: this host has {counted(torch.cuda.device_count(), 'GPU')} and process {local_rank} would "
                "need one more; start one process per GPU"
            )
        torch.cuda.set_device(local_rank)
    device = pick_device()
    if (size > 1 or process_group) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if size == 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout or default_pg_timeout))
            store = dist.PrefixStore(_attempt(), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        atexit.register(_leave)
    if size == 1:
        return World(rank, size, device)
    failures = dist.PrefixStore(f"failures-{next(_joined)}", dist.distributed_c10d._get_default_store())
    return World(rank, size, device, dist.new_group(backend="gloo"), failures, local_rank)


def before_joining(act: Callable[[], Result]) -> Result:
    """The result of `act`, in processes that join in their next step together. If it raises in some of them, these join
    now, so that one raises its error and all others FailedElsewhere; its own if it is alone for PATIENCE."""
    try:
        return act()
    except Exception as error:
        with suppress(RecipeError, RuntimeError):  # its own error says more than that it cannot join
            if launched_processes() > 1:
                join_world(process_group=False, timeout=PATIENCE).agree(error)
        raise


_joined = itertools.count()
"""The number of times that this process joined others; the store stays the same."""


def _first_of(failures: dist.Store, mine: list[Any]) -> list[Any]:
    """The rank and reason of the process that failed first."""
    with suppress(RuntimeError, ValueError):  # the store ends with the process that holds it
        return json.loads(failures.compare_set("first", "", json.dumps(mine)))
    return mine


def _launched() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK."""
    rank, size, local_rank = _whole("RANK", 0), _whole("WORLD_SIZE", 1), _whole("LOCAL_RANK", 0)
    _whole("MASTER_PORT", 0)
    together = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in together if not os.environ.get(name)]
    if missing and (rank, size, local_rank) != (0, 1, 0):
        given = " and ".join(name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if os.environ.get(name))
        raise RecipeError(
            f"launch: {', '.join(missing)} missing beside {given}; start with torchrun, which sets all of them, or "
            f"unset {given} to train alone"
        )
    if rank >= size:
        raise RecipeError(invalid("RANK", rank, f"below WORLD_SIZE ({size}), as torchrun sets it"))
    return rank, size, local_rank


def launched_processes() -> int:
    """WORLD_SIZE, 1 without it. Raises RecipeError."""
    if not (size := _whole("WORLD_SIZE", 1)):
        raise RecipeError(invalid("WORLD_SIZE", "0", "at least 1; unset it to train alone"))
    return size


def _whole(name: str, default: int) -> int:
    """A variable of the environment."""
    given = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", given):
        raise RecipeError(invalid(name, given, f"a whole number, as launchers set it; unset {name} to train alone"))
    return int(given)


def _attempt() -> str:
    """A key for this start of the processes: torchrun restarts them with the same store, whose old addresses would
    mislead gloo. (Over several hosts the counts may differ.)"""
    on_one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if on_one_host else "0"


def _leave() -> None:
    with suppress(RuntimeError):
        dist.destroy_process_group()


def pick_device() -> torch.device:
    """The current GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in checkpoints and summaries: bfloat16."""
    return str(dtype).removeprefix("torch.")


def use_deterministic_algorithms() -> None:
    """Use deterministic algorithms, even if they are slower. Call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

"""Measurements on this machine, kept for later processes in $XDG_CACHE_HOME/spt_fast.

A record is a small JSON file whose name is a digest of everything that it depends on. The measuring process holds a
lock, so that processes that start together neither measure against each other nor get different results. If the folder
cannot be written, or a file is damaged, a warning says so, and the measurement is repeated.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from spt_fast.errors import SptWarning
from spt_fast.files import write_text
from spt_fast.kernels.launch import TRITON_VERSION


def machine(device: torch.device) -> dict[str, str]:
    """What a measurement on this device depends on."""
    known = {"torch": torch.__version__, "triton": TRITON_VERSION or "none"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _read("/proc/driver/nvidia/version").partition("\n")[0]
        return known | {"device": f"{properties.name}, {properties.multi_processor_count} SMs", "driver": driver}
    lines = re.findall(r"^(?:cpu family|model|model name|stepping|flags)\s*: .*", _read("/proc/cpuinfo"), re.MULTILINE)
    facts = lines[:5]  # of the first core
    name = next((fact.partition(": ")[2] for fact in facts if fact.startswith("model name")), platform.machine())
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]  # models of one name differ in instructions
    return known | {"device": f"{name} ({digest})", "threads": str(torch.get_num_threads())}


Read = Callable[[dict[str, Any]], object]
"""Raises one of DAMAGED for a record that isn't of its kind."""
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


def remembered(kind: str, key: Mapping[str, Any], measure: Callable[[], dict[str, Any]], read: Read) -> dict[str, Any]:
    """The measurement of this kind and key, made here or by an earlier process."""
    file = _file(kind, key)
    if (found := recall(kind, key, read)) is not None:
        return found
    with _alone(file.with_suffix(".lock")):
        if (found := recall(kind, key, read)) is not None:
            return found
        found = _plain(measure())
        try:
            write_text(file, json.dumps({"key": key, "found": found}, indent=1))
        except OSError as error:
            problem = (
                f"{file.parent}: measurements cannot be kept there ({error.strerror or error}), so later runs "
                "don't know of them; set XDG_CACHE_HOME to a folder that can be written"
            )
            warnings.warn(problem, SptWarning, stacklevel=1)  # once, whoever asks
    return found


def recall(kind: str, key: Mapping[str, Any], read: Read) -> dict[str, Any] | None:
    """An earlier process's measurement; None if there is none, or, with a warning, if it cannot be read."""
    file = _file(kind, key)
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] != _plain(key):
            return None
        read(kept["found"])
    except OSError:
        return None
    except DAMAGED as error:
        problem = f"{file}: this record of earlier measurements is damaged ({error!r}); it is ignored"
        warnings.warn(problem, SptWarning, stacklevel=2)
        return None
    return kept["found"]


def _file(kind: str, key: Mapping[str, Any]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "spt_fast"
    text = json.dumps(key, sort_keys=True)
    return folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # neither HOME nor the user database has one
        return Path(os.devnull)  # nothing can be stored below it


def _plain(value: Mapping[str, Any]) -> Any:
    """As it is read back."""
    return json.loads(json.dumps(value))


Clock = Callable[[Callable[[], object]], float]
"""Runs something and returns its seconds."""
HEAD_START_CYCLES = 6_000_000
"""Some 3 ms of a GPU, in which the host launches what is timed."""


def host_seconds(work: Callable[[], object]) -> float:
    """Until it returns, by the host's clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def gpu_seconds(work: Callable[[], object], head_start: int = HEAD_START_CYCLES) -> float:
    """By the clock of the current GPU, which is kept busy for `head_start` cycles first: kernels that the host launches
    meanwhile don't wait for it. Those of a training step don't either: they are recorded in a graph, or the host is
    ahead."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(head_start)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def medians(
    rivals: Sequence[Callable[[], object]], *, rounds: int, seconds: float, clock: Clock = host_seconds
) -> list[float]:
    """Seconds of each, in turns so that other load on the machine affects all equally: the medians of `rounds`, or of
    as many as fit into `seconds`, after a first one that counts only if it is the only one."""
    taken: list[list[float]] = [[] for _ in rivals]
    ends = time.perf_counter() + seconds
    for _ in range(rounds + 1):
        for rival, times in zip(rivals, taken, strict=True):
            times.append(clock(rival))
        if time.perf_counter() > ends:
            break
    return [statistics.median(times[1:] or times) for times in taken]


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until others have ended; without a lock if none can be had."""
    descriptor = None
    with suppress(OSError):
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _read(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""

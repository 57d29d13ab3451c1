"""A base is loaded once, piece by piece: the peak of memory is hardly above what remains in use."""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spt_fast.errors import CheckpointError
from spt_fast.model import hf, stored
from spt_fast.model.gpt import GPT, GPTConfig, drawn
from spt_fast.train.local import LocalEngine
from spt_fast.train.snapshot import Snapshot
from spt_fast.train.weights import load_model, stored_weights
from spt_fast.train.world import World
from tests import tiny

CONFIG = GPTConfig(layers=16, width=384, heads=6, kv_heads=2, ffn=1536, context=64, vocab_size=8000)
BYTES = 4 * sum(values.numel() for _, values in drawn(CONFIG, 0))
CPU = torch.device("cpu")


def resident(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _run(act: Callable[[Path], object], folder: Path, said: multiprocessing.SimpleQueue[int]) -> None:
    torch.set_num_threads(1)  # those of the process before the fork are freed
    stored.PIECE = 1 << 20
    act(folder / "small")  # allocated once, at the first call
    ctypes.CDLL(None).malloc_trim(0)  # freed by earlier tests
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    held = act(folder / "base")
    said.put(resident("VmHWM") - before)
    del held


def peak(act: Callable[[Path], object], folder: Path) -> int:
    """Bytes of memory, mapped files included, that a process grows by while it acts."""
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    process = context.Process(target=_run, args=(act, folder, said))
    process.start()
    process.join()
    assert process.exitcode == 0
    return said.get()


def begin(folder: Path) -> LocalEngine:
    config, weights = stored_weights(folder)
    engine = LocalEngine(GPT.without_weights(config), device=CPU, dtype=torch.float32)
    engine.begin(tiny.phase(), Snapshot(weights))
    return engine


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_loading_peaks_at_the_memory_that_remains(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        for name, config in (("small", replace(CONFIG, layers=1, vocab_size=100)), ("base", CONFIG)):
            hf.save(config, drawn(config, 0), tmp_path / dtype / name, dtype=getattr(torch, dtype))
    for act, name, stays in (
        (GPT.from_hf, "float32", BYTES),
        (GPT.from_hf, "bfloat16", BYTES / 2),
        (load_model, "bfloat16", BYTES),
        (begin, "bfloat16", 4 * BYTES),  # weights, gradients and two moments
    ):
        needed = peak(act, tmp_path / name)
        assert 0.8 * stays < needed < 1.2 * stays, (act, name, needed / stays)


def test_a_failed_write_of_weights_raises_in_every_process_after_all_is_sent() -> None:
    """In one process: `spread` must run to its end."""
    sent = []

    class Sent(World):
        def spread(self, tensors):  # type: ignore[no-untyped-def]
            for pair in super().spread(tensors):
                sent.append(pair[0])
                yield pair

    def full(each: object) -> None:
        next(each)  # type: ignore[call-overload]
        raise CheckpointError("no space")

    tensors = {name: torch.zeros(1) for name in "cab"}
    with pytest.raises(CheckpointError, match="no space"):
        Sent(0, 1, CPU).collect(tensors, full)
    assert sent == ["a", "b", "c"]

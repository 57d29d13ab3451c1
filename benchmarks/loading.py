"""Memory at the start of training from a base: its peak, and what remains, in every process.

    python -m benchmarks.loading [--presets 124m …] [--processes 1 2 4] [--stages 0 1 3]

The base is stored in bf16; training is in fp32. Peaks are above the process's memory before it read any weights:
resident memory by the kernel's own high-water mark (VmHWM), and its part without files (RssAnon), sampled every
millisecond. `stays` is the storage of all live tensors when the first step could begin. One process is the local
engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spt_fast.config import recipe_from
from spt_fast.data.shards import DatasetWriter
from spt_fast.model import hf
from spt_fast.model.flops import parameters
from spt_fast.model.gpt import GPTConfig, drawn
from spt_fast.train.engines import join, make_engine
from spt_fast.train.plan import make_plan
from spt_fast.train.snapshot import Snapshot

CONTEXT = 32


def status(field: str) -> int:
    """Bytes, as /proc/self/status has them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Watched:
    """The peaks of this process's memory within a `with`, in bytes above its beginning."""

    def __enter__(self) -> Watched:
        gc.collect()
        self._resident, self._anonymous, self.anonymous, self._over = status("VmRSS"), status("RssAnon"), 0, False
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over:
            self.anonymous = max(self.anonymous, status("RssAnon") - self._anonymous)
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self._over = True
        self._thread.join()
        self.resident = status("VmHWM") - self._resident


def live_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())


def worker(folder: Path, stage: int) -> None:
    torch.set_num_threads(1)
    source = {"train": str(folder / "text"), "heldout": str(folder / "text")}
    phase = {"name": "all", "tokens": 64 * CONTEXT, "mixture": {"text": 1}, "batch": {"sequences": 4, "micro": 1}}
    recipe = recipe_from(
        {
            "run": str(folder / "run"),
            "init": str(folder / "base"),
            "precision": "fp32",
            "engine": {"stage": stage},
            "sources": {"text": source},
            "phases": [phase | {"optimizer": {"lr": 1e-4}}],
        }
    )
    world = join(recipe.engine)
    plan = make_plan(recipe, world=world.size)
    before = live_bytes()
    with Watched() as peak:
        start = Snapshot(plan.starting_weights(world))
        engine = make_engine(plan.model_without_weights(), recipe.engine, world=world, dtype=torch.float32)
        engine.begin(plan.phases[0].phase, start, micro_batches=1)
        del start
    stays = live_bytes() - before
    found = world.exchange({"stays": stays, "anonymous": peak.anonymous, "resident": peak.resident})
    if world.is_first:
        print(json.dumps({name: max(one[name] for one in found) for name in found[0]}))


def measure(preset: str, processes: int, stage: int) -> dict[str, Any]:
    """For the process that needs most; in bytes per parameter."""
    config = GPTConfig.preset(preset, context=CONTEXT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf.save(config, drawn(config, 0), folder / "base", dtype=torch.bfloat16)
        with DatasetWriter(folder / "text", vocab_size=64, eos_id=63, tokenizer_digest=None) as writer:
            writer.write(np.arange(4000) % 64, np.array([4000]), num_bytes=4000)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "benchmarks.loading", "--worker", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--stages", str(stage)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    found = json.loads(done.stdout.splitlines()[-1])
    each = {name: round(value / parameters(config), 2) for name, value in found.items()}
    return each | {"peak / stays": round(found["anonymous"] / found["stays"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["124m"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 3])
    parser.add_argument("--worker", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.stages[0])
        return
    for preset in arguments.presets:
        for processes in arguments.processes:
            for stage in arguments.stages if processes > 1 else [0]:
                print(preset, processes, stage, measure(preset, processes, stage), flush=True)


if __name__ == "__main__":
    main()

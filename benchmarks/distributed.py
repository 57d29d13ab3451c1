"""The cost of distribution: ZeRO on two processes against one, and checkpoints that are written during training.

    python -m benchmarks.distributed [--json FILE] [--rounds N]

Scaling: 6 layers x 384, context 256, vocabulary 4096, 32 sequences a step in micro-batches of 8, one core a process.
One process alone (the local engine) is 1; two independent ones at the same time are the most that this machine can do;
ZeRO on two processes is compared with twice the first and with the second. Launches alternate.

Checkpoints: 124m, vocabulary 50,304, context 1024, one micro-batch a step. The added training time of a save is the
difference of steps with and without one, in turns, relative to 100 steps of 8 micro-batches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from spt_fast.config import Engine, Phase
from spt_fast.data.loader import Batch
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.optimizers import AdamW
from spt_fast.train.checkpoint import Retention, Writer
from spt_fast.train.engines import make_engine
from spt_fast.train.precision import pick_dtype
from spt_fast.train.snapshot import weights_of
from spt_fast.train.world import join_world

SMALL = GPTConfig(layers=6, width=384, heads=6, kv_heads=6, ffn=1024, context=256, vocab_size=4096)
PHASE = Phase(name="step", tokens=1, mixture={}, optimizer=AdamW(lr=1e-4))
SEQUENCES, MICRO = 32, 8
LAUNCHES = {
    "one": (1, None),
    "two apart": (2, None),
    "ZeRO 0": (2, 0),
    "ZeRO 1": (2, 1),
    "ZeRO 2": (2, 2),
    "ZeRO 3": (2, 3),
}


def batches(config: GPTConfig, micro: int, count: int) -> list[Batch]:
    ids = torch.randint(config.vocab_size, (count, micro, config.context + 1))
    return [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None) for rows in ids]


def worker(stage: int | None, steps: int) -> None:
    """Prints the seconds of a step in this process; there may be two processes."""
    torch.set_num_threads(1)
    settings = Engine(name="local" if stage is None else "deepspeed", stage=stage or 0)
    world = join_world(process_group=stage is not None)
    engine = make_engine(GPT(SMALL), settings, world=world, dtype=pick_dtype("auto", world.device))
    count = SEQUENCES // world.size // MICRO
    engine.begin(PHASE, weights_of(GPT(SMALL), world), micro_batches=count)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        result = engine.step(batches(SMALL, MICRO, count), 1e-4, lambda: world.any(False))
        assert result is not None
        result.read()
        seconds.append(time.perf_counter() - began)
    if world.is_first:
        print(json.dumps(statistics.median(seconds[2:])))


def launch(processes: int, stage: int | None, steps: int) -> float:
    """Tokens a second of all processes together."""
    command = [
        "-m",
        "benchmarks.distributed",
        "--worker",
        "local" if stage is None else str(stage),
        "--steps",
        str(steps),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    apart = processes if stage is None else 1
    whole = [sys.executable, *(launcher if stage is not None else []), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(whole, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(apart)]
    step_s = [float(process.communicate()[0].splitlines()[-1]) for process in started]
    return sum(SEQUENCES * SMALL.context / seconds for seconds in step_s)


def scaling(rounds: int, steps: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in LAUNCHES}
    for _ in range(rounds):
        for name, (processes, stage) in LAUNCHES.items():
            rates[name].append(launch(processes, stage, steps))
    against_one = {
        n: statistics.median(r / (2 * o) for r, o in zip(rs, rates["one"], strict=True)) for n, rs in rates.items()
    }
    against_apart = {
        n: statistics.median(r / a for r, a in zip(rs, rates["two apart"], strict=True)) for n, rs in rates.items()
    }
    return {
        name: {
            "tokens_per_s": round(statistics.median(rates[name])),
            "of twice one process": round(against_one[name], 3),
            "of two apart": round(against_apart[name], 3),
        }
        for name in LAUNCHES
    }


def checkpoints(rounds: int) -> dict[str, Any]:
    config = GPTConfig.preset("124m", vocab_size=50_304, context=1024)
    world = join_world(process_group=False)
    engine = make_engine(GPT(config), Engine(), world=world, dtype=pick_dtype("auto", world.device))
    engine.begin(PHASE, weights_of(GPT(config)))
    step_batches = batches(config, 1, 1)

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            result = engine.step(step_batches, 1e-4, lambda: False)
            assert result is not None
            result.read()
        return time.perf_counter() - began

    steps(2)
    plain, added, copied, written = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), world, Retention(1))
        for i in range(rounds):
            plain.append(steps(8))
            began = time.perf_counter()
            snapshot = engine.snapshot(state=True)
            copied.append(time.perf_counter() - began)
            writer.save(f"step-{i:010d}-p00-a000", {}, {"current": snapshot})
            beside = copied[-1]
            while writer.is_writing():
                beside += steps(1) - plain[-1] / 8
            written.append(time.perf_counter() - began)
            writer.finish()
            added.append(beside)
    step_s, added_s = statistics.median(plain) / 8, statistics.median(added)
    return {
        "step_s of one micro-batch": round(step_s, 3),
        "copy_s": round(statistics.median(copied), 3),
        "written after_s": round(statistics.median(written), 2),
        "added_s": round(added_s, 2),
        "share of 100 steps of 8 micro-batches": round(added_s / (100 * 8 * step_s), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(None if options.worker == "local" else int(options.worker), options.steps)
        return
    results = {
        "machine": machine(),
        "scaling": scaling(options.rounds, options.steps),
        "checkpoints": checkpoints(options.rounds),
    }
    text = json.dumps(results, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()

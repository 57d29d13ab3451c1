"""Resources of a long run: `python -m benchmarks.soak [STEPS …] [--json FILE]`; 2,000 and 20,000 steps by default.

A small model with evaluations, checkpoints and logged steps, in this process. Memory, open files and threads are read
twenty times; from the second quarter of the run to the last they must not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from spt_fast.config import recipe_from
from spt_fast.train import loop
from spt_fast.train.run import run
from tests import tiny

SAMPLES = 20
GROWTH = 1.02
"""Largest growth of memory; files and threads must not grow at all."""


@dataclass(frozen=True)
class Sample:
    """The resources of this process after a step."""

    step: int
    memory_mb: float
    """Resident, 10^6 bytes."""
    files: int
    threads: int

    @classmethod
    def now(cls, step: int) -> Sample:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory_mb = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        return cls(step, memory_mb, len(os.listdir("/proc/self/fd")), threading.active_count())


def soak(folder: Path, steps: int) -> list[Sample]:
    """A run of this many steps; the resources along the way."""
    tiny.write_corpora(folder)
    raw = tiny.raw_recipe(folder, f"soak-{steps}")
    often = f"{max(1, steps // 100)} steps"
    raw["phases"] = [raw["phases"][0] | {"tokens": steps * 8 * tiny.CONTEXT, "eval": {"every": often, "tokens": 400}}]
    raw |= {"checkpoint": {"every": often, "keep": 2, "keep_best": True}}
    samples, evaluate = [], loop.Trainer.evaluate

    def sampled(trainer: loop.Trainer, arm: Any) -> None:
        evaluate(trainer, arm)
        if trainer.state.step >= len(samples) * steps / SAMPLES:
            trainer.writer.finish()
            samples.append(Sample.now(trainer.state.step))

    loop.Trainer.evaluate = sampled  # type: ignore[method-assign]
    try:
        assert run(recipe_from(raw), progress=False)["status"] == "done"
    finally:
        loop.Trainer.evaluate = evaluate  # type: ignore[method-assign]
    return samples


def growth(samples: list[Sample]) -> dict[str, float]:
    """By figure, the median of the last quarter over that of the second."""
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    return {
        name: statistics.median(getattr(s, name) for s in last) / statistics.median(getattr(s, name) for s in second)
        for name in ("memory_mb", "files", "threads")
    }


def is_flat(grown: dict[str, float]) -> bool:
    return grown["memory_mb"] <= GROWTH and grown["files"] <= 1 and grown["threads"] <= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=int, nargs="*", default=[2_000, 20_000])
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    results = {}
    for steps in arguments.steps:
        with tempfile.TemporaryDirectory() as folder:
            samples = soak(Path(folder), steps)
        grown = growth(samples)
        results[steps] = {"growth": grown, "samples": [asdict(sample) for sample in samples]}
        first, last = samples[len(samples) // 4], samples[-1]
        held = ", ".join(
            f"{getattr(first, name):g} → {getattr(last, name):g} {name}" for name in ("memory_mb", "files", "threads")
        )
        print(f"{steps:,} steps: {held}: {'flat' if is_flat(grown) else 'NOT FLAT'}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine("torch"), "results": results}, indent=1) + "\n")
    sys.exit(not all(is_flat(result["growth"]) for result in results.values()))


if __name__ == "__main__":
    main()

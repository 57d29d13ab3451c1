"""How fast data arrives: windows gathered from the page cache, samples located, orders built, any step reached.

    python -m benchmarks.loader [--json FILE]

Gathering runs on one thread, into a fresh batch each time as in training. Its rates are per second of CPU time, all
threads and the kernel's copying included: tokens/s per core. The best of several repetitions counts, each of other
windows: those of an earlier one may be in the processor's caches.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import machine
from spt_fast import native
from spt_fast.data.loader import Loader
from spt_fast.data.mixture import Mixture
from spt_fast.data.order import SampleOrder
from spt_fast.data.ring import Ring
from spt_fast.data.shards import TokenDataset
from spt_fast.kernels import keep_freed_memory

CORPUS_TOKENS = 100_000_000
BATCH_TOKENS = 1 << 18
VOCAB_SIZE = 50_000
REPEATS = 7
GATHERED, LOADED = 8, 16
"""Batches in a repetition."""


def best_seconds(
    action: Callable[[], object], repeats: int = REPEATS, clock: Callable[[], float] = time.perf_counter
) -> float:
    seconds = []
    for _ in range(repeats):
        began = clock()
        action()
        seconds.append(clock() - began)
    return min(seconds)


def gathering(folder: Path) -> dict[str, float]:
    """Million tokens per second and core: of the op, and of a loader whose consumer does nothing."""
    results = {}
    for dtype in ("uint16", "uint32"):
        path = folder / f"{dtype}.bin"
        (np.arange(CORPUS_TOKENS, dtype=np.uint32) % VOCAB_SIZE).astype(dtype).tofile(path)
        dataset = TokenDataset.open(path, dtype=dtype)
        for context in (256, 1024, 2048, 8192):
            rows, ring = BATCH_TOKENS // context, Ring(CORPUS_TOKENS, context, 0, "a")
            starts = iter(ring.starts(np.arange(REPEATS * GATHERED * rows)).reshape(REPEATS, GATHERED, rows))
            source = np.zeros(rows, dtype=np.int32)
            with path.open("rb") as file:
                table = np.array([[file.fileno(), 0, CORPUS_TOKENS, np.dtype(dtype).itemsize]])

                def gather_all(
                    table: np.ndarray = table, source: np.ndarray = source, starts: Iterator[np.ndarray] = starts
                ) -> None:
                    for row_starts in next(starts):
                        batch = torch.empty(2, len(source), BATCH_TOKENS // len(source), dtype=torch.int64)
                        native.gather(table, source, row_starts, VOCAB_SIZE, batch)

                results[f"gather {dtype} T={context}, M tokens/s a core"] = (
                    GATHERED * BATCH_TOKENS / best_seconds(gather_all, clock=time.process_time) / 1e6
                )

            order = SampleOrder(Mixture({"a": 1}), {"a": ring}, rows, {"a": 0}, 0, 0)
            steps = iter(range(REPEATS * GATHERED, REPEATS * (GATHERED + LOADED), LOADED))  # after those gathered

            def load_all(
                order: SampleOrder = order, dataset: TokenDataset = dataset, steps: Iterator[int] = steps
            ) -> None:
                ring, first_step = order.rings["a"], next(steps)
                with Loader(
                    order,
                    {"a": dataset},
                    ring.context,
                    micro=order.sequences,
                    vocab_size=VOCAB_SIZE,
                    first_step=first_step,
                    last_step=first_step + LOADED,
                ) as loader:
                    for _ in loader:
                        pass

            results[f"loader {dtype} T={context}, M tokens/s a core"] = (
                LOADED * BATCH_TOKENS / best_seconds(load_all, clock=time.process_time) / 1e6
            )
    return results


def planning() -> dict[str, float]:
    """Milliseconds to build and reach, bytes held, and million samples located a second."""
    two = {"web": "0.98", "chem": "0.02"}
    sixty_four = {f"s{i:02}": 700 + 7 * i for i in range(64)}
    sixty_four["s63"] += (1 << 16) - sum(sixty_four.values())
    rings = {"web": Ring(10**12, 2048, 0, "web"), "chem": Ring(10**9, 2048, 0, "chem")}

    def build() -> SampleOrder:
        return SampleOrder(Mixture(two), rings, 512, dict.fromkeys(two, 0), 0, 0)

    build().windows(0)
    tracemalloc.start()
    order = build()
    order.windows(10**12 // 512)
    held_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    steps = iter(range(10**9, 2 * 10**9, 12_345_678))
    tables = {"2 sources": Mixture(two), "64 sources, Q = 65536": Mixture(sixty_four)}
    return {
        "order of 1e12 samples: build, ms": best_seconds(build) * 1e3,
        "order of 1e12 samples: peak, MB": held_bytes / 1e6,
        "64 sources, Q = 65536: build, ms": best_seconds(lambda: Mixture(sixty_four)) * 1e3,
        "reach a step near 1e9 (512 sequences), ms": best_seconds(lambda: order.windows(next(steps))) * 1e3,
        **{
            f"locate {name}, M/s": 5.0 / best_seconds(lambda mixture=mixture: mixture.locate_many(10**12, 5_000_000))
            for name, mixture in tables.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    with tempfile.TemporaryDirectory() as folder:
        results = planning() | gathering(Path(folder))
    about = machine("torch", "numpy")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for name, value in results.items():
        print(f"{name:<48}{value:>10.3f}" if value < 10 else f"{name:<48}{value:>10.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

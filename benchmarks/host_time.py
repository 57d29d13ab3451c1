"""The host's cost of a step: processor time of a step with tensors so small that mainly Python and PyTorch remain.

    OMP_NUM_THREADS=1 python -m benchmarks.host_time [--layers 12] [--steps 200]

One thread on a CPU; the minimum and the median of many, since other programs can only add. To compare two versions, run
it in both checkouts in turn. It includes eight small products per layer, 13 µs each in bf16, which the host of a GPU
doesn't compute; a step that is replayed as a CUDA graph needs none of this.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from spt_fast.config import Phase
from spt_fast.data.loader import Batch
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.optimizers import AdamW
from spt_fast.train.local import LocalEngine
from spt_fast.train.snapshot import weights_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part, run in parts(options.layers).items():
        least_s, median_s = seconds(run, options.steps)
        print(f"{part:22} {1e3 * least_s:6.2f} ms, median {1e3 * median_s:6.2f}")


def parts(layers: int) -> dict[str, Callable[[], object]]:
    """A step of `layers` blocks in bf16, D = 64, T = 16, B = 1, and its parts."""
    model = GPT(GPTConfig(layers=layers, width=64, heads=1, kv_heads=1, ffn=64, context=16, vocab_size=64))
    engine = LocalEngine(model, device=torch.device("cpu"), dtype=torch.bfloat16)
    engine.begin(Phase(name="step", tokens=1, mixture={}, optimizer=AdamW(lr=1e-3)), weights_of(model))
    tokens, targets = torch.randint(64, (2, 1, 16)).unbind()
    never, norm = torch.tensor(False), torch.ones(())

    def loss() -> torch.Tensor:
        return engine.model(tokens, targets, scale=1.0)

    return {
        "step": lambda: engine.step([Batch(tokens, targets, None)], 1e-3, lambda: False),
        "forward": loss,
        "forward and backward": lambda: loss().backward(),
        "gradient norm": engine.optimizer.grad_norm,
        "update": lambda: engine.optimizer.step(1e-3, norm, never),
    }


def seconds(run: Callable[[], object], times: int) -> tuple[float, float]:
    """(the least, the median) processor time."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return min(taken), statistics.median(taken)


if __name__ == "__main__":
    main()

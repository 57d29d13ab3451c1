"""How many CPU threads train a model fastest: a small one loses more to synchronisation than a second thread gains.

Measured by `spt-fast kernels --tune`. A run with one process uses the result, unless OMP_NUM_THREADS sets the number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from typing import Any

import torch

from spt_fast.kernels.measured import machine, medians, recall, remembered
from spt_fast.kernels.tuner import LEAST_GAIN
from spt_fast.model.config import GPTConfig
from spt_fast.model.gpt import GPT
from spt_fast.train.precision import pick_precision

CPU = torch.device("cpu")
USUAL = torch.get_num_threads()
ROUNDS, SECONDS = 15, 20.0


def threads_of(
    config: GPTConfig, precision: str, sequences: int, context: int, *, measure: bool = False
) -> dict[str, Any] | None:
    """The result for steps of such micro-batches, measured now if `measure`: "chosen", "date", and "seconds" by number.
    None if there is none, or if OMP_NUM_THREADS decides."""
    if os.environ.get("OMP_NUM_THREADS"):
        return None
    shape = {"config": asdict(config), "precision": precision, "sequences": sequences, "context": context}
    key = {**machine(CPU), **shape, "threads": USUAL}
    ask = partial(_measure, config, precision, sequences, context)
    return remembered("threads", key, ask, _read) if measure else recall("threads", key, _read)


def _read(found: Mapping[str, Any]) -> None:
    if not isinstance(found["chosen"], int) or str(found["chosen"]) not in found["seconds"]:
        raise ValueError(found["chosen"])


def _measure(config: GPTConfig, precision: str, sequences: int, context: int) -> dict[str, Any]:
    """A forward and backward pass of one layer and the head."""
    model = GPT(replace(config, layers=1, full_layers=(), no_rope_layers=()))
    model.to(pick_precision(precision, CPU, config).dtype)
    tokens = torch.arange(sequences * context).view(sequences, context) * 7 % config.vocab_size

    def step(threads: int) -> None:
        torch.set_num_threads(threads)
        model(tokens, tokens).backward()

    counts = sorted({USUAL, *(1 << i for i in range(USUAL.bit_length()))})
    before = torch.get_num_threads()
    try:
        taken = medians([partial(step, count) for count in counts], rounds=ROUNDS, seconds=SECONDS)
    finally:
        torch.set_num_threads(before)
    return decided(dict(zip(counts, taken, strict=True)))


def decided(seconds: Mapping[int, float]) -> dict[str, Any]:
    """The fastest number, if it is clearly faster than the usual one."""
    best = min(seconds, key=lambda count: seconds[count])
    chosen = best if seconds[best] < (1 - LEAST_GAIN) * seconds[USUAL] else USUAL
    return {"date": f"{date.today()}", "chosen": chosen, "seconds": {str(n): took for n, took in seconds.items()}}

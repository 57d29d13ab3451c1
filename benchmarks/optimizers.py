"""Muon against AdamW on text: the tokens that each needs for the same held-out loss, with equal tuning.

    python -m benchmarks.optimizers --train PREFIX --heldout PREFIX --preset 3m --tokens 2M --out DIR

Both get four learning rates and two decays, one seed, half of the tokens or --tuning-tokens; then the best of each gets
other seeds, at half of the tokens and at all of them, with a cosine to a tenth each time. Muon's tokens to AdamW's
final loss are interpolated between its two losses in the logarithm of tokens. An interrupted run continues where it
stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from spt_fast.config import recipe_from
from spt_fast.fields import parse_count
from spt_fast.train.run import run

# The same number of rates for each, around its best.
RATES = {"adamw": [1e-3, 2e-3, 4e-3, 8e-3], "muon": [4e-3, 8e-3, 1.6e-2, 3.2e-2]}
DECAYS = [0.1, 0.3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True, help="prefix of a dataset")
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--preset", default="3m")
    parser.add_argument("--tokens", default="2M")
    parser.add_argument("--tuning-tokens", help="of the runs that choose rate and decay (default: half)")
    parser.add_argument("--seeds", type=int, default=3, help="of the runs that are compared")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokens = parse_count(args.tokens, "--tokens")
    tuning_tokens = parse_count(args.tuning_tokens, "--tuning-tokens") if args.tuning_tokens else tokens // 2

    def trained(name: str, seed: int, tokens: int, optimizer: dict[str, Any], **grid: Any) -> dict[str, Any]:
        phase = {
            "name": "pretrain",
            "tokens": tokens,
            "mixture": {"text": "100%"},
            "batch": {"sequences": args.sequences},
            "optimizer": optimizer,
            "schedule": {"name": "cosine", "warmup": "5%", "final": "10%"},
            "eval": {"every": tokens, "tokens": 80_000},
            **grid,
        }
        recipe = recipe_from(
            {
                "run": str(args.out / name),
                "seed": seed,
                "model": {"preset": args.preset},
                "sources": {"text": {"train": args.train, "heldout": args.heldout}},
                "checkpoint": {"every": "200 steps", "keep": 1},
                "phases": [phase],
            }
        )
        return run(recipe, resume=True, progress=False)["phases"]["pretrain"]

    found: dict[str, Any] = {"machine": machine(), "preset": args.preset, "tokens": tokens, "tuned at": tuning_tokens}
    losses: dict[str, dict[int, list[float]]] = {}
    for optimizer, rates in RATES.items():
        first = {"name": optimizer, "lr": rates[0]}
        grid = {"lr": rates, "weight_decay": DECAYS}
        best = trained(f"{args.preset}-{optimizer}-grid", 0, tuning_tokens, first, grid=grid)
        found[f"{optimizer} grid"] = [
            {"lr": arm["lr"], "weight_decay": arm["weight_decay"], "loss": arm["heldout"]["text"]}
            for arm in best["grid"]
        ]
        arm = best["grid"][best["arm"]]
        settings = {"name": optimizer, "lr": arm["lr"], "weight_decay": arm["weight_decay"]}
        losses[optimizer] = {
            budget: [
                trained(f"{args.preset}-{optimizer}-{budget}-{seed}", seed, budget, settings)["heldout"]["text"]
                for seed in range(1, args.seeds + 1)
            ]
            for budget in (tokens // 2, tokens)
        }
        print(optimizer, settings, losses[optimizer], flush=True)
    found["losses"] = losses
    half, whole = (statistics.mean(losses["muon"][budget]) for budget in (tokens // 2, tokens))
    goal = statistics.mean(losses["adamw"][tokens])
    found["tokens to AdamW's loss"] = tokens * math.exp((whole - goal) / (half - whole) * math.log(2))
    found["beyond what was run"] = not whole <= goal <= half
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

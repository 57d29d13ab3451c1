"""The effect of fp8 on the loss: one model trained twice on the same batches, in bf16 and in fp8.

    python -m benchmarks.fp8_loss --out DIR [--preset 1b] [--steps 500] [--dry]

It uses the trainer itself, on English prose that every machine has (study/corpora.py), read as bytes; 32K tokens a
step. For each tenth of the run the table shows the mean training loss and, at its end, the held-out loss, measured in
bf16 for both. DeepSeek-V3 (arXiv 2412.19437, section 3.3) reports a difference below 0.25% and calls that well within
the randomness of training. DIR keeps both runs; the same command continues an interrupted one. --dry: a tiny model
whose layers count as wide.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from spt_fast.config import Recipe, recipe_from
from spt_fast.files import write_text
from spt_fast.model import gpt
from spt_fast.model.presets import PRESETS
from spt_fast.study.corpora import write_general
from spt_fast.train.run import run

TEXT_BYTES = 16_000_000
STEP_TOKENS = 32 * 1024
LR = 3e-4
DRY = {"layers": 1, "width": 32, "heads": 2, "ffn": 64, "context": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    wide = [name for name, shape in PRESETS.items() if shape["width"] >= gpt.FP8_WIDTH]  # else fp8 changes nothing
    parser.add_argument("--preset", choices=wide, default="1b")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--dry", action="store_true", help="tiny: runs every line, measures nothing")
    options = parser.parse_args()
    model: dict[str, Any] = {"preset": options.preset, "context": PRESETS[options.preset]["context"]}
    text_bytes, step_tokens = TEXT_BYTES, STEP_TOKENS
    if options.dry:
        gpt.FP8_WIDTH = 16
        model, text_bytes, step_tokens = DRY, 100_000, 128
    write_tokens(options.out, text_bytes)
    records = {}
    for name in ("bf16", "fp8"):
        made = recipe(options.out, name, model, step_tokens // model["context"], options.steps)
        if run(made, resume=True)["status"] != "done":
            sys.exit(75)
        records[name] = [json.loads(line) for line in (options.out / name / "metrics.jsonl").read_text().splitlines()]
    rows = compare(records["bf16"], records["fp8"])
    print(table(rows))
    report = {"machine": machine("torch", "triton"), "model": model, "rows": rows}
    write_text(options.out / "fp8_loss.json", json.dumps(report, indent=1) + "\n")


def write_tokens(folder: Path, text_bytes: int) -> None:
    """The prose as bytes, a twentieth of it held out."""
    if (folder / "train.bin").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_general(folder / "prose.jsonl", text_bytes)
    lines = (folder / "prose.jsonl").read_text().splitlines()
    ids = np.frombuffer("\n\n".join(json.loads(line)["text"] for line in lines).encode(), np.uint8)
    cut = len(ids) - len(ids) // 20
    ids[cut:].tofile(folder / "heldout.bin")
    ids[:cut].tofile(folder / "train.bin")


def recipe(folder: Path, name: str, model: dict[str, Any], sequences: int, steps: int) -> Recipe:
    step_tokens = sequences * model["context"]
    return recipe_from(
        {
            "run": str(folder / name),
            "precision": "bf16",
            "model": {**model, "vocab_size": 256},
            "engine": {"fp8": name == "fp8"},
            "checkpoint": {"every": f"{steps} steps", "keep": 1},
            "log": {"every": "1 steps"},
            "sources": {
                "prose": {"train": str(folder / "train"), "heldout": str(folder / "heldout"), "dtype": "uint8"}
            },
            "phases": [
                {
                    "name": "pretrain",
                    "tokens": steps * step_tokens,
                    "mixture": {"prose": 1},
                    "batch": {"sequences": sequences, "micro": max(1, sequences // 2)},
                    "optimizer": {"lr": LR},
                    "schedule": {"warmup": "10%"},
                    "eval": {"every": "10%", "tokens": 8 * step_tokens},
                }
            ],
        }
    )


def compare(bf16: list[dict[str, Any]], fp8: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each evaluation after the first: losses in bf16, in fp8, and the difference as a share of the former."""
    rows = []
    steps = [record["step"] for record in bf16 if record["kind"] == "eval"]
    for before, step in pairwise(steps):
        row: dict[str, Any] = {"step": step}
        for split in ("train", "heldout"):
            low, high = (_loss(records, split, before, step) for records in (bf16, fp8))
            row[split] = {"bf16": low, "fp8": high, "difference": high / low - 1}
        rows.append(row)
    return rows


def _loss(records: list[dict[str, Any]], split: str, before: int, step: int) -> float:
    if split == "heldout":
        return next(r["heldout"]["prose"] for r in records if r["kind"] == "eval" and r["step"] == step)
    return float(np.mean([r["loss"] for r in records if r["kind"] == "train" and before < r["step"] <= step]))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| step | training bf16 | fp8 | | held out bf16 | fp8 | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{x['bf16']:.4f} | {x['fp8']:.4f} | {x['difference']:+.2%}" for x in (row["train"], row["heldout"])]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

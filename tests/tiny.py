"""Small data sets and recipes that the tests of the trainer share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from spt_fast.config import Phase, Recipe, recipe_from
from spt_fast.data.shards import DatasetWriter
from spt_fast.optimizers import AdamW

VOCAB = 64
EOS = 63
CONTEXT = 16


def write_dataset(
    prefix: Path, seed: int, tokens: int, *, vocab: int = VOCAB, tokenizer_digest: str | None = None
) -> Path:
    """About `tokens` learnable ids: a cyclic walk with noise, in documents of 20 to 60 tokens that end with EOS."""
    rng = np.random.default_rng(seed)
    lengths = []
    while sum(lengths) < tokens:
        lengths.append(int(rng.integers(20, 60)))
    ids = (np.cumsum(rng.choice([1, 1, 1, 2, 5], sum(lengths))) * (1 + seed % 3)) % (EOS - 1)
    ids[np.cumsum(lengths) - 1] = EOS
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with DatasetWriter(prefix, vocab_size=vocab, eos_id=EOS, tokenizer_digest=tokenizer_digest) as writer:
        writer.write(ids, np.array(lengths), num_bytes=3 * len(ids))
    return prefix


def write_corpora(folder: Path) -> None:
    for seed, (name, tokens) in enumerate(
        [("general", 6000), ("general.heldout", 900), ("chem", 1100), ("chem.heldout", 700)]
    ):
        write_dataset(folder / name, seed // 2, tokens) if "heldout" not in name else write_dataset(
            folder / name, seed // 2 + 30, tokens
        )


def raw_recipe(folder: Path, run: str = "run") -> dict[str, Any]:
    """Two phases on two sources: a mixture that repeats `chem`, then a finetune with a grid and early stopping."""
    return {
        "run": str(folder / run),
        "model": {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "ffn": 64, "context": CONTEXT, "qk_norm": True},
        "checkpoint": {"every": "7 steps", "keep": 2},
        "log": {"every": "1 steps"},
        "sources": {
            "general": {"train": str(folder / "general"), "heldout": str(folder / "general.heldout")},
            "chem": {"train": str(folder / "chem"), "heldout": str(folder / "chem.heldout"), "limit_tokens": 400},
        },
        "phases": [
            {
                "name": "pretrain",
                "tokens": 30 * 8 * CONTEXT,
                "mixture": {"general": "3/4", "chem": "1/4"},
                "batch": {"sequences": 8, "micro": 4},
                "optimizer": {"lr": 3e-3},
                "schedule": {"name": "cosine", "warmup": "10%"},
                "eval": {"every": "10 steps", "tokens": 400},
            },
            {
                "name": "finetune",
                "tokens": 16 * 4 * CONTEXT,
                "mixture": {"chem": "100%"},
                "untie": True,
                "anchor": 0.01,
                "batch": {"sequences": 4, "micro": 4},
                "eval": {"every": "2 steps", "tokens": 400},
                "optimizer": {"lr": 1e-3, "weight_decay": 1e-7},
                "schedule": {"name": "constant", "warmup": "12%"},
                "stop": {"on": "chem", "patience": 2},
                "grid": {"lr": ["1e-3", "2e-2"]},
            },
        ],
    }


def phase(lr: float = 1e-2, *, anchor: float = 0.0, freeze: str = "none", **settings: Any) -> Phase:
    """A phase for an engine to begin, with these settings of AdamW."""
    optimizer = AdamW(lr=lr, **settings)
    return Phase(name="phase", tokens=1, mixture={}, optimizer=optimizer, anchor=anchor, freeze=freeze)


def recipe(folder: Path, run: str = "run", **changes: Any) -> Recipe:
    return recipe_from(raw_recipe(folder, run) | changes)


def write_recipe(folder: Path, raw: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("tokens_per_s", "mfu")} for record in records]

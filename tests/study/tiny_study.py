"""A study that takes seconds: a model of a few thousand parameters on the tiny corpora of the trainer's tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from spt_fast.config import load_recipe
from spt_fast.train.run import run
from tests.tiny import CONTEXT, VOCAB, write_corpora

STEP = 8 * CONTEXT


class HereAlone:
    """Workers that train in this process."""

    free = 1

    def __init__(self) -> None:
        self.trained: list[str] = []

    def start(self, recipe: Path, log: Path) -> Any:
        self.trained.append(recipe.stem)
        run(load_recipe(recipe), resume=True, progress=False)
        return SimpleNamespace(poll=lambda: 0)


def raw_study(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two shares, each with one plateau-rate run of two budgets, and a finetune after each budget."""
    if not (folder / "general.json").exists():
        write_corpora(folder)
    return {
        "study": str(folder / "study"),
        "seeds": [0],
        "models": [
            {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "ffn": 64, "context": CONTEXT, "vocab_size": VOCAB}
        ],
        "sources": {
            name: {"train": str(folder / name), "heldout": str(folder / f"{name}.heldout")}
            for name in ("general", "chem")
        },
        "general": "general",
        "domain": "chem",
        "domain_tokens": 400,
        "stages": [
            {
                "name": "pretrain",
                "delta": [0, "1/4"],
                "budgets": [10 * STEP, 20 * STEP],
                "batch": {"sequences": 8},
                "optimizer": {"lr": 3e-3},
                "schedule": {"name": "cosine", "warmup": "10%", "horizon": 2000 * STEP},
                "eval": {"every": "25%", "tokens": 400},
            },
            {
                "name": "finetune",
                "replay": [0],
                "tokens": 8 * 4 * CONTEXT,
                "batch": {"sequences": 4},
                "optimizer": {"lr": 1e-3},
                "schedule": {"name": "constant"},
                "eval": {"every": "2 steps", "tokens": 400},
                "stop": {"on": "chem", "patience": 2},
                "grid": {"lr": ["1e-3", "2e-2"]},
            },
        ],
        **changes,
    }

"""Run folders in the trainer's format, made from given losses."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

Losses = list[tuple[float, float]]
"""(domain, general) losses at each evaluation of a finetune."""

STEP_TOKENS = 1000


def fake_run(
    folder: Path,
    arms: list[Losses] | Losses,
    *,
    delta: Fraction | str = "0",
    seed: int = 0,
    tokens: int = 1_000_000,
    kept: int = 0,
    handed_on: int = -1,
    lr: tuple[float, ...] = (),
    change: dict[str, Any] | None = None,
) -> Path:
    """A finished NPT or SPT(delta) run whose finetune has the given held-out losses, one evaluation per step.

    arms       losses of the finetune's grid arms, with learning rates `lr`
    kept       the kept arm
    handed_on  the evaluation of its final weights
    change     recipe fields to replace: {"phases.1.tokens": 5}
    """
    paths: list[Losses] = arms if isinstance(arms[0], list) else [arms]  # type: ignore[assignment,list-item]
    lr = lr or tuple(1e-4 * 2**i for i in range(len(paths)))
    share = Fraction(delta)
    mixture = {"general": str(1 - share), "code": str(share)} if share else {"general": "1"}
    recipe: dict[str, Any] = {
        "run": str(folder),
        "seed": seed,
        "model": {"preset": "1m", "context": 50},
        "tokenizer": "bpe.tiktoken",
        "sources": {name: {"train": f"data/{name}", "heldout": f"data/{name}.heldout"} for name in ("general", "code")},
        "phases": [
            {"name": "pretrain", "tokens": tokens, "mixture": mixture, "optimizer": {"lr": 1e-3}},
            {
                "name": "finetune",
                "tokens": STEP_TOKENS * (len(paths[0]) - 1),
                "mixture": {"code": "100%"},
                "batch": {"sequences": 1},
                "optimizer": {"lr": lr[0]},
                "schedule": {"name": "constant", "warmup": "5 steps"},
                "grid": {"lr": list(lr)} if len(lr) > 1 else None,
            },
        ],
    }
    for key, value in (change or {}).items():
        *parents, last = key.split(".")
        node: Any = recipe
        for parent in parents:
            node = node[int(parent) if isinstance(node, list) else parent]
        node[last] = value

    records: list[dict[str, Any]] = [
        evaluation("pretrain", 0, 0, (9.0, 9.0)),
        evaluation("pretrain", 0, 1, paths[0][0]),
    ]
    for arm, path in enumerate(paths):
        for step, losses in enumerate(path):
            records.append({"kind": "train", "phase": "finetune", "arm": arm, "step": step, "tokens": 0, "loss": 1.0})
            records.append(evaluation("finetune", arm, step, losses))
    end = paths[kept][handed_on]
    summary = {
        "status": "done",
        "parameters": 1,
        "seconds": 1.0,
        "seed": seed,
        "phases": {
            "pretrain": {"steps": 1, "tokens": tokens, "epochs": {"code": float(share) * tokens / 10_000}, "arm": 0},
            "finetune": {
                "steps": 1,
                "tokens": 1,
                "epochs": {"code": 7.0},
                "heldout": by_source(end),
                "arm": kept,
                "scored": {"heldout": {name: {"documents": 12, "tokens": 3456} for name in ("code", "general")}},
                "standard_errors": {"heldout": {"code": 0.02, "general": 0.03}},
            },
        },
    }
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def by_source(losses: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("code", "general"), losses, strict=True))


def evaluation(phase: str, arm: int, step: int, losses: tuple[float, float]) -> dict[str, Any]:
    other = {source: loss + 0.5 for source, loss in by_source(losses).items()}
    return {
        "kind": "eval",
        "phase": phase,
        "arm": arm,
        "step": step,
        "tokens": step * STEP_TOKENS,
        "heldout": by_source(losses),
        "select": other,
        "train": other,
    }

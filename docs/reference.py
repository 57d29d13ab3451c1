"""Writes docs/recipe.md from the recipe's dataclasses: `python docs/reference.py`.

Meanings are the docstrings of the fields, types and limits come from their parsers, and every example is parsed.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from spt_fast import config
from spt_fast.config import Phase, Recipe
from spt_fast.fields import (
    Span,
    boolean,
    cadence,
    key_of,
    parse_count,
    parse_share,
    parse_yaml,
    path,
    paths,
    text,
)
from spt_fast.model.config import GPTConfig, LinearScaling, RopeScaling, Scaling, YarnScaling
from spt_fast.model.presets import PRESETS
from spt_fast.optimizers import OPTIMIZERS, AdamW, Muon, parse_optimizer
from spt_fast.printing import plain

PAGE = Path(__file__).with_name("recipe.md")

SECTIONS: dict[str, type] = {
    "The recipe": Recipe,
    "sources.NAME": config.Source,
    "model": GPTConfig,
    "model.rope_scaling, llama3": RopeScaling,
    "model.rope_scaling, linear": LinearScaling,
    "model.rope_scaling, yarn": YarnScaling,
    "phases[NAME]": Phase,
    "phases[NAME].batch": config.BatchSize,
    "phases[NAME].optimizer, adamw": AdamW,
    "phases[NAME].optimizer, muon": Muon,
    "phases[NAME].schedule": config.Schedule,
    "phases[NAME].eval": config.EvalSettings,
    "phases[NAME].stop": config.Stop,
    "phases[NAME].also_average": config.Averaged,
    "checkpoint": config.Checkpoints,
    "log": config.Log,
    "engine": config.Engine,
}

EXAMPLES = {
    "The recipe": {
        "run": "runs/spt",
        "seed": "1",
        "init": "models/SmolLM2-135M",
        "init_only": "embeddings",
        "precision": "bf16",
        "precision_file": "studies/chem/precision.json",
        "model": "{preset: 124m}",
        "tokenizer": "data/bpe.tiktoken",
        "checkpoint": "{every: 200 steps}",
        "log": "{every: 20 steps}",
        "engine": "{stage: 2}",
        "sources": "{general: {train: data/general, heldout: data/general.heldout}}",
        "phases": "[{name: pretrain, tokens: 2B, mixture: {general: 1}, optimizer: {lr: 6e-4}}]",
    },
    "sources.NAME": {
        "train": "data/chem",
        "heldout": "data/chem.heldout",
        "limit_tokens": "30M",
        "dtype": "uint16",
    },
    "model": {
        "layers": "12",
        "width": "768",
        "heads": "12",
        "kv_heads": "4",
        "ffn": "2048",
        "context": "1024",
        "vocab_size": "50304",
        "head_dim": "64",
        "qk_norm": "true",
        "tied": "false",
        "rope_theta": "500000",
        "norm_eps": "1e-5",
        "qkv_bias": "true",
        "rope_scaling": "{rope_type: linear, factor: 4}",
        "qk_norm_over": "width",
        "norms": "after",
        "o_bias": "true",
        "mlp_bias": "true",
        "window": "4096",
        "full_layers": "[3, 7, 11]",
        "scaled_windows": "false",
        "no_rope_layers": "[3, 7, 11]",
        "family": "qwen2",
    },
    "model.rope_scaling, llama3": {
        "factor": "8",
        "low_freq_factor": "1",
        "high_freq_factor": "4",
        "original_max_position_embeddings": "8192",
    },
    "model.rope_scaling, linear": {"factor": "4"},
    "model.rope_scaling, yarn": {
        "factor": "4",
        "original_max_position_embeddings": "32768",
        "attention_factor": "1.1",
        "mscale": "1",
        "mscale_all_dim": "1",
        "truncate": "false",
    },
    "phases[NAME]": {
        "name": "finetune",
        "tokens": "100M",
        "mixture": "{chem: 99%, general: 1%}",
        "documents": "true",
        "batch": "{sequences: 512, micro: 32}",
        "optimizer": "{lr: 1e-4, weight_decay: 1e-7}",
        "schedule": "{name: constant, warmup: 50 steps}",
        "eval": "{every: 5%, tokens: 1M}",
        "untie": "true",
        "anchor": "1.0",
        "average": "10%",
        "also_average": "[{share: 25%, run: runs/averaged}]",
        "freeze": "embeddings",
        "optimizer_state": "keep",
        "stop": "{on: chem, patience: 3}",
        "grid": "{lr: [1e-5, 4e-5, 1e-4], warmup: [50 steps, 100 steps]}",
    },
    "phases[NAME].batch": {"sequences": "512", "micro": "32", "context": "2048"},
    "phases[NAME].optimizer, adamw": {
        "lr": "6e-4",
        "weight_decay": "0.01",
        "clip": "null",
        "betas": "[0.9, 0.98]",
        "eps": "1e-6",
    },
    "phases[NAME].optimizer, muon": {"lr": "2e-3", "weight_decay": "0.01", "clip": "null", "betas": "[0.9, 0.98]"},
    "phases[NAME].schedule": {
        "name": "wsd",
        "warmup": "2%",
        "final": "0",
        "horizon": "20B",
        "decay": "10%",
        "continue": "true",
    },
    "phases[NAME].eval": {"every": "100M", "tokens": "1M", "samples": "2"},
    "phases[NAME].stop": {"on": "chem", "patience": "5"},
    "phases[NAME].also_average": {"share": "25%", "run": "runs/averaged"},
    "checkpoint": {"every": "200 steps", "keep": "5", "keep_every": "10000 steps", "keep_best": "true"},
    "log": {"every": "50 steps", "to": "[tensorboard, wandb]", "stall_s": "1200"},
    "engine": {
        "name": "deepspeed",
        "stage": "3",
        "offload": "optimizer",
        "config": "my_ds.json",
        "checkpointing": "selective",
        "cuda_graphs": "false",
        "fp8": "true",
        "tune_kernels": "false",
        "deterministic": "true",
    },
}
"""Where a field has none, its default is shown."""

INTRODUCTION = """\
# Recipe reference

Every key that a recipe may hold. `spt-fast train RECIPE --set phases.finetune.optimizer.lr=1e-4`
overrides one; phases go by name or position. An unknown key, or a key given twice, is an error; the
message suggests the nearest key.

| kind of value | written as |
|---|---|
| count | a whole number, also `300K`, `20M`, `1.5B`, `2e6` |
| share | `2%`, `0.02` or `1/50`, kept as an exact fraction |
| span | `500 steps`, `2M` (tokens) or `2%` (of the phase) |
| path | relative to the working directory; `~` and `$NAME` are expanded |

YAML is read strictly: `010`, `1:30`, `yes` and `2026-11-28` are text, and a name of digits with a dot
(`1.10`) needs quotes.

This page is written by `python docs/reference.py` from the dataclasses; a test compares them.
"""


def meanings(cls: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of the classes that it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for item, after in pairwise(body):
            if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = ast.literal_eval(after.value)
                found[item.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return found


def kind_of(parse: Callable[..., Any]) -> str:
    """What a parser takes, in words."""
    inside = inspect.getclosurevars(parse).nonlocals
    if parse in KINDS:
        return KINDS[parse]
    if "choices" in inside:
        return ", ".join(f"`{choice}`" for choice in inside["choices"])
    if "cls" in inside:
        return "section"
    if "parse" in inside:
        return kind_of(inside["parse"])
    low, high, whole = inside["low"], inside["high"], parse.__qualname__.startswith("integer")
    bounds = [f"{'>' if inside.get('open_low') else '≥'} {low:,g}"]
    bounds += [f"≤ {high:,g}" if high < 1e5 else f"≤ 2^{high.bit_length() - 1}"] if high < 2**31 - 1 else []
    return f"{'integer' if whole else 'number'} {', '.join(bounds)}"


KINDS: dict[Any, str] = {
    parse_count: "count",
    parse_share: "share",
    cadence: "span",
    Span.parse: "span",
    boolean: "`true`, `false`",
    text: "name",
    path: "path",
    paths: "path, or list of paths",
    parse_optimizer: "section",
    config._steps: "steps",
    config._stage: "0, 1, 2, 3",
    config._trackers: f"list of {', '.join(f'`{name}`' for name in config.TRACKERS)}",
    config._phase_name: "name",
    config._mixture: "shares by source",
    config._grid: "lists by setting",
    config._averages: "list of sections",
    config._sources: "sections by name",
    config._phases: "list of sections",
    config._auto_or_boolean: "`auto`, `true`, `false`",
    Scaling.parse: "section",
}
"""What parsers take that carry no choices or bounds."""

SHAPES = {
    "betas": "two numbers",
    "momentum": "number ≥ 0, < 1",
    "full_layers": "list of integers",
    "no_rope_layers": "list of integers",
}
"""Fields whose parsers belong to them alone."""


def default_of(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "required"
    value = plain(item.default)
    if isinstance(value, dict):
        return "its defaults"
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value not in ([], ()) else "none"


def rows(title: str, cls: type) -> list[str]:
    said, examples = meanings(cls), EXAMPLES.get(title, {})
    lines = []
    for item in dataclasses.fields(cls):
        key, parse = key_of(item), item.metadata["parse"]
        meaning = said.get(item.name)
        if meaning is None and "cls" in (inside := inspect.getclosurevars(parse).nonlocals):
            meaning = inspect.getdoc(inside["cls"])
        meaning = meaning or {"optimizer": "What updates the weights.", "stop": "Early stopping."}.get(key)
        kind = SHAPES.get(key) or kind_of(parse)
        assert meaning or issubclass(cls, Scaling), f"{cls.__name__}.{item.name} has no docstring"
        default = default_of(item)
        assert key in examples or default.startswith("`"), f"EXAMPLES has none for {title}.{key}"
        example = examples.get(key, default.strip("`"))
        parse(parse_yaml(example, key), key)
        meaning = " ".join((meaning or "").split()).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{key}` | {kind} | {default} | `{example}` | {meaning} |")
    return lines


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, cls in SECTIONS.items():
        introduction = inspect.getdoc(cls) or ""
        if not issubclass(cls, Scaling):
            introduction = introduction.split("\n\n")[0]
        if cls is GPTConfig:
            introduction = "`preset` names a shape of the table below; other keys change single fields of it."
        table = ["| key | value | default | example | meaning |", "|---|---|---|---|---|", *rows(title, cls)]
        body = "\n".join([*([" ".join(introduction.split()), ""] if introduction else []), *table])
        parts.append(f"## {title if cls is Recipe else f'`{title}`'}\n\n{body}\n")
    shape = ("layers", "width", "heads", "kv_heads", "ffn", "context", "vocab_size")
    heading = [f"| preset | {' | '.join(shape)} |", "|---" * (len(shape) + 1) + "|"]
    presets = [f"| `{name}` | {' | '.join(f'{given[key]:,}' for key in shape)} |" for name, given in PRESETS.items()]
    parts.append("## Presets\n\n" + "\n".join([*heading, *presets]) + "\n")
    own = {name for name, kind in OPTIMIZERS.items() if kind.__module__.startswith("spt_fast.")}
    assert own == {title.split(", ")[1] for title in SECTIONS if "optimizer" in title}
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Writes docs/recipe.md and docs/studies_reference.md from the dataclasses of both: `python docs/reference.py`.

Meanings are the docstrings of the fields, types and limits come from their parsers, and every example is parsed.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from textwrap import fill
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
from spt_fast.study import study
from spt_fast.study.study import Axes, Base, Simulated, Study

RECIPE_PAGE, STUDY_PAGE = (Path(__file__).with_name(name) for name in ("recipe.md", "studies_reference.md"))

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

STUDY_SECTIONS: dict[str, type] = {
    "The study": Study,
    "models[NUMBER]": Base,
    "simulate": Simulated,
    "stages[NAME]": Axes,
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
    "The study": {
        "study": "studies/chem",
        "seeds": "3",
        "models": "[{preset: 3m}, {preset: 10m}]",
        "init": "models/SmolLM2-135M",
        "domain": "chem",
        "general": "general",
        "domain_tokens": "[300K, 3M, all]",
        "simulate": "{budget: 20B, domain_tokens: 30M}",
        "stages": "[{name: pretrain, delta: [0, 2%], tokens: 20M, optimizer: {lr: 1e-3}}]",
    },
    "models[NUMBER]": {"init": "models/SmolLM2-135M"},
    "simulate": {"budget": "20B", "domain_tokens": "30M"},
    "stages[NAME]": {
        "name": "finetune",
        "delta": "[0, 1%, 5%]",
        "replay": "[0, 1%]",
        "tokens": "[1M, 4M]",
        "budgets": "[15M, 30M, 60M]",
        "lr": "[3e-4, 1e-3]",
        "source": "smiles",
        "domain_from": "[0, 90%]",
        "anchor": "[0, 1]",
        "average": "[0, 10%]",
        "start": "[pretrained, scratch]",
    },
    "stages[NAME].optimizer": {
        "name": "[adamw, muon]",
        "lr": "[3e-4, 1e-3]",
        "weight_decay": "[0.1, 1]",
        "clip": "[1, null]",
        "betas": "[[0.9, 0.95], [0.9, 0.99]]",
        "eps": "[1e-8, 1e-6]",
        "momentum": "[0.9, 0.95]",
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
| span | `500 steps`, `2M` (tokens, as every number without a unit) or `2%` (of the phase) |
| path | relative to the working directory; `~` and `$NAME` are expanded |

YAML is read strictly: `010`, `1:30`, `yes` and `2026-11-28` are text, and a name of digits with a dot
(`1.10`) needs quotes.

This page is written by `python docs/reference.py` from the dataclasses; a test compares them.
"""

STUDY_INTRODUCTION = """\
# Study reference

Every key that a study may hold; [Studies and laws](studies.md) shows how they work together.
`spt-fast sweep STUDY --set stages.finetune.tokens=2M` overrides one; stages go by name or position. Values are
written as in a [recipe](recipe.md). Where a key takes a list, each value is an arm of the grid, and one value
alone needs no brackets.

This page is written by `python docs/reference.py` from the dataclasses; a test compares them.
"""

FURTHER_KEYS = """\
A stage also takes these keys of a [phase](recipe.md#phasesname), the same in all of its runs: {keys}. `stop` and `grid`
cannot be used with several `budgets` or with `domain_from`, whose runs have several phases. With `grid` each run tries
the values itself and keeps the best; an axis makes a run of each."""


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
    """The values that a parser accepts, in words."""
    inside = inspect.getclosurevars(parse).nonlocals
    if parse in KINDS:
        return KINDS[parse]
    if "choices" in inside:
        return ", ".join(f"`{choice}`" for choice in inside["choices"])
    if "cls" in inside:
        return "section"
    if "parse" in inside:
        kind = kind_of(inside["parse"])
        return f"{kind}, or a list" if parse.__qualname__.startswith("several.") else kind
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
    study._seeds: "integer ≥ 1, or a list",
    study._model: "section",
    study._tokens_or_all: "count, `all`",
    study._stages: "list of sections",
}
"""The values of parsers without choices or bounds."""

SHAPES = {
    "betas": "two numbers",
    "momentum": "number ≥ 0, < 1",
    "full_layers": "list of integers",
    "no_rope_layers": "list of integers",
}
"""Fields with their own parsers."""


def default_of(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "required"
    value = plain(item.default)
    if item.name == "domain_tokens":
        return "`all`"
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        return "its defaults"
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value not in ([], ()) else "none"


def rows(title: str, cls: type) -> list[str]:
    said, examples = meanings(cls), EXAMPLES.get(title, {})
    items = list(dataclasses.fields(cls))
    if cls is Study:  # some of its keys belong to the recipes of its runs
        of_recipe = {item.name: item for item in dataclasses.fields(Recipe)}
        items = [of_recipe.get(item.name, item) for item in items]
        said, examples = meanings(Recipe) | said, EXAMPLES["The recipe"] | examples
    lines = []
    for item in items:
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


TABLE = ("| key | value | default | example | meaning |", "|---|---|---|---|---|")


def section_of(title: str, cls: type, introduction: str) -> str:
    """A heading, what the section is, and its keys."""
    body = "\n".join([*([introduction, ""] if introduction else []), *TABLE, *rows(title, cls)])
    return f"## {title if title.startswith('The ') else f'`{title}`'}\n\n{body}\n"


def introduction_of(cls: type) -> str:
    if cls is GPTConfig:
        return "`preset` names a shape of the table below; other keys change single fields of it."
    introduction = inspect.getdoc(cls) or ""
    return " ".join((introduction if issubclass(cls, Scaling) else introduction.split("\n\n")[0]).split())


def recipe_page() -> str:
    parts = [INTRODUCTION, *(section_of(title, cls, introduction_of(cls)) for title, cls in SECTIONS.items())]
    shape = ("layers", "width", "heads", "kv_heads", "ffn", "context", "vocab_size")
    heading = [f"| preset | {' | '.join(shape)} |", "|---" * (len(shape) + 1) + "|"]
    presets = [f"| `{name}` | {' | '.join(f'{given[key]:,}' for key in shape)} |" for name, given in PRESETS.items()]
    parts.append("## Presets\n\n" + "\n".join([*heading, *presets]) + "\n")
    assert set(own_optimizers()) == {title.split(", ")[1] for title in SECTIONS if "optimizer" in title}
    return "\n".join(parts)


def own_optimizers() -> dict[str, type]:
    """Optimizers except those that a plug-in has registered."""
    return {name: kind for name, kind in OPTIMIZERS.items() if kind.__module__.startswith("spt_fast.")}


def optimizer_section() -> str:
    """Every field of an optimizer is an axis of a stage."""
    title, fields = "stages[NAME].optimizer", dict[str, dataclasses.Field[Any]]()
    for kind in own_optimizers().values():
        fields = {item.name: item for item in dataclasses.fields(kind)} | fields
    lines = []
    for name, item in fields.items():
        owners = [f"`{owner}`" for owner, kind in own_optimizers().items() if hasattr(kind(lr=1.0), name)]
        kind = "`adamw`, `muon`" if name == "name" else SHAPES.get(name) or kind_of(item.metadata["parse"])
        example = EXAMPLES[title][name]
        study._optimizers({"lr": 1.0, "name": list(own_optimizers())} | {name: parse_yaml(example, name)}, None, name)
        lines.append(f"| `{name}` | {kind}, or a list | {default_of(item)} | `{example}` | {', '.join(owners)} |")
    said = "Any field may be a list. If several optimizers are named, each takes the fields that it has."
    table = ["| key | value | default | example | of |", "|---|---|---|---|---|", *lines]
    return "\n".join([f"## `{title}`", "", said, "", *table, ""])


def study_page() -> str:
    said = {
        "The study": "A grid of runs. Either `models` or `init` says what is trained.",
        "models[NUMBER]": "A shape as in a recipe's [`model`](recipe.md#model), or instead of one:",
        "stages[NAME]": "One of `delta` and `replay` is required, and one of `tokens` and `budgets`.",
    }
    parts = [STUDY_INTRODUCTION]
    parts += [section_of(title, cls, said.get(title) or introduction_of(cls)) for title, cls in STUDY_SECTIONS.items()]
    axes = {item.name for item in dataclasses.fields(Axes)}
    further = [key_of(item) for item in dataclasses.fields(Phase) if item.name not in axes]
    shared = [f"`{key}`" for key in further if key not in ("mixture", "optimizer", "also_average")]
    keys = fill(FURTHER_KEYS.format(keys=", ".join(shared)), 110)
    return "\n".join([*parts, optimizer_section(), "## Further keys of a stage\n", keys, ""])


def pages() -> dict[Path, str]:
    """The pages that are generated, by file."""
    return {RECIPE_PAGE: recipe_page(), STUDY_PAGE: study_page()}


if __name__ == "__main__":
    for file, text_of_page in pages().items():
        file.write_text(text_of_page, encoding="utf-8")

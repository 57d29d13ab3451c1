"""The complete workflow on text that every installation has, in a few minutes on two CPU cores.

    corpora → tokenizer → datasets → recipes → runs (NPT and SPT, two seeds each) → comparison

Everything is written to one folder. What exists is not repeated, so an interrupted demo continues where it stopped.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from rich.console import Console

from spt_fast.config import load_recipe
from spt_fast.data.prepare import prepare
from spt_fast.data.tokenizer import Tokenizer, train_tokenizer
from spt_fast.printing import print_grid, print_note, terminal
from spt_fast.quantities import duration
from spt_fast.study.compare import Comparison, compare
from spt_fast.study.corpora import write_domain, write_general
from spt_fast.study.figures import check_place, write
from spt_fast.study.findings import arm_table, conclusion
from spt_fast.study.jobs import train_side_by_side

GENERAL, DOMAIN = "prose", "cpp"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the demo. The defaults take two to four minutes on two cores."""

    general_bytes: int = 7_000_000
    """Size of the general corpus: more than pretraining reads."""
    domain_bytes: int = 400_000
    """Size of the domain corpus; half of it is held out, and only `domain_tokens` of the rest are trained on."""
    vocab_size: int = 4096
    model: str = "{preset: 1m}"
    pretrain_tokens: int = 900_000
    delta: Fraction = Fraction(1, 10)
    """The domain's share of SPT's pretraining tokens."""
    domain_tokens: int = 9_000
    """Domain tokens to train on: few enough that SPT reads them about ten times."""
    finetune_tokens: int = 90_000
    heldout_tokens: int = 16_000
    seeds: tuple[int, ...] = (0, 1)


def demo(out: Path, scale: Scale | None = None) -> Comparison:
    """Run or continue the demo in folder `out`; returns the comparison, also written there as JSON and PNG.

    Exits the process with code 75 when interrupted: finished work is saved, and the same call continues it.
    """
    out, scale = Path(out), scale or Scale()
    check_place(out)
    console = terminal()
    began_s = time.monotonic()
    console.print(
        "Specialized pretraining (SPT) mixes a scarce domain into pretraining from the first step; standard "
        "pretraining (NPT) leaves it to the finetune. Here the domain is C++ headers, the general text English from "
        "docstrings, and the finetune is the same for both. A few minutes on two cores.\n"
    )
    prepare_data(out / "data", scale, console)
    recipes = write_recipes(out, scale)
    print_note(console, f"training {', '.join(map(str, recipes))}\n")
    if not train_side_by_side(recipes, out / "logs", console):
        print_note(console, f"\nstopped and saved; run `spt-fast demo --out {out}` to continue")
        raise SystemExit(75)

    result = compare([load_recipe(recipe).run for recipe in recipes])
    write(result, out)
    console.print()
    print_grid(console, arm_table(result))
    for paragraph in conclusion(result):
        console.print(f"{paragraph}\n")
    console.print(next_steps(out), soft_wrap=True)
    took = duration(time.monotonic() - began_s)
    print_note(console, f"\nTotal time {took}. The picture is {out / 'comparison.png'}")
    return result


def prepare_data(folder: Path, scale: Scale, console: Console) -> None:
    """Write the corpora, train the tokenizer and prepare both datasets with their held-out parts, each if missing."""
    tokenizer_file = folder / "bpe.tiktoken"
    writers = {GENERAL: (write_general, scale.general_bytes), DOMAIN: (write_domain, scale.domain_bytes)}
    texts = {name: folder / f"{name}.jsonl" for name in writers}
    for name, (write_text, limit_bytes) in writers.items():
        if not texts[name].exists():
            size_bytes = write_text(texts[name], limit_bytes)
            print_note(console, f"{texts[name]}: {size_bytes / 1e6:.1f} MB of text")
    if not tokenizer_file.exists():
        train_tokenizer(list(texts.values()), scale.vocab_size, tokenizer_file)
        print_note(console, f"{tokenizer_file}: {scale.vocab_size:,} ids")
    for name, heldout in ((GENERAL, Fraction(1, 20)), (DOMAIN, Fraction(1, 2))):
        if not (folder / f"{name}.heldout.json").exists():
            made = prepare(texts[name], folder / name, Tokenizer.load(tokenizer_file), heldout=heldout, progress=False)
            assert made.heldout is not None
            print_note(console, f"{folder / name}: {made.tokens:,} tokens, {made.heldout.tokens:,} more held out")


def write_recipes(out: Path, scale: Scale) -> list[Path]:
    """One recipe per seed and arm in OUT/recipes; existing ones are kept."""
    (out / "recipes").mkdir(parents=True, exist_ok=True)
    recipes = []
    for seed in scale.seeds:
        for arm, delta in (("npt", Fraction(0)), ("spt", scale.delta)):
            recipe = out / "recipes" / f"{arm}-seed{seed}.yaml"
            if not recipe.exists():
                recipe.write_text(
                    _recipe(out / "runs" / recipe.stem, out / "data", delta, seed, scale), encoding="utf-8"
                )
            recipes.append(recipe)
    return recipes


def _recipe(run_folder: Path, data: Path, delta: Fraction, seed: int, scale: Scale) -> str:
    mixture = {GENERAL: 1 - delta, DOMAIN: delta}
    shares = ", ".join(f"{name}: {100 * share}%" for name, share in mixture.items() if share)
    paths = {name: f"train: {_quoted(data / name)}, heldout: {_quoted(data / f'{name}.heldout')}" for name in mixture}
    return f"""\
run: {_quoted(run_folder)}
seed: {seed}
model: {scale.model}
tokenizer: {_quoted(data / "bpe.tiktoken")}
checkpoint: {{every: 100 steps, keep: 1}}
sources:
  {GENERAL}: {{{paths[GENERAL]}}}
  # scarce on purpose: the first documents up to this many tokens
  {DOMAIN}: {{{paths[DOMAIN]}, limit_tokens: {scale.domain_tokens}}}
phases:
  - name: pretrain
    tokens: {scale.pretrain_tokens}
    mixture: {{{shares}}}  # the only difference between NPT and SPT
    batch: {{sequences: 8}}
    optimizer: {{lr: 3e-3}}
    schedule: {{name: cosine, warmup: 5%}}
    eval: {{every: 50%, tokens: {scale.heldout_tokens}}}
  - name: finetune
    tokens: {scale.finetune_tokens}
    mixture: {{{DOMAIN}: 100%}}
    batch: {{sequences: 4}}
    optimizer: {{lr: 4e-4, weight_decay: 1e-7}}
    schedule: {{name: constant, warmup: 10 steps}}
    eval: {{every: 10%, tokens: {scale.heldout_tokens}}}
    stop: {{on: {DOMAIN}, patience: 2}}  # keep the weights with the best held-out domain loss
    grid: {{lr: [4e-4, 1e-3]}}  # each starts from the same weights; the best by held-out domain loss is kept
"""


def _quoted(path: Path) -> str:
    """The path as a YAML string; YAML accepts JSON strings."""
    return json.dumps(str(path))


def next_steps(out: Path) -> str:
    """The commands for the user's own data."""
    return f"""\
The same with your own data (the recipes of this run are in {out / "recipes"}):
  spt-fast init --general general.jsonl --domain mine.jsonl --out mine
  spt-fast train mine/recipe.yaml
  spt-fast train mine/recipe.yaml --set run=mine/runs/npt \\
    --set "phases.pretrain.mixture={{general: 1}}"
  spt-fast compare mine/runs/npt mine/runs/spt --out comparison"""

"""One study: every share of domain data with every seed, trained from one template, then compared.

    python -m benchmarks.studies.run TEMPLATE --data DIR --domain NAME --deltas 0 2% 10% --seeds 0 1 --out OUT

The template is a recipe without run, seed, sources and mixtures. Runs go side by side; an interrupted study goes on
where it was. Writes OUT/comparison.json and .png.
"""

from __future__ import annotations

import argparse
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from spt_fast.fields import parse_share, read_yaml
from spt_fast.study.compare import compare, print_comparison, write
from spt_fast.study.launch import train_side_by_side


def recipe(template: dict[str, Any], data: Path, domain: str, delta: Fraction, seed: int, run: Path) -> dict[str, Any]:
    """The template filled in for one run."""
    pretrain, finetune = ({**phase} for phase in template["phases"])
    pretrain["mixture"] = {"general": str(1 - delta), domain: str(delta)} if delta else {"general": 1}
    finetune["mixture"] = {domain: 1}
    finetune["stop"] = {**finetune["stop"], "on": domain}
    limit = template["domain_tokens"]
    return {
        **{key: value for key, value in template.items() if key != "domain_tokens"},
        "run": str(run),
        "seed": seed,
        "tokenizer": str(data / template["tokenizer"]),
        "sources": {
            "general": {"train": str(data / "general"), "heldout": str(data / "general.heldout")},
            domain: {"train": str(data / domain), "heldout": str(data / f"{domain}.heldout"), "limit_tokens": limit},
        },
        "phases": [pretrain, finetune],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("template", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tokenizer and the datasets")
    parser.add_argument("--domain", required=True, help="name of the domain's dataset")
    parser.add_argument("--deltas", nargs="+", required=True, help="shares of the domain in pretraining; 0 is NPT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    template = read_yaml(arguments.template)
    arguments.out.mkdir(parents=True, exist_ok=True)
    recipes, runs = [], []
    for seed in arguments.seeds:
        for text in arguments.deltas:
            delta = parse_share(text, "--deltas")
            runs.append(arguments.out / f"delta-{float(delta):g}-seed-{seed}")
            recipes.append(runs[-1].with_suffix(f"{runs[-1].suffix}.yaml"))
            filled = recipe(template, arguments.data, arguments.domain, delta, seed, runs[-1])
            recipes[-1].write_text(yaml.safe_dump(filled, sort_keys=False))

    console = Console()
    if not train_side_by_side(recipes, arguments.out / "logs", console):
        sys.exit(75)
    result = compare(runs)
    write(result, arguments.out)
    print_comparison(result, console)


if __name__ == "__main__":
    main()

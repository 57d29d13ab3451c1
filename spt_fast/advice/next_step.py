"""The recipe that carries out a decision, to paste and complete."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from spt_fast.advice.result import Decision
from spt_fast.advice.sizing import windows_of_step
from spt_fast.config import BatchSize
from spt_fast.errors import counted
from spt_fast.model.presets import PRESETS
from spt_fast.quantities import amount
from spt_fast.study.settings import fields_of, usual, usual_batch
from spt_fast.study.usable import UsableRows

Batch = tuple[int, int]
"""Windows of a step, and tokens of a window."""


@dataclass(frozen=True)
class Rates:
    """Peak learning rates, the other optimizer fields and the batches that they were tuned with, and their source."""

    pretrain: float
    finetune: list[float]
    of: str
    pretrain_optimizer: Mapping[str, Any] = field(default_factory=lambda: {"weight_decay": 0.1})
    finetune_optimizer: Mapping[str, Any] = field(default_factory=lambda: {"weight_decay": 1e-7})
    pretrain_batch: Batch | None = None
    """None if it is unknown, or is for models of another size."""
    finetune_batch: Batch | None = None
    unused: str = ""
    """Why the batch of the runs, if there are any, is not used."""


PUBLISHED = Rates(4e-4, [1e-5, 4e-5, 1e-4], "the paper's, for 1B parameters (arXiv 2603.16177)")
ALIKE = 3.0
"""The largest factor in model size at which rates carry over."""


def rates_of(table: UsableRows | None, runs_params: int | None, params: int | None, delta: float) -> Rates:
    """The rates of the runs of `runs_params` parameters if the model is within a factor of ALIKE of them, else the
    published ones. The pretraining rate is the best one of the share nearest to `delta`."""
    if table is None or runs_params is None:
        return PUBLISHED
    done = pd.concat([table.rows.assign(beaten=False), table.left_out])
    runs = done[(done["params"] == runs_params) & done["handed_on"]].dropna(subset=["lr"])
    pretrain, finetune = runs[(runs["stage"] == 0) & ~runs["beaten"]], runs[runs["stage"] == 1]
    if pretrain.empty or finetune.empty:
        return PUBLISHED
    batch = usual_batch(pretrain)
    if not 1 / ALIKE <= (params or runs_params) / runs_params <= ALIKE:
        what = "the batch" if batch is None else f"the batch of {_in_words(batch)} a step"
        return replace(PUBLISHED, unused=f"{what} and the rates of the runs are for {amount(runs_params)} parameters")
    pretrain = pretrain[(pretrain["delta"] - delta).abs() == (pretrain["delta"] - delta).abs().min()]
    tried = sorted(map(float, finetune["lr"].unique()))
    best = finetune[~finetune["beaten"]]
    batches = usual_batch(pretrain), usual_batch(best)
    of_one = "" if not any(batches) else "' finetunes" if batches[0] else "' pretraining"
    return Rates(
        float(pretrain["lr"].mode()[0]),
        tried,
        "the runs'",
        fields_of(usual(pretrain)),
        fields_of(usual(best)),
        *batches,
        "" if all(batches) else f"the batch of the runs{of_one}, which these rates belong to, is not recorded",
    )


def batch_said(unused: str = "", of_one: str = "") -> str:
    """The comment on a batch that is not that of runs. of_one: the phase that has it, if the other has the runs'."""
    before, it = f"{unused}; " if unused else "", "its" if of_one else "the"
    return f"{before}the batch{of_one} is a default: tune {it} learning rates for the batch that you train with"


def with_comment(recipe: str, says: str) -> str:
    """The recipe below a comment, if there is something to say."""
    return "".join(f"# {line}\n" for line in textwrap.wrap(says, 78)) + recipe


def batch_section(batch: Batch) -> dict[str, int]:
    return dict(zip(("sequences", "context"), batch, strict=True))


def _in_words(batch: Batch) -> str:
    return f"{counted(batch[0], 'window')} of {counted(batch[1], 'token')}"


def default_batch(most: int, window: int, tokens: float) -> Batch:
    """At most `most` windows, but few enough for FEWEST_STEPS steps in a phase of `tokens`: a power of two."""
    return windows_of_step(most, tokens, window), window


def in_windows(batch: Batch, window: int) -> Batch:
    """The batch in windows of another length, with as many tokens in a step or, rounded up, up to a window more."""
    return -(-math.prod(batch) // window), window


def windows_said(batch: Batch, here: Batch) -> str:
    """The comment on a batch of runs that has other windows here."""
    return f"the runs' {_in_words(batch)} a step are {_in_words(here)} here, the model's context"


def next_step(
    decision: Decision,
    *,
    preset: str,
    budget: int,
    finetune_tokens: float,
    rates: Rates = PUBLISHED,
    general: str | Path | None = None,
    domain: str | Path | None = None,
) -> str:
    """The recipe as YAML. The tokenizer, and prefixes that are not given, are placeholders."""
    prefixes = {"general": str(general or "data/general"), "domain": str(domain or "data/domain")}
    late = round(budget * (1 - decision.domain_from)) if decision.domain_from else 0
    known, context = (rates.pretrain_batch, rates.finetune_batch), PRESETS[preset]["context"]
    batches = [  # in windows of the context, since only then all of its positions are trained
        in_windows(batch, context) if batch else default_batch(BatchSize().sequences, context, tokens)
        for batch, tokens in zip(known, (budget, finetune_tokens), strict=True)
    ]
    phases: list[dict[str, Any]] = [
        {
            "name": "pretrain",
            "tokens": exact_count(budget - late),
            "mixture": _mixture(0 if late else decision.delta),
            "batch": batch_section(batches[0]),
            "optimizer": {"lr": rates.pretrain, **rates.pretrain_optimizer},
            "schedule": {"name": "cosine", "warmup": "2%", "horizon": exact_count(budget)},
        }
    ]
    if late:
        rising = {
            "name": "late",
            "tokens": exact_count(late),
            "mixture": _mixture(decision.late_share),
            "optimizer": phases[0]["optimizer"] | {},
            "optimizer_state": "keep",
            "schedule": {"continue": True},
        }
        phases.append(rising)
    finetune = {
        "name": "finetune",
        "tokens": exact_count(round(finetune_tokens)),
        "mixture": _mixture(decision.replay, of="general"),
        "batch": batch_section(batches[1]),
        "untie": True,
        "optimizer": {"lr": rates.finetune[len(rates.finetune) // 2], **rates.finetune_optimizer},
        "schedule": {"name": "constant", "warmup": _finetune_warmup(finetune_tokens, batches[1])},
        "stop": {"on": "domain"},
        "grid": {"lr": rates.finetune},
    }
    recipe = {
        "run": "runs/advised",
        "model": {"preset": preset},
        "tokenizer": "data/bpe.tiktoken",
        "sources": {name: {"train": prefix, "heldout": f"{prefix}.heldout"} for name, prefix in prefixes.items()},
        "phases": [*phases, finetune],
    }
    of_one = "" if not any(known) else " of the finetune" if known[0] else " of pretraining"
    comments = [] if all(known) else [batch_said(rates.unused, of_one)]
    comments += [
        windows_said(batch, here) for batch, here in zip(known, batches, strict=True) if batch not in (None, here)
    ]
    text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=80)
    return with_comment(text, "; ".join(dict.fromkeys(comments)))


def _finetune_warmup(tokens: float, batch: Batch) -> str:
    """The published 50 steps, or 5% of a finetune for which those are more."""
    steps = tokens / math.prod(batch)
    return "50 steps" if 0.05 * steps >= 50 else "5%"


def exact_count(tokens: int) -> int | str:
    """The exact count, in T, B or M if three decimals suffice, in K if it is whole."""
    for unit, size, step in (("T", 10**12, 10**9), ("B", 10**9, 10**6), ("M", 10**6, 1000), ("K", 1000, 1000)):
        if tokens >= size and tokens % step == 0:
            return f"{tokens / size:.12g}{unit}"
    return tokens


def _mixture(share: float | Fraction, of: str = "domain") -> dict[str, str]:
    """The shares of the two sources as exact percentages that sum to 100, `share` to four digits; zero is left out."""
    small = Fraction(f"{float(share):.4g}")
    shares = {of: small, "general" if of == "domain" else "domain": 1 - small}
    return {name: f"{float(100 * shares[name]):.12g}%" for name in ("general", "domain") if shares[name]}

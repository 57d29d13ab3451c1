"""The finetuner's tax: a domain loss that a small model reaches by specialized pretraining costs a larger model, which
was only finetuned, at every token that it serves.

    training   6 · params · (pretraining tokens + finetuning tokens)
    serving    2 · params · tokens served
    break-even where both have cost the same; from there on the small one is cheaper

FLOPs in all, with 6 for a parameter and trained token (arXiv 2001.08361). Attention's own are left out on both sides:
they depend on a shape, which the larger model doesn't have. Two accounts: the larger model's pretraining is paid too
(the small one is then cheaper from the start), or somebody else has paid it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from spt_fast.advice.prior import GAP_CLOSED
from spt_fast.laws.chinchilla import FLOPS_PER_PARAMETER_AND_TOKEN
from spt_fast.study.words import amount, percent

FLOPS_PER_SERVED = FLOPS_PER_PARAMETER_AND_TOKEN / 3
"""Of each parameter: the forward pass alone."""
PUBLISHED_STEP = 3.0
"""GAP_CLOSED is of the step from 1B to 3B."""


def tax(*, params: float, budget: int, finetune_tokens: float, served: int, larger: dict[str, Any]) -> dict[str, Any]:
    """A model of `params` by SPT beside one `larger["factor"]` times as large that was finetuned only, both pretrained
    on `budget` tokens.

    larger      as given: {factor: {mean, low, high}, basis, says}
    accounts    [{what, params, pretraining, finetuning, serving, total}] in FLOPs, for `served` tokens
    break_even  {"both paid" | "larger one for free": {mean, low, high}}: tokens served from which the small model has
                cost less, by the factor and its ends; 0 from the start, None never
    """
    size = params * larger["factor"]["mean"]
    trained = {"budget": budget, "finetune_tokens": finetune_tokens}
    return {
        "larger": larger,
        "served": served,
        "accounts": [
            _account("SPT", params, served, **trained),
            _account("finetuned larger", size, served, **trained),
            _account("the same, pretrained by others", size, served, budget=0, finetune_tokens=finetune_tokens),
        ],
        "break_even": {
            name: {
                edge: break_even(
                    _account("", params, 0, **trained),
                    _account("", params * factor, 0, budget=paid, finetune_tokens=finetune_tokens),
                )
                for edge, factor in larger["factor"].items()
            }
            for name, paid in {"both paid": budget, "larger one for free": 0}.items()
        },
    }


def _account(what: str, params: float, served: float, *, budget: float, finetune_tokens: float) -> dict[str, Any]:
    flops = {
        "pretraining": FLOPS_PER_PARAMETER_AND_TOKEN * params * budget,
        "finetuning": FLOPS_PER_PARAMETER_AND_TOKEN * params * finetune_tokens,
        "serving": FLOPS_PER_SERVED * params * served,
    }
    return {"what": what, "params": params} | flops | {"total": sum(flops.values())}


def break_even(small: dict[str, Any], large: dict[str, Any]) -> float | None:
    """Tokens served at which the accounts, made up before any was served, are level; 0 where the small one is ahead at
    once, None where the larger one is not larger."""
    if large["params"] <= small["params"]:
        return None
    return max(0.0, (small["total"] - large["total"]) / (FLOPS_PER_SERVED * (large["params"] - small["params"])))


def published_factor() -> dict[str, Any]:
    """How much larger a finetuned model must be, by the gaps closed from 1B to 3B: over the three domains, between the
    sizes by the logarithm of params."""
    low, middle, high = (PUBLISHED_STEP**closed for closed in sorted(GAP_CLOSED.values()))
    return {
        "factor": {"mean": middle, "low": low, "high": high},
        "basis": "published",
        "says": "the published 1B models by SPT made up for 23%, 81% and 133% of the step to 3B (arXiv 2603.16177); "
        "that they equal finetuned models 1.3, 2.4 and 4.3 times their size supposes a loss that falls evenly with "
        "log(params), also beyond 3B",
    }


def factor_of(rows: pd.DataFrame, params: float) -> dict[str, Any] | None:
    """The same from the plainest finetunes of several sizes: the size nearest to `params` by its best SPT, at
    the largest budget that has it and a larger one finetuned only; None where there is none.

    The ends are by the best and worst seeds of SPT.
    """
    for budget in sorted(rows["pretrain_tokens"].unique(), reverse=True):
        here = rows[rows["pretrain_tokens"] == budget]
        spt, finetuned = here[here["regime"] == "SPT"], here[here["regime"] == "FT"]
        curve = finetuned.groupby("params")["domain_heldout"].mean()
        sizes = [size for size in spt["params"].unique() if size in curve.index and curve.index.max() > size]
        if not sizes:
            continue
        small = min(sizes, key=lambda size: abs(np.log(size / params)))
        by_share = spt[spt["params"] == small].groupby("pretrain_delta")["domain_heldout"]
        best = by_share.mean().idxmin()
        seeds = by_share.get_group(best)
        losses = {"mean": seeds.mean(), "low": seeds.max(), "high": seeds.min()}
        curve = curve[curve.index >= small]
        factor = {edge: float(_size_at(curve, loss) / small) for edge, loss in losses.items()}
        bound = losses["mean"] < curve.iloc[-1]
        return {
            "factor": factor,
            "basis": "runs",
            "says": f"after {amount(budget)} tokens {amount(small)} parameters by SPT at {percent(best)} end with "
            f"{losses['mean']:.4f}, as {'more than ' if bound else ''}{amount(factor['mean'] * small)} finetuned only "
            f"({', '.join(f'{amount(size)}: {loss:.4f}' for size, loss in curve.items())})",
        }
    return None


def _size_at(curve: pd.Series, loss: float) -> float:
    """Params at which the loss comes down to this one, by log(params) between sizes; an outermost size's beyond."""
    if loss >= curve.iloc[0]:
        return float(curve.index[0])
    for (size, above), (next_size, below) in pairwise(curve.items()):
        if below <= loss:
            return float(size * (next_size / size) ** ((above - loss) / (above - below)))
    return float(curve.index[-1])

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

import numpy as np
import pandas as pd

from spt_fast.advice.prior import GAP_CLOSED
from spt_fast.advice.result import Account, BreakEven, Larger, Tax
from spt_fast.laws.chinchilla import FLOPS_PER_PARAMETER_AND_TOKEN
from spt_fast.study.finetunes import Interval
from spt_fast.study.words import amount, percent

FLOPS_PER_SERVED = FLOPS_PER_PARAMETER_AND_TOKEN / 3
"""Of each parameter: the forward pass alone."""
PUBLISHED_STEP = 3.0
"""GAP_CLOSED is of the step from 1B to 3B."""


def tax(*, params: float, budget: int, finetune_tokens: float, served: int, larger: Larger) -> Tax:
    """A model of `params` by SPT beside one `larger.factor` times as large that was finetuned only, both pretrained on
    `budget` tokens, and `served` tokens by each."""

    def account(what: str, factor: float, paid: int = budget) -> Account:
        size = params * factor
        trained = FLOPS_PER_PARAMETER_AND_TOKEN * size
        return Account(what, size, trained * paid, trained * finetune_tokens, FLOPS_PER_SERVED * size * served)

    small, factor = account("SPT", 1), larger.factor
    return Tax(
        larger=larger,
        served=served,
        accounts=[
            small,
            account("finetuned larger", factor.mean),
            account("the same, pretrained by others", factor.mean, paid=0),
        ],
        break_even={
            name: BreakEven(**{edge: break_even(small, account("", by, paid)) for edge, by in vars(factor).items()})
            for name, paid in {"both paid": budget, "larger one for free": 0}.items()
        },
    )


def break_even(small: Account, large: Account) -> float | None:
    """Tokens served at which the accounts are level; 0 where the small one is ahead at once, None where the larger one
    is not larger."""
    if large.params <= small.params:
        return None
    return max(0.0, (small.training - large.training) / (FLOPS_PER_SERVED * (large.params - small.params)))


def published_factor() -> Larger:
    """How much larger a finetuned model must be, by the gaps closed from 1B to 3B: over the three domains, between the
    sizes by the logarithm of params."""
    low, middle, high = (PUBLISHED_STEP**closed for closed in sorted(GAP_CLOSED.values()))
    return Larger(
        factor=Interval(middle, low, high),
        basis="published",
        says="the published 1B models by SPT made up for 23%, 81% and 133% of the step to 3B (arXiv 2603.16177); "
        "that they equal finetuned models 1.3, 2.4 and 4.3 times their size supposes a loss that falls evenly with "
        "log(params), also beyond 3B",
    )


def factor_of(rows: pd.DataFrame, params: float) -> Larger | None:
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
        loss = float(seeds.mean())
        curve = curve[curve.index >= small]
        factor = Interval(*(_size_at(curve, at) / small for at in (loss, seeds.max(), seeds.min())))
        bound = loss < curve.iloc[-1]
        return Larger(
            factor=factor,
            basis="runs",
            says=f"after {amount(budget)} tokens {amount(small)} parameters by SPT at {percent(best)} end with "
            f"{loss:.4f}, as {'more than ' if bound else ''}{amount(factor.mean * small)} finetuned only "
            f"({', '.join(f'{amount(size)}: {at:.4f}' for size, at in curve.items())})",
        )
    return None


def _size_at(curve: pd.Series, loss: float) -> float:
    """Params at which the loss comes down to this one, by log(params) between sizes; an outermost size's beyond."""
    if loss >= curve.iloc[0]:
        return float(curve.index[0])
    for (size, above), (next_size, below) in pairwise(curve.items()):
        if below <= loss:
            return float(size * (next_size / size) ** ((above - loss) / (above - below)))
    return float(curve.index[-1])

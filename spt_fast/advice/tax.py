"""The finetuner's tax: the extra compute of a larger model that was only finetuned, at the domain loss that a small
model reaches by specialized pretraining.

    training    6 · params · (pretraining tokens + finetuning tokens)
    serving     2 · params · served tokens
    break-even  served tokens at which both have cost the same; beyond them the small model is cheaper

All in FLOPs, with 6 per parameter and trained token (arXiv 2001.08361). Attention's FLOPs are left out on both sides:
they depend on a shape, and of the larger model only the size is known. There are two cases: the larger model's
pretraining is paid for too (the small one is then cheaper from the start), or others have paid for it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd

from spt_fast.advice.prior import GAP_CLOSED
from spt_fast.advice.result import Account, BreakEven, Larger, Tax
from spt_fast.laws.chinchilla import FLOPS_PER_PARAMETER_AND_TOKEN
from spt_fast.quantities import amount, percent
from spt_fast.study.finetunes import Interval

FLOPS_PER_SERVED = FLOPS_PER_PARAMETER_AND_TOKEN / 3
"""FLOPs per parameter and served token: the forward pass alone."""
PUBLISHED_STEP = 3.0
"""GAP_CLOSED refers to models of 1B and 3B parameters."""


def tax(*, params: float, budget: int, finetune_tokens: float, served: int, larger: Larger) -> Tax:
    """The cost of a model of `params` parameters by SPT and of one `larger.factor` times as large that was only
    finetuned: both are pretrained on `budget` tokens, and each serves `served` tokens."""

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
    """Served tokens at which both have cost the same; 0 if the small model is cheaper from the start, None if the large
    one is not larger."""
    if large.params <= small.params:
        return None
    return max(0.0, (small.training - large.training) / (FLOPS_PER_SERVED * (large.params - small.params)))


def published_factor() -> Larger:
    """How much larger a finetuned model must be by the published gaps between 1B and 3B: the lowest, middle and highest
    of three domains, interpolated in log(params)."""
    low, middle, high = (PUBLISHED_STEP**closed for closed in sorted(GAP_CLOSED.values()))
    return Larger(
        factor=Interval(middle, low, high),
        basis="published",
        says="the published 1B models by SPT gained 23%, 81% and 133% of the difference to 3B (arXiv 2603.16177); that "
        "they equal finetuned models 1.3, 2.4 and 4.3 times their size assumes a loss that is linear in log(params), "
        "also beyond 3B",
    )


def factor_of(rows: pd.DataFrame, params: float) -> Larger | None:
    """How much larger a finetuned model must be by runs: the plainest finetunes of several sizes.

    The best SPT arm of the size nearest to `params` is compared with larger finetuned models, at the largest budget
    that has both; None if no budget does. The interval's ends are those of the best and worst seeds of SPT.
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
            says=f"after {amount(budget)} tokens {amount(small)} parameters by SPT at {percent(best)} reach a loss of "
            f"{loss:.4f}; only finetuned, that takes {'more than ' if bound else ''}{amount(factor.mean * small)} "
            f"({', '.join(f'{amount(size)}: {at:.4f}' for size, at in curve.items())})",
        )
    return None


def _size_at(curve: pd.Series, loss: float) -> float:
    """The parameters at which `curve` reaches the loss, interpolated in log(params); the nearest size's beyond it."""
    if loss >= curve.iloc[0]:
        return float(curve.index[0])
    for (size, above), (next_size, below) in pairwise(curve.items()):
        if below <= loss:
            return float(size * (next_size / size) ** ((above - loss) / (above - below)))
    return float(curve.index[-1])

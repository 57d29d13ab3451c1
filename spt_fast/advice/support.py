"""How far the runs support an advice: what lies outside them, the laws' error on held-out runs, what to run next."""

from __future__ import annotations

import math

from spt_fast.advice.evidence import Evidence
from spt_fast.advice.forecast import FEWEST_BUDGETS, FEWEST_POINTS
from spt_fast.advice.prior import SAYS, outside
from spt_fast.advice.result import Asked, Decision, Share, Standing, Support
from spt_fast.quantities import amount, number, percent
from spt_fast.study.finetunes import plainest

NEAR = 1.5
"""The factor up to which a question outside the runs still counts as within them."""
SURE = 0.8
"""The share of the refits from which on the best share counts as settled."""
ASSUMED = (
    "a standard deviation of {:.2g}% between seeds is assumed, from how far these losses lie from their curves and how "
    "much more seeds differed in stored studies"
)
UNITS = {
    "budget": "pretraining tokens",
    "tokens": "tokens",
    "params": "parameters",
    "domain_tokens": "domain tokens",
    "epochs": "epochs",
}


def beyond(factors: dict[str, float], than: float = 1.0) -> list[str]:
    """The factors above `than` by which a question lies outside the runs, in words: "2× in parameters"."""
    return [f"{number(factor)}× in {UNITS[what]}" for what, factor in factors.items() if factor > than]


def support(decision: Decision, evidence: Evidence | None, shares: list[Share] | None, asked: Asked) -> Support:
    if evidence is None:
        return Support(
            outside=None,
            verdict=f"not supported by runs: {SAYS}",
            next=f"run shares of 0, {', '.join(map(percent, _around(decision.delta)))} with a small model, and a "
            "domain corpus that is reduced by the same factor as the budget (simulated epoching); then ask again with "
            "those runs",
        )
    rows = evidence.rows
    read = rows["pretrain_epochs"][rows["pretrain_epochs"] > 0]
    factors = {
        "budget": outside(evidence.budget, rows["pretrain_tokens"].min(), rows["pretrain_tokens"].max()),
        "params": 1.0 if asked.params is None else outside(asked.params, evidence.params, evidence.params),
        "domain_tokens": outside(asked.domain_tokens, evidence.domain_tokens, evidence.domain_tokens),
        "epochs": outside(decision.epochs, read.min(), read.max()) if decision.epochs and len(read) else 1.0,
    }
    known = evidence.forecast
    return Support(
        outside={what: float(factor) for what, factor in factors.items()},
        **vars(known.standing if known else Standing(warnings=[])),
        verdict="; ".join([_verdict(decision, evidence, factors, shares), *_rescaled(asked, evidence)]),
        next=_next(decision, evidence, factors, shares),
    )


def _rescaled(asked: Asked, evidence: Evidence) -> list[str]:
    """How the question was rescaled to the corpus and model size of the runs."""
    said, own, size = [], evidence.domain_tokens, evidence.params
    if not math.isclose(own, asked.domain_tokens, rel_tol=0.01):
        said.append(
            f"the runs' domain corpus has {amount(own)} tokens, yours {amount(asked.domain_tokens)}: the runs are used "
            f"at {amount(evidence.budget)} tokens of pretraining, which read their corpus as often as "
            f"{amount(asked.budget)} read yours"
        )
    if asked.params is not None and not math.isclose(size, asked.params, rel_tol=0.01):
        said.append(
            f"the runs have {amount(size)} parameters, your model {amount(asked.params)}: shares are carried over "
            "unchanged, losses are those of the runs' size"
        )
    return said


def _verdict(decision: Decision, evidence: Evidence, factors: dict[str, float], shares: list[Share] | None) -> str:
    far = beyond(factors, NEAR)
    if decision.basis == "published":
        away = f"which differ by {' and '.join(far)}" if far else "which have no arms to compare at this budget"
        return f"not supported by the runs, {away}: {SAYS}"
    said = [f"extrapolates by {', '.join(far)}" if far else "supported by the runs"]
    known = evidence.forecast
    if known is None or shares is None:
        said.append("as measured in the nearest arms; no law of finetuned losses could be fitted")
        return "; ".join(said)
    held, largest = known.standing.heldout, known.standing.largest
    assert largest is not None
    if held is None:
        said.append("there are too few budgets to hold one out and test the laws on it")
    else:
        more = "" if held.mre < _lead(shares) else ", which is more than the difference of the best two shares"
        said.append(
            f"fitted to budgets up to {amount(held.by)}, the laws predict the losses at {amount(held.tokens)} with an "
            f"error of {100 * held.mre:.2g}%{more}, and {percent(held.predicted)} as the best share there "
            f"({percent(held.seen)} was)"
        )
    if largest.predicted != largest.seen:
        said.append(
            f"at {amount(largest.tokens)} the best share is {percent(largest.predicted)} by the laws, "
            f"{percent(largest.seen)} in the runs"
        )
    if _is_largest(decision, shares):
        said.append(f"{percent(decision.delta)} is the largest share that was run: a larger one may be better")
    if _seeds(evidence) < 2:
        spread = known.standing.assumed_spread
        said.append(
            "with one seed it is unknown how much of the differences is chance"
            + (f": {ASSUMED.format(100 * spread)}" if spread is not None else "")
        )
    likely = sorted((row for row in shares if row.best_in >= 0.05), key=lambda row: -row.best_in)
    found = ", ".join(f"{percent(row.delta)} in {row.best_in:.0%}" for row in likely)
    said.append(
        f"refitted with errors as large as those of the runs, the laws have as the best share {found} of the fits"
    )
    return "; ".join(said)


def _next(decision: Decision, evidence: Evidence, factors: dict[str, float], shares: list[Share] | None) -> str | None:
    """Runs that would make the answer more certain; None if it is certain enough."""
    if shares is None:
        return _for_a_law(evidence, factors)
    likely = sorted(shares, key=lambda row: (-row.best_in, row.domain.mean))
    close = " and ".join(percent(row.delta) for row in sorted(likely[:2], key=lambda row: row.delta))
    held = evidence.forecast and evidence.forecast.standing.heldout
    steps = []
    if _is_largest(decision, shares):
        steps.append(f"also run a share of {percent(2 * decision.delta)}")
    if factors["budget"] > NEAR:
        most = evidence.rows["pretrain_tokens"].max()
        tokens = evidence.budget if evidence.budget < most else min(4 * most, evidence.budget)
        steps.append(f"run shares {close} to {amount(tokens)} tokens")
    elif _seeds(evidence) < 2:
        steps.append(f"add seeds at shares {close}")
    elif likely[0].best_in < SURE or (held and held.mre > _lead(shares)):
        steps.append(f"add seeds at shares {close}, which these runs do not separate reliably")
    elif factors["params"] > NEAR or factors["domain_tokens"] > NEAR:
        steps.append(
            f"run shares {close} at the size asked for, for as long as you can afford, to check that their order holds"
        )
    return "; ".join(steps) or None


def _for_a_law(evidence: Evidence, factors: dict[str, float]) -> str:
    """The runs that a law still needs."""
    rows = evidence.rows
    budgets = plainest(rows[rows["regime"] != "SCPT"]).groupby("pretrain_delta")["pretrain_tokens"]
    few = budgets.nunique()[lambda budgets: budgets < FEWEST_BUDGETS]
    if len(few):
        found = ", ".join(f"{percent(delta)} has {many}" for delta, many in few.items())
        return f"add budgets: a law needs {FEWEST_BUDGETS} or more at each share; {found}"
    if (budgets.size() < FEWEST_POINTS).any():
        return f"add a second seed: a law needs {FEWEST_POINTS} finetunes or more at each share"
    if factors["budget"] > NEAR:
        return f"run budgets nearer to {amount(evidence.budget)} tokens of pretraining"
    return "add a second seed at every share and budget"


def _is_largest(decision: Decision, shares: list[Share]) -> bool:
    return decision.basis == "laws" and decision.delta == max(row.delta for row in shares)


def _lead(shares: list[Share]) -> float:
    """The difference between the two lowest domain losses, relative to the second."""
    best, second = sorted(row.domain.mean for row in shares)[:2]
    return 1 - best / second


def _seeds(evidence: Evidence) -> int:
    return min(arm.seeds for arm in evidence.arms)


def _around(delta: float) -> list[float]:
    return [float(f"{delta / 2:.2g}"), float(f"{delta:.2g}"), min(float(f"{2 * delta:.2g}"), 0.2)]

"""How much general data goes into the finetune: its effect on the general loss and on the domain loss.

Finetunes that differ only in replay are compared in pairs. Without a limit on the general loss, the share with the
lowest general loss is chosen among those that do not clearly raise the domain loss; with a limit, the smallest share
within it.
"""

from __future__ import annotations

import math
import warnings

import pandas as pd

from spt_fast.advice.evidence import Evidence
from spt_fast.advice.prior import REPLAY
from spt_fast.advice.result import Choice, Effect, Replay
from spt_fast.errors import DataError, RecipeError
from spt_fast.laws import ForgettingLaw
from spt_fast.laws.base import LawWarning
from spt_fast.study import views
from spt_fast.study.usable import UsableRows

PAIR = ["regime", "pretrain_delta", "domain_from", "pretrain_tokens", "seed"]


def effects(rows: pd.DataFrame) -> list[Effect]:
    """The effect of each share of general data in one group of finetunes, the smallest share first. Finetunes whose
    general loss was not measured are left out."""
    measured = rows.dropna(subset=["general_heldout"])
    base = measured[measured["injected"] == measured["injected"].min()]
    found = []
    for injected, arm in measured.groupby("injected"):
        pairs = arm.merge(base, on=PAIR, suffixes=("", "_least"))
        if pairs.empty:
            continue
        domain = pairs["domain_heldout"] / pairs["domain_heldout_least"]
        found.append(
            Effect(
                injected=float(injected),
                general=float((pairs["general_heldout"] / pairs["general_heldout_least"]).mean()),
                domain=float(domain.mean()),
                domain_error=float(domain.std() / math.sqrt(len(pairs))) if len(pairs) > 1 else None,
                pairs=len(pairs),
            )
        )
    return found


def least_within(found: list[Effect], general: float, limit: float) -> Effect | None:
    """The effect of the smallest share that lowers a general loss of `general` to `limit`; None if none does."""
    return next((effect for effect in found if effect.general * general <= limit), None)


def costless(found: list[Effect]) -> Effect:
    """The effect with the lowest general loss, without those that raise the domain loss by over two standard errors,
    or at all if these are unknown."""
    free = [effect for effect in found if effect.domain - 2 * (effect.domain_error or 0.0) <= 1]
    return min(free, key=lambda effect: effect.general)


def choose(
    chosen: Choice,
    evidence: Evidence | None,
    effects: list[Effect],
    limit: float | None,
    table: UsableRows | None,
    params: int | None,
    domain_tokens: int,
) -> Replay:
    """The replay for the chosen regime and share: from finetunes with several shares of general data, else from the
    forgetting law, else the published one. limit: the highest general loss to end with, or None."""
    before, after = (evidence.general_of(chosen) if evidence else None) or (None, None)
    if limit is None and len(effects) > 1:
        says = "the share with the lowest general loss among those run that cost nothing in the domain"
        return Replay(costless(effects).injected, "seen", says, effects)
    if limit is not None and after is not None and (found := least_within(effects, after, limit)):
        says = f"the smallest share run that keeps the general loss under {limit:.4f}"
        return Replay(found.injected, "seen", says, effects)
    if limit is not None and before is not None and table is not None and evidence is not None:
        by_law = _by_forgetting_law(table, params or evidence.params, domain_tokens, limit - before)
        if by_law is not None:
            says = (
                f"by the forgetting law of finetunes after the least domain text, for a general loss under {limit:.4f}"
            )
            return Replay(by_law, "law", says, effects)
    if limit is not None and len(effects) > 1:
        says = f"the share with the lowest general loss among those run; it is still above {limit:.4f}"
        return Replay(min(effects, key=lambda effect: effect.general).injected, "seen", says, effects)
    if chosen.regime == "SPT":
        says = "in published runs SPT without replay beat plain pretraining with any replay"
        return Replay(0.0, "published", says, effects)
    says = "in published runs 1% stopped forgetting at no cost in domain loss"
    return Replay(REPLAY, "published", says, effects)


def _by_forgetting_law(table: UsableRows, params: int, domain_tokens: int, rise: float) -> float | None:
    """The share by a law of the finetunes after the largest budget, rounded up to two digits; None if no law can be
    fitted or no share up to a half keeps the general loss from rising by more than `rise`, in nats."""
    groups = [rows for _, rows in views.forgetting(table)]
    if not groups:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LawWarning)
            law = ForgettingLaw().fit(max(groups, key=lambda rows: rows["pretrain_tokens"].max()))
            share = law.injection(params=params, unique_tokens=domain_tokens, max_rise=rise)
    except (DataError, RecipeError):
        return None
    digit = 10 ** math.floor(math.log10(share) - 1) if share else 1
    return float(f"{math.ceil(share / digit) * digit:.2g}") if share <= 0.5 else None

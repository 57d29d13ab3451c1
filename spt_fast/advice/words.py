"""Advice in words, for the terminal and the report: the decision, expected losses, how far the runs support it."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.table import Table

from spt_fast.advice.bases import BaseAdvice
from spt_fast.advice.forecast import LEVEL
from spt_fast.advice.prior import PUBLISHED_RUNS, Prior
from spt_fast.advice.result import Advice, BreakEven, Decision, Distance, Share, Tax
from spt_fast.advice.support import UNITS, beyond
from spt_fast.printing import print_grid
from spt_fast.quantities import amount, number, percent, signed

BASIS = {
    "laws": "by laws fitted to the runs",
    "seen": "as measured in the runs",
    "published": "a prior from published runs, not from measurements of yours",
}
SHARE_HEADINGS = ("share", "epochs", "domain loss", "general loss", "forgetting", "best in")


# ------------------------------------------------------------------------------------------------ for both


def headline(decision: Decision) -> str:
    share = percent(decision.delta)
    return {
        "FT": "Use domain data in the finetune only.",
        "SPT": f"Give the domain {share} of the pretraining tokens.",
        "SCPT": f"Give the domain {share} of the pretraining tokens, late in pretraining.",
        "SPT or SCPT": f"Give the domain {share} of the pretraining tokens, from the start or late.",
    }[decision.regime]


def certainty(advice: Advice) -> list[str]:
    """How far to trust the answer, why runs were not used, and what to run next."""
    more = [f"what to run next: {advice.support.next}"] if advice.support.next else []
    return [*advice.support.verdict.split("; "), *advice.missing, *more]


def costs(advice: Advice) -> list[str]:
    """The expected losses, the runs that they come from, and the replay, a sentence each."""
    replay = advice.replay
    unseen = " (not measured in these runs)" if replay.effects and replay.basis != "seen" else ""
    return [*_expected(advice), f"{percent(replay.share)} replay in the finetune: {replay.says}{unseen}"]


def _expected(advice: Advice) -> list[str]:
    expected, published = advice.expected, advice.prior["expected"]
    if not expected:
        (low, high), (less, more) = published["r_gain"], published["compute_multiplier"]
        return [
            f"expected losses: unknown; published gains over FT only are {low:g} to {high:g}% of the domain loss, or "
            f"the same loss with {less:g} to {more:g} times fewer pretraining tokens"
        ]
    of, shared, by_law = expected.of, advice.decision.delta, advice.decision.basis == "laws"
    gain = ""
    if expected.r_gain is not None and shared:
        gain = f", {abs(expected.r_gain):.2g}% {'below' if expected.r_gain >= 0 else 'above'} FT only"
    found = [f"domain loss {expected.domain} after finetuning{gain}"]
    if expected.general:
        found.append(f"general loss {expected.general} after finetuning")
    alone = next((row for row in advice.shares or () if row.delta == 0), None) if by_law else None
    if alone and alone.general and shared:
        found.append(
            f"without domain text in pretraining the domain loss is {alone.domain.mean:.4f}, the general loss "
            f"{alone.general.mean:.4f}"
        )
    within = "; one seed gives no interval"
    if expected.domain.low < expected.domain.high:
        within = f"; {LEVEL:.0%} of new runs lie in the intervals" if by_law else "; the intervals span the seeds"
    replayed = f" and {percent(of.injected)} replay" if of.injected else ""
    return [
        *found,
        f"these losses are of models of {amount(of.params)} parameters after {amount(of.tokens)} tokens of pretraining "
        f"with {amount(of.domain_tokens)} unique domain tokens{replayed}{within}",
        "the share was chosen by these losses, on the report half of the held-out text; learning rates and checkpoints "
        "were chosen on the select half",
    ]


def share_cells(share: Share) -> list[str]:
    """The cells under SHARE_HEADINGS."""
    return [
        percent(share.delta),
        number(share.epochs),
        str(share.domain),
        str(share.general) if share.general else "n/a",
        "n/a" if share.forgetting is None else signed(share.forgetting, 4),
        f"{share.best_in:.0%}",
    ]


# ------------------------------------------------------------------------------------------------ on a terminal


def print_advice(advice: Advice | BaseAdvice, console: Console) -> None:
    if isinstance(advice, BaseAdvice):
        _print_base_advice(advice, console)
        return
    console.print(advice.decision.says, style="bold")
    for line in findings(advice):
        console.print(f"- {line}")
    for table in (shares_table(advice), effects_table(advice), accounts_table(advice), facts_table(advice)):
        if table:
            print_grid(console, table)
    rates = advice.learning_rates
    console.print(f"a recipe to paste; learning rates are {rates}; fill in the prefixes and the tokenizer:\n")
    console.print(advice.recipe, soft_wrap=True)


def _print_base_advice(advice: BaseAdvice, console: Console) -> None:
    console.print(advice.decision.says, style="bold")
    for line in [BASIS[advice.decision.basis], *advice.missing, advice.general_text]:
        console.print(f"- {line}")
    if advice.arms:
        headings = ("general text", "anchor", "average", "epochs", "domain loss", "general loss", "forgetting", "seeds")
        table = _table(f"runs from {advice.base}", *headings)
        for arm in advice.arms:
            rise = "n/a" if arm.forgetting is None else signed(arm.forgetting.mean, 4)
            losses = (f"{loss.mean:.4f}" if loss else "n/a" for loss in (arm.domain, arm.general))
            how = (percent(arm.replay), f"{arm.anchor:g}", percent(arm.average), number(arm.epochs))
            table.add_row(*how, *losses, rise, str(arm.seeds))
        print_grid(console, table)
    console.print("a recipe to paste; fill in the prefixes:\n")
    console.print(advice.recipe, soft_wrap=True)


def findings(advice: Advice) -> list[str]:
    """The evidence, a sentence each."""
    before = advice.support.before_finetuning
    found = [BASIS[advice.decision.basis], *certainty(advice)]
    if advice.decision.basis == "laws" and before is not None:
        best = percent(float(f"{before:.2g}"))
        largest = max(row.delta for row in advice.shares or ())
        by = (
            "the largest that was run: a larger one may be better"
            if math.isclose(before, largest, rel_tol=1e-6)
            else "by a law that also covers shares that were not run"
        )
        found.append(f"before finetuning the best share is {best}, {by}")
    found += [*costs(advice), *(advice.regimes.says if advice.regimes else ())]
    return [*found, *_papers(advice.prior), *_distance(advice.distance), *_tax(advice.tax)]


def _papers(papers: Prior) -> list[str]:
    ends = list(dict.fromkeys(map(percent, papers["delta_range"] or ())))
    span = f" ({' to '.join(ends)})" if len(ends) > 1 else ""
    worth = papers["worth"]
    far = beyond(papers["outside"])
    outside = f"; the question is outside the published runs by {', '.join(far)}" if far else ""
    lost = papers["expected"]["progress_lost"]
    found = [
        f"the papers: {papers['regime']} at {percent(papers['delta'])}{span}; {papers['why']}{outside}",
        f"{amount(worth['read'])} tokens read from that corpus are worth {amount(worth['fresh'])} fresh ones, and one "
        f"more epoch {worth['next_epoch']:.0%} of an epoch of fresh ones (arXiv 2305.16264)",
    ]
    if lost is not None:
        found.append(
            f"after plain pretraining, a finetune without replay at this size undoes about {lost:.0%} of pretraining's "
            "gain in general loss (arXiv 2502.06042)"
        )
    return found


def _distance(distance: Distance) -> list[str]:
    found = []
    if distance.divergence:
        d = distance.divergence
        bits = ", ".join(f"{n} {d[n]:.3f} ({d[f'{n}_floor']:.3f})" for n in ("unigrams", "bigrams", "trigrams"))
        found.append(
            "distance from the general corpus, n-gram Jensen-Shannon divergence in bits (in brackets: between two "
            f"samples of the general corpus): {bits}"
        )
    if distance.domain_after_plain_finetuning is not None:
        found.append(
            f"domain loss after FT only: {distance.domain_after_plain_finetuning:.4f}; domains with a higher loss gain "
            "more from SPT (this ranked the three published domains correctly)"
        )
    return found


def _tax(tax: Tax | None) -> list[str]:
    if tax is None:
        return []
    factor = tax.larger.factor
    return [
        f"finetuner's tax: SPT equals an only finetuned model with {factor.mean:.3g} ({factor.low:.3g} to "
        f"{factor.high:.3g}) times as many parameters; {tax.larger.says}",
        f"the SPT model is cheaper {_from(tax.break_even['both paid'])} if both pretrainings are paid for, and "
        f"{_from(tax.break_even['larger one for free'])} if the larger model was pretrained by others",
    ]


def _from(served: BreakEven) -> str:
    mean, low, high = (
        "never" if tokens is None else "from the start" if tokens == 0 else f"after {amount(tokens)} served tokens"
        for tokens in (served.mean, served.high, served.low)
    )
    return mean if low == mean == high else f"{mean} (at best {low}, at worst {high})"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table


def shares_table(advice: Advice) -> Table | None:
    """Losses after finetuning at the budget, by share."""
    if not advice.shares:
        return None
    table = _table("after finetuning, by share of the domain in pretraining", *SHARE_HEADINGS, "")
    for row in advice.shares:
        chosen = "←" if advice.decision.delta == row.delta else "" if row.allowed else "over the limit"
        table.add_row(*share_cells(row), chosen)
    return table


def effects_table(advice: Advice) -> Table | None:
    """The effects of replay on the losses."""
    if len(advice.replay.effects) < 2:
        return None
    headings = ("general data", "general loss", "domain loss", "pairs")
    table = _table("replay in the finetune, factors on the losses ± standard error", *headings)
    for effect in advice.replay.effects:
        domain = f"{effect.domain:.4f}" + ("" if effect.domain_error is None else f" ± {effect.domain_error:.4f}")
        table.add_row(percent(effect.injected), f"{effect.general:.4f}", domain, str(effect.pairs))
    return table


def accounts_table(advice: Advice) -> Table | None:
    """The FLOPs of the finetuner's tax, a row per account."""
    if advice.tax is None:
        return None
    title = f"FLOPs with {amount(advice.tax.served)} tokens served"
    table = _table(title, "", "params", "pretraining", "finetuning", "serving", "total")
    for account in advice.tax.accounts:
        flops = (account.pretraining, account.finetuning, account.serving, account.total)
        table.add_row(account.what, amount(account.params), *(f"{part:.3g}" for part in flops))
    return table


def facts_table(advice: Advice) -> Table | None:
    """The sources of a prior."""
    if advice.decision.basis != "published":
        return None
    ranges = ", ".join(f"{amount(low)} to {amount(high)} {UNITS[what]}" for what, (low, high) in PUBLISHED_RUNS.items())
    table = Table("", "source", "status", title=f"published ({ranges})", title_justify="left", box=box.SIMPLE_HEAD)
    for fact in advice.prior["facts"]:
        table.add_row(fact["says"], fact["source"], fact["standing"])
    return table

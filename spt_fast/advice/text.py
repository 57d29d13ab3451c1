"""Advice as people read it: the decision, what to expect, how far the runs support it, and the phases to paste."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spt_fast.advice.forecast import LEVEL
from spt_fast.advice.prior import PUBLISHED_RUNS
from spt_fast.study.words import amount, percent

BASIS = {
    "laws": "by laws fitted to the runs",
    "seen": "as the runs themselves came out",
    "published": "a prior: by published runs, nothing of yours was measured",
}
UNITS = {"budget": "pretraining tokens", "params": "parameters", "domain_tokens": "domain tokens"}


def print_advice(advice: dict[str, Any], console: Console) -> None:
    console.print(f"{advice['decision']['says']}", style="bold", highlight=False)
    for line in findings(advice):
        console.print(f"- {line}", highlight=False)
    for table in (shares_table(advice), effects_table(advice), accounts_table(advice), facts_table(advice)):
        if table:
            console.print(table)
    rates = advice["learning_rates"]
    console.print(f"phases to paste; learning rates are {rates}; prefixes and tokenizer are yours:\n", highlight=False)
    console.print(advice["recipe"], highlight=False, markup=False)


def findings(advice: dict[str, Any]) -> list[str]:
    """A sentence each."""
    decision, support = advice["decision"], advice["support"]
    found = [BASIS[decision["basis"]], *_expected(advice), f"support: {support['verdict']}"]
    if decision["basis"] == "laws" and support["before_finetuning"] is not None:
        best = percent(float(f"{support['before_finetuning']:.2g}"))
        found.append(
            f"before finetuning the best share is {best}, by the OverfittingLaw, which knows those between too"
        )
    if support["next"]:
        found.append(f"next: {support['next']}")
    found += [
        *(advice["regimes"] or {"says": []})["says"],
        f"replay {percent(advice['replay']['share'])}: {_replay(advice)}",
    ]
    found += [*_papers(advice), *_distance(advice["distance"]), *_tax(advice["tax"])]
    return found + [f"note: {line}" for line in advice["missing"]]


def _expected(advice: dict[str, Any]) -> list[str]:
    expected = advice["expected"]
    if not expected:
        low, high = advice["prior"]["expected"]["r_gain"]
        less, more = advice["prior"]["expected"]["compute_multiplier"]
        return [
            f"expected losses: unknown without runs; published gains over FT only are {low:g} to {high:g}% of the "
            f"domain loss, or {less:g} to {more:g} times fewer tokens for the same one"
        ]
    of = expected["of"]
    kind = f"{LEVEL:.0%} of runs" if advice["decision"]["basis"] == "laws" else "seeds"
    losses = [f"domain loss {_interval(expected['domain'])}"]
    if expected["general"]:
        losses.append(f"general loss {_interval(expected['general'])}")
    gain = "" if expected["r_gain"] is None else f"; {expected['r_gain']:.2g}% below FT only in the domain"
    return [
        f"expected ({kind} within): {', '.join(losses)}{gain}; of {amount(of['params'])} parameters, "
        f"{amount(of['domain_tokens'])} domain and {amount(of['tokens'])} pretraining tokens"
    ]


def _interval(loss: dict[str, float]) -> str:
    return f"{loss['mean']:.4f} ({loss['low']:.4f} to {loss['high']:.4f})"


def _replay(advice: dict[str, Any]) -> str:
    replay = advice["replay"]
    return replay["says"] + (
        "" if replay["basis"] == "seen" else " (not seen in these runs)" if replay["effects"] else ""
    )


def _papers(advice: dict[str, Any]) -> list[str]:
    papers = advice["prior"]
    span = "" if papers["delta_range"] is None else f" ({' to '.join(map(percent, papers['delta_range']))})"
    worth = papers["worth"]
    far = [f"{factor:.3g}× in {UNITS[what]}" for what, factor in papers["outside"].items() if factor > 1]
    beyond = f"; the question lies outside of theirs {', '.join(far)}" if far else ""
    lost = papers["expected"]["progress_lost"]
    found = [
        f"the papers: {papers['regime']} at {percent(papers['delta'])}{span}; {papers['why']}{beyond}",
        f"{amount(worth['read'])} tokens read from that corpus are worth {amount(worth['fresh'])} fresh ones, one more "
        f"epoch {worth['next_epoch']:.0%} of a fresh one (arXiv 2305.16264)",
    ]
    if lost is not None:
        found.append(
            f"without replay after plain pretraining, a finetune at this size undoes about {lost:.0%} of what "
            "pretraining has gained in general loss (arXiv 2502.06042)"
        )
    return found


def _distance(distance: dict[str, Any]) -> list[str]:
    found = []
    if distance["divergence"]:
        d = distance["divergence"]
        bits = ", ".join(f"{n} {d[n]:.3f} ({d[f'{n}_floor']:.3f})" for n in ("unigrams", "bigrams", "trigrams"))
        found.append(
            f"distance from the general corpus, n-gram Jensen-Shannon divergence in bits (between two samples of the "
            f"general one): {bits}"
        )
    if distance["domain_after_plain_finetuning"] is not None:
        found.append(
            f"domain loss after plain finetuning: {distance['domain_after_plain_finetuning']:.4f}; of several domains "
            "the one where it is higher has more to gain from SPT (it ranked the published three correctly)"
        )
    return found


def _tax(tax: dict[str, Any] | None) -> list[str]:
    if tax is None:
        return []
    factor = tax["larger"]["factor"]
    return [
        f"finetuner's tax: as good as {factor['mean']:.3g} ({factor['low']:.3g} to {factor['high']:.3g}) times as many "
        f"parameters finetuned only; {tax['larger']['says']}",
        f"the small one is cheaper {_from(tax['break_even']['both paid'])} where both pretrainings are paid, and "
        f"{_from(tax['break_even']['larger one for free'])} where others have pretrained the larger one",
    ]


def _from(served: dict[str, float | None]) -> str:
    mean, low, high = (
        "never" if tokens is None else "from the start" if tokens == 0 else f"after {amount(tokens)} served tokens"
        for tokens in (served["mean"], served["high"], served["low"])
    )
    return mean if low == mean == high else f"{mean} ({low}, to {high})"


def shares_table(advice: dict[str, Any]) -> Table | None:
    """Losses after finetuning at the budget, by share."""
    if not advice["shares"]:
        return None
    table = Table(
        title="after finetuning, by share of the domain in pretraining", title_justify="left", box=box.SIMPLE_HEAD
    )
    for heading in ("share", "epochs", "domain loss", "general loss", "forgetting", "best in", ""):
        table.add_column(heading, justify="right")
    for row in advice["shares"]:
        chosen = "←" if advice["decision"]["delta"] == row["delta"] else "" if row["allowed"] else "over the limit"
        table.add_row(
            percent(row["delta"]),
            f"{row['epochs']:.3g}",
            _interval(row["domain"]),
            _interval(row["general"]) if row["general"] else "n/a",
            "n/a" if row["forgetting"] is None else f"{row['forgetting']:.3f}",
            f"{row['best_in']:.0%}",
            chosen,
        )
    return table


def effects_table(advice: dict[str, Any]) -> Table | None:
    """What replay did to the losses."""
    if len(advice["replay"]["effects"]) < 2:
        return None
    table = Table(title="replay in the finetune, factors on the losses", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("general data", "general loss", "domain loss", "pairs"):
        table.add_column(heading, justify="right")
    for effect in advice["replay"]["effects"]:
        domain = f"{effect['domain']:.4f} ± {effect['domain_error']:.4f}"
        table.add_row(percent(effect["injected"]), f"{effect['general']:.4f}", domain, str(effect["pairs"]))
    return table


def accounts_table(advice: dict[str, Any]) -> Table | None:
    """The finetuner's tax, side by side."""
    if advice["tax"] is None:
        return None
    title = f"FLOPs with {amount(advice['tax']['served'])} tokens served"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in ("params", "pretraining", "finetuning", "serving", "total"):
        table.add_column(heading, justify="right")
    for account in advice["tax"]["accounts"]:
        flops = (f"{account[key]:.3g}" for key in ("pretraining", "finetuning", "serving", "total"))
        table.add_row(account["what"], amount(account["params"]), *flops)
    return table


def facts_table(advice: dict[str, Any]) -> Table | None:
    """What a prior rests on."""
    if advice["decision"]["basis"] != "published":
        return None
    ranges = ", ".join(f"{amount(low)} to {amount(high)} {UNITS[what]}" for what, (low, high) in PUBLISHED_RUNS.items())
    table = Table("", "source", "standing", title=f"published ({ranges})", title_justify="left", box=box.SIMPLE_HEAD)
    for fact in advice["prior"]["facts"]:
        table.add_row(fact["says"], fact["source"], fact["standing"])
    return table

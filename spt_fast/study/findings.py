"""Comparisons and fits in words, for the terminal and the report: a sentence or a table cell for each fact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from spt_fast.printing import print_grid, print_table
from spt_fast.quantities import amount, signed
from spt_fast.study.behind import Behind, rests_on
from spt_fast.study.compare import JUDGED, ArmFigures, Comparison, Tried, Verdict
from spt_fast.study.finetunes import Interval, Treatment, compared_with
from spt_fast.study.fits import Errors, Fits, Fitted, Score
from spt_fast.study.tasks import COLUMNS, cells, title_of

# --------------------------------------------------------------------------------------------------------- comparisons


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the arms as a table, then the sentences on them."""
    print_grid(console, arm_table(comparison))
    if comparison.settings:
        of = "optimizer settings: each arm uses the one with the lowest domain loss on the select half"
        print_table(console, of, SETTING_COLUMNS, map(setting_cells, comparison.settings))
    for line in findings(comparison):
        console.print(f"- {line}")
    for warning in comparison.warnings:
        console.print(f"warning: {warning}")
    for table in comparison.tasks:
        print_table(console, f"\n{title_of(table)}", COLUMNS, (cells(score, "\n±") for score in table.scores))
        for note in table.notes:
            console.print(f"- {note}")


def arm_table(comparison: Comparison) -> Table:
    """A row of figures per arm, 80 columns wide."""
    of = f"finetunes of {comparison.base}\n" if comparison.base else ""
    sources = f"domain: {comparison.domain}, general: {comparison.general}"
    table = Table(
        title=f"{of}{sources}; held-out nats/token\n± half the seeds' range",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("arm")
    headings = ("tokens", "epochs", "seeds", "domain\nbefore", "domain\nafter", "general\nbefore", "general\nafter")
    for heading in (*headings, "forget-\nting", "R_gain\n%"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in comparison.arms:
        name, epochs, seeds, *figures = arm_cells(arm, "\n±", ("domain_before", *ARM_FIGURES))
        table.add_row(name, amount(arm.tokens) if arm.tokens else "base", epochs, seeds, *figures)
    return table


SETTING_COLUMNS = ("arm", "setting", "seeds", "select half", "domain after", "chosen")


def setting_cells(tried: Tried) -> list[str]:
    """The cells of a row under SETTING_COLUMNS; losses are means over seeds."""
    means = (tried.domain_select, tried.domain_after)
    arm = f"{tried.treatment.name}, {amount(tried.tokens)}" if tried.tokens else tried.treatment.name
    return [arm, tried.setting, str(tried.seeds), *(signed(mean, 3) for mean in means), "yes" if tried.kept else ""]


ARM_FIGURES = ("domain_after", "general_before", "general_after", "forgetting")


def arm_cells(arm: ArmFigures, plus_minus: str = " ± ", figures: Sequence[str] = ARM_FIGURES) -> list[str]:
    """The cells of an arm: name, epochs, seeds, the figures and R_gain, as means ± half the range over seeds."""
    return [
        arm.treatment.name,
        f"{arm.domain_epochs.mean:.3g}" if arm.domain_epochs else "",
        str(len(arm.seeds)),
        *(_with_spread(getattr(arm, figure), plus_minus) for figure in figures),
        _with_spread(arm.r_gain, plus_minus, digits=2),
    ]


def _with_spread(over: Interval | None, plus_minus: str, digits: int = 3) -> str:
    if over is None:
        return ""
    return signed(over.mean, digits) + (
        f"{plus_minus}{(over.high - over.low) / 2:.{digits}f}" if over.high > over.low else ""
    )


def findings(comparison: Comparison) -> list[str]:
    """The findings of a comparison, a sentence each."""
    found = judgements([verdict for by_arm in comparison.verdict.values() for verdict in by_arm.values()])
    equal = comparison.general_at_equal_domain
    if len(equal.general) > 1:
        losses = ", ".join(f"{arm.name} {loss.mean:.3f}" for arm, loss in equal.general.items() if loss)
        level = f"{equal.domain_loss:.3f}"
        found.append(f"when the finetune reaches a domain loss of {level}, the general loss is: {losses}")
    found += [*later(comparison), *behind(comparison)]
    return found + [line for arm in comparison.compute_multiplier or {} for line in multiplier(comparison, arm)]


def judgements(judged: Sequence[Verdict]) -> list[str]:
    """A sentence for each verdict over several seeds; those of one seed in a sentence per figure, and a caution."""
    found = [verdict.says for verdict in judged if verdict.seeds != 1]
    single: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in judged:
        if verdict.seeds == 1:
            single.setdefault((JUDGED[verdict.figure], verdict.base.name), []).append(verdict)
    found += [
        f"{figure}, against {base}: " + "; ".join(f"{verdict.arm.name} {verdict.by}" for verdict in of_arms)
        for (figure, base), of_arms in single.items()
    ]
    return [*found, "one seed cannot show which of these differences are more than chance"] if single else found


def later(comparison: Comparison) -> list[str]:
    """A sentence on the effect of a later, unrelated finetune on the domain loss, if there is one."""
    arms = [arm for arm in comparison.arms if arm.tokens == comparison.tokens and arm.domain_later and arm.domain_after]
    if not arms:
        return []
    losses = ", ".join(
        f"{arm.treatment.name} {_mean(arm.domain_after):.3f} to {_mean(arm.domain_later):.3f}" for arm in arms
    )
    return [f"the later finetune on {comparison.runs[0].later} changes the domain loss: {losses}"]


def behind(comparison: Comparison) -> list[str]:
    """A sentence on the held-out text behind the losses, and on what was chosen on other text, if it is recorded."""
    found = {}
    for name, of in ((comparison.domain, "domain_behind"), (comparison.general, "general_behind")):
        known = [one for run in comparison.runs if (one := getattr(run, of)) is not None]
        if not known:
            return []
        found[name] = Behind.least(known)
    return [f"{rests_on(found)}; learning rates and checkpoints were chosen on the select half"]


def multiplier(comparison: Comparison, arm: Treatment) -> list[str]:
    """A sentence on the tokens that NPT needs to reach the loss of an arm, if they or a lower bound are known."""
    factor = (comparison.compute_multiplier or {}).get(arm)
    if not factor:
        return _at_least(comparison, arm)
    says = f"NPT needs {factor:.2f} times the pretraining tokens of {arm.name} for its domain loss after finetuning"
    seeds = (comparison.compute_multiplier_per_seed or {})[arm].values()
    known = [own for own in seeds if own is not None]
    spread = [f"by seed {min(known):.2f} to {max(known):.2f}"] if known else []
    if len(known) < len(seeds):
        spread.append(f"NPT's budgets do not bracket the loss of {len(seeds) - len(known)} of {len(seeds)}")
    return [f"{says} ({', and '.join(spread)})" if len(seeds) > 1 else says]


def _at_least(comparison: Comparison, arm: Treatment) -> list[str]:
    """A lower bound of the multiplier, if the arm's loss is below all losses of the NPT that it is compared with."""
    losses: dict[Treatment, dict[int, float]] = {}
    for own in comparison.arms:
        losses.setdefault(own.treatment, {})[own.tokens] = _mean(own.domain_after)
    base = compared_with(arm, losses)
    if base is None:
        return []
    most, lowest = max(losses[base]), min(losses[base].values())
    fewest = min((tokens for tokens, loss in losses[arm].items() if loss < lowest), default=most)
    if fewest >= most:
        return []
    return [
        f"NPT needs more than {most / fewest:.2g} times the pretraining tokens of {arm.name}: with {amount(most)} its "
        f"domain loss after finetuning is above that of {arm.name} with {amount(fewest)}"
    ]


def conclusion(comparison: Comparison) -> list[str]:
    """A summary of one arm against NPT, in complete sentences."""
    npt, spt = comparison.arms
    name, gain = spt.treatment.name, _mean(spt.r_gain)
    verdicts = {figure: by_arm[spt.treatment].weighed for figure, by_arm in comparison.verdict.items()}
    return [
        f"The domain loss of {name}, which has read the domain {_mean(spt.domain_epochs):.3g} times before the "
        f"finetune, ends {abs(gain):.1f}% {'below' if gain > 0 else 'above'} that of NPT: {verdicts['domain_after']}.",
        f"On general text, the finetune raises the loss by {_mean(npt.forgetting):.2f} nats/token after NPT and "
        f"{_mean(spt.forgetting):.2f} after {name}: {verdicts['forgetting']}. When both reach the same "
        f"domain loss, the general loss is {_mean(npt.general_at_equal_domain):.2f} for NPT and "
        f"{_mean(spt.general_at_equal_domain):.2f} for {name}: {verdicts['general_at_equal_domain']}.",
        "A model this small, trained for such a short time, shows the direction of the effect but not its size.",
    ]


def _mean(over: Interval | None) -> float:
    return math.nan if over is None else over.mean


# ---------------------------------------------------------------------------------------------------------------- fits


def print_fits(fits: Fits, console: Console, *, every_parameter: bool = False) -> None:
    """Print how well each law fits and predicts, its parameters, and what the other laws lack. every_parameter:
    include the laws that have parameters for each share."""
    found = [one for one in fits.laws if one.law]
    if found:
        print_grid(console, _quality_table(found))
    for one in found:
        if one.law and (one.law.names or every_parameter):
            figures = (
                f"{name} {p.value:.4g} "
                + ("(not determined)" if name in one.law.unidentified_ else f"({p.low:.4g} to {p.high:.4g})")
                for name, p in one.parameters.items()
            )
            console.print(f"- {law_title(one)}, with 90% intervals: {', '.join(figures)}")
        for warning in one.warnings:
            console.print(f"- {law_title(one)}: {warning}")
    for one in fits.laws:
        if one.problem:
            console.print(f"- not fitted: {law_title(one)}: {one.problem}")
    for note in (rests_on(fits.behind), *fits.notes):
        console.print(f"- {note}")
    for crossover in fits.crossover:
        console.print(f"- to pretrain or not: {crossover.says}")


def _quality_table(found: Sequence[Fitted]) -> Table:
    """A row per law and group, 80 columns wide."""
    table = Table(
        title="error: mean relative error of the losses that a law was fitted to, and of losses that it predicted",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("law", max_width=26)
    for heading in ("runs", "R²", "error"):
        table.add_column(heading, justify="right")
    table.add_column("left out and\npredicted", no_wrap=True)
    for heading in ("R²", "error"):
        table.add_column(heading, justify="right")
    for one in found:
        left_out = one.holdout.values()
        table.add_row(
            f"{one.law_name}\n{group_name(one.group)}".rstrip(),
            f"{one.runs:,}",
            r2_of(one.score),
            error_of(one.score),
            "\n".join(one.holdout) or "nothing",
            "\n".join(map(r2_of, left_out)),
            "\n".join(map(error_of, left_out)),
        )
    return table


def r2_of(score: Score | Errors | None) -> str:
    return f"{score.r2:.4f}" if score and math.isfinite(score.r2) else ""


def error_of(score: Score | Errors | None) -> str:
    return f"{100 * score.mre:.2f}%" if score else ""


def law_title(one: Fitted) -> str:
    return ", ".join(filter(None, (one.law_name, group_name(one.group))))


def group_name(group: Mapping[str, float | None]) -> str:
    """The known properties that all runs of a fit share, in words."""
    words: dict[str, Callable[[float], str]] = {
        "params": lambda size: f"{amount(size)} parameters",
        "domain_tokens": lambda tokens: f"{amount(tokens)} domain tokens",
        "delta": _regime,
        "pretrain_delta": lambda delta: f"after {_regime(delta)}",
        "pretrain_tokens": lambda tokens: f"{amount(tokens)} tokens of pretraining",
    }
    return ", ".join(words[name](value) for name, value in group.items() if value is not None)


def _regime(delta: float) -> str:
    return Treatment(delta, 0.0, 0.0).name

"""The evidence of a page, in sections: figures with an explanation, and what could not be drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import pandas as pd

from spt_fast.quantities import amount, percent
from spt_fast.report import panels
from spt_fast.report.decision import RunsDecision, TableRow, by_sizes, compared, titled, with_shares
from spt_fast.report.panels import Panel, panel
from spt_fast.study.compare import best_settings
from spt_fast.study.crossover import crossovers
from spt_fast.study.curves import Curve
from spt_fast.study.drawing import Axes
from spt_fast.study.figures import draw_plane
from spt_fast.study.findings import SETTING_COLUMNS, group_name, setting_cells
from spt_fast.study.finetunes import Treatment, every_finetune
from spt_fast.study.fits import Fitted
from spt_fast.study.tasks import COLUMNS, TaskTable, cells, title_of
from spt_fast.study.usable import UsableRows


@dataclass(frozen=True)
class Figure:
    caption: str
    panels: list[Panel]


@dataclass(frozen=True)
class Table:
    """Rows of text, the first column left."""

    caption: str
    columns: Sequence[str]
    rows: list[TableRow]


@dataclass
class Section:
    """Evidence: figures, tables, and a sentence for each figure that could not be drawn."""

    id: str
    title: str
    says: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def show(self, panels: list[Panel], caption: str, missing: str) -> Section:
        """Add a figure of these panels; without panels add the text in `missing`. Returns the section."""
        if panels:
            self.figures.append(Figure(caption, panels))
        else:
            self.missing.append(missing)
        return self


def finetuning(finetunes: pd.DataFrame, decisions: Sequence[RunsDecision]) -> Section:
    best = {decision.sizes: decision for decision in decisions}
    drawn = []
    for sizes, own in with_shares(finetunes.dropna(subset="domain_heldout")).items():
        chosen = best[sizes].best.delta if sizes in best else None
        lowest = f"; lowest at δ = {percent(chosen)} for {amount(best[sizes].budget)}" if chosen is not None else ""
        drawn.append(
            panel(
                titled("After finetuning", sizes, finetunes),
                f"Domain loss after finetuning against δ, a line per budget, {sizes.name}{lowest}.",
                partial(panels.loss_after_finetuning, finetunes=own, chosen=chosen),
            )
        )
    return Section("finetuning", "Domain loss after finetuning").show(
        drawn,
        "Lower is better. Rings are seeds, lines go through their means, one for each pretraining budget, from pale "
        "(the smallest) to strong; the dashed line marks the best share at the largest budget with the most shares. "
        "Compare how far the curve at the best share is below δ = 0 with the distance of the rings, and check whether "
        "the best share moves left as the budget grows. The axis of shares is a square-root axis.",
        missing="No finetunes after pretraining at two shares or more.",
    )


def pretraining(rows: pd.DataFrame) -> Section:
    rows = rows[rows["stage"] == 0]
    colours = panels.colours_of(rows["delta"])
    specialized = rows[(rows["delta"] > 0) | (rows.groupby("params")["delta"].transform("max") == 0)]
    drawn = []
    for sizes in by_sizes(specialized):
        # runs without domain text belong to every corpus
        of_corpus = (rows["domain_tokens"] == sizes.domain_tokens) | (rows["delta"] == 0)
        own = rows[(rows["params"] == sizes.params) & of_corpus]
        for corpus in ("domain", "general"):
            if own[f"{corpus}_heldout"].notna().any():
                drawn.append(
                    panel(
                        titled(f"{corpus.capitalize()} loss", sizes, specialized),
                        f"Held-out {corpus} loss over pretraining tokens, a line per run, coloured by δ.",
                        partial(panels.losses_in_pretraining, rows=own, column=f"{corpus}_heldout", colours=colours),
                    )
                )
    return Section("pretraining", "Pretraining").show(
        drawn,
        "A line for each run, labelled with δ. A domain line that begins to rise has overfitted the repeated corpus. "
        "The distance of a general line from that of δ = 0 is the cost of the domain's share.",
        missing="No run here was pretrained from scratch." if rows.empty else "No held-out losses of pretraining here.",
    )


MOST_CURVES = 40
"""Runs in a panel of training steps."""


def training(curves: Sequence[Curve], rows: pd.DataFrame) -> Section:
    """Training curves of the runs; rows: the runs table, which has the stage and δ of each phase."""
    stages = rows.assign(of=rows["delta"].where(rows["stage"] == 0, rows["pretrain_delta"].fillna(rows["delta"])))
    known = {(row.run, row.phase): (row.stage, row.of) for row in stages.itertuples()}
    joined: dict[tuple[str, int], tuple[float, Curve]] = {}  # by run and stage
    for curve in curves:
        if (at := (curve.run, curve.phase)) in known:
            stage, of_run = known[at]
            before = joined.get((curve.run, stage))
            joined[curve.run, stage] = (of_run, before[1].then(curve) if before else curve)
    colours = panels.colours_of(stages["of"])
    section = Section("training", "Training steps")
    for adapts, name in ((False, "Pretraining"), (True, "Adaptation")):
        own = [found for (_, stage), found in joined.items() if (stage > 0) == adapts]
        if not own:
            continue
        some = f" These are the first {MOST_CURVES} of {len(own)} runs." if len(own) > MOST_CURVES else ""
        drawn = [
            panel(
                f"{name} · {title}",
                f"{title} over the tokens trained, a line per run, coloured by δ.",
                partial(panels.steps_of_runs, curves=own[:MOST_CURVES], of=of, colours=colours),
            )
            for of, title in STEP_TITLES.items()
            if any((curve.figures[of] > 0).any() for _, curve in own[:MOST_CURVES])
        ]
        section.figures.append(
            Figure(
                "A line for the kept arm of each run, coloured by δ; the throughput is that of the machine it was "
                "trained on. A jump in the loss or gradient norm indicates too high a learning rate or bad data."
                + some,
                drawn,
            )
        )
    if not section.figures:
        section.missing.append("No training steps to draw: they are read from the folders of runs or of a study.")
    return section


STEP_TITLES = {
    "loss": "Training loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_s": "Throughput",
}


def forgetting(finetunes: pd.DataFrame) -> Section:
    finetunes = finetunes.dropna(subset=["general_before", "general_heldout"])
    colours = panels.colours_of(finetunes["pretrain_delta"])
    drawn = []
    for sizes, own in by_sizes(finetunes).items():
        budget = own["pretrain_tokens"].max()
        own = own[own["pretrain_tokens"] == budget]
        arms = [
            (f"δ = {percent(arm.delta)}{arm.finetuned}", colours[arm.delta], rows)
            for figures, rows in own.groupby(["pretrain_delta", "injected", "anchor", "average"])
            for arm in [Treatment(*figures)]
        ]
        rises = ", ".join(
            f"{name} {(rows['general_heldout'] - rows['general_before']).mean():+.3f}" for name, _, rows in arms
        )
        drawn.append(
            panel(
                titled(f"After {amount(budget)} tokens of pretraining", sizes, finetunes),
                f"General loss before and after finetuning; mean rise in nats: {rises}.",
                partial(panels.general_before_and_after, arms=arms),
                height_in=panels.height_of_rows(len(arms)),
            )
        )
    return Section("forgetting", "Forgetting").show(
        drawn,
        "General loss before (○) and after (●) finetuning, a point for each seed, with the mean rise beside it. A "
        "shorter line means less forgetting; a dot further left means a better general model after finetuning.",
        missing="No finetune here has a general held-out loss before and after.",
    )


def tasks(tables: Sequence[TaskTable]) -> Section:
    """The task scores of runs, a table per task."""
    section = Section("tasks", "Tasks")
    section.says.append(
        "Scores before and after each run's last phase, ± standard errors. Changes and differences from the first run "
        "of a table are over the same questions; below two standard errors they may be chance."
    )
    for table in tables:
        rows = [TableRow(cells(score)) for score in table.scores]
        section.tables.append(Table(f"{title_of(table)}.", COLUMNS, rows))
        section.missing += [f"{table.task}: {note}." for note in table.notes]
    return section


def settings(used: UsableRows) -> Section:
    """The optimizer settings that were tried, with their losses; no tables if there was only one."""
    section = Section("settings", "Settings of the optimizers")
    section.says.append(
        "Each arm uses the setting with the lowest mean domain loss on the select half; all other figures on this page "
        "are of that setting. The losses after finetuning are on the report half, means over seeds."
    )
    beaten = used.left_out[used.left_out["beaten"]]
    rows = pd.concat([used.rows, beaten], ignore_index=True)
    for sizes, own in by_sizes(every_finetune(rows)).items() if len(beaten) else ():
        _, tried = best_settings(compared(own, rows))
        if tried:
            table = [TableRow(setting_cells(one)[:-1], best=one.kept) for one in tried]
            section.tables.append(Table(f"{sizes.name}.", SETTING_COLUMNS[:-1], table))
    return section


def crossover(table: pd.DataFrame) -> Section:
    section = Section("crossover", "To pretrain or not")
    drawn = []
    for found in crossovers(table):
        size = f"{amount(found.params)} parameters"
        section.says.append(found.says)
        drawn += [
            panel(
                f"Domain loss, {size}",
                f"Domain loss over the size of the domain's corpus, a line per start: {found.says}",
                partial(panels.draw_losses, arms=found.arms),
            ),
            panel(
                f"Gap to training from scratch, {size}",
                f"The difference in domain loss between training from scratch and from pretrained weights, over the "
                f"corpus size: {found.says}",
                partial(panels.draw_gap, found=found),
            ),
        ]
    section.figures.append(
        Figure(
            "The same finetune from pretrained weights, from scratch, and from the pretrained embeddings only, on "
            "nested subsets of the domain. Where the gap reaches the dashed threshold, pretraining no longer makes a "
            "difference.",
            drawn,
        )
    )
    return section


def plane(decisions: Sequence[RunsDecision], finetunes: pd.DataFrame) -> Section:
    drawn = [
        panel(
            titled(f"After {amount(decision.budget)} tokens of pretraining", decision.sizes, finetunes),
            "Paths of finetunes in the plane of domain loss and general loss, coloured by δ.",
            partial(_plane, decision=decision),
            height_in=4.4,
        )
        for decision in decisions
    ]
    return Section("plane", "Domain against general loss").show(
        drawn,
        "The path of each finetune from the end of pretraining (○) to its final weights (●); down and left is better. "
        "Pale lines are not part of the result: other arms of a grid, and steps after the best ones. Where paths cross "
        "the dashed line their domain losses are equal: the lower one has forgotten less.",
        missing="No finetunes to draw.",
    )


def _plane(axes: Axes, decision: RunsDecision) -> None:
    compared = decision.comparison.compared
    arms = {arm: list(compared[arm].values()) for arm in decision.plainest}
    by_share = panels.colours_of(arm.delta for arm in arms)
    draw_plane(axes, decision.comparison, arms, {arm: by_share[arm.delta] for arm in arms})
    axes.set_title("", loc="left")


def laws(fits: Sequence[Fitted]) -> Section:
    """Curves and runs for the laws over tokens or shares, and why other laws were not fitted."""
    section = Section("laws", "Scaling laws against the runs")
    fitted = [fit for fit in fits if fit.law is not None]
    for caption, curves in DRAWN:
        drawn = [
            panel(
                " · ".join(filter(None, (title, group_name(fit.group)))),
                f"{title}, fitted curves against runs, {group_name(fit.group)}.",
                partial(draw, law=fit.law, rows=fit.table),
            )
            for law_name, title, draw in curves
            for fit in fitted
            if fit.law_name == law_name
        ]
        if drawn:
            section.figures.append(Figure(caption, drawn))
    for law_name in dict.fromkeys(fit.law_name for fit in fits if fit.problem is not None):
        groups = [fit for fit in fits if fit.law_name == law_name and fit.problem is not None]
        most = max(groups, key=lambda fit: fit.rows)
        of = f" ({group_name(most.group)})" if most.group else ""
        others = f" {len(groups) - 1} other groups of runs have no such law either." if len(groups) > 2 else ""
        others = " Another group of runs has no such law either." if len(groups) == 2 else others
        section.missing.append(f"No {law_name} law{of}: {most.problem}.{others}")
    return section


DRAWN: tuple[tuple[str, tuple[tuple[str, str, Callable[..., None]], ...]], ...] = (
    (
        "The overfitting law for training and held-out text of the domain over pretraining tokens: curves with 90% "
        "intervals for a new run, and the runs as rings. The law does not explain rings outside the bands; where two "
        "held-out curves cross, the better share changes.",
        (
            ("overfitting", "Training text of the domain", partial(panels.law_over_tokens, of="train_loss")),
            ("overfitting", "Held-out text of the domain", partial(panels.law_over_tokens, of="heldout_loss")),
        ),
    ),
    (
        "The domain loss after finetuning over pretraining tokens, for each share, with 90% intervals for a new run. "
        "The lowest curve at your budget is the best share.",
        (("post-finetuning", "After finetuning", partial(panels.law_over_tokens, of="finetuned_loss")),),
    ),
    (
        "The D-CPT law: loss against the domain's share of continual pretraining, at the largest number of tokens, a "
        "line per model size, with 90% intervals for a new run. A larger share lowers the domain loss and raises the "
        "general loss.",
        (
            ("dcpt-domain", "Domain loss", partial(panels.law_over_ratio, of="domain")),
            ("dcpt-general", "General loss", partial(panels.law_over_ratio, of="general")),
        ),
    ),
)
"""For each figure: its caption, and its panels as (law, title, drawing function)."""

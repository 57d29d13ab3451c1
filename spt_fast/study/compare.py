"""Compare runs: the gain of specialized pretraining in the domain loss, and the forgetting of general text.

An *arm* is all runs with the same treatment (delta, the domain's share of the pretraining tokens; replay, the share of
other sources in the finetune; its anchor and average) and the same pretraining budget. Its runs differ by seed; if
several optimizer settings were run, the best one is used (see settings). NPT is delta = 0. An arm is compared with NPT
with the same finetune if there is one, else with NPT with the plainest finetune. Losses are held-out, in nats per
token. The definitions are those of "The Finetuner's Fallacy", arXiv 2603.16177:

    R_gain(delta)       100 · (L_NPT→FT − L_SPT(delta)→FT) / L_NPT→FT, L the domain loss after finetuning
    forgetting          general loss after finetuning − before
    compute multiplier  tokens that NPT needs for the domain loss after finetuning of SPT(delta) / tokens of SPT(delta),
                        at the largest budget of SPT whose loss NPT's budgets bracket. (The paper's headline is at NPT's
                        loss after 200B tokens; the two differ as curves are not parallel in log tokens.)

We add *general at equal domain*: the general loss when each finetune reaches the same domain loss, which is the lowest
one that every run reaches. Finetunes of a base with unknown pretraining all have delta 0, and are named after their
treatment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import pandas as pd

from spt_fast.errors import RecipeError
from spt_fast.study.behind import Behind
from spt_fast.study.finetunes import Interval, Treatment, compared_with
from spt_fast.study.runs import FinetunePath, FinishedRun, check_comparable, differences
from spt_fast.study.runs_table import last_runs
from spt_fast.study.settings import beaten, in_words, setting_ids, setting_of, settings_of, varied
from spt_fast.study.tasks import TaskTable, task_tables

FIGURES = (
    "domain_epochs",
    "domain_before",
    "domain_after",
    "general_before",
    "general_after",
    "forgetting",
    "general_at_equal_domain",
    "domain_later",
    "general_later",
)
AFTER = ("domain_after", "general_after")
JUDGED = {
    "domain_after": "domain loss after finetuning",
    "forgetting": "forgetting",
    "general_after": "general loss after finetuning",
    "general_at_equal_domain": "general loss at equal domain loss",
    "domain_later": "domain loss after the later finetune",
}
"""The figures that arms are compared by, in words; lower is better."""


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """The figures of one run."""

    name: str
    folder: str
    treatment: Treatment
    seed: int
    base: str | None = None
    """The name of the weights that were finetuned, if their pretraining is unknown."""
    tokens: int
    """Tokens of pretraining."""
    domain_epochs: float
    """Epochs of the domain in pretraining."""
    domain_before: float
    domain_after: float
    general_before: float
    general_after: float
    domain_behind: Behind | None = None
    """The held-out text behind the domain losses."""
    general_behind: Behind | None = None
    """The held-out text behind the general losses."""
    paths: list[FinetunePath]
    """The evaluations of each arm of its grid."""
    arm: int = 0
    """The kept arm of the grid."""
    lr: float | None = None
    """The peak learning rate of the kept arm."""
    warmup: str | None = None
    """The warm-up of the kept arm."""
    domain_select: float = math.nan
    """The domain loss on the select half, by which the best share and the best setting are chosen."""
    setting: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer setting of the finetune: SETTINGS and `grid` by name."""
    pretrain_setting: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer setting of pretraining."""
    pretraining: str = ""
    """The run of the pretraining; empty if it is unknown."""
    later: str | None = None
    """The source of a later, unrelated finetune."""
    domain_later: float | None = None
    """The domain loss after the later finetune."""
    general_later: float | None = None
    """The general loss after the later finetune."""
    general_at_equal_domain: float | None = None
    """None unless the run has the compared budget."""

    @property
    def forgetting(self) -> float:
        return self.general_after - self.general_before

    @property
    def path(self) -> FinetunePath:
        return self.paths[self.arm]

    @classmethod
    def of(cls, run: FinishedRun) -> Finetune:
        grid = run.finetune.arms()
        kept = run.finetuned.arm_of(run.finetune)
        chosen = run.finetune.with_overrides(grid[kept])
        paths = [run.finetune_path(arm) for arm in range(len(grid))]
        _, domain_before, general_before = paths[kept][0]
        domain_after, general_after = run.heldout(run.finetuned["heldout"])
        domain_later, general_later = run.heldout(run.later.heldout) if run.later else (None, None)
        folder = run.later.folder if run.later else run.folder
        first = run.pretraining[0] if run.pretraining else None
        return cls(
            name=folder.resolve().name,
            folder=str(folder),
            treatment=run.treatment,
            seed=run.recipe.seed,
            base=run.base,
            tokens=sum(trained.done["tokens"] for trained in run.pretraining),
            domain_epochs=math.fsum(trained.done["epochs"].get(run.domain, 0.0) for trained in run.pretraining),
            domain_before=domain_before,
            domain_after=domain_after,
            general_before=general_before,
            general_after=general_after,
            domain_behind=Behind.of(run.finetuned, run.domain),
            general_behind=Behind.of(run.finetuned, run.general),
            paths=paths,
            arm=kept,
            lr=chosen.optimizer.lr,
            warmup=str(chosen.schedule.warmup),
            domain_select=run.finetuned.get("select", {}).get(run.domain, math.nan),
            setting=setting_of(run.finetune, kept),
            pretrain_setting=setting_of(first.phase, first.done.arm_of(first.phase)) if first else {},
            pretraining=first.recipe.run if first else "",
            later=run.later.source if run.later else None,
            domain_later=domain_later,
            general_later=general_later,
        )

    def as_json(self) -> dict[str, Any]:
        inner = ("domain_select", "pretraining", "setting", "pretrain_setting")
        figures = _beside_treatment(self, if_known=("base", "_behind", "later"))
        return {name: value for name, value in figures.items() if name not in inner} | {"forgetting": self.forgetting}


def _beside_treatment(of: Finetune | ArmFigures | Tried, if_known: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields with those of the treatment in its place; if_known: endings of fields that are left out if None."""
    figures = {name: value for name, value in vars(of).items() if value is not None or not name.endswith(if_known)}
    return {**figures.pop("treatment")._asdict(), **figures}


Arm = dict[int, Finetune]
"""The runs of one arm by seed."""
Arms = dict[Treatment, Arm]
"""The arms of one budget."""


@dataclass(frozen=True)
class Figure(Interval):
    """Mean and range over an arm's seeds, with the standard deviation (None for one seed)."""

    std: float | None

    @classmethod
    def of(cls, seeds: Iterable[float | None]) -> Figure | None:
        given = [math.nan if value is None else value for value in seeds]
        over = Interval.of(given)
        return None if over is None else cls(**vars(over), std=stdev(given) if len(given) > 1 else None)

    def as_json(self) -> dict[str, float | None]:
        return {"mean": self.mean, "min": self.low, "max": self.high, "std": self.std}


@dataclass(frozen=True)
class Gain(Interval):
    """R_gain in percent, paired by seed with NPT."""

    per_seed: dict[str, float]

    @classmethod
    def against(cls, npt: Arm, arm: Arm) -> Gain | None:
        """The gain over the seeds that both arms have; None if there are none."""
        per_seed = {
            str(seed): 100 * (npt[seed].domain_after - run.domain_after) / npt[seed].domain_after
            for seed, run in arm.items()
            if seed in npt
        }
        over = Interval.of(per_seed.values())
        return None if over is None else cls(**vars(over), per_seed=per_seed)


@dataclass(frozen=True, kw_only=True)
class ArmFigures:
    """The figures of an arm over its seeds; a figure that was not measured is None."""

    treatment: Treatment
    tokens: int
    seeds: list[int]
    domain_epochs: Figure | None
    domain_before: Figure | None
    domain_after: Figure | None
    general_before: Figure | None
    general_after: Figure | None
    forgetting: Figure | None
    general_at_equal_domain: Figure | None
    r_gain: Gain | None
    domain_later: Figure | None = None
    general_later: Figure | None = None

    def as_json(self) -> dict[str, Any]:
        return _beside_treatment(self, if_known=("later",))


@dataclass(frozen=True)
class Verdict:
    """Whether two arms differ by more than the spread between seeds, over the seeds that both have."""

    figure: str
    """A key of JUDGED."""
    arm: Treatment
    base: Treatment
    seeds: int
    """The number of common seeds."""
    difference: float | None
    """The difference of the means over seeds; None without a common seed."""
    spread: float | None
    """The larger of the two arms' ranges (max - min) over seeds; None with fewer than two."""
    exceeds: bool | None
    """Whether the difference has the same sign at every seed and is larger than the spread; None with fewer than two
    seeds."""

    @property
    def says(self) -> str:
        return f"{JUDGED[self.figure]}, {self.arm.name} against {self.base.name}: {self.weighed}"

    @property
    def by(self) -> str:
        """The difference in words."""
        if self.difference is None:
            return "unknown, since the arms have no seed in common"
        return f"{abs(self.difference):.3f} {'lower' if self.difference < 0 else 'higher'}"

    @property
    def weighed(self) -> str:
        """The difference, and whether it exceeds the spread over seeds."""
        if self.difference is None:
            return self.by
        if self.spread is None:
            return f"{self.by}; one seed cannot show whether that is more than chance"
        seen = f"the spread between {self.seeds} seeds ({self.spread:.3f})"
        return (
            f"{self.by}, more than {seen}" if self.exceeds else f"{self.by}, not more than {seen}: this may be chance"
        )

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("difference", "spread", "seeds", "exceeds", "says")}


@dataclass(frozen=True)
class EqualDomain:
    """General losses when each finetune reaches the lowest domain loss that all of them reach."""

    domain_loss: float
    general: dict[Treatment, Figure | None]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One of several settings of an arm."""

    treatment: Treatment
    tokens: int
    """Tokens of pretraining."""
    setting: str
    """The values that differ between settings, in words."""
    seeds: int
    domain_select: float
    """The mean over seeds; the best setting is chosen by the seeds that all settings of the arm have."""
    domain_after: float
    """The mean over seeds."""
    general_after: float
    """The mean over seeds."""
    kept: bool
    """Whether the arm uses the runs of this setting."""

    def as_json(self) -> dict[str, Any]:
        return _beside_treatment(self)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of comparing runs."""

    domain: str = "the domain"
    """The name of the domain source."""
    general: str = "general text"
    """The name of the general source."""
    tokens: int
    """The compared budget, in pretraining tokens; `runs`, `arms` and `compute_multiplier` include others. It is the
    largest budget at which the most arms, NPT included, can be compared."""
    runs: list[Finetune]
    arms: list[ArmFigures]
    """The arms of all budgets."""
    r_gain: dict[Treatment, Gain | None] | None
    """None without NPT; an arm without a common seed has None."""
    compute_multiplier: dict[Treatment, float | None] | None
    """None without NPT; an arm whose loss NPT's budgets do not bracket has None."""
    compute_multiplier_per_seed: dict[Treatment, dict[str, float | None]] | None
    """The same from the curves of each seed, at the same budget of SPT."""
    general_at_equal_domain: EqualDomain
    verdict: dict[str, dict[Treatment, Verdict]]
    """By figure, a key of JUDGED."""
    warnings: Sequence[str] = ()
    """Failed runs of a study, and differences that may explain losses, beside treatment, budget and seed."""
    tasks: Sequence[TaskTable] = ()
    """The runs' task scores, in the order of `runs`."""
    settings: Sequence[Tried] = ()
    """The settings of all arms, if one has several."""

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("tasks", "settings") or value}

    @property
    def base(self) -> str | None:
        """The name of the weights that all runs finetuned; None if their pretraining is known."""
        return self.runs[0].base

    @property
    def compared(self) -> Arms:
        """The arms of the compared budget, ascending."""
        return _by_budget(self.runs)[self.tokens]


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Compare finished runs, or those of a study's last stage.

    If runs of an arm differ in optimizer fields, the best setting is used.

    Raises RecipeError or CheckpointError for runs that are unfinished, lack pretraining or a finetune, repeat an arm
    and seed, or differ in domain, held-out text, tokenizer or model.
    """
    if not folders:
        raise RecipeError("runs: none given; give the folders of finished runs, or of a study")
    found_in = [last_runs(Path(folder)) for folder in folders]
    runs = [FinishedRun.read(run) for last, _ in found_in for run in last]
    check_comparable(runs)
    finetunes, tried = best_settings([Finetune.of(run) for run in runs])
    found = compare_finetunes(finetunes)
    tasks = task_tables([Path(run.folder) for run in found.runs])
    return replace(
        found,
        domain=runs[0].domain,
        general=runs[0].general,
        warnings=[*(said for _, left_out in found_in for said in left_out), *differences(runs, searched=bool(tried))],
        tasks=tasks,
        settings=tried,
    )


def best_settings(runs: Sequence[Finetune]) -> tuple[list[Finetune], list[Tried]]:
    """The runs of each arm's best setting, and all settings if an arm has several; the rule is that of `usable`."""
    if not runs:
        return [], []
    arm = [*Treatment._fields, "tokens"]
    table = pd.DataFrame([{**run.treatment._asdict(), **vars(run), **run.setting} for run in runs])
    pretraining = settings_of(pd.DataFrame([run.pretrain_setting for run in runs]))
    own = settings_of(table)
    table = table.assign(first=setting_ids(pretraining), last=setting_ids(table))
    for _, same in table.groupby([*arm, "seed", "first", "last"]):
        if len(same) > 1:
            _refuse_twice(*(runs[i] for i in same.index[:2]))
    length = table.groupby("pretraining")["tokens"].transform("max")
    ends = table[["delta", "seed", "pretraining", "domain_select"]].assign(length=length, **pretraining)
    ends = ends[table["tokens"] == length]
    ends["judged"] = ends.groupby("pretraining")["domain_select"].transform("min")
    ends = ends.drop_duplicates("pretraining")
    worse = table["pretraining"].isin(ends.loc[beaten(ends, ["delta", "length"], by="judged"), "pretraining"])
    worse = worse | beaten(table[~worse], arm).reindex(table.index, fill_value=False)
    if not worse.any():
        return list(runs), []
    before, here = varied(pretraining), varied(own)
    table["setting"] = [
        " · ".join(filter(None, (first and f"pretraining {first}", last)))
        for first, last in zip(
            (in_words(row, before) for row in pretraining.to_dict("records")),
            (in_words(row, here) for row in own.to_dict("records")),
            strict=True,
        )
    ]
    means = {"seeds": ("seed", "nunique"), **{name: (name, "mean") for name in ("domain_select", *AFTER)}}
    tried = table.assign(kept=~worse).groupby([*arm, "setting"], sort=False).agg(**means, kept=("kept", "any"))
    kind = type(runs[0].treatment)
    found = [
        Tried(treatment=kind(*map(float, key[:-2])), tokens=int(key[-2]), setting=key[-1], **row)
        for key, row in zip(tried.index, tried.to_dict("records"), strict=True)
    ]
    return [run for run, is_worse in zip(runs, worse, strict=True) if not is_worse], sorted(
        found, key=lambda one: (one.tokens, one.treatment, one.domain_select)
    )


def compare_finetunes(runs: Sequence[Finetune]) -> Comparison:
    """Compare finetunes by their figures, read from run folders or from a runs table."""
    budget = _widest(_by_budget(runs))
    equal_domain = max(min(domain for _, domain, _ in run.path) for run in runs if run.tokens == budget)
    runs = [
        replace(run, general_at_equal_domain=general_when(run.path, equal_domain)) if run.tokens == budget else run
        for run in runs
    ]
    budgets = _by_budget(runs)
    compared = budgets[budget]
    figures = [_arm_figures(treatment, tokens, arms) for tokens, arms in budgets.items() for treatment in arms]
    here = {arm.treatment: arm for arm in figures if arm.tokens == budget}
    has_npt = any(treatment.delta == 0 for treatment in compared)
    multipliers = _compute_multipliers(budgets)
    gains = {arm: here[arm].r_gain for arm in compared if compared_with(arm, compared) is not None}
    return Comparison(
        tokens=budget,
        runs=runs,
        arms=figures,
        r_gain=gains if has_npt else None,
        compute_multiplier=None if multipliers is None else {arm: own.of_means for arm, own in multipliers.items()},
        compute_multiplier_per_seed=None
        if multipliers is None
        else {arm: own.per_seed for arm, own in multipliers.items()},
        general_at_equal_domain=EqualDomain(
            equal_domain, {arm: own.general_at_equal_domain for arm, own in here.items()}
        ),
        verdict={
            figure: _verdicts(figure, compared)
            for figure in JUDGED
            if all(getattr(run, figure) is not None for arm in compared.values() for run in arm.values())
        },
    )


def _by_budget(runs: Iterable[Finetune]) -> dict[int, Arms]:
    """The runs by budget, treatment and seed, each ascending. RecipeError if two runs agree in all three."""
    budgets: dict[int, Arms] = {}
    for run in sorted(runs, key=lambda run: (run.tokens, run.treatment, run.seed)):
        same = budgets.setdefault(run.tokens, {}).setdefault(run.treatment, {}).setdefault(run.seed, run)
        if same is not run:
            _refuse_twice(same, run)
    return budgets


def _refuse_twice(run: Finetune, other: Finetune) -> None:
    raise RecipeError(
        f"runs: {run.folder} and {other.folder} have the same delta ({run.treatment.key}), the same pretraining tokens "
        f"({run.tokens:,}) and the same seed ({run.seed}); give one of them; corpora of different sizes are "
        "compared by `spt-fast report`"
    )


def _widest(budgets: Mapping[int, Arms]) -> int:
    """The budget at which the most arms, NPT included, can be compared."""

    def breadth(tokens: int) -> tuple[bool, int, int]:
        arms = budgets[tokens]
        return any(arm.delta == 0 for arm in arms) and len(arms) > 1, len(arms), tokens

    return max(budgets, key=breadth)


def general_when(path: FinetunePath, domain_loss: float) -> float:
    """The general loss where the path first reaches `domain_loss`, interpolated between evaluations. The path must
    reach it."""
    if path[0][1] <= domain_loss:
        return path[0][2]
    for (_, domain, general), (_, next_domain, next_general) in pairwise(path):
        if next_domain <= domain_loss:
            return general + (next_general - general) * (domain - domain_loss) / (domain - next_domain)
    raise AssertionError(f"the path never reaches {domain_loss}")


def _arm_figures(treatment: Treatment, tokens: int, arms: Arms) -> ArmFigures:
    arm, base = arms[treatment], compared_with(treatment, arms)
    figures = {figure: Figure.of(getattr(run, figure) for run in arm.values()) for figure in FIGURES}
    gain = None if base is None else Gain.against(arms[base], arm)
    return ArmFigures(treatment=treatment, tokens=tokens, seeds=list(arm), r_gain=gain, **figures)


class _Multiplier(NamedTuple):
    of_means: float | None
    per_seed: dict[str, float | None]


def _compute_multipliers(budgets: Mapping[int, Arms]) -> dict[Treatment, _Multiplier] | None:
    curves: dict[Treatment, dict[int, Arm]] = {}
    for tokens, arms in budgets.items():
        for treatment, arm in arms.items():
            curves.setdefault(treatment, {})[tokens] = arm
    if not any(treatment.delta == 0 for treatment in curves):
        return None
    return {
        treatment: _multiplier(curves[base], curve)
        for treatment, curve in sorted(curves.items())
        if (base := compared_with(treatment, curves)) is not None
    }


def _multiplier(npt: Mapping[int, Arm], spt: Mapping[int, Arm]) -> _Multiplier:
    """The multiplier at SPT's largest budget whose mean loss NPT's mean losses bracket."""
    means = _curve(npt)
    for tokens, loss in sorted(_curve(spt).items(), reverse=True):
        if (factor := compute_multiplier(means, tokens, loss)) is not None:
            arm = spt[tokens]
            return _Multiplier(
                factor,
                {str(seed): compute_multiplier(_curve(npt, seed), tokens, arm[seed].domain_after) for seed in arm},
            )
    return _Multiplier(None, {})


def _curve(by_budget: Mapping[int, Arm], seed: int | None = None) -> dict[int, float]:
    """{tokens: domain loss after finetuning}: of one seed at the budgets that have it, or the means over seeds."""
    return {
        tokens: fmean(run.domain_after for run in arm.values() if seed in (None, run.seed))
        for tokens, arm in by_budget.items()
        if seed is None or seed in arm
    }


def compute_multiplier(npt: Mapping[int, float], tokens: int, loss: float) -> float | None:
    """The tokens that NPT needs to reach `loss`, divided by `tokens`, those of SPT. npt: {tokens: domain loss after
    finetuning}.

    Interpolated linearly in log tokens between NPT's budgets; None if they do not bracket the loss.
    """
    for (fewer, worse), (more, better) in pairwise(sorted(npt.items())):
        if worse > better and worse >= loss >= better:
            return fewer * (more / fewer) ** ((worse - loss) / (worse - better)) / tokens
    return None


def _verdicts(figure: str, arms: Arms) -> dict[Treatment, Verdict]:
    """Each arm compared with its NPT; without NPT, with the arm of the smallest delta."""
    against = {arm: compared_with(arm, arms) or min(arms) for arm in arms}
    return {arm: judge(figure, arm, base, arms) for arm, base in against.items() if arm != base}


def judge(figure: str, arm: Treatment, base: Treatment, arms: Arms) -> Verdict:
    """The verdict on `arm` against `base` in a figure, a key of JUDGED."""
    seeds = sorted(arms[arm].keys() & arms[base].keys())
    pairs = [(getattr(arms[arm][seed], figure), getattr(arms[base][seed], figure)) for seed in seeds]
    by_seed = [ours - theirs for ours, theirs in pairs]
    difference, spread, exceeds = fmean(by_seed) if pairs else None, None, None
    if difference is not None and len(pairs) > 1:
        spread = max(max(values) - min(values) for values in zip(*pairs, strict=True))
        exceeds = abs(difference) > spread and (max(by_seed) < 0 or min(by_seed) > 0)
    return Verdict(figure, arm, base, len(seeds), difference, spread, exceeds)

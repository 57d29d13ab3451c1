"""The runs of a study: a tree of recipes, each run below the one whose weights it starts from."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

from spt_fast.config import Model, Recipe, check_lengths, recipe_from, recorded_recipe
from spt_fast.errors import RecipeError, SptError, shown_key
from spt_fast.fields import Span, naming
from spt_fast.model.config import GPTConfig
from spt_fast.optimizers import parse_optimizer
from spt_fast.study.study import Base, Stage, Study, Tuned, for_a_name
from spt_fast.train.lr import PLATEAU, learning_rate
from spt_fast.train.weights import read_config


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study: its recipe, and the run whose weights it starts from."""

    name: str
    stage: int
    recipe: Recipe
    model: Model | Base
    """The shape or base, which the recipe of a run that starts from another run of the study doesn't contain."""
    after: str | None
    made_by: str | None = None
    """The run that differs only in `average` and trains for both."""


@dataclass(frozen=True)
class _Branch:
    """A path down the tree: the settings that all runs below it share, and the folder of its weights."""

    model: Model | Base
    seed: int
    limit: int | None
    root: str
    """The model's part of names."""
    label: str
    after: str | None
    weights: str | None


@dataclass(frozen=True)
class _Arm:
    """One combination of the values of a stage's axes."""

    share: Fraction
    """Of the domain."""
    late: Fraction
    """The part of the stage that ends before the domain is mixed in."""
    budgets: tuple[int, ...]
    tuned: Tuned
    anchor: float
    average: Fraction
    start: str


def expand(study: Study) -> list[PlannedRun]:
    """Every run of the study, each after the one that it starts from.

    Raises RecipeError for an invalid recipe, and for a budget in the decay of the learning rate.
    """
    branches = [
        _Branch(model, seed, limit, label, label, None, model.init if isinstance(model, Base) else None)
        for (model, label), limit, seed in product(study.starts, study.limits, study.seeds)
    ]
    runs: dict[str, PlannedRun] = {}
    for position, stage in enumerate(study.stages):
        branches = [below for branch in branches for below in _grow(study, position, stage, branch, runs)]
    return list(runs.values())


def _grow(study: Study, position: int, stage: Stage, branch: _Branch, runs: dict[str, PlannedRun]) -> Iterator[_Branch]:
    """Adds the stage's runs below a branch to `runs`, and yields a branch for each point at which one saves weights."""
    for arm in _arms(stage):
        names = _names(study, stage, branch, arm)
        name, least = names[arm.average], min(names)
        if name not in runs:
            recipe = _recipe(study, stage, branch, arm, names)
            after = None if arm.start == "scratch" else branch.after
            made_by = None if arm.average == least else names[least]
            runs[name] = PlannedRun(name, position, recipe, branch.model, after, made_by)
        label, weights = name.removesuffix(_of_seed(branch)), study.folder / "runs" / name / "weights"
        saved = runs[name].recipe.phases[-len(arm.budgets) :]
        for phase, budget in zip(saved, arm.budgets, strict=True):
            point = f"-at{_short(budget)}" if len(arm.budgets) > 1 else ""
            yield dataclasses.replace(branch, label=label + point, after=name, weights=str(weights / phase.name))


def _arms(stage: Stage) -> Iterator[_Arm]:
    axes = stage.axes
    arrivals = [(share, late) for share in axes.shares for late in (axes.domain_from if share else (Fraction(0),))]
    for (share, late), budgets, tuned, anchor, average, start in product(
        arrivals, axes.runs, stage.optimizers, axes.anchor, axes.average, axes.start
    ):
        yield _Arm(share, late, budgets, tuned, anchor, average, start)


def _limit(stage: Stage, branch: _Branch, arm: _Arm) -> int | None:
    """Tokens of the domain that this run may read, if it reads any."""
    return branch.limit if arm.share or stage.axes.source else None


def _names(study: Study, stage: Stage, branch: _Branch, arm: _Arm) -> dict[Fraction, str]:
    """The names of the runs that differ only in their average, by average."""
    axes, limit = stage.axes, _limit(stage, branch, arm)
    what = f"{axes.name}-{for_a_name(axes.source) if axes.source else 'd'}{float(arm.share):.12g}"
    what += "" if limit is None else f"-u{_short(limit)}"
    what += f"-from{float(arm.late):.12g}" if arm.late else ""
    what += f"-{_short(arm.budgets[-1])}"
    trunk = branch.root if arm.start == "scratch" else branch.label
    names: dict[Fraction, str] = {}
    for said in (*arm.tuned.labels, arm.tuned.labels[0]):
        labels = _labels(what + said, arm.anchor, axes.average, arm.start)
        names = {part: f"{trunk}_{label}{_of_seed(branch)}" for part, label in labels.items()}
        begun = (_began(study.folder / "runs" / name, arm.tuned) for name in names.values())
        if not arm.tuned.said or any(begun):
            break
    return names


def _recipe(study: Study, stage: Stage, branch: _Branch, arm: _Arm, names: Mapping[Fraction, str]) -> Recipe:
    runs_folder, least = study.folder / "runs", min(names)
    treatment: dict[str, Any] = {"anchor": arm.anchor, "average": str(arm.average)}
    if arm.average == least and len(names) > 1:  # this run trains for all averages
        others = [(part, runs_folder / other) for part, other in names.items() if part != least]
        treatment["also_average"] = [{"share": str(part), "run": str(run)} for part, run in others]
    if arm.start == "frozen embeddings":
        treatment["freeze"] = "embeddings"
    raw: dict[str, Any] = {
        "run": str(runs_folder / names[arm.average]),
        "seed": branch.seed,
        "tokenizer": study.tokenizer,
        "precision": study.precision,
        "precision_file": str(study.folder / "precision.json"),
        "checkpoint": {"keep": 1, **(study.checkpoint or {})},
        "engine": study.engine or {},
        "log": study.log or {},
        "sources": _sources(study, _limit(stage, branch, arm), stage.axes.source),
        "phases": _phases(study, stage, arm, treatment),
    }
    if arm.start == "scratch" or branch.weights is None:
        raw["model"] = {key: value for key, value in vars(branch.model).items() if value is not None}
    else:
        raw["init"] = branch.weights
        raw["init_only"] = None if arm.start == "pretrained" else "embeddings"
    with naming_stage(stage):
        recipe = recipe_from(raw)
        check_lengths(recipe, _context(branch.model))
    if len(arm.budgets) > 1:
        _check_plateau(study, recipe, branch, f"stages[{shown_key(stage.axes.name)}]")
    return recipe


def _of_seed(branch: _Branch) -> str:
    return f"_s{branch.seed}"


@contextmanager
def naming_stage(stage: Stage) -> Iterator[None]:
    """Errors and warnings about a phase of a run's recipe name the study's stage instead."""

    def renamed(says: object) -> str:
        return re.sub(r"phases\[[^\]]*\]", f"stages[{shown_key(stage.axes.name)}]", str(says))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except SptError as error:
            raise type(error)(renamed(error), argument=error.argument) from None
    for warning in caught:
        warnings.warn(renamed(warning.message), warning.category, stacklevel=3)


def _labels(what: str, anchor: float, averages: tuple[Fraction, ...], start: str) -> dict[Fraction, str]:
    """The names of runs that differ only in their average, by average."""
    before = what + (f"-anchor{anchor:.12g}" if anchor else "")
    after = "" if start == "pretrained" else f"-{start.replace(' ', '-')}"
    return {share: before + (f"-average{float(share):.12g}" if share else "") + after for share in averages}


def _began(folder: Path, tuned: Tuned) -> bool:
    """Whether a run with this optimizer has begun."""
    if not (folder / "recipe.yaml").exists():
        return False
    with suppress(RecipeError):  # a damaged recipe is reported when that run is trained
        return recorded_recipe(folder / "recipe.yaml").phases[0].optimizer == parse_optimizer(tuned.section, "")
    return False


def _sources(study: Study, limit: int | None, other: str | None) -> dict[str, Any]:
    """A recipe's sources: the domain, the general source, and a stage's replacement for the domain. The domain is
    limited if it is trained on."""
    names = (study.general, study.domain, *([other] if other else []))
    sources = {name: dict(study.sources[name]) for name in names}
    if limit is not None:
        sources[study.domain]["limit_tokens"] = limit
    return sources


def _phases(study: Study, stage: Stage, arm: _Arm, treatment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A phase per budget, after a phase without the domain if that is mixed in late, all with one schedule."""
    name, share, budgets, whole = stage.axes.name, arm.share, arm.budgets, arm.budgets[-1]
    before = round(arm.late * whole)
    parts = [(name, whole - before, share)]
    if before:
        parts = [(f"{name}-general", before, Fraction(0)), *parts]
    elif len(budgets) > 1:
        parts = [
            (f"{name}-{_short(end)}", end - start, share) for start, end in zip((0, *budgets), budgets, strict=False)
        ]
    phase = {**stage.phase, "optimizer": arm.tuned.section, **treatment}
    if len(parts) > 1:
        schedule = {"horizon": whole, **(phase.get("schedule") or {})}
        for key in schedule.keys() & {"warmup", "decay"}:
            schedule[key] = _of_whole(schedule[key], whole, f"stages[{shown_key(name)}].schedule.{key}")
        every = (phase.get("eval") or {}).get("every", "10%")
        every = _of_whole(every, whole, f"stages[{shown_key(name)}].eval.every")
        phase |= {"schedule": schedule, "eval": {**(phase.get("eval") or {}), "every": every}}
    carried_on = {"schedule": {"continue": True}, "optimizer_state": "keep", "untie": False}
    return [
        {
            **phase,
            "name": part,
            "tokens": tokens,
            "mixture": _mixture(study, stage, domain),
            **(carried_on if i else {}),
        }
        for i, (part, tokens, domain) in enumerate(parts)
    ]


def _mixture(study: Study, stage: Stage, share: Fraction) -> dict[str, str]:
    shares = {study.general: 1 - share, stage.axes.source or study.domain: share}
    return {source: str(part) for source, part in shares.items() if part}


def _of_whole(value: object, whole: int, where: str) -> str:
    """A share of the whole run in tokens, for a phase that is only a part of it."""
    span = Span.parse(value, where)
    return str(max(1, round(span.amount * whole))) if span.unit == "share" and span.amount else str(span)


def _check_plateau(study: Study, recipe: Recipe, branch: _Branch, where: str) -> None:
    """Raises RecipeError unless the rate is near its peak at every budget: only the largest would gain from a decay."""
    first = recipe.phases[0]
    tokens_per_step = first.tokens_per_step(_context(branch.model))
    tokens = 0
    for phase in recipe.phases:
        tokens += phase.tokens
        steps = max(1, round(Fraction(tokens, tokens_per_step)))
        share = learning_rate(first.schedule, 1.0, steps, steps, tokens_per_step)
        if share < PLATEAU:
            raise RecipeError(
                f"{where}.budgets: at {tokens:,} tokens the learning rate is {share:.0%} of its peak, and below "
                f"{PLATEAU:.0%} it is not comparable with a run of that length; give schedule.name: constant, a cosine "
                "with a schedule.horizon several times the largest budget, or `tokens` for a run per budget"
            )


def _context(model: Model | Base) -> int:
    if isinstance(model, Base):
        with naming("init"):
            return read_config(Path(model.init)).context
    if model.context:
        return model.context
    if model.preset is None:
        raise RecipeError("models: a shape needs a preset, or its context")
    return GPTConfig.preset(model.preset).context


def _short(value: int) -> str:
    """A count in short form: 300K, 1.5M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size and value * 1000 % size == 0:
            return f"{value / size:.12g}{unit}"
    return str(value)

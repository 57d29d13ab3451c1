"""A study: a grid of runs as one YAML file. `tree.expand` makes its recipes.

    study: studies/chem                  # its folder: recipes, runs, logs and the runs table
    seeds: 3
    models: [{preset: 1m}, {preset: 3m}] # or [{init: SmolLM2-135M}], to continue from weights
    tokenizer: data/bpe4096.tiktoken
    sources: {general: {train: …, heldout: …}, chem: {train: …, heldout: …}}
    general: general
    domain: chem
    domain_tokens: [100K, 1M]            # training reads the first documents of the domain up to this many tokens
    stages:
      - name: pretrain
        delta: [0, 1%, 5%]               # the domain's share; or `replay`, the general corpus's share
        budgets: [5M, 10M, 20M]          # points of one run at a plateau of its learning rate
        optimizer: {lr: 1e-3}
        schedule: {name: cosine, warmup: 2%, horizon: 200M}
      - name: finetune                   # after every budget of every pretraining run
        replay: [0, 1%]
        tokens: 1M
        …

A stage is a phase template (any key of a recipe's phase) with axes: `delta` or `replay`, `budgets` or `tokens`,
`domain_from`, `lr`, `anchor`, `average`, `start` and every field of its optimizer that is a list. Every combination is
a run from the final weights of each run of the previous stage. All arms have the same axes, including learning rates.
Identical runs are trained once: pretraining without domain text is shared by all `domain_tokens`. `source: other` in a
stage replaces the domain by another source, such as in a later finetune.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from typing import Any

from spt_fast.config import Model, Phase
from spt_fast.errors import RecipeError, invalid, nearest, shown, shown_key
from spt_fast.fields import (
    build,
    integer,
    key_of,
    number,
    one_of,
    optional,
    parse_count,
    parse_share,
    path,
    section,
    setting,
    text,
)
from spt_fast.optimizers import OPTIMIZERS, AdamW
from spt_fast.synonyms import unknown_key

STARTS = ("pretrained", "scratch", "embeddings", "frozen embeddings")
MOST_SEEDS = 1000


def several(parse: Any) -> Any:
    """A parser of a list of values that `parse` reads, or of a single value."""

    def parse_all(value: object, where: str) -> tuple[Any, ...]:
        values = value if isinstance(value, (list, tuple)) else [value]
        if not values:
            raise RecipeError(f"{where}: is an empty list; name at least one value")
        parsed = tuple(parse(item, f"{where}[{i}]" if len(values) > 1 else where) for i, item in enumerate(values))
        for i, item in enumerate(parsed):
            if item in parsed[:i]:
                raise RecipeError(f"{where}[{i}]: {shown(values[i])} is there twice; name every value once")
        return parsed

    return parse_all


def _tokens_or_all(value: object, where: str) -> int | None:
    return None if value == "all" else parse_count(value, where)


def _seeds(value: object, where: str) -> tuple[int, ...]:
    """Seeds, from a list or from their number."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        if value > MOST_SEEDS:
            raise RecipeError(invalid(where, value, f"at most {MOST_SEEDS} seeds; write [{value}] for that one seed"))
        return tuple(range(value))
    return several(integer(0))(value, where)


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of a stage: `delta` or `replay`, `tokens` or `budgets`, and every field with several values."""

    name: str = setting(text)
    """The stage's name in `--set stages.NAME.…` and in the names of its runs."""
    delta: tuple[Fraction, ...] | None = setting(optional(several(parse_share)), None)
    """The domain's share of the stage's tokens; with `domain_from`, of those after it."""
    replay: tuple[Fraction, ...] | None = setting(optional(several(parse_share)), None)
    """Instead of `delta`: the general corpus's share."""
    tokens: tuple[int, ...] | None = setting(optional(several(parse_count)), None)
    """Lengths, each a separate run."""
    budgets: tuple[int, ...] | None = setting(optional(several(parse_count)), None)
    """Instead of `tokens`: lengths that are points of one run, which saves its weights at each of them."""
    lr: tuple[float, ...] | None = setting(optional(several(number(0.0, open_low=True))), None)
    """Peak learning rates, each a separate run. By default `optimizer.lr`."""
    source: str | None = setting(optional(text), None)
    """The source that replaces the domain in this stage."""
    domain_from: tuple[Fraction, ...] = setting(several(parse_share), (Fraction(0),))
    """The share of the stage's tokens after which the domain is mixed in; above 0 it is SCPT."""
    anchor: tuple[float, ...] = setting(several(number(0.0)), (0.0,))
    """Decay toward the stage's starting weights."""
    average: tuple[Fraction, ...] = setting(several(parse_share), (Fraction(0),))
    """The share of the stage's starting weights in its final weights."""
    start: tuple[str, ...] = setting(several(one_of(*STARTS)), ("pretrained",))
    """What is copied from the previous stage: everything, nothing, or the embeddings."""

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """The domain's shares."""
        return self.delta if self.delta is not None else tuple(1 - share for share in self.replay or ())

    @property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """The budgets of each run, ascending."""
        return (tuple(sorted(self.budgets)),) if self.budgets else tuple((tokens,) for tokens in self.tokens or ())


@dataclass(frozen=True)
class Tuned:
    """One combination of the values in an optimizer's lists."""

    section: dict[str, Any]
    """The section `optimizer` of a recipe."""
    said: tuple[str, ...]
    """The parts of a run's name, one for each field with a list."""

    @property
    def labels(self) -> list[str]:
        """The combination in a run's name, first as it is now, then as it was when fewer fields had lists."""
        sizes = range(len(self.said), -1, -1)
        return ["".join(parts) for size in sizes for parts in combinations(self.said, size)]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage's axes, and the settings that all its runs share."""

    axes: Axes
    optimizers: tuple[Tuned, ...]
    phase: dict[str, Any]
    """The other keys of a recipe's phase, as in YAML."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Simulated epoching (arXiv 2606.07597): small runs mislead unless they repeat the domain as often as the run that
    they simulate. The domain is cut to the number of tokens that gives this at the largest budget."""

    budget: int = setting(parse_count)
    """Pretraining tokens of the run that is simulated."""
    domain_tokens: int = setting(parse_count)
    """Unique domain tokens of that run."""


def _stages(raw: object, where: str) -> tuple[Stage, ...]:
    if not isinstance(raw, list) or not raw:
        raise RecipeError(invalid(where, raw, "write a list of at least one stage"))
    return tuple(_stage(item, f"{where}[{shown_key(_name(item, i))}]", first=i == 0) for i, item in enumerate(raw))


def _name(item: object, position: int) -> object:
    return item.get("name", position) if isinstance(item, Mapping) else position


def _stage(raw: object, where: str, *, first: bool) -> Stage:
    if not isinstance(raw, Mapping):
        raise RecipeError(invalid(where, raw, "write a section with name, delta, tokens and optimizer"))
    own = {item.name for item in dataclasses.fields(Axes)}
    known = own | {key_of(item) for item in dataclasses.fields(Phase)}
    for key in raw:
        if key not in known:
            raise RecipeError(f"{where}.{shown_key(key)}: {unknown_key(key, known - {'mixture', 'also_average'})}")
    axes = build(Axes, {key: value for key, value in raw.items() if key in own}, where)
    phase = {str(key): value for key, value in raw.items() if key not in own}
    _check_axes(axes, phase, where, first=first)
    _check_schedule(axes, phase, where)
    optimizer = {} if phase.get("optimizer") is None else phase["optimizer"]
    if not isinstance(optimizer, Mapping):
        raise RecipeError(invalid(f"{where}.optimizer", optimizer, "write a section such as {lr: 1e-3}"))
    if axes.lr and isinstance(optimizer.get("lr"), (list, tuple)):
        raise RecipeError(f"{where}.lr: optimizer.lr is a list too; leave one out")
    if not (axes.lr or "lr" in optimizer):
        raise RecipeError(f"{where}.lr: missing; give a list of rates to try, or optimizer.lr")
    optimizers, listed = _optimizers(optimizer, axes.lr, f"{where}.optimizer")
    for key in phase["grid"] if isinstance(phase.get("grid"), Mapping) else ():
        if key in listed:
            raise RecipeError(
                f"{where}.grid.{key}: {key} is an axis too, and each of its runs would try the grid's values instead "
                "of its own; leave one out"
            )
    trial = {"tokens": axes.runs[0][0], "mixture": {"any": 1}} | phase | {"optimizer": optimizers[0].section}
    build(Phase, {"name": axes.name, **trial}, where)
    return Stage(axes=axes, optimizers=optimizers, phase=phase)


def _check_axes(axes: Axes, phase: Mapping[str, Any], where: str, *, first: bool) -> None:
    """Raises RecipeError unless the axes give one mixture and one length, from weights that exist."""
    if "mixture" in phase:
        raise RecipeError(f"{where}.mixture: a study's mixtures are its axis; write delta or replay")
    if "also_average" in phase:
        raise RecipeError(f"{where}.also_average: a study's averages are its axis; write average, such as [0, 10%]")
    for one, other, what in (("delta", "replay", "its mixture"), ("tokens", "budgets", "its length")):
        given = [key for key in (one, other) if getattr(axes, key) is not None]
        if len(given) != 1:
            both = "both are given" if given else "neither is given"
            raise RecipeError(f"{where}: {both}, {one} and {other}; give exactly one of them for {what}")
    if first and axes.start != ("pretrained",):
        raise RecipeError(f"{where}.start: the first stage has no earlier weights; leave it out")
    if Fraction(1) in axes.domain_from:
        raise RecipeError(f"{where}.domain_from: after 100% of the stage no tokens remain for the domain; write less")


def _check_schedule(axes: Axes, phase: Mapping[str, Any], where: str) -> None:
    """Raises RecipeError for settings that a stage of several phases can't have."""
    late, many = axes.domain_from != (0,), axes.budgets is not None and len(axes.budgets) > 1
    if late and many:
        raise RecipeError(f"{where}.domain_from: needs a run for every length; write `tokens` instead of budgets")
    if axes.average != (0,) and (late or many):
        raise RecipeError(
            f"{where}.average: this stage has several phases, and each would be averaged with its own start; write "
            "`tokens` for a run per budget, and leave domain_from out"
        )
    for key in ("stop", "grid"):
        if key in phase and (late or many):
            raise RecipeError(
                f"{where}.{key}: the phases of this stage share one schedule, so they cannot stop early or try rates; "
                "write lists of values in `optimizer`, or `tokens` for a run per budget"
            )


def _optimizers(
    raw: Mapping[str, Any], rates: tuple[float, ...] | None, where: str
) -> tuple[tuple[Tuned, ...], list[str]]:
    """All combinations of the listed values, and the names of the fields with lists, sorted. If there are several
    optimizers, each takes the fields that it has."""
    given = {"name": AdamW.name, **raw} | ({"lr": rates} if rates else {})
    names = several(one_of(*OPTIMIZERS))(given["name"], f"{where}.name")
    fields = {field.name: field for name in names for field in dataclasses.fields(OPTIMIZERS[name])}
    for key in given:
        if key not in fields:
            raise RecipeError(f"{where}.{shown_key(key)}: {unknown_key(key, fields)}")
    values: dict[str, tuple[Any, ...]] = {}
    listed = []
    for key in sorted(given.keys() & fields.keys(), key=["lr", *fields].index):
        value, field = given[key], fields[key]
        parse = one_of(*OPTIMIZERS) if key == "name" else field.metadata["parse"]
        a_list = isinstance(value, (list, tuple))
        if a_list and isinstance(field.default, tuple):  # a single value of this field is a list itself
            a_list = bool(value) and isinstance(value[0], (list, tuple))
        values[key] = several(parse)(value, f"{where}.{key}") if a_list else (parse(value, f"{where}.{key}"),)
        listed += [key] if a_list else []
    found: dict[tuple[str, ...], Tuned] = {}
    for combination in product(*values.values()):
        section = dict(zip(values, combination, strict=True))
        own = {field.name for field in dataclasses.fields(OPTIMIZERS[section["name"]])}
        section = {key: value for key, value in section.items() if key in own}
        said = tuple(_said(key, section[key]) for key in listed if key in section)
        found.setdefault(said, Tuned(section, said))
    return tuple(found.values()), listed


def _said(field: str, value: Any) -> str:
    """The part of a run's name for an optimizer's field."""
    if field == "name":
        return f"-{value}"
    parts = value if isinstance(value, tuple) else (value,)
    written = "-".join("none" if part is None else f"{part:.12g}" for part in parts)
    return f"-{field.replace('_', '')}{written}"


@dataclass(frozen=True, kw_only=True)
class Base:
    """Weights to start from, instead of a shape."""

    init: str = setting(path)
    """A Hugging Face folder, a run, its weights/<phase> or a checkpoint. They set the shape."""


def _model(value: object, where: str) -> Model | Base:
    """A shape, or weights that set the shape."""
    if not isinstance(value, Mapping) or "init" not in value:
        return section(Model)(value, where)
    for key in value.keys() - {"init"}:
        window = f", and write shorter windows as `batch: {{context: {value[key]}}}` in the stages"
        expected = f"the weights at {shown(value['init'])} set the shape; leave it out"
        raise RecipeError(invalid(f"{where}.{key}", value[key], expected + (window if key == "context" else "")))
    return build(Base, value, where)


def _as_it_is(value: object, where: str) -> Any:
    """The value itself; the recipe checks it."""
    return value


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    """A section; the recipe checks its keys."""
    if not isinstance(value, Mapping):
        raise RecipeError(invalid(where, value, "write a section of keys and values"))
    return value


def _sections(value: object, where: str) -> dict[str, Mapping[str, Any]]:
    """Sections by name."""
    return {str(name): _mapping(item, f"{where}.{name}") for name, item in _mapping(value, where).items()}


def _called(model: Model | Base) -> str:
    if isinstance(model, Model):
        return model.preset or f"{model.layers}x{model.width}"
    folder = Path(model.init).absolute()
    name = f"{folder.parent.parent.name}-{folder.name}" if folder.parent.name == "weights" else folder.name
    return for_a_name(name)


def _in_full(model: Model | Base) -> str:
    if isinstance(model, Base):
        return for_a_name(model.init)
    return "-".join(f"{key.replace('_', '')}{value}" for key, value in vars(model).items() if value is not None)


def for_a_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")


@dataclass(frozen=True, kw_only=True)
class Study:
    """The content of a study's YAML."""

    study: str = setting(path)
    """The study's folder."""
    seeds: tuple[int, ...] = setting(_seeds, (0,))
    """Seeds of the weights and of the order of the data, the same in every arm. A number n means 0 … n - 1."""
    models: tuple[Model | Base, ...] | None = setting(optional(several(_model)), None)
    """Shapes to train from scratch, or {init: WEIGHTS} to continue from."""
    init: str | None = setting(optional(path), None)
    """Instead of `models`: the weights to start from, if there is one base."""
    domain: str = setting(text)
    """The source whose share and repetition are studied."""
    general: str = setting(text)
    """The source that fills the rest."""
    domain_tokens: tuple[int | None, ...] = setting(several(_tokens_or_all), (None,))
    """Training reads the first documents of the domain up to this many tokens; `all` for all of them."""
    simulate: Simulated | None = setting(optional(section(Simulated)), None)
    """Instead of `domain_tokens`: the domain is cut so that it repeats as often as in this larger run."""
    stages: tuple[Stage, ...] = setting(_stages)
    """The stages, in order. Each starts from the weights of all runs of the previous one."""
    # The next six are fields of a recipe, which checks them.
    sources: dict[str, Mapping[str, Any]] = setting(_sections)
    tokenizer: Any = setting(_as_it_is, None)
    precision: Any = setting(_as_it_is, "auto")
    engine: Any = setting(_as_it_is, None)
    checkpoint: Mapping[str, Any] | None = setting(optional(_mapping), None)
    """How often a run saves a checkpoint to resume from. One per run is kept, or `keep`."""
    log: Mapping[str, Any] | None = setting(optional(_mapping), None)

    def __post_init__(self) -> None:
        self._check_sources()
        self._check_starts()
        if self.simulate and self.domain_tokens != (None,):
            raise RecipeError("simulate: domain_tokens is given too, and simulate computes it; leave one out")
        names = [stage.axes.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise RecipeError(f"stages: {', '.join(names)}: two have the same name; rename one")

    def _check_sources(self) -> None:
        for field in ("domain", "general"):
            source = getattr(self, field)
            if source not in self.sources:
                raise RecipeError(invalid(field, source, f"name a source; {nearest(source, self.sources)}"))
        if self.domain == self.general:
            raise RecipeError(f"general: {shown(self.general)} is the domain too; name the source that fills the rest")
        for stage in self.stages:
            source, where = stage.axes.source, f"stages[{shown_key(stage.axes.name)}].source"
            if source is not None and source not in self.sources:
                raise RecipeError(invalid(where, source, f"name a source; {nearest(source, self.sources)}"))
            if source in (self.domain, self.general):
                raise RecipeError(f"{where}: {shown(source)} is in the stage's mixture already; leave it out")

    def _check_starts(self) -> None:
        if bool(self.models) == bool(self.init):
            given = "both are given" if self.init else "neither is given"
            raise RecipeError(f"models: {given}, models and init; give exactly one of them for what is trained")
        bases = [model for model, _ in self.starts if isinstance(model, Base)]
        if bases and len(bases) < len(self.starts):
            raise RecipeError(
                "models: some are trained from scratch and others start from weights, so their first stages differ; "
                "use one study for each kind"
            )
        for stage in self.stages if bases else ():
            if "scratch" in stage.axes.start:
                raise RecipeError(
                    f"stages[{shown_key(stage.axes.name)}].start: scratch needs a shape, and `init` has its own; "
                    "give models instead of init"
                )

    @property
    def folder(self) -> Path:
        return Path(self.study)

    @property
    def starts(self) -> list[tuple[Model | Base, str]]:
        """The starts of the first stage, each with its name: preset, layers x width or folder. If an earlier start has
        the same name, all its settings are added, so that a model that is added later does not rename earlier ones."""
        if self.init:
            return [(Base(init=self.init), "init")]
        models = self.models or ()
        short = [_called(model) for model in models]
        return [
            (model, _in_full(model) if name in short[:i] else name)
            for i, (model, name) in enumerate(zip(models, short, strict=True))
        ]

    @property
    def limits(self) -> tuple[int | None, ...]:
        """Tokens of the domain that training may read: as given, None for all, or computed for simulated epoching."""
        if self.simulate is None:
            return self.domain_tokens
        largest = max(budget for run in self.stages[0].axes.runs for budget in run)
        return (max(1, self.simulate.domain_tokens * largest // self.simulate.budget),)


def study_from(raw: object) -> Study:
    """A Study from the contents of its YAML. RecipeError names the field, the value and the remedy."""
    if not isinstance(raw, Mapping):
        raise RecipeError(invalid("the study", raw, "write keys such as study, models, sources and stages"))
    return build(Study, raw, "")

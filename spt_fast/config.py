"""The recipe: everything a run does, as nested dataclasses read from YAML.

Each field is documented and validated where it is defined. Counts take K / M / B / T, shares take percents, decimals or
fractions and stay exact, spans are steps, tokens or a share of the phase. Relative paths start at the working
directory; `~` and `$NAME` are expanded. An unknown key is an error that suggests the nearest field.
`Recipe.plain()` is the resolved recipe as plain YAML data; reading it back gives the same recipe. Resuming a run
compares two of them key by key.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass
from fractions import Fraction
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import yaml

from spt_fast.data.formats import ID_DTYPES
from spt_fast.data.mixture import Mixture
from spt_fast.errors import RecipeError, invalid, nearest, shown, shown_key
from spt_fast.fields import (
    Span,
    apply_overrides,
    boolean,
    build,
    cadence,
    integer,
    naming,
    number,
    one_of,
    optional,
    parse_count,
    parse_share,
    path,
    paths,
    read_yaml,
    section,
    setting,
    text,
)
from spt_fast.files import place
from spt_fast.model.config import GPTConfig
from spt_fast.model.presets import PRESETS
from spt_fast.optimizers import OPTIMIZERS, Optimizer, parse_optimizer
from spt_fast.printing import plain
from spt_fast.synonyms import unknown_key


def _stage(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value <= 3:
        raise RecipeError(invalid(where, value, "write 0, 1, 2 or 3"))
    return value


def _steps(value: object, where: str) -> Span:
    span = cadence(value, where)
    if span.unit != "steps":
        raise RecipeError(invalid(where, value, "write a number of steps, such as `5000 steps`"))
    return span


def _phase_name(value: object, where: str) -> str:
    name = text(value, where)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RecipeError(invalid(where, name, "use letters, digits, dots, dashes and underscores"))
    return name


def _mixture(value: object, where: str) -> dict[str, Fraction]:
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(invalid(where, value, "write shares by source, such as {general: 98%, chem: 2%}"))
    try:
        return dict(Mixture(value).weights)
    except ValueError as error:
        raise RecipeError(f"{where}{str(error).removeprefix('mixture')}") from None


def _grid(value: object, where: str) -> dict[str, tuple[Any, ...]]:
    if not isinstance(value, Mapping):
        raise RecipeError(invalid(where, value, "write lists by name, such as {lr: [1e-5, 1e-4]}"))
    axes: dict[str, tuple[Any, ...]] = {}
    settings = [item for kind in OPTIMIZERS.values() for item in dataclasses.fields(kind) if item.name != "name"]
    parsers = {item.name: item.metadata["parse"] for item in settings} | {"warmup": Span.parse}
    for key, choices in value.items():
        if key not in parsers:
            raise RecipeError(f"{where}.{shown_key(key)}: {unknown_key(key, parsers)}")
        if not isinstance(choices, (list, tuple)) or not choices:
            raise RecipeError(invalid(f"{where}.{key}", choices, "write a list of values to try"))
        axes[str(key)] = tuple(parsers[key](choice, f"{where}.{key}[{i}]") for i, choice in enumerate(choices))
    return axes


# ------------------------------------------------------------------------------------------------ the sections


_FIRST = ("layers", "width", "heads", "kv_heads", "head_dim")
"""The names of a study's runs list the fields in the order of `Model`, these first."""

_Shape: Any = dataclasses.make_dataclass(
    "_Shape",
    [
        ("preset", Any, setting(optional(one_of(*PRESETS)), None)),
        *(
            (item.name, Any, setting(optional(item.metadata["parse"]), None))
            for item in sorted(dataclasses.fields(GPTConfig), key=lambda item: item.name not in _FIRST)
        ),
    ],
    frozen=True,
    kw_only=True,
)


class Model(_Shape):
    """The shape of the GPT: a preset by name, a preset with changes, or every field of a `GPTConfig`.

    A field that is not given is None.
    """

    def with_defaults(self) -> dict[str, Any]:
        """As plain data, with the preset's or GPTConfig's value where none is given; vocab_size is the tokenizer's."""
        defaults = {item.name: item.default for item in dataclasses.fields(GPTConfig) if item.default is not MISSING}
        shape = defaults | PRESETS.get(self.preset, {}) | {"vocab_size": None}
        return plain(vars(self) | {name: value for name, value in shape.items() if getattr(self, name) is None})


@dataclass(frozen=True, kw_only=True)
class Source:
    """One corpus: token datasets made by `spt-fast prepare`, or foreign ones read in place."""

    train: str | tuple[str, ...] = setting(paths)
    """Prefix of the training dataset. A folder, a pattern or a list names a dataset in many files."""
    heldout: str | tuple[str, ...] | None = setting(optional(paths), None)
    """Prefix of text that is never trained on. Held-out losses are measured on it."""
    limit_tokens: int | None = setting(optional(parse_count), None)
    """Use only the first whole documents of `train`, up to this many tokens."""
    dtype: str | None = setting(optional(one_of(*ID_DTYPES)), None)
    """The type of a token id in headerless files."""


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """The windows of one optimizer step, and their length."""

    sequences: int = setting(integer(1), 32)
    """Windows in the global batch of one step."""
    micro: int | None = setting(optional(integer(1)), None)
    """Windows in one forward pass of one process. By default a process takes its whole share at once."""
    context: int | None = setting(optional(integer(1)), None)
    """Tokens of a window, in training and evaluation. At most the model's context, which is the default."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over the phase: linear warm-up to the peak, then a shape."""

    name: str = setting(one_of("cosine", "wsd", "linear", "constant"), "cosine")
    """The shape after warm-up. cosine and linear fall from the peak to `final` at the horizon; wsd holds the peak and
    falls linearly over the last `decay`; constant holds the peak."""
    warmup: Span = setting(Span.parse, Span(Fraction(0), "steps"))
    """How long the rate rises linearly from zero to its peak."""
    final: Fraction = setting(parse_share, Fraction(1, 10))
    """Learning rate at the horizon, as a share of the peak."""
    horizon: int | None = setting(optional(parse_count), None)
    """Tokens at which the shape ends, by default the phase's own `tokens`. A longer horizon cuts the shape off, so the
    rate stays high to the end of the phase (as in SPT)."""
    decay: Span = setting(Span.parse, Span(Fraction(1, 5), "share"))
    """The length of the fall before the horizon, for wsd only; a share is of the tokens up to there."""
    carry_on: bool = setting(boolean, False, key="continue")
    """Continue the previous phase's schedule: shape, warm-up, horizon and step count. `optimizer.lr` is its peak. No
    other key may be given with it."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """When the losses are measured, and on how much text. A phase's first and last step always measure them."""

    every: Span = setting(cadence, Span(Fraction(1, 10), "share"))
    """Time between two evaluations."""
    tokens: int = setting(parse_count, 200_000)
    """Held-out tokens of each source: one half is `select`, the other `report`. Half as many training tokens are scored
    too."""
    samples: int = setting(integer(0, 100), 0)
    """Number of texts that the model generates greedily at each evaluation, after fixed prompts from each source's
    held-out text. It needs a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Early stopping on the `select` half of a source's held-out text; the phase ends with the best weights."""

    on: str = setting(text)
    """The source whose loss decides."""
    patience: int = setting(integer(1), 3)
    """Stop after this many evaluations in a row without a new best."""


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """A run that shares another's training and differs from it only in `average`."""

    share: Fraction = setting(parse_share)
    """Its `average`."""
    run: str = setting(path)
    """Its folder."""


def _averages(value: object, where: str) -> tuple[Averaged, ...]:
    if not isinstance(value, (list, tuple)):
        raise RecipeError(invalid(where, value, "write a list such as [{share: 10%, run: runs/averaged}]"))
    return tuple(build(Averaged, item, f"{where}[{i}]") for i, item in enumerate(value))


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Training on a number of tokens of an exact mixture, with one optimizer and schedule."""

    name: str = setting(_phase_name)
    """Its name in logs, in `--set phases.NAME.…` and in `weights/NAME`."""
    tokens: int = setting(parse_count)
    """Tokens of the phase, rounded to whole steps."""
    mixture: dict[str, Fraction] = setting(_mixture)
    """Each source's share: percents, decimals or fractions that sum to 1, or whole-number ratios."""
    documents: bool = setting(boolean, False)
    """Keep attention and positions inside each document of a window."""
    batch: BatchSize = setting(section(BatchSize), BatchSize())
    optimizer: Optimizer = setting(parse_optimizer)
    schedule: Schedule = setting(section(Schedule), Schedule())
    evaluation: EvalSettings = setting(section(EvalSettings), EvalSettings(), key="eval")
    untie: bool = setting(boolean, False)
    """Give the output head its own copy of the embedding at the phase's start."""
    anchor: float = setting(number(0.0), 0.0)
    """Decoupled decay toward the weights that the phase starts from (Anchored AdamW, arXiv 2502.06042)."""
    average: Fraction = setting(parse_share, Fraction(0))
    """The share of the phase's starting weights in its final weights, (1 − average) · trained + average · starting
    (WiSE-FT, arXiv 2109.01903). The phase's losses, and the choice among a grid's arms, use this average; early
    stopping uses the trained weights."""
    also_average: tuple[Averaged, ...] = setting(_averages, ())
    """Further runs that differ only in `average`; this run writes them too. For recipes of one phase."""
    freeze: str = setting(one_of("none", "embeddings"), "none")
    """embeddings: do not train the token embedding in this phase. The head must be separate: `untie: true`, or an
    untied model."""
    optimizer_state: str = setting(one_of("reset", "keep"), "reset")
    """keep: continue with the previous phase's moments. reset: start from zero."""
    stop: Stop | None = setting(optional(section(Stop)), None)
    grid: dict[str, tuple[Any, ...]] | None = setting(optional(_grid), None)
    """Values to try. Every combination runs from the same start, and the one with the best `select` loss is kept."""

    def arms(self) -> list[dict[str, Any]]:
        """One dict of overrides per grid combination; a single empty one without a grid."""
        grid = self.grid or {}
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]

    def window(self, context: int) -> int:
        """Tokens of a window, for a model of this context."""
        return self.batch.context or context

    def tokens_per_step(self, context: int) -> int:
        """Tokens of a step, for a model of this context."""
        return self.batch.sequences * self.window(context)

    def steps(self, context: int) -> int:
        """Whole steps, at least one, for a model of this context."""
        return max(1, round(Fraction(self.tokens, self.tokens_per_step(context))))

    @property
    def needs_start(self) -> bool:
        """Whether its starting weights matter after the first step."""
        return bool(self.anchor or self.average or self.also_average or self.grid is not None)

    @property
    def chosen_by(self) -> str:
        """The source whose `select` loss decides early stopping and the grid."""
        return self.stop.on if self.stop else self.largest_source

    @property
    def largest_source(self) -> str:
        """The source with the largest share; of equal ones the first by name."""
        return max(sorted(self.mixture), key=lambda source: self.mixture[source])

    def with_overrides(self, overrides: Mapping[str, Any]) -> Phase:
        """This phase as one arm of its grid runs it."""
        optimizer = dataclasses.replace(self.optimizer, **{k: v for k, v in overrides.items() if k != "warmup"})
        schedule = self.schedule
        if "warmup" in overrides:
            schedule = dataclasses.replace(schedule, warmup=overrides["warmup"])
        return dataclasses.replace(self, optimizer=optimizer, schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """How often a run saves a checkpoint to resume from, and which checkpoints it keeps."""

    every: Span = setting(cadence, Span(Fraction(500), "steps"))
    """Time between two checkpoints."""
    keep: int = setting(integer(1), 3)
    """How many of the newest are kept."""
    keep_every: Span | None = setting(optional(_steps), None)
    """Checkpoints at multiples of this number of steps of the whole run are kept as well."""
    keep_best: bool = setting(boolean, False)
    """Also write a checkpoint at every new best `select` loss, and keep the newest of these."""


TRACKERS = ("tensorboard", "wandb", "mlflow", "csv")


def _trackers(value: object, where: str) -> tuple[str, ...]:
    names = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(one_of(*TRACKERS)(name, where) for name in names))


@dataclass(frozen=True, kw_only=True)
class Log:
    """What a run records while it trains."""

    every: Span = setting(cadence, Span(Fraction(10), "steps"))
    """Time between two `train` records in metrics.jsonl."""
    to: tuple[str, ...] = setting(_trackers, ("tensorboard",))
    """Where figures go besides metrics.jsonl: tensorboard, wandb (Weights & Biases), mlflow, csv (metrics.csv in the
    run's folder); [] for none. wandb and mlflow are extras: `pip install 'spt-fast[wandb]'`."""
    stall_s: float = setting(number(0.0, open_low=True), 600.0)
    """After this many seconds without a step, the stacks of all threads are written to stacks-<process>.txt."""


def _auto_or_boolean(value: object, where: str) -> bool | str:
    if value != "auto" and not isinstance(value, bool):
        raise RecipeError(invalid(where, value, "write auto, true or false"))
    return value


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a step is computed: on how many devices, in which memory, with which kernels."""

    name: str = setting(one_of("auto", "local", "deepspeed"), "auto")
    """local: one process on one GPU, or on the CPU; deepspeed: any number of processes; auto: local for a single
    process, else deepspeed."""
    stage: int = setting(_stage, 1)
    """The ZeRO stage: what is sharded across DeepSpeed's processes. 0 nothing, 1 optimizer state, 2 gradients too,
    3 parameters too."""
    offload: str = setting(one_of("none", "optimizer", "all"), "none")
    """What is kept in host memory instead of GPU memory. optimizer: the optimizer's state and its update; all: the
    parameters too (stage 3)."""
    config: str | None = setting(optional(path), None)
    """A DeepSpeed JSON file whose keys override ours. A key that the recipe decides is an error."""
    checkpointing: str = setting(one_of("none", "selective", "full"), "none")
    """Activation checkpointing: what the backward pass recomputes to save memory. selective: all but matmuls and
    attention; full: whole blocks, for about a third more time. It does not change results."""
    cuda_graphs: bool | str = setting(_auto_or_boolean, "auto")
    """On one GPU, record a step as a CUDA graph and replay it, since small models are launch-bound. auto: if a step is
    short and memory allows it."""
    fp8: bool = setting(boolean, False)
    """Train the blocks' layers that are at least 2,048 wide both ways in fp8, on GPUs from compute capability 8.9 on (a
    CPU emulates it, slowly). It changes what is computed, so a resumed run keeps its setting."""
    tune_kernels: bool = setting(boolean, True)
    """On a GPU that has not trained these shapes yet, time backends and launches of the model's ops before the first
    step, for two minutes at most. `spt-fast kernels --tune` does it beforehand, on CPUs too. A resumed run keeps its
    choices."""
    deterministic: bool = setting(boolean, False)
    """Use only algorithms on a GPU that give the same bits every time, even if they are slower. CPUs always do."""

    def __post_init__(self) -> None:
        if self.offload == "optimizer" and self.stage == 0:
            raise RecipeError(invalid("engine.offload", "optimizer", "it needs ZeRO stage 1 or more; write stage: 1"))
        if self.offload == "all" and self.stage < 3:
            raise RecipeError(invalid("engine.offload", "all", "it needs ZeRO stage 3; write stage: 3"))
        if self.name == "deepspeed" and self.cuda_graphs is True:
            raise RecipeError(invalid("engine.cuda_graphs", True, "only the local engine records graphs; write false"))


def _sources(raw: object, where: str) -> dict[str, Source]:
    if not isinstance(raw, Mapping) or not raw:
        raise RecipeError(invalid(where, raw, "name at least one source with its `train` prefix"))
    return {text(name, where): build(Source, item, f"{where}.{shown_key(name)}") for name, item in raw.items()}


INHERITED = ("batch", "eval", "documents")
"""A phase inherits these from the previous phase, key by key, unless it gives its own."""


def _merged(before: object, given: object) -> object:
    return {**before, **given} if isinstance(before, Mapping) and isinstance(given, Mapping) else given


def _phases(raw: object, where: str) -> tuple[Phase, ...]:
    if not isinstance(raw, list) or not raw:
        raise RecipeError(invalid(where, raw, "write a list of at least one phase"))
    phases: list[Phase] = []
    inherited: dict[str, Any] = {}
    for i, item in enumerate(raw):
        name = item.get("name", i) if isinstance(item, Mapping) else i
        here = f"{where}[{shown_key(name)}]"
        if not isinstance(item, Mapping):
            raise RecipeError(invalid(here, item, "write a section with name, tokens, mixture and optimizer"))
        inherited |= {key: _merged(inherited.get(key), item[key]) for key in INHERITED if key in item}
        phase = build(Phase, {**item, **inherited}, here)
        if phase.name in [p.name for p in phases]:
            raise RecipeError(f"{here}.name: {shown(phase.name)} names two phases; give each its own name")
        if phase.batch.micro and phase.batch.sequences % phase.batch.micro:
            expected = f"write a divisor of sequences ({phase.batch.sequences})"
            raise RecipeError(invalid(f"{here}.batch.micro", phase.batch.micro, expected))
        for key in (phase.grid or {}).keys() - {"warmup"} - vars(phase.optimizer).keys():
            raise RecipeError(f"{here}.grid.{key}: {phase.optimizer.name} has no such setting; leave it out")
        _check_continued(phase, phases[-1] if phases else None, here)
        phases.append(phase)
    return tuple(phases)


def _check_continued(phase: Phase, previous: Phase | None, where: str) -> None:
    """RecipeError if a schedule or an optimizer's state cannot be continued."""
    if phase.schedule.carry_on:
        if previous is None:
            raise RecipeError(f"{where}.schedule.continue: the first phase has no schedule to continue; name one")
        if phase.schedule != Schedule(carry_on=True):
            raise RecipeError(
                f"{where}.schedule: `continue: true` takes the whole schedule of the previous phase; leave its other "
                "keys out"
            )
        if "warmup" in (phase.grid or {}):
            raise RecipeError(f"{where}.grid.warmup: a continued schedule has no warm-up; leave it out")
    if phase.optimizer_state == "keep":
        if previous is None:
            raise RecipeError(f"{where}.optimizer_state: the first phase has no optimizer state to keep; write reset")
        if phase.optimizer.name != previous.optimizer.name:
            expected = f"{previous.optimizer.name}'s state cannot be used by {phase.optimizer.name}; write reset"
            raise RecipeError(invalid(f"{where}.optimizer_state", "keep", expected))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes. On one machine the same recipe gives the same run, bit for bit."""

    run: str = setting(path)
    """The run's folder."""
    seed: int = setting(integer(0), 0)
    """Seed of the initial weights and of the order of the data."""
    init: str | None = setting(optional(path), None)
    """Weights to start from: a Hugging Face folder, a run's weights/<phase>, or a checkpoint. They set the shape."""
    init_only: str | None = setting(optional(one_of("embeddings")), None)
    """embeddings: take only the token embedding (and a tied head) from `init`; initialise the rest from `seed`."""
    precision: str = setting(one_of("auto", "bf16", "fp32"), "auto")
    """auto: bf16 with fp32 master weights where this machine multiplies bf16 faster, else fp32. A CPU is tested at the
    run's start; for a GPU the compute capability decides. A resumed run keeps its precision."""
    precision_file: str | None = setting(optional(path), None)
    """A file that keeps the decision of `precision: auto`. The first run that names it decides, and all later ones
    follow. Studies use it."""
    model: Model = setting(section(Model), Model())
    tokenizer: str | None = setting(optional(path), None)
    """A .tiktoken file, a tiktoken encoding by name, or a Hugging Face folder or tokenizer.json. Datasets made with
    another tokenizer are refused."""
    checkpoint: Checkpoints = setting(section(Checkpoints), Checkpoints())
    log: Log = setting(section(Log), Log())
    engine: Engine = setting(section(Engine), Engine())
    sources: dict[str, Source] = setting(_sources)
    """The corpora by name. Mixtures, `stop.on` and metrics use these names."""
    phases: tuple[Phase, ...] = setting(_phases)
    """The phases, in the order in which they run. A phase inherits `batch`, `eval` and `documents` from the previous
    phase, key by key."""

    def __post_init__(self) -> None:
        for phase in self.phases:
            self._check_phase(phase, f"phases[{phase.name}]")
        if len(self.phases) > 1 and (several := [phase.name for phase in self.phases if phase.also_average]):
            raise RecipeError(f"phases[{several[0]}].also_average: the recipe has several phases; leave it out")
        if self.init_only and not self.init:
            raise RecipeError(invalid("init_only", self.init_only, "it needs `init`, the weights to take them from"))
        if not self.init and not self.model.preset and not self.model.layers:
            raise RecipeError(
                "model: missing; name a preset such as {preset: 10m}, give layers, width, …, or set `init`"
            )

    def _check_phase(self, phase: Phase, where: str) -> None:
        """RecipeError if the phase needs sources or an engine that the recipe doesn't have."""
        for source in phase.mixture:
            if source not in self.sources:
                says = f"unknown source; {nearest(source, self.sources)}"
                raise RecipeError(f"{where}.mixture.{shown_key(source)}: {says}")
        if phase.stop and phase.stop.on not in self.sources:
            expected = f"name a source; {nearest(phase.stop.on, self.sources)}"
            raise RecipeError(invalid(f"{where}.stop.on", phase.stop.on, expected))
        if (phase.stop or len(phase.arms()) > 1) and not self.sources[phase.chosen_by].heldout:
            raise RecipeError(
                f"sources.{phase.chosen_by}.heldout: missing; {where} chooses its weights by the loss on it"
            )
        if phase.optimizer.whole_matrices and (self.engine.stage > 1 or self.engine.offload != "none"):
            expected = (
                "it needs whole matrices, which ZeRO stages 2 and 3 and offloading split; write engine: {stage: 1, "
                "offload: none}, or adamw"
            )
            raise RecipeError(invalid(f"{where}.optimizer.name", phase.optimizer.name, expected))

    def plain(self) -> dict[str, Any]:
        """The resolved recipe as plain data; `recipe_from` of it gives an equal recipe."""
        return plain(self)

    def as_yaml(self) -> str:
        """The resolved recipe as the text of its file."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)

    def up_to(self, phase: str) -> tuple[Phase, ...]:
        """The phases up to the one of this name, which is the last of them."""
        names = [each.name for each in self.phases]
        return self.phases[: names.index(phase) + 1]

    def _with_defaults(self, shape: GPTConfig | None) -> dict[str, Any]:
        """`plain`, with the model's shape, as far as it is known, and the resulting windows filled in."""
        given = self.plain()
        model = given["model"] if self.init else self.model.with_defaults()
        model |= {name: value for name, value in plain(shape or {}).items() if model[name] is None}
        for phase in given["phases"]:
            phase["batch"]["context"] = phase["batch"]["context"] or model["context"]
        return given | {"model": model}

    def changes(self, other: Recipe, shape: GPTConfig | None = None) -> list[str]:
        """The differences of `other` that change what the run computes: "phases.0.tokens: 20000000 → 30000000".

        Another path to data, a tokenizer or weights does not count, since these are identified by their digests. How
        often losses are measured counts only in a phase whose early stopping counts evaluations. `shape` is the run's,
        where it is known: writing it out does not count.
        """
        free = "|".join(
            [
                "(run|log|checkpoint|engine|precision_file)(?!.fp8$).*",
                *(["tokenizer"] if self.init and other.init else []),
                r"phases\.[0-9]+\.(batch\.micro|also_average.*|eval\.samples)",
                *(rf"phases\.{i}\.eval\.every" for i, phase in enumerate(self.phases) if not phase.stop),
            ]
        )
        mine, theirs = (flat(recipe._with_defaults(shape)) for recipe in (self, other))
        return [
            f"{key}: {mine.get(key, 'absent')} → {theirs.get(key, 'absent')}"
            for key in sorted(mine.keys() | theirs.keys())
            if not re.fullmatch(free, key, re.DOTALL)
            and mine.get(key, "absent") != theirs.get(key, "absent")
            and not (_KNOWN_BY_DIGEST.fullmatch(key) and mine.get(key) and theirs.get(key))
        ]


_KNOWN_BY_DIGEST = re.compile(r"tokenizer|init|sources\..+\.(train|heldout)", re.DOTALL)
"""Fields with paths."""


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Plain data by dotted paths: phases.0.tokens."""
    if isinstance(value, list) and _KNOWN_BY_DIGEST.fullmatch(prefix):
        value = ", ".join(value)
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {path: leaf for key, item in items for path, leaf in flat(item, f"{prefix}.{key}".lstrip(".")).items()}


def check_lengths(recipe: Recipe, context: int) -> None:
    """RecipeError for windows longer than the model's `context`, and for a warm-up that is longer than the steps of its
    schedule, or that overlaps the decay: the rate would never reach its peak, or jump."""
    for i, phase in enumerate(recipe.phases):
        if (window := phase.window(context)) > context:
            expected = f"the model's context is {context:,} tokens; write that or less"
            raise RecipeError(invalid(f"phases[{phase.name}].batch.context", window, expected))
        if phase.schedule.carry_on:
            continue
        steps, carried = phase.steps(context), takewhile(lambda p: p.schedule.carry_on, recipe.phases[i + 1 :])
        tokens_per_step = phase.tokens_per_step(context)
        last = steps + sum(Fraction(following.tokens, tokens_per_step) for following in carried)
        for arm in phase.arms():
            schedule = phase.with_overrides(arm).schedule
            horizon = Fraction(schedule.horizon, tokens_per_step) if schedule.horizon else Fraction(steps)
            warmup = schedule.warmup.exact_steps(tokens_per_step, steps)
            decay = schedule.decay.exact_steps(tokens_per_step, horizon)
            where = f"phases[{phase.name}].{'grid' if 'warmup' in arm else 'schedule'}.warmup"
            given, ends = str(schedule.warmup), f"the horizon of {float(horizon):.4g} steps"
            falls = schedule.name in ("cosine", "linear")
            if warmup >= last > 1 or warmup > last:
                says = (
                    f"its schedule runs for {float(last):.4g} step{'s' * (last != 1)}; write a shorter warm-up or more "
                    f"tokens, or smaller steps than {tokens_per_step:,} tokens by `batch.sequences` or `batch.context`"
                )
            elif falls and warmup >= horizon and last > horizon:
                says = f"it reaches to {ends}, where the rate would jump; write a shorter one, or a longer horizon"
            elif schedule.name == "wsd" and (warmup + decay > horizon or (not decay and last > horizon)):
                where, given = f"phases[{phase.name}].schedule.decay", str(schedule.decay)
                says = (
                    f"it has no steps before {ends}"
                    if not decay
                    else f"with the warm-up of {schedule.warmup} it is longer than {ends}"
                )
                says = f"{says}, and the rate would jump; write a {'shorter' if decay else 'longer'} one"
            else:
                continue
            if not _has_begun(recipe):
                raise RecipeError(invalid(where, given, says))


def _has_begun(recipe: Recipe) -> bool:
    """Whether an earlier version, which did not check schedules, started this run with the same phases."""
    with suppress(RecipeError):
        return recorded_recipe(Path(recipe.run) / "recipe.yaml").phases == recipe.phases
    return False


# ------------------------------------------------------------------------------------------------ reading


def recipe_from(raw: object) -> Recipe:
    """A Recipe from plain data, as YAML gives it."""
    recipe = _built(raw)
    _check_averages(recipe)
    context = recipe.model.context or PRESETS.get(recipe.model.preset, {}).get("context")
    if context:
        check_lengths(recipe, context)
    return recipe


def _check_averages(recipe: Recipe) -> None:
    """RecipeError for an `also_average` with the folder of another, which would not be written, or with its share,
    whose losses would be recorded twice."""
    for phase in recipe.phases:
        runs, shares = {os.path.abspath(recipe.run)}, {phase.average}
        for i, other in enumerate(phase.also_average):
            where, folder = f"phases[{phase.name}].also_average[{i}]", os.path.abspath(other.run)
            if folder in runs:
                expected = "the run itself, or one before it in the list, has this folder; name another"
                raise RecipeError(invalid(f"{where}.run", other.run, expected))
            if other.share in shares:
                expected = "the phase's `average`, or one before it in the list, is the same; leave it out"
                raise RecipeError(invalid(f"{where}.share", str(other.share), expected))
            runs.add(folder)
            shares.add(other.share)


def recorded_recipe(path: Path) -> Recipe:
    """The recipe that a run recorded. An earlier version may not have checked its schedules."""
    return _built(read_yaml(path))


def _built(raw: object) -> Recipe:
    _check_is_recipe(raw)
    return build(Recipe, raw, "")


def _check_is_recipe(raw: object) -> None:
    if not isinstance(raw, Mapping):
        raise RecipeError(invalid("the recipe", raw, "write keys such as run, model, sources and phases"))


def load_recipe(path: str | Path, overrides: str | Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML.

    `overrides`: one or several "a.b=c" strings. The value is YAML; phases go by name or position
    ("phases.finetune.optimizer.lr=1e-4"). Raises RecipeError, which names the field, what was given and the remedy.
    """
    path = place(path, "recipe", RecipeError)
    raw = read_yaml(path)
    if isinstance(raw, dict) and "stages" in raw and "phases" not in raw:
        raise RecipeError(f"{path}: is a study, not a recipe; train its runs with `spt-fast sweep`")
    with naming(path):
        _check_is_recipe(raw)
        apply_overrides(raw, overrides)
        return recipe_from(raw)


def as_recipe(given: Recipe | str | os.PathLike[str]) -> Recipe:
    """A recipe, or the one in the file at this path. Raises RecipeError."""
    if isinstance(given, (str, os.PathLike)):
        return load_recipe(Path(given))
    if not isinstance(given, Recipe):
        what = type(given).__name__
        expected = "give the path of its file, or what `spt.load_recipe(…)` returns"
        raise RecipeError(f"recipe: is of type {what}; {expected}", argument=True)
    return given

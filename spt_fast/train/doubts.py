"""Warnings about likely mistakes in a plan, with figures. `plan`, the dry run and the log print them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from fractions import Fraction
from itertools import combinations
from pathlib import Path

from spt_fast.config import Engine, Schedule
from spt_fast.errors import SptWarning, counted
from spt_fast.train.evaluate import FORWARD_SHARE, evaluated_tokens, evaluation_texts
from spt_fast.train.origin import origin_of, tokenizer_file
from spt_fast.train.plan import Plan
from spt_fast.train.weights import locate, unfinished

FEW_DOCUMENTS = 30
"""With fewer, one document may change a loss more than a mixture does."""
MOST_EPOCHS = 40
"""Beyond about this many epochs, repeated text teaches nothing more (arXiv 2305.16264)."""


def doubts(plan: Plan) -> list[str]:
    """Warnings: a text that two sources have, text repeated too often, a limit smaller than a document, evaluations
    that cost more than the training, losses on little text or on training text, spans in tokens that are shorter than a
    step, a rate that jumps in a continued schedule or has fallen to 0, settings without effect, a source that is
    started again by windows of another length, a start from a run that isn't done, whose documents began or ended with
    other tokens, or whose tokenizer is unknown or has ids without a row."""
    texts = (_twins, _limits, _repetitions, _evaluations, _thin_texts, Plan.leaks)
    found = (*texts, _spans, _jumps, _standstills, _unused, _restarts, _starts)
    return [doubt for find in found for doubt in find(plan)]


def warn(found: Iterable[str]) -> None:
    """Issue them as Python warnings."""
    for doubt in found:
        warnings.warn(doubt, SptWarning, stacklevel=3)


def _twins(plan: Plan) -> list[str]:
    found = []
    for texts in (plan.train, plan.heldout):
        for one, other in combinations(texts, 2):
            a, b = texts[one], texts[other]
            if a.digest == b.digest or a.path == b.path:
                kind = "train" if texts is plan.train else "heldout"
                found.append(f"sources.{other}.{kind}: is the text of {one!r}, {b.path}; give each source its own")
    return found


def _limits(plan: Plan) -> list[str]:
    return [
        f"sources.{name}.limit_tokens: {limit:,} is less than the first document, so its "
        f"{counted(tokens, 'token', 'are')} read"
        for name, source in plan.recipe.sources.items()
        if (limit := source.limit_tokens) and (tokens := plan.train[name].num_tokens) > limit
    ]


def _repetitions(plan: Plan) -> list[str]:
    epochs: dict[str, Fraction] = {}
    for planned in plan.phases:
        for name, n in planned.windows(planned.steps).items():
            epochs[name] = epochs.get(name, Fraction(0)) + planned.rings[name].epochs(n)
    return [
        f"sources.{name}: its {counted(plan.train[name].num_tokens, 'token', 'are')} read {times:,.0f} times; beyond "
        f"about {MOST_EPOCHS} repetitions nothing more is learned: take more text, or train on fewer tokens"
        for name, times in zip(epochs, map(float, epochs.values()), strict=True)
        if times > MOST_EPOCHS
    ]


def _evaluations(plan: Plan) -> list[str]:
    found = []
    for planned in plan.phases:
        trained, evaluated = planned.tokens * len(planned.phase.arms()), evaluated_tokens(plan, planned.index)
        if evaluated * FORWARD_SHARE > trained:
            found.append(
                f"phases[{planned.phase.name}].eval: evaluations score {counted(evaluated, 'token')}, which takes "
                f"longer than training on {trained:,}; write fewer `tokens` there, or a longer `every`"
            )
    return found


def _thin_texts(plan: Plan) -> list[str]:
    found: dict[tuple[str, str], str] = {}
    for planned in plan.phases:
        asked = planned.phase.evaluation.tokens
        texts = evaluation_texts(plan, planned.phase)["heldout"]
        for source in sorted(texts):
            text = texts[source]
            scored = text.num_targets + 1
            if text.documents is not None and text.documents < FEW_DOCUMENTS:
                more = "hold out more text"
                remedy = more if scored < asked // 2 else f"raise the phase's `eval.tokens`, or {more}"
                found.setdefault(
                    (source, "documents"),
                    f"sources.{source}.heldout: half of what is scored has {counted(text.documents, 'document')}, "
                    f"fewer than {FEW_DOCUMENTS}, so differences below its standard error mean nothing; {remedy}",
                )
            if scored < asked // 2:
                found.setdefault(
                    (source, "tokens"),
                    f"phases[{planned.phase.name}].eval.tokens: {asked:,} asks for {asked // 2:,} of each half of the "
                    f"held-out text of {source!r}, which has {scored:,}; hold out more text",
                )
    return list(found.values())


def _spans(plan: Plan) -> list[str]:
    """A number without a unit is tokens, where other trainers count steps."""
    found: dict[str, str] = {}
    for planned in plan.phases:
        phase, where, step = planned.phase, f"phases[{planned.phase.name}]", planned.tokens_per_step
        spans = {
            "checkpoint.every": plan.recipe.checkpoint.every,
            "log.every": plan.recipe.log.every,
            f"{where}.eval.every": phase.evaluation.every,
            f"{where}.schedule.warmup": phase.schedule.warmup,
            f"{where}.schedule.decay": phase.schedule.decay,
            **{f"{where}.grid.warmup[{i}]": span for i, span in enumerate((phase.grid or {}).get("warmup", ()))},
        }
        for field, span in spans.items():
            if span.unit == "tokens" and 0 < span.amount < step:
                found.setdefault(
                    field,
                    f"{field}: {counted(int(span.amount), 'token', 'are')} less than a step of {step:,}, so it is "
                    f"one step; write `{span} steps` if steps are meant",
                )
        for field, tokens in (("tokens", phase.tokens), ("schedule.horizon", phase.schedule.horizon)):
            if tokens and tokens < step:
                found[f"{where}.{field}"] = (
                    f"{where}.{field}: {counted(tokens, 'token', 'are')} less than a step of {step:,}; it counts "
                    "tokens, not steps"
                )
    return list(found.values())


def _jumps(plan: Plan) -> list[str]:
    found, peak = [], None
    for planned in plan.phases:
        phase, lr = planned.phase, planned.phase.optimizer.lr
        if phase.schedule.carry_on and peak and lr != peak:
            found.append(
                f"phases[{phase.name}].optimizer.lr: {lr:g} is the peak of a continued schedule, whose peak was "
                f"{peak:g}, so the rate jumps to {lr / peak:.3g} of its last value"
            )
        peak = None if "lr" in (phase.grid or {}) else lr
    return found


def _standstills(plan: Plan) -> list[str]:
    found, owner, before = [], plan.phases[0], 0
    for planned in plan.phases:
        if not planned.phase.schedule.carry_on:
            owner, before = planned, 0
        shape = owner.phase.schedule
        ends = shape.horizon or owner.tokens
        still = min(planned.tokens, before + planned.tokens - ends)
        before += planned.tokens
        if shape.name != "constant" and not shape.final and still >= planned.tokens_per_step:
            found.append(
                f"phases[{planned.phase.name}].schedule: the last {still:,} of its {planned.tokens:,} tokens change "
                f"nothing, since the rate of phases[{owner.phase.name}] falls to 0 at {ends:,} tokens; give that one a "
                "longer `horizon`, or a `final` above 0"
            )
    return found


def _unused(plan: Plan) -> list[str]:
    found, engine = [], plan.recipe.engine
    for key in ("stage", "offload", "config") if engine.name == "local" else ():
        if (given := getattr(engine, key)) != getattr(Engine(), key):
            found.append(
                f"engine.{key}: {given} is not used by the local engine; write name: deepspeed, or leave it out"
            )
    for planned in plan.phases:
        phase, schedule, usual = planned.phase, planned.phase.schedule, Schedule()
        for key in {"wsd": (), "constant": ("final", "decay")}.get(schedule.name, ("decay",)):
            if (given := getattr(schedule, key)) != getattr(usual, key):
                found.append(
                    f"phases[{phase.name}].schedule.{key}: {given} is not used by {schedule.name}; leave it out"
                )
        every = phase.evaluation.every.steps(planned.tokens_per_step, planned.steps)
        inside = (planned.steps - 1) // every
        if phase.stop and phase.stop.patience > inside:
            found.append(
                f"phases[{phase.name}].stop.patience: {phase.stop.patience} can't end the phase early, with "
                f"{counted(inside, 'evaluation')} between its first and last step; write a shorter `eval.every`"
            )
        if plan.recipe.checkpoint.keep_best and phase.chosen_by not in plan.heldout:
            found.append(
                f"checkpoint.keep_best: phases[{phase.name}] has no best weights without held-out text of "
                f"{phase.chosen_by!r}; name it, or leave this out"
            )
    return found


def _restarts(plan: Plan) -> list[str]:
    found, before = [], dict[str, set[int]]()
    for planned in plan.phases:
        for source in planned.mixture.sources:
            lengths = before.setdefault(source, set())
            if lengths - {planned.context} and planned.context not in lengths:
                found.append(
                    f"phases[{planned.phase.name}].batch.context: windows of {planned.context:,} start {source!r} "
                    f"again after those of {', '.join(f'{n:,}' for n in sorted(lengths))}, so the visits of any two of "
                    "its tokens may differ by one more; `audit` counts both"
                )
            lengths.add(planned.context)
    return found


def _starts(plan: Plan) -> list[str]:
    init = plan.recipe.init
    if not init:
        return []
    doubt, origin = unfinished(Path(init)), origin_of(Path(init))
    found = [f"init: {doubt}"] if doubt else []
    if plan.tokenizer_digest and not origin.tokenizer and not tokenizer_file(locate(Path(init))):
        found.append(
            f"init: {init} neither records nor holds a tokenizer, so whether its weights were trained with that of the "
            f"text ({plan.tokenizer_digest[:12]}) is not known; put their tokenizer.json there"
        )
    if plan.tokenizer and (doubt := plan.tokenizer.beyond(plan.model.vocab_size)):
        found.append(f"init: its tokenizer {doubt}")
    field, data = next(((field, data) for field, data in plan.texts.items() if data.eos_id is not None), ("", None))
    for name in ("eos_id", "bos_id") if data and origin.eos_id is not None else ():
        if (this := getattr(data, name)) != (trained := getattr(origin, name)):
            found.append(
                f"{field}: has {name} {this}, but the text that the weights at {init} were trained on has {trained}; "
                "prepare it with the same tokens that begin and end a document"
            )
    return found

"""Commands that plan, train and look at runs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

import spt_fast as spt
from spt_fast.cli.flags import (
    Dtype,
    Json,
    Overrides,
    PathOption,
    Price,
    RecipePath,
    Resume,
    RunPath,
    WeightsPath,
    is_first,
    stopped,
)
from spt_fast.cli.program import app, checkpoint_app, out, print_json
from spt_fast.printing import print_facts, print_table
from spt_fast.train.signals import StopRequest


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, Option(min=1, help="Processes; the launcher's, or one, by default.")] = None,
    gpu: Annotated[str | None, Option(help="Its name, such as H100; this machine's own by default.")] = None,
    gpu_memory: Annotated[str | None, Option(help="Of one GPU, such as 80GB; its own by default.")] = None,
    mfu: Annotated[str | None, Option(help="Share of the peak, such as 40%; measured by default.")] = None,
    mfu_from: Annotated[Path | None, PathOption(metavar="RUN", help="Take it from this run's metrics.")] = None,
    per_gpu_hour: Price = None,
    as_json: Json = False,
) -> None:
    """What a recipe would do: tokens and epochs asked and exactly achieved, FLOPs; memory, hours and cost."""
    planned = spt.plan(
        spt.load_recipe(recipe, overrides or ()),
        gpus=gpus,
        gpu=gpu,
        gpu_memory=gpu_memory,
        mfu=mfu,
        mfu_from=mfu_from,
        per_gpu_hour=per_gpu_hour,
    )
    if as_json:
        print_json(planned)
    else:
        from spt_fast.train.price import print_plan

        print_plan(recipe, planned.phases, planned.price, out)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Resume = False,
    verify: Annotated[bool, Option(help="Compare every block of the datasets with its hash, not only some.")] = False,
    dry_run: Annotated[bool, Option(help="Check everything and try a step of every phase, in memory only.")] = False,
) -> None:
    """Train all phases of a recipe."""
    with nullcontext() if dry_run else StopRequest():  # the run takes over what is heard while torch is imported
        from spt_fast.train import dry_run as trying
        from spt_fast.train.run import print_summary

        loaded = spt.load_recipe(recipe, overrides or ())
        if dry_run:
            trials = trying.dry_run(loaded, verify=verify)
            if is_first():
                trying.print_trials(trials, out)
            return
        trained = spt.train(loaded, resume=resume, verify=verify)
    if trained.status == "stopped":
        raise stopped(trained.reason)
    if trained.status == "failed":
        raise RuntimeError(trained.reason)
    if is_first():
        print_summary(loaded.run, trained.summary, out)


@app.command("eval")
def evaluate(
    weights: WeightsPath,
    data: Annotated[list[Path] | None, PathOption("--data", metavar="PREFIX", help="Loss on this dataset.")] = None,
    tasks: Annotated[list[str] | None, Option(metavar="TASK,…", help="lm-eval's names and .yaml; .jsonl.")] = None,
    num_fewshot: Annotated[int | None, Option(help="Solved examples before each question.")] = None,
    limit: Annotated[int | None, Option(help="Questions at most, of each task.")] = None,
    context: Annotated[int | None, Option(min=1, help="Tokens seen at a time; as in training, or the model's.")] = None,
    batch: Annotated[int | None, Option(help="Texts of a task at a time; as many as fit by default.")] = None,
    tokenizer: Annotated[Path | None, PathOption(help="For tasks; the weights' own by default.")] = None,
    bos: Annotated[
        str | None, Option(metavar="TOKEN", help="Begins each text of a task; as in training by default.")
    ] = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte on datasets, every token but the first scored once; accuracy in tasks."""
    from spt_fast.evaluation.score import print_scores
    from spt_fast.evaluation.tasks import print_tasks

    found = spt.evaluate(
        weights,
        data or (),
        tasks=None if tasks is None else [name.strip() for some in tasks for name in some.split(",") if name.strip()],
        num_fewshot=num_fewshot,
        limit=limit,
        context=context,
        batch=batch,
        tokenizer=tokenizer,
        bos=bos,
        dtype=dtype,
    )
    if as_json:
        print_json(found)
        return
    if found.losses:
        print_scores(weights, found.losses, out)
    if found.tasks:
        print_tasks(weights, found.tasks, out)


@app.command()
def audit(
    run: RunPath,
    source: Annotated[str | None, Option(help="Only this source.")] = None,
    document: Annotated[int | None, Option(help="One document of the source, by its position in the dataset.")] = None,
    as_json: Json = False,
) -> None:
    """Exactly how often a run has read every source, or one document."""
    from spt_fast.train.audit import print_audit

    if document is None:
        readings = spt.audit(run, source=source)
        print_json(readings) if as_json else print_audit(run, readings, out)
    else:
        reading = spt.audit(run, source=source, document=document)
        print_json(reading) if as_json else print_facts(out, f"{source}, document {document}", reading)


@checkpoint_app.command("list")
def checkpoint_list(run: RunPath, as_json: Json = False) -> None:
    """Checkpoints of a run, oldest first."""
    from spt_fast.train.checkpoint import checkpoints_of

    found = {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in checkpoints_of(run)}
    if as_json:
        print_json([{"name": name, "bytes": size} for name, size in found.items()])
    else:
        print_table(out, str(run), ["checkpoint", "bytes"], found.items())


@checkpoint_app.command("verify")
def checkpoint_verify(run: RunPath, as_json: Json = False) -> None:
    """Check every hash of every checkpoint; exit code 2 where one is damaged."""
    from spt_fast.train.checkpoint import WHOLE, verdicts_of

    verdicts = verdicts_of(run)
    print_json(verdicts) if as_json else print_facts(out, str(run), verdicts)
    if set(verdicts.values()) != {WHOLE}:
        raise typer.Exit(2)

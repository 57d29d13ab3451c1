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
    ManyValues,
    OutFolder,
    Overrides,
    PathOption,
    Price,
    RecipePath,
    Resume,
    RunPath,
    SkipBad,
    TextKey,
    WeightsPath,
    after_the_argument,
    is_first,
    stopped,
)
from spt_fast.cli.program import app, checkpoint_app, example, out, print_json
from spt_fast.errors import FailedElsewhere
from spt_fast.printing import print_facts, print_named, print_table, terminal
from spt_fast.train.signals import StopRequest


@app.command(
    epilog=example(
        "spt-fast init --general general.jsonl --domain chem.jsonl --out chem",
        "spt-fast init --init models/SmolLM2-135M --general general.jsonl --domain chem.jsonl --out chem",
    )
)
def init(
    general: Annotated[Path, PathOption(metavar="TEXT_OR_PREFIX", help="Use this general text, or prepared dataset.")],
    domain: Annotated[Path, PathOption(metavar="TEXT_OR_PREFIX", help="Use this domain text, or prepared dataset.")],
    out_folder: OutFolder = Path(),
    init: Annotated[
        Path | None, PathOption(metavar="WEIGHTS", help="Start from this base; by default from scratch.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        PathOption(metavar="TOKENIZER", help="Use this tokenizer; by default the base's, or one trained on the text."),
    ] = None,
    hours: Annotated[
        float | None,
        Option(metavar="HOURS", help="Fit the training into this many hours; by default 1, or 24 on a GPU."),
    ] = None,
    text_key: TextKey = "text",
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Write a first recipe and study for two corpora, from scratch or a base, sized for this machine."""
    begun = spt.init(
        general,
        domain,
        out_folder,
        init=init,
        tokenizer=tokenizer,
        hours=hours,
        text_key=text_key,
        skip_bad=skip_bad,
    )
    if as_json:
        print_json(begun)
        return
    print_facts(out, str(begun.recipe), begun)
    next_steps = [f"spt-fast plan {begun.recipe}", f"spt-fast train {begun.recipe}"]
    next_steps += [f"spt-fast sweep {begun.study} --dry-run"] if begun.study else []
    out.print("next:", *next_steps, sep="\n  ", soft_wrap=True)


@app.command(epilog=example("spt-fast plan recipe.yaml --gpu H100 --gpus 8 --gpu-memory 80GB --price 2.50"))
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, Option(min=1, metavar="COUNT", help="Plan for this many GPUs; by default the launcher's, or one.")
    ] = None,
    gpu: Annotated[
        str | None, Option(metavar="NAME", help="Plan for this GPU, such as H100; by default for this machine.")
    ] = None,
    gpu_memory: Annotated[
        str | None, Option(metavar="SIZE", help="Set the memory of one GPU, such as 80GB; by default its own.")
    ] = None,
    mfu: Annotated[
        str | None,
        Option(
            metavar="SHARE", help="Assume this share of the peak, such as 50%; by default the measured one, or 40%."
        ),
    ] = None,
    mfu_from: Annotated[
        Path | None, PathOption(metavar="RUN", help="Take the share of the peak from the metrics of this run.")
    ] = None,
    per_gpu_hour: Price = None,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do: tokens, epochs, FLOPs, memory, hours and cost."""
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


@app.command(
    epilog=example("spt-fast train recipe.yaml --resume", "spt-fast train recipe.yaml --set run=runs/npt --dry-run")
)
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Resume = False,
    verify: Annotated[bool, Option(help="Check every block of the datasets against its hash, not only some.")] = False,
    dry_run: Annotated[
        bool, Option(help="Check everything and try two steps of every phase, without writing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train all phases of a recipe."""
    with nullcontext() if dry_run else StopRequest():  # the run takes over a signal that comes while torch is imported
        from spt_fast.train import dry_run as trying
        from spt_fast.train.run import print_summary
        from spt_fast.train.world import before_joining

        loaded = before_joining(lambda: spt.load_recipe(recipe, overrides or ()))
        if dry_run:
            trials = trying.dry_run(loaded, resume=resume, verify=verify)
            if is_first():
                print_json(trials) if as_json else trying.print_trials(trials, out)
            return
        trained = spt.train(loaded, resume=resume, verify=verify)
    if trained.status == "stopped":
        raise stopped(trained.reason)
    if trained.status == "failed":
        raise RuntimeError(trained.reason) if is_first() else FailedElsewhere(trained.reason)
    if is_first():
        print_json(trained.summary) if as_json else print_summary(loaded, trained.summary, terminal(lasting=True))


@app.command(
    "eval",
    cls=ManyValues.of("--data", after_the_argument),
    epilog=example("spt-fast eval runs/spt --data data/chem.heldout", "spt-fast eval runs/spt --tasks arc_easy"),
)
def evaluate(
    weights: WeightsPath,
    data: Annotated[
        list[Path] | None, PathOption("--data", metavar="PREFIX…", help="Measure the loss on these datasets.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        Option(metavar="TASK,…", help="Run tasks of lm-eval, by name or .yaml file, or your own questions in .jsonl."),
    ] = None,
    num_fewshot: Annotated[
        int | None, Option(metavar="COUNT", help="Show this many solved examples before each question.")
    ] = None,
    limit: Annotated[int | None, Option(metavar="COUNT", help="Ask at most this many questions of each task.")] = None,
    context: Annotated[
        int | None, Option(min=1, metavar="TOKENS", help="Set the window; by default that of training, or the model's.")
    ] = None,
    batch: Annotated[
        int | None,
        Option(metavar="COUNT", help="Score this many texts of a task at a time; by default as many as fit."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        PathOption(metavar="TOKENIZER", help="Use this tokenizer for tasks; by default that of the weights."),
    ] = None,
    bos: Annotated[
        str | None,
        Option(metavar="TOKEN", help="Begin each text of a task with this token; by default as in training."),
    ] = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity and bits per byte on datasets, or accuracy in tasks."""
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


@app.command(epilog=example("spt-fast audit runs/spt --source chem --document 7"))
def audit(
    run: RunPath,
    source: Annotated[str | None, Option(metavar="SOURCE", help="Audit only this source.")] = None,
    document: Annotated[
        int | None, Option(metavar="NUMBER", help="Audit one document of the source, by its position from 0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show exactly how often a run has read every source, or one document."""
    from spt_fast.train.audit import print_audit

    if document is None:
        readings = spt.audit(run, source=source)
        print_json(readings) if as_json else print_audit(run, readings, out)
    else:
        reading = spt.audit(run, source=source, document=document)
        print_json(reading) if as_json else print_facts(out, f"{source}, document {document}", reading)


@checkpoint_app.command("list", epilog=example("spt-fast checkpoint list runs/spt"))
def checkpoint_list(run: RunPath, as_json: Json = False) -> None:
    """List the checkpoints of a run, oldest first."""
    from spt_fast.train.checkpoint import checkpoints_of

    found = {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in checkpoints_of(run)}
    if as_json:
        print_json([{"name": name, "bytes": size} for name, size in found.items()])
    else:
        print_table(out, str(run), ["checkpoint", "bytes"], found.items())


@checkpoint_app.command("verify", epilog=example("spt-fast checkpoint verify runs/spt"))
def checkpoint_verify(run: RunPath, as_json: Json = False) -> None:
    """Check every hash of every checkpoint; the exit code is 2 if one is damaged."""
    from spt_fast.train.checkpoint import WHOLE, verdicts_of

    verdicts = verdicts_of(run)
    print_json(verdicts) if as_json else print_named(out, str(run), verdicts)
    if set(verdicts.values()) != {WHOLE}:
        raise typer.Exit(2)

"""Commands for many runs: grids, comparisons, laws, advice, pages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

import spt_fast as spt
from spt_fast.cli.flags import (
    ClusterOptions,
    DomainSource,
    GeneralSource,
    Json,
    Overrides,
    PathArgument,
    PathOption,
    Price,
    RecipePath,
    Resume,
    Runs,
    share,
    stopped,
)
from spt_fast.cli.program import app, out, print_json
from spt_fast.printing import print_facts


@app.command()
def demo(out_folder: Annotated[Path, PathOption("--out", metavar="DIR")] = Path("demo")) -> None:
    """The whole main job on text that every machine has: specialized against standard pretraining."""
    from spt_fast.study.demo import demo as run_demo

    run_demo(out_folder)


@app.command()
def compare(
    runs: Annotated[list[Path], PathArgument(metavar="RUN…")],
    out_folder: Annotated[Path | None, PathOption("--out", metavar="DIR", help="For comparison.json and .png.")] = None,
    as_json: Json = False,
) -> None:
    """Finished runs side by side: domain loss, forgetting, R_gain, compute multiplier."""
    from spt_fast.study.findings import print_comparison

    result = spt.compare(runs, out=out_folder)
    print_json(result) if as_json else print_comparison(result, out)


@app.command()
def sweep(
    study: Annotated[Path, PathArgument(metavar="STUDY", help="A study's YAML file, or the name of a ready study.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, Option(help="Check every run, say what all of them would take, train none.")] = False,
    general: Annotated[Path | None, PathOption(metavar="PREFIX", help="The general corpus of a ready study.")] = None,
    domain: Annotated[Path | None, PathOption(metavar="PREFIX", help="The domain corpus of a ready study.")] = None,
    tokenizer: Annotated[Path | None, PathOption(help="The tokenizer of a ready study.")] = None,
    init: Annotated[
        list[Path] | None, PathOption(metavar="WEIGHTS", help="Go on from these; dcpt, forgetting.")
    ] = None,
    out_folder: Annotated[Path | None, PathOption("--out", metavar="DIR", help="The folder of a ready study.")] = None,
    jobs: Annotated[int | None, Option(min=1, help="Runs at a time; by default one a GPU, or a core.")] = None,
    cluster: Annotated[str | None, Option(help="Run as jobs of it, by submitit: slurm, local.")] = None,
    cluster_options: ClusterOptions = None,
    gpu: Annotated[str | None, Option(help="Price the study for it, such as H100; for this machine.")] = None,
    mfu: Annotated[str | None, Option(help="At this share of its peak, such as 40%.")] = None,
    per_gpu_hour: Price = None,
    as_json: Json = False,
) -> None:
    """Train a grid of runs, whatever of it is missing, and write the table of what they measured."""
    from spt_fast.study import sweep as sweeping

    loaded = spt.load_study(
        study,
        overrides or (),
        general=general,
        domain=domain,
        tokenizer=tokenizer,
        init=init or (),
        out=out_folder,
    )
    if dry_run:
        price = sweeping.price(loaded, jobs=jobs, gpu=gpu, mfu=share(mfu, "--mfu"), per_gpu_hour=per_gpu_hour)
        print_json(price) if as_json else sweeping.print_price(price, loaded.study, out)
        return
    if (gpu, mfu, per_gpu_hour) != (None, None, None):
        raise typer.BadParameter("--gpu, --mfu and --price say what a study would take: add --dry-run")
    swept = spt.sweep(loaded, jobs=jobs, cluster=cluster, cluster_options=cluster_options or ())
    print_json(swept) if as_json else print_facts(out, loaded.study, swept)
    if swept.interrupted:
        print("spt-fast: stopped; what was under way is saved: run the same line again to go on", file=sys.stderr)
        raise typer.Exit(75)
    if swept.failed:
        raise typer.Exit(1)


@app.command()
def fit(
    runs: Runs,
    law: Annotated[str | None, Option(metavar="NAME", help="Only this law, such as overfitting.")] = None,
    domain_source: DomainSource = None,
    general_source: GeneralSource = None,
    out_folder: Annotated[Path | None, PathOption("--out", metavar="DIR", help="Also write fits.json.")] = None,
    as_json: Json = False,
) -> None:
    """Scaling laws of finished runs, and how far each can be trusted."""
    from spt_fast.study.findings import print_fits

    found = spt.fit(runs, law, domain_source=domain_source, general_source=general_source, out=out_folder)
    print_json(found) if as_json else print_fits(found, out, every_parameter=law is not None)


@app.command()
def advise(
    domain_tokens: Annotated[str, Option(metavar="COUNT", help="Unique tokens of the domain corpus, such as 30M.")],
    budget: Annotated[str, Option(metavar="COUNT", help="Tokens of pretraining, or from a base, such as 20B.")],
    model: Annotated[str | None, Option(help="A preset, or a number of parameters.")] = None,
    runs: Annotated[list[Path] | None, PathOption(metavar="RUNS", help="Without: a prior from the papers.")] = None,
    init: Annotated[Path | None, PathOption(metavar="WEIGHTS", help="The base to go on from.")] = None,
    general: Annotated[Path | None, PathOption(metavar="PREFIX", help="The general dataset, for the distance.")] = None,
    domain: Annotated[Path | None, PathOption(metavar="PREFIX", help="The domain dataset, for the distance.")] = None,
    domain_source: DomainSource = None,
    general_source: GeneralSource = None,
    inference_tokens: Annotated[str | None, Option(metavar="COUNT", help="To price a larger model.")] = None,
    max_general_rise: Annotated[str | None, Option(metavar="SHARE", help="Of the general loss, such as 3%.")] = None,
    as_json: Json = False,
) -> None:
    """Share of domain data in pretraining, repeats, replay: by runs, or by the papers where there are none."""
    from spt_fast.advice.words import print_advice

    given = spt.advise(
        domain_tokens=domain_tokens,
        budget=budget,
        model=model,
        runs=runs,
        init=init,
        general=general,
        domain=domain,
        domain_source=domain_source,
        general_source=general_source,
        inference_tokens=inference_tokens,
        max_general_rise=max_general_rise,
    )
    print_json(given) if as_json else print_advice(given, out)


@app.command()
def report(
    runs: Runs,
    out_file: Annotated[Path, PathOption("--out", metavar="FILE")] = Path("report.html"),
    domain_source: DomainSource = None,
    general_source: GeneralSource = None,
    domain_tokens: Annotated[str | None, Option(help="Unique domain tokens to advise for: 300M.")] = None,
    budget: Annotated[str | None, Option(help="Pretraining tokens to advise for: 20B.")] = None,
    model: Annotated[str | None, Option(help="Advise for this preset, or number of parameters.")] = None,
    as_json: Json = False,
) -> None:
    """One HTML page: the decision, and the evidence for it."""
    spt.report(
        runs,
        out_file,
        domain_source=domain_source,
        general_source=general_source,
        domain_tokens=domain_tokens,
        budget=budget,
        model=model,
    )
    facts = {"report": str(out_file), "bytes": out_file.stat().st_size}
    print_json(facts) if as_json else out.print(f"{out_file}: open it in a browser", soft_wrap=True)


@app.command()
def reweight(
    recipe: RecipePath,
    target: Annotated[str | None, Option(metavar="SOURCE", help="What the others help; each other by default.")] = None,
    out_folder: Annotated[Path | None, PathOption("--out", metavar="DIR", help="RUN-reweight by default.")] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Learn a mixture of sources by DoGE, with a recipe's first phase as the proxy run."""
    from spt_fast.study import doge

    loaded = spt.load_recipe(recipe, overrides or ())
    result = doge.reweight(loaded, out_folder or Path(f"{loaded.run}-reweight"), target=target, resume=resume)
    if isinstance(result, doge.Stopped):
        raise stopped(result.reason)
    print_json(result) if as_json else doge.print_reweighting(result, str(recipe), out)

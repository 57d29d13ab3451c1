"""Commands for many runs: grids, comparisons, laws, advice, pages."""

from __future__ import annotations

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
    OutFolder,
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
from spt_fast.cli.program import app, example, out, print_json
from spt_fast.printing import print_message, print_note, terminal


@app.command(epilog=example("spt-fast demo --out demo"))
def demo(out_folder: OutFolder = Path("demo")) -> None:
    """Compare specialized with standard pretraining on text that every machine has, in minutes."""
    from spt_fast.study.demo import demo as run_demo

    run_demo(out_folder)


@app.command(epilog=example("spt-fast compare runs/npt runs/spt --out comparison"))
def compare(
    runs: Annotated[list[Path], PathArgument(metavar="RUN", help="The folders of finished runs, or of a study.")],
    out_folder: Annotated[
        Path | None, PathOption("--out", metavar="DIR", help="Write comparison.json and comparison.png to this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare finished runs: domain loss, forgetting, R_gain, compute multiplier."""
    from spt_fast.study.findings import print_comparison

    result = spt.compare(runs, out=out_folder)
    if as_json:
        print_json(result)
        return
    print_comparison(result, out)
    if out_folder:
        print_note(
            out, f"{out_folder / 'comparison.png'}: the picture; {out_folder / 'comparison.json'}: exact numbers"
        )


@app.command(
    epilog=example(
        "spt-fast sweep study.yaml --dry-run",
        "spt-fast sweep spt --general data/general --domain data/chem --tokenizer data/bpe.tiktoken --out studies/chem",
    )
)
def sweep(
    study: Annotated[
        Path,
        PathArgument(
            metavar="STUDY", help="A study in YAML, or a ready one: spt, dcpt, forgetting, scratch-vs-pretrained."
        ),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[bool, Option(help="Check every run and price them all, without training.")] = False,
    general: Annotated[
        Path | None, PathOption(metavar="PREFIX", help="Set the general corpus of a ready study.")
    ] = None,
    domain: Annotated[Path | None, PathOption(metavar="PREFIX", help="Set the domain corpus of a ready study.")] = None,
    tokenizer: Annotated[
        Path | None,
        PathOption(metavar="TOKENIZER", help="Set the tokenizer of a ready study."),
    ] = None,
    init: Annotated[
        list[Path] | None,
        PathOption(metavar="WEIGHTS", help="Start a ready study from these weights (dcpt, forgetting); repeatable."),
    ] = None,
    out_folder: Annotated[
        Path | None, PathOption("--out", metavar="DIR", help="Set the folder of a ready study.")
    ] = None,
    jobs: Annotated[
        int | None,
        Option(min=1, metavar="COUNT", help="Train this many runs at a time; by default one per GPU, or core."),
    ] = None,
    cluster: Annotated[
        str | None, Option(metavar="NAME", help="Submit the runs as jobs of a cluster: slurm, or local to try it.")
    ] = None,
    cluster_options: ClusterOptions = None,
    gpu: Annotated[
        str | None,
        Option(metavar="NAME", help="Price the study for this GPU, such as H100; by default for this machine."),
    ] = None,
    mfu: Annotated[
        str | None, Option(metavar="SHARE", help="Assume this share of the GPU's peak, such as 50%; by default 40%.")
    ] = None,
    per_gpu_hour: Price = None,
    as_json: Json = False,
) -> None:
    """Train the missing runs of a study, and write the table of their results."""
    from spt_fast.study import costs
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
        price = costs.price(loaded, jobs=jobs, gpu=gpu, mfu=share(mfu, "--mfu"), per_gpu_hour=per_gpu_hour)
        print_json(price) if as_json else costs.print_price(price, loaded.study, out)
        return
    if (gpu, mfu, per_gpu_hour) != (None, None, None):
        raise typer.BadParameter("--gpu, --mfu and --price only price a study; add --dry-run")
    swept = spt.sweep(loaded, jobs=jobs, cluster=cluster, cluster_options=cluster_options or ())
    print_json(swept) if as_json else sweeping.print_swept(swept, loaded.study, terminal(lasting=True))
    if swept.interrupted:
        print_message("spt-fast: stopped; running jobs are saved; run the same command again to continue")
        raise typer.Exit(75)
    if swept.failed:
        raise typer.Exit(1)


@app.command(epilog=example("spt-fast fit studies/chem --law overfitting"))
def fit(
    runs: Runs,
    law: Annotated[str | None, Option(metavar="NAME", help="Fit only this law, such as overfitting.")] = None,
    domain_source: DomainSource = None,
    general_source: GeneralSource = None,
    out_folder: Annotated[
        Path | None, PathOption("--out", metavar="DIR", help="Write fits.json to this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit scaling laws to finished runs, and show how far each can be trusted."""
    from spt_fast.study.findings import print_fits

    found = spt.fit(runs, law, domain_source=domain_source, general_source=general_source, out=out_folder)
    if as_json:
        print_json(found)
        return
    print_fits(found, out, every_parameter=law is not None)
    if out_folder:
        print_note(out, f"{out_folder / 'fits.json'}: exact numbers")


@app.command(epilog=example("spt-fast advise --domain-tokens 30M --budget 20B --model 1b --runs studies/chem"))
def advise(
    domain_tokens: Annotated[
        str, Option(metavar="COUNT", help="Set the unique tokens of the domain corpus, such as 30M.")
    ],
    budget: Annotated[str, Option(metavar="COUNT", help="Set the tokens to train on, such as 20B.")],
    model: Annotated[
        str | None, Option(metavar="MODEL", help="Set the model: a preset, or a number of parameters.")
    ] = None,
    runs: Annotated[
        list[Path] | None, PathOption(metavar="RUNS", help="Decide by these runs; without any, by the papers.")
    ] = None,
    init: Annotated[
        Path | None, PathOption(metavar="WEIGHTS", help="Advise for continuing from these weights.")
    ] = None,
    general: Annotated[
        Path | None, PathOption(metavar="PREFIX", help="Measure the distance of the domain from this general dataset.")
    ] = None,
    domain: Annotated[
        Path | None,
        PathOption(metavar="PREFIX", help="Measure the distance of this domain dataset from the general one."),
    ] = None,
    domain_source: DomainSource = None,
    general_source: GeneralSource = None,
    inference_tokens: Annotated[
        str | None, Option(metavar="COUNT", help="Set the tokens to generate, to price a larger model.")
    ] = None,
    max_general_rise: Annotated[
        str | None, Option(metavar="SHARE", help="Allow the general loss to rise by this share, such as 3%.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decide how much domain data goes into pretraining, from runs or from the papers."""
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


@app.command(epilog=example("spt-fast report studies/chem --out chem.html"))
def report(
    runs: Runs,
    out_file: Annotated[Path, PathOption("--out", metavar="FILE", help="Write the page to this file.")] = Path(
        "report.html"
    ),
    domain_source: DomainSource = None,
    general_source: GeneralSource = None,
    domain_tokens: Annotated[
        str | None, Option(metavar="COUNT", help="Advise for this many unique domain tokens, such as 300M.")
    ] = None,
    budget: Annotated[
        str | None, Option(metavar="COUNT", help="Advise for this many pretraining tokens, such as 20B.")
    ] = None,
    model: Annotated[
        str | None, Option(metavar="MODEL", help="Advise for this preset, or number of parameters.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML page with the decision and the evidence for it."""
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
    print_json(facts) if as_json else print_note(out, f"{out_file}: open it in a browser")


@app.command(epilog=example("spt-fast reweight recipe.yaml --target chem"))
def reweight(
    recipe: RecipePath,
    target: Annotated[
        str | None,
        Option(metavar="SOURCE", help="Weight the others by their help for this source; by default, for each other."),
    ] = None,
    out_folder: Annotated[
        Path | None, PathOption("--out", metavar="DIR", help="Write to this folder; by default RUN-reweight.")
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Learn the weights of many sources with DoGE, from a recipe's first phase."""
    from spt_fast.study import doge

    loaded = spt.load_recipe(recipe, overrides or ())
    folder = out_folder or Path(f"{loaded.run}-reweight")
    result = doge.reweight(loaded, folder, target=target, resume=resume)
    if isinstance(result, doge.Stopped):
        raise stopped(result.reason)
    if as_json:
        print_json(result)
        return
    print_note(out, f"{folder / 'weights.json'}: exact numbers")
    doge.print_reweighting(result, str(recipe), out)

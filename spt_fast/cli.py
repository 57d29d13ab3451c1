"""The command line: `spt-fast`, also `python -m spt_fast`. Each command reads its flags, calls the library, and prints.

Exit codes: 0 the work is done; 75 interrupted and saved; 2 a bad recipe, file or flag, with one message; 1 otherwise.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from spt_fast import __version__
from spt_fast.errors import FailedElsewhere, SptError
from spt_fast.flags import (
    ClusterOptions,
    Commands,
    DomainSource,
    Dtype,
    GeneralSource,
    Inputs,
    Json,
    Overrides,
    Overwrite,
    PathArgument,
    PathOption,
    Price,
    RecipePath,
    Resume,
    RunPath,
    Runs,
    WeightsPath,
    count,
    is_first,
    share,
    stopped,
)
from spt_fast.printing import as_json, print_facts, print_table, set_up, terminal
from spt_fast.train.signals import StopRequest, interrupt_by_signals

app = typer.Typer(
    cls=Commands,
    help="Specialized pretraining: decide how much domain data goes into pretraining, then train that model fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
tokenizer_app = typer.Typer(cls=Commands, help="Tokenizers.", no_args_is_help=True)
checkpoint_app = typer.Typer(cls=Commands, help="Checkpoints of a run.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(checkpoint_app, name="checkpoint")

out = terminal()


def main() -> None:
    """Entry point: runs the command line and turns a user's mistake into one message and exit code 2.

    SIGTERM interrupts as Ctrl-C does, so that what is half-written is removed; training takes both over and saves.
    """
    interrupt_by_signals()
    set_up()
    rank = os.environ.get("RANK")
    me = "spt-fast" if rank is None or os.environ.get("WORLD_SIZE", "1") == "1" else f"spt-fast, process {rank}"
    try:
        app()
    except FailedElsewhere:
        sys.exit(1)
    except SptError as error:
        print(f"{me}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("spt-fast: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{me}: {what}; make room there, or give a file or folder that this user may use", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"{me}: {error}", file=sys.stderr)
        sys.exit(1)


def _print_json(data: Any) -> None:
    print(json.dumps(as_json(data), indent=1, allow_nan=False))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"spt-fast {__version__}")
        raise typer.Exit


# ------------------------------------------------------------------------------------------------ text to tokens


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Inputs,
    vocab_size: Annotated[int, Option(help="Ids in all, the end-of-text id included.")],
    out_file: Annotated[Path, PathOption("--out", help="File for the tiktoken ranks.")],
    text_key: Annotated[str, Option(help="Key or column of the text.")] = "text",
    skip_bad: Annotated[bool, Option(help="Leave broken lines out instead of stopping at the first.")] = False,
) -> None:
    """Train a byte-level BPE and save it as tiktoken ranks."""
    from spt_fast.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(inputs, vocab_size, out_file, text_key=text_key, skip_bad=skip_bad)
    out.print(f"{out_file}: {tokenizer.vocab_size:,} ids, end of text {tokenizer.eos_id}", soft_wrap=True)


@app.command()
def prepare(
    inputs: Inputs,
    out_prefix: Annotated[Path, PathOption("--out", metavar="PREFIX", help="Writes PREFIX.bin, .idx and .json.")],
    tokenizer: Annotated[Path, PathOption(help="A .tiktoken file, or a tiktoken encoding by name.")],
    text_key: Annotated[str, Option(help="Key or column of the text.")] = "text",
    heldout: Annotated[str | None, Option(metavar="SHARE", help="Of the text, in bytes; for PREFIX.heldout.")] = None,
    skip_bad: Annotated[bool, Option(help="Count broken lines instead of stopping at the first.")] = False,
    workers: Annotated[int | None, Option(help="Processes; all cores by default.")] = None,
    as_json: Json = False,
) -> None:
    """Turn text into a token dataset."""
    from spt_fast.data.prepare import prepare as prepare_dataset
    from spt_fast.data.tokenizer import Tokenizer
    from spt_fast.fields import optional, parse_share

    summary = prepare_dataset(
        inputs,
        out_prefix,
        Tokenizer.load(tokenizer),
        text_key=text_key,
        heldout=optional(parse_share)(heldout, "--heldout"),
        skip_bad=skip_bad,
        workers=workers,
    )
    _print_json(summary) if as_json else print_facts(out, str(out_prefix), summary)


@app.command()
def inspect(
    prefix: Annotated[Path, PathArgument(metavar="PREFIX")],
    verify: Annotated[bool, Option(help="Check every hash and id.")] = False,
    overlap: Annotated[Path | None, PathOption(metavar="PREFIX2", help="Share of text that PREFIX2 holds too.")] = None,
    divergence: Annotated[Path | None, PathOption(metavar="PREFIX2", help="Distance from PREFIX2, in bits.")] = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """What a token dataset holds."""
    from spt_fast.data.inspection import inspect as inspect_dataset

    facts = inspect_dataset(prefix, dtype=dtype, verify=verify, overlap=overlap, divergence=divergence)
    _print_json(facts) if as_json else print_facts(out, str(prefix), facts)


# ------------------------------------------------------------------------------------------------ training


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, Option(envvar="WORLD_SIZE", min=1, help="Processes; the launcher's by default.")] = 1,
    gpu: Annotated[str | None, Option(help="Its name, such as H100; this machine's own by default.")] = None,
    gpu_memory: Annotated[str | None, Option(help="Of one GPU, such as 80GB; its own by default.")] = None,
    mfu: Annotated[str | None, Option(help="Share of the peak, such as 40%; measured by default.")] = None,
    mfu_from: Annotated[Path | None, PathOption(metavar="RUN", help="Take it from this run's metrics.")] = None,
    per_gpu_hour: Price = None,
    as_json: Json = False,
) -> None:
    """What a recipe would do: tokens and epochs asked and exactly achieved, FLOPs; memory, hours and cost."""
    from spt_fast.config import load_recipe
    from spt_fast.train import price as pricing
    from spt_fast.train.plan import make_plan

    loaded = load_recipe(recipe, overrides or ())
    memory = None if gpu_memory is None else pricing.parse_bytes(gpu_memory, "--gpu-memory")
    machine = pricing.Machine.of(loaded, gpus=gpus, gpu=gpu, memory=memory)
    made = make_plan(loaded, world=gpus)
    speed = pricing.speed_of(made, machine, mfu=share(mfu, "--mfu"), run=mfu_from)
    phases, price = made.describe(), pricing.price(made, machine, speed, per_gpu_hour=per_gpu_hour)
    if as_json:
        _print_json({"phases": phases, **vars(price)})
    else:
        pricing.print_plan(recipe, phases, price, out)


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
        from spt_fast.config import load_recipe
        from spt_fast.train import dry_run as trying
        from spt_fast.train.run import print_summary, run

        loaded = load_recipe(recipe, overrides or ())
        if dry_run:
            trials = trying.dry_run(loaded, verify=verify)
            if is_first():
                trying.print_trials(trials, out)
            return
        summary = run(loaded, resume=resume, verify=verify)
    if summary["status"] == "stopped":
        raise stopped(summary["reason"])
    if summary["status"] == "failed":
        raise RuntimeError(summary["reason"])
    if is_first():
        print_summary(loaded.run, summary, out)


@app.command("eval")
def evaluate(
    weights: WeightsPath,
    data: Annotated[list[Path], PathOption("--data", metavar="PREFIX")],
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Loss, perplexity and bits per byte; every token but the first of a dataset is scored once."""
    from spt_fast.train.score import print_scores, score

    scored = {str(prefix): score(weights, prefix, dtype=dtype) for prefix in data}
    _print_json(scored) if as_json else print_scores(weights, scored, out)


@app.command()
def audit(
    run: RunPath,
    source: Annotated[str | None, Option(help="Only this source.")] = None,
    document: Annotated[int | None, Option(help="One document of the source, by its position in the dataset.")] = None,
    as_json: Json = False,
) -> None:
    """Exactly how often a run has read every source, or one document."""
    from spt_fast.train.audit import audit_document, audit_run, print_audit

    if document is None:
        readings = audit_run(run, source)
        _print_json(readings) if as_json else print_audit(run, readings, out)
    else:
        reading = audit_document(run, source, document)
        _print_json(reading) if as_json else print_facts(out, f"{source}, document {document}", reading)


@checkpoint_app.command("list")
def checkpoint_list(run: RunPath, as_json: Json = False) -> None:
    """Checkpoints of a run, oldest first."""
    from spt_fast.train.checkpoint import checkpoints_of

    found = {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in checkpoints_of(run)}
    if as_json:
        _print_json([{"name": name, "bytes": size} for name, size in found.items()])
    else:
        print_table(out, str(run), ["checkpoint", "bytes"], found.items())


@checkpoint_app.command("verify")
def checkpoint_verify(run: RunPath, as_json: Json = False) -> None:
    """Check every hash of every checkpoint; exit code 2 where one is damaged."""
    from spt_fast.train.checkpoint import WHOLE, verdicts_of

    verdicts = verdicts_of(run)
    _print_json(verdicts) if as_json else print_facts(out, str(run), verdicts)
    if set(verdicts.values()) != {WHOLE}:
        raise typer.Exit(2)


# ------------------------------------------------------------------------------------------------ studies


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
    from spt_fast.study import compare as comparing
    from spt_fast.study.figures import write
    from spt_fast.study.findings import print_comparison

    result = comparing.compare(runs)
    if out_folder:
        write(result, out_folder)
    _print_json(result) if as_json else print_comparison(result, out)


@app.command()
def sweep(
    study: Annotated[Path, PathArgument(metavar="STUDY", help="A study's YAML file, or the name of a ready study.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, Option(help="Check every run, say what all of them would take, train none.")] = False,
    general: Annotated[Path | None, PathOption(metavar="PREFIX", help="The general corpus of a ready study.")] = None,
    domain: Annotated[Path | None, PathOption(metavar="PREFIX", help="The domain corpus of a ready study.")] = None,
    tokenizer: Annotated[Path | None, PathOption(help="The tokenizer of a ready study.")] = None,
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

    given = {"general": general, "domain": domain, "tokenizer": tokenizer, "out": out_folder}
    loaded = sweeping.load_study(str(study), overrides or (), given=given)
    if dry_run:
        price = sweeping.price(loaded, jobs=jobs, gpu=gpu, mfu=share(mfu, "--mfu"), per_gpu_hour=per_gpu_hour)
        _print_json(price) if as_json else sweeping.print_price(price, loaded.study, out)
        return
    if (gpu, mfu, per_gpu_hour) != (None, None, None):
        raise typer.BadParameter("--gpu, --mfu and --price say what a study would take: add --dry-run")
    workers = sweeping.workers_of(loaded, jobs, cluster, cluster_options or [])
    table, outcome = sweeping.sweep(loaded, terminal(stderr=True), workers=workers)
    facts = sweeping.facts_of(loaded, table, outcome)
    _print_json(facts) if as_json else print_facts(out, loaded.study, facts)
    if outcome.interrupted:
        print("spt-fast: stopped; what was under way is saved: run the same line again to go on", file=sys.stderr)
        raise typer.Exit(75)
    if outcome.failed:
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
    from spt_fast.study import fits
    from spt_fast.study.findings import print_fits
    from spt_fast.study.runs_table import read_table

    found = fits.fit(read_table(runs, domain_source=domain_source, general_source=general_source), law)
    if out_folder:
        fits.write(found, out_folder)
    _print_json(found) if as_json else print_fits(found, out, every_parameter=law is not None)


@app.command()
def advise(
    domain_tokens: Annotated[str, Option(metavar="COUNT", help="Unique tokens of the domain corpus, such as 30M.")],
    budget: Annotated[str, Option(metavar="COUNT", help="Pretraining tokens, such as 20B.")],
    model: Annotated[str | None, Option(help="A preset, or a number of parameters.")] = None,
    runs: Annotated[list[Path] | None, PathOption(metavar="RUNS", help="Without: a prior from the papers.")] = None,
    general: Annotated[Path | None, PathOption(metavar="PREFIX", help="The general dataset, for the distance.")] = None,
    domain: Annotated[Path | None, PathOption(metavar="PREFIX", help="The domain dataset, for the distance.")] = None,
    domain_source: DomainSource = None,
    general_source: GeneralSource = None,
    inference_tokens: Annotated[str | None, Option(metavar="COUNT", help="To price a larger model.")] = None,
    max_general_rise: Annotated[str | None, Option(metavar="SHARE", help="Of the general loss, such as 3%.")] = None,
    as_json: Json = False,
) -> None:
    """Share of domain data in pretraining, repeats, replay: by runs, or by the papers where there are none."""
    from spt_fast.advice import advise as advising
    from spt_fast.advice.words import print_advice
    from spt_fast.fields import parse_count
    from spt_fast.study.runs_table import read_table

    given = advising.advise(
        domain_tokens=parse_count(domain_tokens, "--domain-tokens"),
        budget=parse_count(budget, "--budget"),
        model=model,
        table=read_table(runs, domain_source=domain_source, general_source=general_source) if runs else None,
        general=general,
        domain=domain,
        inference_tokens=count(inference_tokens, "--inference-tokens"),
        max_general_rise=share(max_general_rise, "--max-general-rise"),
    )
    _print_json(given) if as_json else print_advice(given, out)


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
    from spt_fast.report.page import report as write_report

    write_report(
        runs,
        out_file,
        domain_source=domain_source,
        general_source=general_source,
        domain_tokens=count(domain_tokens, "--domain-tokens"),
        budget=count(budget, "--budget"),
        model=model,
    )
    facts = {"report": str(out_file), "bytes": out_file.stat().st_size}
    _print_json(facts) if as_json else out.print(f"{out_file}: open it in a browser", soft_wrap=True)


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
    from spt_fast.config import load_recipe
    from spt_fast.study import doge

    loaded = load_recipe(recipe, overrides or ())
    result = doge.reweight(loaded, out_folder or Path(f"{loaded.run}-reweight"), target=target, resume=resume)
    if isinstance(result, doge.Stopped):
        raise stopped(result.reason)
    _print_json(result) if as_json else doge.print_reweighting(result, str(recipe), out)


# ------------------------------------------------------------------------------------------------ weights in and out


@app.command("export")
def export_weights(
    weights: WeightsPath,
    out_folder: Annotated[Path, PathOption("--out", metavar="DIR")],
    tokenizer: Annotated[Path | None, PathOption(help="Saved along for AutoTokenizer; a run's own by default")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a Hugging Face folder (Llama; Qwen2 with a QKV bias; Qwen3 with QK-norm)."""
    from spt_fast.train.release import export

    export(weights, out_folder, tokenizer, overwrite=overwrite)
    out.print(f"{out_folder}: load it with AutoModelForCausalLM.from_pretrained", soft_wrap=True)


@app.command("import")
def import_weights(
    folder: Annotated[Path, PathArgument(metavar="DIR", help="A Hugging Face folder: Llama, Qwen2 or Qwen3.")],
    out_folder: Annotated[Path, PathOption("--out", metavar="CHECKPOINT")],
    overwrite: Overwrite = False,
) -> None:
    """Check that a Hugging Face folder can be trained on, and copy it to where a recipe's `init` may point."""
    from spt_fast.train.release import take_over

    take_over(folder, out_folder, overwrite=overwrite)
    out.print(f"{out_folder}: name it in a recipe as `init: {out_folder}`", soft_wrap=True)


@app.command()
def generate(
    weights: WeightsPath,
    prompt: str = "",
    tokens: Annotated[int, Option(min=0, max=1_000_000, help="How many to generate.")] = 100,
    temperature: Annotated[float, Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int | None, Option(help="Sample among the k likeliest only.")] = 50,
    seed: int = 0,
    tokenizer: Annotated[Path | None, PathOption(help="A run's own by default.")] = None,
) -> None:
    """Text from a trained model."""
    from spt_fast.train.release import generate_text

    print(generate_text(weights, prompt, tokens, temperature=temperature, top_k=top_k, seed=seed, tokenizer=tokenizer))


@app.command()
def kernels(as_json: Json = False) -> None:
    """The backend that each op uses on this machine, and why."""
    from spt_fast.kernels import chosen_backends

    chosen = chosen_backends()
    _print_json(chosen) if as_json else print_facts(out, "kernels", chosen)

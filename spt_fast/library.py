"""The library: what `import spt_fast as spt` offers, a call for most commands of `spt-fast` (docs/api.md).

    import spt_fast as spt

    spt.tokenizer("text/", 4096, "data/bpe.tiktoken")
    spt.prepare("text/general", "data/general", "data/bpe.tiktoken", heldout="0.5%")
    spt.prepare("text/chem.jsonl", "data/chem", "data/bpe.tiktoken", heldout="5%")
    print(spt.plan("recipe.yaml").price.hours)
    trained = spt.train("recipe.yaml")
    print(trained.phases["finetune"].heldout)
    print(spt.generate(trained.run, "The solvent is")[0].text)

Every call returns a dataclass, or a list or dict of them, whose fields its class documents; `spt-fast` prints the same
result. Paths are strings or `pathlib.Path`; numbers of tokens are ints or strings such as "300M"; shares are numbers,
fractions or strings such as "2%". Errors that a user can fix are raised as `spt.SptError`, a ValueError whose message
names the argument, file or recipe field, what was given and what to do: RecipeError for values and recipes, DataError
for text, tokenizers and datasets, CheckpointError for runs and weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from spt_fast.errors import RecipeError, SptError, invalid
from spt_fast.files import place

if TYPE_CHECKING:
    import pandas as pd

    from spt_fast.advice.bases import BaseAdvice
    from spt_fast.advice.result import Advice
    from spt_fast.advice.starter import Begun
    from spt_fast.config import Recipe
    from spt_fast.data.base_tokenizer import BaseTokenizer
    from spt_fast.data.prepare import Prepared
    from spt_fast.data.tokenizer import Tokenizer
    from spt_fast.data.visits import Visits
    from spt_fast.evaluation.results import TaskResult
    from spt_fast.evaluation.score import Scored
    from spt_fast.study.compare import Comparison
    from spt_fast.study.fits import Fits
    from spt_fast.study.study import Study
    from spt_fast.study.sweep import Swept
    from spt_fast.train.audit import SourceReading
    from spt_fast.train.plan import PhaseFigures
    from spt_fast.train.price import Price
    from spt_fast.train.release import Generated
    from spt_fast.train.summary import TrainedRun

    AnyPath = str | os.PathLike[str]
    Paths = AnyPath | Sequence[AnyPath]
    Count = int | str
    Share = float | Fraction | str


def tokenizer(
    inputs: Paths,
    vocab_size: int,
    out: AnyPath,
    *,
    text_key: str = "text",
    skip_bad: bool = False,
    progress: bool = True,
) -> Tokenizer:
    """Train a byte-level BPE and save it as tiktoken ranks.

    inputs      .jsonl, .txt and .parquet files, also compressed, and folders of them
    vocab_size  number of ids, end-of-text included; at least 257
    out         the file for the ranks
    text_key    key or column of the text
    skip_bad    leave broken lines out instead of stopping at the first
    progress    show a line on standard error

    Returns the tokenizer. Raises DataError.

        >>> bpe = spt.tokenizer("text/", 4096, "data/bpe.tiktoken")
        >>> bpe.encode("benzene")
    """
    from spt_fast.data.tokenizer import train_tokenizer
    from spt_fast.fields import integer

    vocab_size = _parsed(integer(), vocab_size, "vocab_size")
    texts, to = _paths(inputs, "inputs"), place(out, "out")
    return train_tokenizer(texts, vocab_size, to, text_key=text_key, skip_bad=skip_bad, progress=progress)


def prepare(
    inputs: Paths,
    out: AnyPath,
    tokenizer: BaseTokenizer | AnyPath,
    *,
    eos: str | None = None,
    bos: str | None = None,
    text_key: str = "text",
    heldout: Share | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Turn text into the token dataset OUT.bin, OUT.idx and OUT.json.

    inputs      as for `tokenizer`; "-" reads JSON lines from standard input
    tokenizer   a Hugging Face folder or tokenizer.json, a file of tiktoken ranks, a tiktoken name, or a tokenizer
    eos, bos    tokens that end and begin each document; by default the tokenizer's own and none
    text_key    key or column of the text
    heldout     share of the text, in bytes, that goes to the dataset OUT.heldout instead, such as "0.5%"
    skip_bad    count broken documents and leave them out instead of stopping at the first
    workers     processes; by default one for each core
    progress    show a bar on standard error

    Returns the counts of documents, tokens and bytes. Raises DataError; then nothing is left behind.

        >>> spt.prepare("chem.jsonl", "data/chem", "data/bpe.tiktoken", heldout="5%").tokens
    """
    from spt_fast.data.prepare import prepare
    from spt_fast.fields import integer, parse_share

    return prepare(
        _paths(inputs, "inputs"),
        place(out, "out"),
        place(tokenizer, "tokenizer") if isinstance(tokenizer, (str, os.PathLike)) else tokenizer,
        eos=_parsed(_name, eos, "eos"),
        bos=_parsed(_name, bos, "bos"),
        text_key=text_key,
        heldout=_parsed(parse_share, heldout, "heldout"),
        skip_bad=skip_bad,
        workers=_parsed(integer(), workers, "workers"),
        progress=progress,
    )


def init(
    general: AnyPath,
    domain: AnyPath,
    out: AnyPath = ".",
    *,
    init: AnyPath | None = None,
    tokenizer: AnyPath | None = None,
    hours: float | None = None,
    text_key: str = "text",
    skip_bad: bool = False,
    progress: bool = True,
) -> Begun:
    """Write a first recipe and study for two corpora, sized for this machine: OUT/recipe.yaml and OUT/study.yaml.

    general, domain  text as for `tokenizer`, which is prepared in OUT/data, or prefixes of datasets with held-out parts
    out              the folder to write
    init             a base to start from, a run, its weights/<phase>, a checkpoint or a Hugging Face folder; by default
                     a model of a preset is trained from scratch
    tokenizer        of the datasets, or for the text; by default the base's, or one that is trained on the text
    hours            of training on this machine; by default 1, or 24 on a GPU
    text_key         key or column of the text
    skip_bad         skip and count broken lines instead of stopping at the first
    progress         show bars on standard error

    Returns what was written and what it is sized for. Raises RecipeError for a recipe that is there already, DataError,
    or CheckpointError for a base that can't be represented.

        >>> begun = spt.init("general.jsonl", "chem.jsonl", "chem", init="models/SmolLM2-135M", hours=8)
        >>> spt.plan(begun.recipe).price.hours
    """
    from spt_fast.advice.starter import begin
    from spt_fast.fields import number

    return begin(
        place(general, "general"),
        place(domain, "domain"),
        place(out, "out"),
        init=_place(init, "init"),
        tokenizer=_place(tokenizer, "tokenizer"),
        hours=_parsed(number(0, open_low=True), hours, "hours"),
        text_key=text_key,
        skip_bad=skip_bad,
        progress=progress,
    )


@dataclass(frozen=True)
class Planned:
    """A recipe's phases, and the compute, memory, time and cost that they need."""

    phases: list[PhaseFigures]
    price: Price

    def as_json(self) -> dict[str, Any]:
        return {"phases": self.phases, **vars(self.price)}


def plan(
    recipe: Recipe | AnyPath,
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    gpu_memory: str | None = None,
    mfu: Share | None = None,
    mfu_from: AnyPath | None = None,
    per_gpu_hour: float | None = None,
) -> Planned:
    """What a recipe reads and needs: tokens, epochs, FLOPs, memory, hours, cost. Nothing is trained.

    recipe        a recipe, or the path of its file
    gpus          processes; by default those that a launcher started, or one
    gpu           name of the GPU, such as "H100"; by default this machine's
    gpu_memory    of one GPU, such as "80GB"; by default its own
    mfu           share of the peak FLOP/s that training reaches; by default measured by `mfu_from`, else by the
                  recipe's own run, else 40%
    mfu_from      a run to take the measured speed from
    per_gpu_hour  price of one GPU for an hour, in any currency; `price.cost` is in the same

    Returns the phases and the price. What is not known is None. Raises RecipeError, DataError or CheckpointError.

        >>> spt.plan("recipe.yaml", gpus=8, gpu="H100", per_gpu_hour=2.5).price.cost
    """
    from spt_fast.config import as_recipe
    from spt_fast.fields import integer, number, rounded_share
    from spt_fast.train import price as pricing
    from spt_fast.train.plan import make_plan
    from spt_fast.train.precision import precision_of
    from spt_fast.train.world import launched_processes, pick_device

    loaded, gpus = as_recipe(recipe), _parsed(integer(1), gpus, "gpus") or launched_processes()
    gpu, per_hour = _parsed(_name, gpu, "gpu"), _parsed(number(0), per_gpu_hour, "per_gpu_hour")
    memory, share = _parsed(pricing.parse_bytes, gpu_memory, "gpu_memory"), _parsed(rounded_share, mfu, "mfu")
    made = make_plan(loaded, world=gpus)
    here = None if gpu else precision_of(loaded, pick_device(), made.model)
    machine = pricing.Machine.of(loaded, gpus=gpus, gpu=gpu, memory=memory, precision=here)
    speed = pricing.speed_of(made, machine, mfu=share, run=_place(mfu_from, "mfu_from"))
    return Planned(made.describe(), pricing.price(made, machine, speed, per_gpu_hour=per_hour))


def train(recipe: Recipe | AnyPath, *, resume: bool = False, verify: bool = False, progress: bool = True) -> TrainedRun:
    """Train all phases of a recipe. `spt.train` is also the package of that name, so `spt_fast.train.loop` works.

    recipe    a recipe, or the path of its file
    resume    continue from the newest whole checkpoint, or start without one
    verify    compare every block of the datasets with its hash, not only some
    progress  show progress on standard error

    Returns the run, whose `status` is "done", "stopped" after a signal, or "failed" if it diverged; the last two have
    a `reason`. Raises RecipeError, DataError or CheckpointError.

        >>> trained = spt.train("recipe.yaml", resume=True)
        >>> trained.phases["finetune"].heldout["chem"]
    """
    from spt_fast.config import as_recipe
    from spt_fast.train.run import run
    from spt_fast.train.summary import TrainedRun
    from spt_fast.train.world import before_joining

    loaded = before_joining(lambda: as_recipe(recipe))
    return TrainedRun.of(Path(loaded.run), run(loaded, resume=resume, verify=verify, progress=progress))


@dataclass(frozen=True)
class Evaluation:
    """The scores of weights."""

    losses: dict[str, Scored]
    """By dataset."""
    tasks: dict[str, TaskResult]
    """By task."""

    def as_json(self) -> dict[str, Any]:
        return {**self.losses, **({"tasks": self.tasks} if self.tasks else {})}


def evaluate(
    weights: AnyPath,
    data: Paths = (),
    *,
    tasks: Paths | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    context: int | None = None,
    batch: int | None = None,
    tokenizer: AnyPath | None = None,
    bos: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Loss, perplexity and bits per byte on datasets, and accuracy in tasks.

    weights      a run, its weights/<phase>, a checkpoint or a Hugging Face folder
    data         prefixes of datasets; every token but the first is scored once
    tasks        one or several: files of questions (.jsonl), lm-eval's task files (.yaml) and names of its tasks
    num_fewshot  solved examples before each question of a task
    limit        questions of each task at most
    context      tokens that the model sees at a time; by default as in training, or the model's own
    batch        texts of a task at a time; by default as many as fit
    tokenizer    for tasks; by default the weights' own
    bos          token that begins each text of a task; by default as in training
    dtype        of the ids of headerless datasets
    progress     show bars on standard error

    Returns losses in nats per token by dataset, and results by task. Raises RecipeError, DataError or CheckpointError.

        >>> spt.evaluate("runs/chem", "data/chem.heldout").losses["data/chem.heldout"].perplexity
    """
    from spt_fast.evaluation.score import scored
    from spt_fast.evaluation.tasks import score_tasks
    from spt_fast.fields import integer

    num_fewshot, limit = _parsed(integer(0), num_fewshot, "num_fewshot"), _parsed(integer(), limit, "limit")
    context, batch = _parsed(integer(), context, "context"), _parsed(integer(), batch, "batch")
    datasets, folder = _several(data), place(weights, "weights")
    if not datasets and tasks is None:
        raise RecipeError("data: missing; give `data=PREFIX`, `tasks=TASK` or both", argument=True)
    of_tasks = {"num_fewshot": num_fewshot, "limit": limit, "batch": batch, "tokenizer": tokenizer, "bos": bos}
    if tasks is None and (unused := [name for name, given in of_tasks.items() if given is not None]):
        raise RecipeError(f"{unused[0]}: is for tasks; add `tasks=TASK`, or leave it out", argument=True)
    results = {}
    if tasks is not None:
        own = _place(tokenizer, "tokenizer")
        asked: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "batch": batch}
        asked["bos"] = _parsed(_name, bos, "bos")
        named = [str(task) for task in _paths(tasks, "tasks")]
        results = score_tasks(folder, named, tokenizer=own, context=context, progress=progress, **asked)
    losses = {
        str(prefix): scored(folder, place(prefix, "data"), dtype=dtype, context=context, progress=progress)
        for prefix in datasets
    }
    return Evaluation(losses, results)


def compare(runs: Paths, *, out: AnyPath | None = None) -> Comparison:
    """Finished runs side by side: domain loss, forgetting, R_gain, compute multiplier.

    runs  folders of finished runs, with pretraining and a finetune each, or of a study, whose last stage is compared
    out   a folder for comparison.json and comparison.png

    Returns the figures of each arm and run. Raises RecipeError or CheckpointError for runs that are unfinished or
    cannot be compared.

        >>> for arm in spt.compare(["runs/npt", "runs/spt"]).arms:
        ...     print(arm.treatment.name, arm.domain_after.mean)
    """
    from spt_fast.study import compare as comparing

    if out is None:
        return comparing.compare(_paths(runs, "runs"))
    from spt_fast.study import figures

    figures.check_place(folder := place(out, "out"))
    found = comparing.compare(_paths(runs, "runs"))
    figures.write(found, folder)
    return found


@overload
def audit(run: AnyPath, *, source: str | None = None) -> dict[str, SourceReading]: ...
@overload
def audit(run: AnyPath, *, source: str | None = None, document: int) -> Visits: ...
def audit(run: AnyPath, *, source: str | None = None, document: int | None = None) -> dict[str, SourceReading] | Visits:
    """Exactly how often a run has read every source, or one document.

    source    only this one
    document  a document of the source, by its position in the dataset, from 0

    Returns the readings by source, or the visits of the document: how often its tokens were read as inputs. Raises
    DataError or CheckpointError.

        >>> spt.audit("runs/chem")["chem"].epochs
        >>> spt.audit("runs/chem", source="chem", document=17).max_visits
    """
    from spt_fast.train.audit import audit_document, audit_run

    folder, source = place(run, "run"), _parsed(_name, source, "source")
    return audit_run(folder, source) if document is None else audit_document(folder, source, document)


def load_study(
    study: AnyPath,
    overrides: str | Sequence[str] = (),
    *,
    general: AnyPath | None = None,
    domain: AnyPath | None = None,
    tokenizer: AnyPath | None = None,
    init: Paths = (),
    out: AnyPath | None = None,
) -> Study:
    """A study from its YAML file, or a ready one by name, such as "spt".

    overrides                        one or several "a.b=c" strings, whose values are YAML
    general, domain, tokenizer, out  for a ready study: the datasets' prefixes, their tokenizer, the study's folder
    init                             for a ready study: one or several weights to start from

    Raises RecipeError, or CheckpointError for `init` without weights.
    """
    from spt_fast.study import load

    given = {"general": general, "domain": domain, "tokenizer": tokenizer, "out": out, "init": _several(init)}
    name = os.fspath(study) if isinstance(study, os.PathLike) else study
    return load.load_study(name, overrides, given=given)


def sweep(
    study: Study | AnyPath,
    *,
    jobs: int | None = None,
    cluster: str | None = None,
    cluster_options: str | Sequence[str] = (),
    progress: bool = True,
) -> Swept:
    """Train the missing runs of a grid, and write the table of their results.

    study            a study as `load_study` gives it, or the path of its file
    jobs             runs at a time; by default one for each GPU, or core
    cluster          run as jobs of a cluster, by submitit: "slurm", "local"
    cluster_options  one or several "key=value" strings for submitit, such as "timeout_min=600"
    progress         show what is under way on standard error

    Returns the state of every run, and the table with a row for each evaluation. A failed run is reported; the others
    continue. Raises RecipeError, DataError or CheckpointError.

        >>> swept = spt.sweep(spt.load_study("spt", general="data/web", domain="data/chem", tokenizer="gpt2", out="s"))
        >>> swept.table[["run", "tokens", "domain_heldout"]]
    """
    from spt_fast.fields import integer
    from spt_fast.printing import terminal
    from spt_fast.study import sweep as sweeping

    jobs = _parsed(integer(1), jobs, "jobs")
    loaded = load_study(study) if isinstance(study, (str, os.PathLike)) else study
    options = [cluster_options] if isinstance(cluster_options, str) else cluster_options
    workers = sweeping.workers_of(loaded, jobs, cluster, options)
    console = terminal(stderr=True, quiet=not progress)
    return sweeping.Swept.of(loaded, *sweeping.sweep(loaded, console, workers=workers))


def fit(
    runs: Paths | pd.DataFrame,
    law: str | None = None,
    *,
    domain_source: str | None = None,
    general_source: str | None = None,
    out: AnyPath | None = None,
) -> Fits:
    """Scaling laws of finished runs, and how far each can be trusted.

    runs                           studies, tables (.parquet, .csv) and folders of runs, or a runs table itself
    law                            only this one, such as "overfitting"
    domain_source, general_source  names of the sources, in runs that belong to no study
    out                            a folder for fits.json

    Returns each law with its parameters, intervals, and errors on runs that were left out; or why it was not fitted.
    Raises RecipeError, DataError or CheckpointError.

        >>> for fitted in spt.fit("studies/chem").laws:
        ...     print(fitted.law_name, fitted.problem or fitted.score.r2)
    """
    from spt_fast.study import fits

    law = _parsed(_name, law, "law")
    if folder := _place(out, "out"):
        fits.check_place(folder)
    found = fits.fit(_table(runs, domain_source, general_source), law)
    if folder:
        fits.write(found, folder)
    return found


def advise(
    *,
    domain_tokens: Count,
    budget: Count,
    model: Count | None = None,
    runs: Paths | pd.DataFrame | None = None,
    init: AnyPath | None = None,
    general: AnyPath | None = None,
    domain: AnyPath | None = None,
    domain_source: str | None = None,
    general_source: str | None = None,
    inference_tokens: Count | None = None,
    max_general_rise: Share | None = None,
) -> Advice | BaseAdvice:
    """The share of domain data in pretraining, repeats and replay: from runs, or else from the papers.

    domain_tokens                  unique tokens of the domain corpus
    budget                         tokens of pretraining, or of training from a base
    model                          a preset, or a number of parameters
    runs                           as for `fit`; without them a prior from the papers answers
    init                           the base to start from, a run or a Hugging Face folder
    general, domain                dataset prefixes, to measure the distance of the domain from general text
    domain_source, general_source  names of the sources, in runs that belong to no study
    inference_tokens               tokens to generate in use, to price a larger model that is only finetuned
    max_general_rise               how far the general loss may rise, such as "3%"

    Returns the decision and the evidence for it. Raises RecipeError, DataError or CheckpointError.

        >>> spt.advise(domain_tokens="30M", budget="20B", model="1b").decision.delta
    """
    from spt_fast.advice.advise import advise

    return advise(
        domain_tokens=domain_tokens,
        budget=budget,
        model=model,
        table=None if runs is None else _table(runs, domain_source, general_source),
        general=_place(general, "general"),
        domain=_place(domain, "domain"),
        inference_tokens=inference_tokens,
        max_general_rise=max_general_rise,
        base=None if init is None else str(place(init, "init")),
    )


def report(
    runs: Paths,
    out: AnyPath = "report.html",
    *,
    domain_source: str | None = None,
    general_source: str | None = None,
    model: Count | None = None,
    domain_tokens: Count | None = None,
    budget: Count | None = None,
) -> Path:
    """One HTML page: the decision, and the evidence for it. `spt.report` is also the package of that name.

    runs                           studies, tables (.parquet, .csv) and folders of runs
    out                            the file to write
    domain_source, general_source  names of the sources, in runs that belong to no study
    model, domain_tokens, budget   what the advice is for; by default the size, corpus and largest budget of the runs

    Returns the path of the page. Raises RecipeError, DataError or CheckpointError.

        >>> spt.report("studies/chem", "chem.html", budget="20B")
    """
    from spt_fast.fields import parse_count
    from spt_fast.report.page import report

    page = place(out, "out")
    report(
        _paths(runs, "runs"),
        page,
        domain_source=_parsed(_name, domain_source, "domain_source"),
        general_source=_parsed(_name, general_source, "general_source"),
        domain_tokens=_parsed(parse_count, domain_tokens, "domain_tokens"),
        budget=_parsed(parse_count, budget, "budget"),
        model=model,
    )
    return page


def export(
    weights: AnyPath,
    out: AnyPath,
    tokenizer: AnyPath | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write weights as a Hugging Face folder, in the form of the base that they come from.

    weights    a run, its weights/<phase>, a checkpoint or a Hugging Face folder
    out        the folder to write, outside of every run
    tokenizer  saved along for AutoTokenizer; by default the run's own
    dtype      "fp32", "bf16" or "fp16"; by default as stored
    overwrite  replace another model in that folder

    Returns the folder, for `AutoModelForCausalLM.from_pretrained`. Raises CheckpointError or DataError.

        >>> spt.export("runs/chem", "hf/chem", dtype="bf16")
    """
    from spt_fast.train.release import export

    folder = place(out, "out")
    own = _place(tokenizer, "tokenizer")
    export(place(weights, "weights"), folder, own, dtype=dtype, overwrite=overwrite)
    return folder


def generate(
    weights: AnyPath,
    prompts: str | Sequence[str] = "",
    tokens: int = 100,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
    tokenizer: AnyPath | None = None,
) -> list[Generated]:
    """Text from a trained model.

    weights      a run, its weights/<phase>, a checkpoint or a Hugging Face folder
    prompts      one or several; an empty one begins a document
    tokens       how many to draw after each prompt; fewer where a token that ends a text is drawn
    temperature  0 takes the likeliest token each time
    top_k        draw only from this many likeliest tokens; None for all
    top_p        and from the likeliest tokens whose probabilities sum to this
    seed         each text depends on it alone
    tokenizer    by default the run's own

    Returns a text for each prompt, in order. Raises CheckpointError, or SptError for invalid sampling settings.

        >>> spt.generate("runs/chem", "The solvent is", 50)[0].text
    """
    from spt_fast.fields import integer, number
    from spt_fast.train.release import generate_texts

    temperature, top_k = _parsed(number(), temperature, "temperature"), _parsed(integer(), top_k, "top_k")
    top_p = _parsed(number(), top_p, "top_p")
    tokens = _parsed(integer(0), tokens, "tokens")
    seed = _parsed(integer(-(2**63), 2**64 - 1), seed, "seed")
    asked = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(asked, Sequence) or not all(isinstance(prompt, str) for prompt in asked):
        raise RecipeError(invalid("prompts", prompts, "give a text, or a list of texts"), argument=True)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    own = _place(tokenizer, "tokenizer")
    return [*generate_texts(place(weights, "weights"), asked, tokens, tokenizer=own, **sampling)]


def _place(given: AnyPath | None, argument: str) -> Path | None:
    return None if given is None else place(given, argument)


def _paths(paths: Paths, argument: str) -> list[Path]:
    return [place(path, argument) for path in _several(paths)]


def _several(paths: Paths) -> list[AnyPath]:
    """One or several, as they were given."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else [*paths]


def _table(runs: Paths | pd.DataFrame, domain_source: str | None, general_source: str | None) -> Any:
    from spt_fast.study.runs_table import read_table

    if hasattr(runs, "columns"):
        return runs
    domain = _parsed(_name, domain_source, "domain_source")
    general = _parsed(_name, general_source, "general_source")
    return read_table(_paths(runs, "runs"), domain_source=domain, general_source=general)


def _name(given: object, argument: str) -> str:
    if not isinstance(given, str):
        raise RecipeError(invalid(argument, given, "give its name, as text"))
    return given


def _parsed(parse: Callable[[Any, str], Any], given: Any, argument: str) -> Any:
    """The value of an argument that may be text; None stays None. RecipeError names the argument."""
    try:
        return None if given is None else parse(given, argument)
    except SptError as error:
        error.argument = True
        raise

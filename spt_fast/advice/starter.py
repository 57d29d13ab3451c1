"""A first recipe and a first study for two corpora, sized for a machine and a number of hours.

They start from a base (`spt_fast.advice.starter_base`) or from scratch. The rules for training from scratch follow;
the recipe's comments name each one. `spt_fast.advice.sizing` has the rules that both share.

    model         the largest preset that can be trained on 20 tokens per parameter in the time (arXiv 2203.15556)
    tokens        as many as the time allows, with at most four epochs of the general text (arXiv 2305.16264)
    share         the papers' share for this many domain tokens, see `spt_fast.advice.prior`
    rate          0.312 · C^-0.125 for C FLOPs (arXiv 2401.02954)
    weight decay  averages the weights over a fifth of the run: 1 / (rate · steps / 5) (arXiv 2405.13698)
    study         the same at about a tenth of the model's size, with the domain cut so that it repeats as often
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from textwrap import fill, indent

from spt_fast.advice import starter_base
from spt_fast.advice.prior import FINETUNE_EPOCHS, Prior, prior
from spt_fast.advice.sizing import (
    HELDOUT_TOKENS,
    TRAINING_SHARE,
    WARMUP_STEPS,
    Corpus,
    Device,
    Sizing,
    exact,
    in_steps,
    one_digit,
    quoted,
    study_commands,
    two_digits,
)
from spt_fast.config import recipe_from
from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.inputs import find_files
from spt_fast.data.prepare import Prepared, heldout_prefix, prepare
from spt_fast.data.shards import TokenDataset
from spt_fast.data.tokenizer import Tokenizer, train_tokenizer
from spt_fast.errors import DataError, MissingKey, RecipeError, SptWarning, TooFewPieces, counted, invalid
from spt_fast.fields import parse_yaml
from spt_fast.model.config import GPTConfig
from spt_fast.model.flops import parameters, train_flops_per_token
from spt_fast.model.presets import PRESETS
from spt_fast.outputs import check_folder
from spt_fast.quantities import amount, duration
from spt_fast.study.study import study_from
from spt_fast.study.tree import expand
from spt_fast.train.doubts import MOST_EPOCHS
from spt_fast.train.plan import VOCABULARY_MULTIPLE, make_plan

SIZES = ("1m", "3m", "10m", "30m", "60m", "124m", "350m", "1b", "3b", "8b")
TOKENS_PER_PARAMETER = 20
GENERAL_EPOCHS = 4
HOURS = {"cpu": 1.0, "cuda": 24.0}
BYTES_PER_TOKEN = 4
FEWEST_IDS = 257
Named = str | os.PathLike[str] | None
"""A tokenizer as the user named it."""


@dataclass(frozen=True)
class Begun:
    """The files that `init` has written, and the sizes in them."""

    recipe: Path
    study: Path | None
    """None if the runs of a study would be nearly as long as the training itself."""
    model: str
    """The preset, or the name of the base."""
    parameters: int
    tokens: int
    """Tokens of pretraining, or of training from the base."""
    domain_share: float
    """The domain's share of these tokens."""
    epochs: dict[str, float]
    """How often each source is read, the finetune included."""
    hours: float
    """The time of the training, estimated from this machine's speed."""
    skipped: dict[str, int]
    """Documents of both texts that were left out, by kind."""


def begin(
    general: str | os.PathLike[str],
    domain: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    init: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    hours: float | None = None,
    text_key: str = "text",
    skip_bad: bool = False,
    progress: bool = True,
) -> Begun:
    """Write OUT/recipe.yaml and OUT/study.yaml for two corpora.

    general, domain  prefixes of datasets with held-out parts, or text, which is prepared in OUT/data
    init             a base to start from: a run, its weights/<phase>, a checkpoint or a Hugging Face folder
    tokenizer        of the datasets, or for the text; by default the base's, or one that is trained on the text
    hours            of training on this machine; by default 1 on a CPU and 24 on a GPU
    text_key         key or column of the text
    skip_bad         skip and count broken lines instead of stopping at the first
    progress         show progress on standard error

    Both files are planned before they are written. Warns if text is repeated too often, and if the hours are too few
    for the base. Raises RecipeError if a file exists or if the base has another tokenizer, DataError for text,
    datasets and tokenizers that can't be used, and CheckpointError for a base that can't be represented.
    """
    out = Path(out)
    recipe, study = out / "recipe.yaml", out / "study.yaml"
    check_folder(out, "out")
    for file in (recipe, study):
        if file.exists():
            raise RecipeError(f"out: {file} exists; choose another folder, or move the file away", argument=True)
    if hours is not None and not 0 < hours < math.inf:
        raise RecipeError(invalid("hours", hours, "write a number above 0"), argument=True)
    base = None if init is None else starter_base.Base.of(Path(init), tokenizer)
    given, reading = [Path(general), Path(domain)], Reading(text_key, skip_bad, progress)
    with _of_two_texts():
        if base is None and tokenizer is None:
            tokenizer = _trained(given, out / "data" / "bpe.tiktoken", reading)
        loaded = base.tokenizer if base else Tokenizer.load(tokenizer or "")
        corpora, skipped = _corpora(given, out / "data", loaded, reading)
    device = Device.here()
    hours = hours or HOURS[device.kind]
    plan: FromScratch | starter_base.FromBase
    if base:
        plan = starter_base.FromBase.of(corpora, base, device, hours)
        most = MOST_EPOCHS, MOST_EPOCHS
    else:
        plan = FromScratch.of(corpora, loaded.vocab_size, device, hours)
        most = GENERAL_EPOCHS, MOST_EPOCHS
    written = {recipe: plan.recipe(out, tokenizer), study: plan.study(out, tokenizer)}
    make_plan(recipe_from(parse_yaml(written[recipe] or "", str(recipe))), world=device.count)
    if text := written[study]:
        expand(study_from(parse_yaml(text, str(study))))
    out.mkdir(parents=True, exist_ok=True)
    for file, text in written.items():
        if text:
            file.write_text(text, encoding="utf-8")
    epochs = plan.epochs()
    _warn_of_repetition(corpora, epochs, most)
    return Begun(
        recipe=recipe,
        study=study if written[study] else None,
        model=plan.name,
        parameters=plan.parameters,
        tokens=plan.tokens,
        domain_share=float(plan.share),
        epochs=epochs,
        hours=plan.hours,
        skipped=skipped,
    )


def _warn_of_repetition(corpora: Sequence[Corpus], epochs: Mapping[str, float], most: Sequence[int]) -> None:
    """most: epochs of each corpus beyond which repetition helps little."""
    for corpus, times in zip(corpora, most, strict=True):
        if epochs[corpus.name] > 1.05 * times:
            warnings.warn(
                f"{corpus.name}: its {counted(corpus.tokens, 'token', 'are')} read {epochs[corpus.name]:.0f} times; "
                f"beyond about {times} epochs repetition helps little: add text, or train for fewer hours",
                SptWarning,
                stacklevel=3,
            )


# ------------------------------------------------------------------------------------------------ the corpora


@dataclass(frozen=True)
class Reading:
    """How texts are read: arguments of `train_tokenizer` and `prepare`."""

    text_key: str
    skip_bad: bool
    progress: bool


@contextmanager
def _of_two_texts() -> Iterator[None]:
    """Errors about a missing key say what to do if the two texts have different keys."""
    try:
        yield
    except MissingKey as error:
        remedy = "if the keys of the two texts differ, prepare each with `spt-fast prepare` and give the prefixes"
        error.args = (f"{error}; {remedy}",)
        raise


def _is_dataset(path: Path) -> bool:
    return not path.is_file() and not path.is_dir() and Path(f"{path}.bin").exists()


def _trained(given: Sequence[Path], out: Path, reading: Reading) -> Path:
    """A tokenizer trained on the texts, written to `out`; a token per 2 kB of text, from 1,024 to 32,768. DataError for
    a dataset, whose tokenizer must be named."""
    if any(map(_is_dataset, given)):
        raise DataError("tokenizer: missing; name the one that the datasets were prepared with", argument=True)
    found = sum(path.stat().st_size for text in given for path in find_files(text).files)
    size = min(32_768, max(1024, 1 << (int(found) // 2000).bit_length() - 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            train_tokenizer([str(text) for text in given], size, out, **vars(reading))
            return out
        except TooFewPieces:
            if size == FEWEST_IDS:
                raise
            size = max(FEWEST_IDS, size // 2)


def _corpora(
    given: Sequence[Path], folder: Path, tokenizer: BaseTokenizer, reading: Reading
) -> tuple[list[Corpus], dict[str, int]]:
    """Both corpora, prepared in `folder` if they are text; and how many documents were left out, by kind."""
    names = [path.name.split(".")[0] for path in given]
    if names[0] == names[1]:
        names = ["general", "domain"]
    corpora, skipped = [], Counter[str]()
    for name, path in zip(names, given, strict=True):
        prefix = path
        if not _is_dataset(path):
            prefix = folder / name
            skipped.update(_prepare(path, prefix, tokenizer, reading).skipped)
        if not _is_dataset(heldout_prefix(prefix)):
            raise DataError(f"{prefix}: has no held-out part; prepare it with `heldout=5%`")
        tokens, heldout = (TokenDataset.open(part).num_tokens for part in (prefix, heldout_prefix(prefix)))
        corpora.append(Corpus(name, prefix, tokens, heldout))
    return corpora, dict(skipped)


def _prepare(text: Path, prefix: Path, tokenizer: BaseTokenizer, reading: Reading) -> Prepared:
    """Prepare a text with HELDOUT_TOKENS held out, or a tenth of a small one."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = sum(path.stat().st_size for path in find_files(text).files) / BYTES_PER_TOKEN
    heldout = Fraction(min(100, round(1000 * HELDOUT_TOKENS / tokens) or 1), 1000)
    return prepare(text, prefix, tokenizer, heldout=heldout, **vars(reading))


# ------------------------------------------------------------------------------------------------ the sizes


@dataclass(frozen=True, kw_only=True)
class FromScratch(Sizing):
    """A pretraining from scratch, and the text of its recipe and study."""

    name: str
    """The preset."""

    @classmethod
    def of(cls, corpora: Sequence[Corpus], vocab_size: int, device: Device, hours: float) -> FromScratch:
        """The largest preset that these hours train on enough tokens; the smallest if there is none."""
        general, chosen = corpora[0], None
        for preset in SIZES:
            config = _with_vocabulary(preset, vocab_size)
            by_time = TRAINING_SHARE * hours * 3600 * device.flops_per_s / train_flops_per_token(config)
            tokens = min(by_time, GENERAL_EPOCHS * general.tokens)
            enough = tokens >= TOKENS_PER_PARAMETER * parameters(config)
            sized = cls(
                corpora=corpora,
                config=config,
                window=config.context,
                tokens=max(two_digits(tokens), 100 * config.context),
                device=device,
                name=preset,
            )
            if chosen is None or (enough and sized.fits(1)):
                chosen = sized
        assert chosen
        return chosen

    @cached_property
    def papers(self) -> Prior:
        return prior(domain_tokens=self.corpora[1].tokens, budget=self.tokens, params=self.parameters)

    @property
    def share(self) -> Fraction:
        """The domain's share, in pretraining."""
        return Fraction(str(self.papers["delta"]))

    @property
    def finetune_tokens(self) -> int:
        tokens = min(FINETUNE_EPOCHS * self.corpora[1].tokens, self.tokens // 10)
        return max(two_digits(tokens), 100 * self.window)

    def epochs(self) -> dict[str, float]:
        general, domain = self.corpora
        return {
            general.name: self.tokens * float(1 - self.share) / general.tokens,
            domain.name: (self.tokens * float(self.share) + self.finetune_tokens) / domain.tokens,
        }

    @property
    def rate(self) -> float:
        return float(f"{min(4e-3, 0.3118 * self.flops**-0.125):.1g}")

    def weight_decay(self, steps: int) -> float:
        return float(f"{min(0.5, max(0.05, 5 / (self.rate * steps))):.1g}")

    def warmup(self, steps: int) -> int:
        return max(1, min(WARMUP_STEPS, steps // 20 if self.parameters < 100e6 else steps // 50))

    # -------------------------------------------------------------------------------------------- the texts

    def recipe(self, out: Path, tokenizer: Named) -> str:
        (general, domain), share, epochs = self.corpora, self.share, self.epochs()
        sequences, finetuned = self.sequences(self.tokens), self.sequences(self.finetune_tokens)
        steps = self.steps(self.tokens)
        rates = ", ".join(one_digit(self.rate / by) for by in (30, 10, 3))
        size = f"The largest preset with {TOKENS_PER_PARAMETER} tokens per parameter in this time and text"
        if self.name == SIZES[0] and self.tokens < TOKENS_PER_PARAMETER * self.parameters:
            size = f"The smallest preset: under {TOKENS_PER_PARAMETER} tokens per parameter in this time and text"
        why = f"The share is the papers' for this many tokens: {self.papers['why']}. The study finds it for your text."
        time, window, step = duration(3600 * self.hours), self.window, amount(sequences * self.window)
        return f"""\
# {amount(self.parameters)} parameters for about {time} on this machine ({self.device.kind}), by `spt-fast init`.
{self.commands(out / "recipe.yaml")}
run: {quoted(out / "runs" / "spt")}
tokenizer: {quoted(tokenizer)}
# {size}. Windows of {window:,} tokens.
model: {{preset: {self.name}}}
{self.before_phases()}
phases:
  - name: pretrain
    tokens: {amount(self.tokens)}
    # With the finetune, {domain.name} is read {epochs[domain.name]:.2g} times.
{indent(fill(why, 90), "    # ")}
    mixture: {{{quoted(general.name)}: {exact(1 - share)}, {quoted(domain.name)}: {exact(share)}}}
    batch: {{sequences: {sequences}, micro: {self.micro(sequences)}}}  # {step} tokens a step
    optimizer: {{lr: {one_digit(self.rate)}, weight_decay: {one_digit(self.weight_decay(steps))}, clip: 1.0}}
    schedule: {{name: cosine, warmup: {in_steps(self.warmup(steps))}, final: 10%}}
    eval: {self.evaluation(self.tokens)}  # costs less than a tenth of the training
  - name: finetune
    tokens: {amount(self.finetune_tokens)}  # at most: it stops when the held-out loss of {domain.name} no longer falls
    mixture: {{{quoted(domain.name)}: 100%}}
    batch: {{sequences: {finetuned}, micro: {self.micro(finetuned)}}}
    optimizer: {{lr: {one_digit(self.rate / 10)}, weight_decay: 1e-7}}
    schedule: {{name: constant, warmup: 5%}}
    eval: {self.evaluation(self.finetune_tokens)}
    stop: {{on: {quoted(domain.name)}, patience: 3}}
    grid: {{lr: [{rates}]}}  # each from the same start; the best by held-out loss is kept
"""

    def study(self, out: Path, tokenizer: Named) -> str:
        small, domain = self._proxy(), self.corpora[1]
        shares = ["0", *(exact(Fraction(f"{min(0.5, by * float(self.share)):.2g}")) for by in (1 / 3, 1, 3))]
        unique = max(two_digits(domain.tokens * small.tokens / self.tokens), 10 * small.window)
        sequences, finetuned = small.sequences(small.tokens // 4), small.sequences(small.finetune_tokens)
        steps = max(1, small.tokens // (sequences * small.window))
        warmup, rates = small.warmup(steps // 4), ", ".join(one_digit(small.rate / by) for by in (30, 10, 3))
        budgets = ", ".join(amount(two_digits(small.tokens / by)) for by in (4, 2, 1))
        return f"""\
# Which share of {domain.name}? Small runs answer this for the recipe beside this file, written by `spt-fast init`.
{study_commands(out)}
study: {quoted(out / "study")}
seeds: 2
models: [{{preset: {small.name}}}]
tokenizer: {quoted(tokenizer)}
{self.corpora_of_study()}
domain_tokens: {amount(unique)}  # cut so that it repeats as often as in the large run
stages:
  - name: pretrain
    delta: [{", ".join(dict.fromkeys(shares))}]
    budgets: [{budgets}]
    batch: {{sequences: {sequences}, micro: {small.micro(sequences)}}}
    optimizer: {{lr: {one_digit(small.rate)}, weight_decay: {one_digit(small.weight_decay(steps))}}}
    schedule: {{name: cosine, warmup: {in_steps(warmup)}, final: 10%, horizon: {amount(10 * small.tokens)}}}
    eval: {small.evaluation(small.tokens // 4)}
  - name: finetune
    delta: 1
    tokens: {amount(small.finetune_tokens)}
    batch: {{sequences: {finetuned}, micro: {small.micro(finetuned)}}}
    optimizer: {{lr: {one_digit(small.rate / 10)}, weight_decay: 1e-7}}
    schedule: {{name: constant, warmup: 5%}}
    eval: {small.evaluation(small.finetune_tokens)}
    stop: {{on: {quoted(domain.name)}, patience: 3}}
    grid: {{lr: [{rates}]}}
"""

    def _proxy(self) -> FromScratch:
        """A model two presets smaller, with as many tokens per parameter."""
        small = SIZES[max(0, SIZES.index(self.name) - 2)]
        config = _with_vocabulary(small, self.config.vocab_size)
        part = min(0.25, parameters(config) / self.parameters)
        tokens = max(two_digits(self.tokens * part), 100 * config.context)
        return replace(self, config=config, window=config.context, tokens=tokens, name=small)


def _with_vocabulary(preset: str, ids: int) -> GPTConfig:
    rows = -(-ids // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return GPTConfig(**PRESETS[preset] | {"vocab_size": rows})

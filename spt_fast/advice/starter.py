"""A first recipe and a first study for two corpora, sized for a machine and a number of hours.

The rules, each of which the recipe's comments name where it decided:

    model         the largest preset that 20 tokens a parameter can be trained for in the time (arXiv 2203.15556)
    tokens        what the time allows, and at most four readings of the general text (arXiv 2305.16264)
    share         that of the papers for so many domain tokens, see `spt_fast.advice.prior`
    batch, rate   0.292 · C^0.327 tokens and 0.312 · C^-0.125, where C are the FLOPs (arXiv 2401.02954)
    weight decay  averages the weights over a fifth of the run: 1 / (rate · steps / 5) (arXiv 2405.13698)
    evaluation    at most a tenth of the FLOPs of each phase
    study         the same at about a tenth of the model's size, with the domain cut so that it repeats as often
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from textwrap import fill, indent
from time import perf_counter

import torch

from spt_fast.advice.prior import FINETUNE_EPOCHS, Prior, prior
from spt_fast.data.prepare import heldout_prefix, prepare
from spt_fast.data.shards import TokenDataset
from spt_fast.data.text import find_files
from spt_fast.data.tokenizer import Tokenizer, train_tokenizer
from spt_fast.errors import DataError, RecipeError, SptWarning, invalid
from spt_fast.model.config import GPTConfig
from spt_fast.model.flops import parameters, peak_flops, train_flops_per_token
from spt_fast.model.memory import memory_bytes
from spt_fast.model.presets import PRESETS
from spt_fast.outputs import check_folder
from spt_fast.quantities import amount, duration, percent
from spt_fast.train.doubts import MOST_EPOCHS
from spt_fast.train.evaluate import FORWARD_SHARE

SIZES = ("1m", "3m", "10m", "30m", "60m", "124m", "350m", "1b", "3b", "8b")
TOKENS_PER_PARAMETER = 20
GENERAL_EPOCHS = 4
EFFICIENCY = {"cpu": 0.3, "cuda": 0.4}
"""The share of a machine's rate of products that training reaches."""
HOURS = {"cpu": 1.0, "cuda": 24.0}
EVALUATION_SHARE = 0.1
FEWEST_STEPS, WARMUP_STEPS = 200, 2000
HELDOUT_TOKENS = 200_000
"""To hold out of a corpus, where that is at most a tenth of it."""
BYTES_PER_TOKEN = 4
FEWEST_IDS = 257


@dataclass(frozen=True)
class Corpus:
    """A prepared source, with its held-out part."""

    name: str
    prefix: Path
    tokens: int
    heldout_tokens: int


@dataclass(frozen=True)
class Begun:
    """What `begin` has written."""

    recipe: Path
    study: Path
    model: str
    parameters: int
    tokens: int
    domain_share: float
    epochs: dict[str, float]
    """How often each source is read, the finetune included."""
    hours: float


def begin(
    general: str | os.PathLike[str],
    domain: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    hours: float | None = None,
) -> Begun:
    """Write OUT/recipe.yaml and OUT/study.yaml for two corpora.

    general, domain  prefixes of datasets with held-out parts, or text, which is prepared in OUT/data
    tokenizer        of the datasets, or for the text; by default one is trained on the text
    hours            of training on this machine; by default 1 on a CPU and 24 on a GPU

    Warns of text that is repeated too often. Raises RecipeError where a file is there already, and DataError for text
    and datasets that can't be used.
    """
    out = Path(out)
    check_folder(out, "out")
    recipe, study = out / "recipe.yaml", out / "study.yaml"
    for file in (recipe, study):
        if file.exists():
            raise RecipeError(f"out: {file} exists; choose another folder, or move the file away", argument=True)
    if hours is not None and not hours > 0:
        raise RecipeError(invalid("hours", hours, "write a number above 0"), argument=True)
    names = [Path(given).name.split(".")[0] for given in (general, domain)]
    if names[0] == names[1]:
        names = ["general", "domain"]
    texts = [Path(given) for given in (general, domain) if not _is_dataset(Path(given))]
    if tokenizer is None and len(texts) < 2:
        raise DataError("tokenizer: missing; name the one that the datasets were prepared with", argument=True)
    if tokenizer is None:
        tokenizer = _trained(texts, out / "data" / "bpe.tiktoken")
    corpora = [_corpus(name, Path(given), out, tokenizer) for name, given in zip(names, (general, domain), strict=True)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = _Sizes.of(corpora, Tokenizer.load(tokenizer).vocab_size, device, hours or HOURS[device])
    out.mkdir(parents=True, exist_ok=True)
    recipe.write_text(plan.recipe(out, Path(tokenizer)), encoding="utf-8")
    study.write_text(plan.study(out, Path(tokenizer)), encoding="utf-8")
    epochs = plan.epochs()
    for corpus, most in zip(corpora, (GENERAL_EPOCHS, MOST_EPOCHS), strict=True):
        if epochs[corpus.name] > 1.05 * most:
            warnings.warn(
                f"{corpus.name}: its {corpus.tokens:,} tokens are read {epochs[corpus.name]:.0f} times; beyond about "
                f"{most} readings they teach little: add text, or train for fewer hours",
                SptWarning,
                stacklevel=2,
            )
    return Begun(
        recipe=recipe,
        study=study,
        model=plan.preset,
        parameters=parameters(plan.config),
        tokens=plan.tokens,
        domain_share=plan.papers["delta"],
        epochs=epochs,
        hours=plan.hours,
    )


# ------------------------------------------------------------------------------------------------ the corpora


def _is_dataset(path: Path) -> bool:
    return not path.is_file() and not path.is_dir() and Path(f"{path}.bin").exists()


def _trained(texts: Sequence[Path], out: Path) -> Path:
    """A tokenizer of a size that the text supports: about a token for each 2 kB, 1,024 to 32,768."""
    found = sum(path.stat().st_size for text in texts for path in find_files(text).files)
    size = min(32_768, max(1024, 1 << (int(found) // 2000).bit_length() - 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            train_tokenizer([str(text) for text in texts], size, out)
            return out
        except DataError:
            if size == FEWEST_IDS:
                raise
            size = max(FEWEST_IDS, size // 2)  # the text has fewer different pieces


def _corpus(name: str, given: Path, out: Path, tokenizer: str | os.PathLike[str]) -> Corpus:
    prefix = given
    if not _is_dataset(given):
        prefix = out / "data" / name
        prefix.parent.mkdir(parents=True, exist_ok=True)
        tokens = sum(path.stat().st_size for path in find_files(given).files) / BYTES_PER_TOKEN
        prepare(given, prefix, tokenizer, heldout=Fraction(min(100, round(1000 * HELDOUT_TOKENS / tokens) or 1), 1000))
    if not _is_dataset(heldout_prefix(prefix)):
        raise DataError(f"{prefix}: has no held-out part; prepare it with `heldout=5%`")
    return Corpus(
        name,
        prefix,
        TokenDataset.open(prefix).num_tokens,
        TokenDataset.open(heldout_prefix(prefix)).num_tokens,
    )


# ------------------------------------------------------------------------------------------------ the sizes


def flops_per_s(device: str) -> float:
    """Of training on this machine, all its GPUs together."""
    peak = peak_flops("cuda") if device == "cuda" else None
    if peak is None:
        a = torch.ones(1024, 1024, device=device)
        (a @ a).sum().item()
        began_s = perf_counter()
        (a @ a).sum().item()
        peak = 2 * 1024**3 / (perf_counter() - began_s)
    return EFFICIENCY[device] * peak * max(1, torch.cuda.device_count())


@dataclass(frozen=True)
class _Sizes:
    """What a run of one model on the corpora takes, and the text of its recipe."""

    corpora: Sequence[Corpus]
    preset: str
    config: GPTConfig
    tokens: int
    """Of pretraining."""
    hours: float
    device: str
    papers: Prior

    @classmethod
    def of(cls, corpora: Sequence[Corpus], vocab_size: int, device: str, hours: float) -> _Sizes:
        """With the largest preset that is trained well in so many hours."""
        general, domain = corpora
        rate = flops_per_s(device)
        memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
        chosen = None
        for preset in SIZES:
            config = GPTConfig(**PRESETS[preset] | {"vocab_size": -(-vocab_size // 64) * 64})
            by_time = 0.75 * hours * 3600 * rate / train_flops_per_token(config)  # the rest: finetune, evaluations
            tokens = min(by_time, GENERAL_EPOCHS * general.tokens)
            needed = memory_bytes(config, 1, dtype=torch.bfloat16, device="cuda")["total"] if memory else 0
            enough = tokens >= TOKENS_PER_PARAMETER * parameters(config) and needed < 0.8 * (memory or 1)
            if chosen is None or enough:
                chosen = preset, config, tokens
        assert chosen
        preset, config, tokens = chosen
        rounded = max(int(float(f"{tokens:.2g}")), 100 * config.context)
        papers = prior(domain_tokens=domain.tokens, budget=rounded, params=parameters(config))
        return cls(corpora, preset, config, rounded, hours, device, papers)

    @property
    def flops(self) -> float:
        return self.tokens * train_flops_per_token(self.config)

    @property
    def finetune_tokens(self) -> int:
        tokens = min(FINETUNE_EPOCHS * self.corpora[1].tokens, self.tokens // 10)
        return max(int(float(f"{tokens:.2g}")), 100 * self.config.context)

    def epochs(self) -> dict[str, float]:
        general, domain = self.corpora
        share = self.papers["delta"]
        return {
            general.name: self.tokens * (1 - share) / general.tokens,
            domain.name: (self.tokens * share + self.finetune_tokens) / domain.tokens,
        }

    def sequences(self, tokens: int) -> int:
        """Windows of a step, a power of two."""
        best = min(0.292 * self.flops**0.3271, tokens / FEWEST_STEPS)
        return 1 << max(0, round(best / self.config.context).bit_length() - 1)

    @property
    def rate(self) -> float:
        return float(f"{min(4e-3, 0.3118 * self.flops**-0.125):.1g}")

    def micro(self, sequences: int) -> int:
        """Windows of a forward pass: what fits a GPU; on a CPU what stays in its caches."""
        micro = min(sequences, 8 if self.device == "cpu" else 64)
        if self.device == "cuda":
            memory = 0.85 * torch.cuda.get_device_properties(0).total_memory
            while micro > 1 and memory_bytes(self.config, micro, dtype=torch.bfloat16)["total"] > memory:
                micro //= 2
        return micro

    def weight_decay(self, steps: int) -> float:
        return float(f"{min(0.5, max(0.05, 5 / (self.rate * steps))):.1g}")

    def warmup(self, steps: int) -> int:
        return max(1, min(WARMUP_STEPS, steps // 20 if parameters(self.config) < 100e6 else steps // 50))

    def evaluation(self, tokens: int) -> str:
        """As much text, and as often, as a tenth of training on `tokens` pays for."""
        most = min(1_000_000, *(corpus.heldout_tokens for corpus in self.corpora))
        for enough, often in (
            (HELDOUT_TOKENS, (5, 10)),
            (HELDOUT_TOKENS // 10, (10, 20)),
            (self.config.context, (20,)),
        ):
            for percents in often:
                # of each source both halves of the held-out text, and half as much of the training text
                scored = 1.5 * len(self.corpora) * (100 // percents + 1)
                found = 0.9 * EVALUATION_SHARE * tokens / FORWARD_SHARE / scored
                if found >= min(enough, most):
                    return f"{{every: {percents}%, tokens: {amount(float(f'{min(found, most):.2g}'))}}}"
        return f"{{every: 50%, tokens: {2 * self.config.context}}}"

    # -------------------------------------------------------------------------------------------- the texts

    def recipe(self, out: Path, tokenizer: Path) -> str:
        general, domain = self.corpora
        share = Fraction(str(self.papers["delta"]))
        sequences, finetuned = self.sequences(self.tokens), self.sequences(self.finetune_tokens)
        steps = max(1, self.tokens // (sequences * self.config.context))
        epochs = self.epochs()
        rates = ", ".join(f"{self.rate / by:.1g}" for by in (30, 10, 3))
        why = f"The share is that of the papers for so many tokens: {self.papers['why']}. The study finds your own."
        time, window, step = duration(3600 * self.hours), self.config.context, amount(sequences * self.config.context)
        return f"""\
# {parameters(self.config) / 1e6:,.0f}M parameters for about {time} on this machine ({self.device}), by `spt-fast init`.
#   spt-fast plan {out / "recipe.yaml"}               # tokens, epochs, memory, hours
#   spt-fast train {out / "recipe.yaml"} --dry-run    # two steps of every phase
run: {_quoted(out / "runs" / "spt")}
tokenizer: {_quoted(tokenizer)}
# The largest preset with {TOKENS_PER_PARAMETER} tokens a parameter in this time and text; windows of {window:,} tokens.
model: {{preset: {self.preset}}}
checkpoint: {{every: {max(1, steps // 10)} steps, keep: 2}}
log: {{every: {max(1, min(100, steps // 50))} steps}}
{self._sources()}
phases:
  - name: pretrain
    tokens: {amount(self.tokens)}
    # With the finetune, {domain.name} is read {epochs[domain.name]:.2g} times.
{indent(fill(why, 90), "    # ")}
    mixture: {{{_quoted(general.name)}: {_exact(1 - share)}, {_quoted(domain.name)}: {_exact(share)}}}
    batch: {{sequences: {sequences}, micro: {self.micro(sequences)}}}  # {step} tokens a step
    optimizer: {{lr: {self.rate:g}, weight_decay: {self.weight_decay(steps):g}, clip: 1.0}}
    schedule: {{name: cosine, warmup: {self.warmup(steps)} steps, final: 10%}}
    eval: {self.evaluation(self.tokens)}  # costs less than a tenth of the training
  - name: finetune
    tokens: {amount(self.finetune_tokens)}  # at most: it stops when the held-out loss of {domain.name} no longer falls
    mixture: {{{_quoted(domain.name)}: 100%}}
    batch: {{sequences: {finetuned}, micro: {self.micro(finetuned)}}}
    optimizer: {{lr: {self.rate / 10:.1g}, weight_decay: 1e-7}}
    schedule: {{name: constant, warmup: 5%}}
    eval: {self.evaluation(self.finetune_tokens)}
    stop: {{on: {_quoted(domain.name)}, patience: 3}}
    grid: {{lr: [{rates}]}}  # each from the same start; the best by held-out loss is kept
"""

    def study(self, out: Path, tokenizer: Path) -> str:
        small = self._proxy()
        general, domain = self.corpora
        share = self.papers["delta"]
        shares = ["0", *(_exact(Fraction(f"{min(0.5, by * share):.2g}")) for by in (1 / 3, 1, 3))]
        unique = max(int(float(f"{domain.tokens * small.tokens / self.tokens:.2g}")), 10 * small.config.context)
        sequences, finetuned = small.sequences(small.tokens // 4), small.sequences(small.finetune_tokens)
        steps = max(1, small.tokens // (sequences * small.config.context))
        warmup, rates = small.warmup(steps // 4), ", ".join(f"{small.rate / by:.1g}" for by in (30, 10, 3))
        budgets = ", ".join(amount(float(f"{small.tokens / by:.2g}")) for by in (4, 2, 1))
        return f"""\
# Which share of {domain.name}? Small runs answer that for the recipe beside this file, written by `spt-fast init`.
# Price it with `spt-fast sweep {out / "study.yaml"} --dry-run`, train it without that flag, then
# `spt-fast report {out / "study"} --out report.html`.
study: {_quoted(out / "study")}
seeds: 2
models: [{{preset: {small.preset}}}]
tokenizer: {_quoted(tokenizer)}
{self._sources()}
general: {_quoted(general.name)}
domain: {_quoted(domain.name)}
domain_tokens: {amount(unique)}  # cut so that it repeats as often as in the large run
stages:
  - name: pretrain
    delta: [{", ".join(dict.fromkeys(shares))}]
    budgets: [{budgets}]
    batch: {{sequences: {sequences}, micro: {small.micro(sequences)}}}
    optimizer: {{lr: {small.rate:g}, weight_decay: {small.weight_decay(steps):g}}}
    schedule: {{name: cosine, warmup: {warmup} steps, final: 10%, horizon: {amount(10 * small.tokens)}}}
    eval: {small.evaluation(small.tokens // 4)}
  - name: finetune
    delta: 1
    tokens: {amount(small.finetune_tokens)}
    batch: {{sequences: {finetuned}, micro: {small.micro(finetuned)}}}
    optimizer: {{lr: {small.rate / 10:.1g}, weight_decay: 1e-7}}
    schedule: {{name: constant, warmup: 5%}}
    eval: {small.evaluation(small.finetune_tokens)}
    stop: {{on: {_quoted(domain.name)}, patience: 3}}
    grid: {{lr: [{rates}]}}
"""

    def _proxy(self) -> _Sizes:
        """A model of a tenth of the parameters or less, for as many tokens a parameter."""
        small = SIZES[max(0, SIZES.index(self.preset) - 2)]
        config = GPTConfig(**PRESETS[small] | {"vocab_size": self.config.vocab_size})
        part = min(0.25, parameters(config) / parameters(self.config))
        tokens = max(int(float(f"{self.tokens * part:.2g}")), 100 * config.context)
        return _Sizes(self.corpora, small, config, tokens, self.hours, self.device, self.papers)

    def _sources(self) -> str:
        rows = (
            f"  {_quoted(corpus.name)}: {{train: {_quoted(corpus.prefix)}, "
            f"heldout: {_quoted(heldout_prefix(corpus.prefix))}}}  # {amount(corpus.tokens)} tokens"
            for corpus in self.corpora
        )
        return "\n".join(["sources:", *rows])


def _quoted(text: object) -> str:
    """For YAML, which takes JSON's strings; a plain word stays one."""
    written = str(text)
    return written if written.replace("/", "").replace("_", "").isidentifier() else json.dumps(written)


def _exact(share: Fraction) -> str:
    return percent(float(share)) if Fraction(percent(float(share))[:-1]) == 100 * share else str(share)

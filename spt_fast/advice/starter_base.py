"""A first recipe and a first study that start from a base, sized for machine and corpora.

The recipe's comments name each rule; `spt_fast.advice.sizing` has the others:

    finetune      if the time suffices for two epochs of the domain: up to 5 epochs, after which a finetune begins to
                  overfit (arXiv 2603.16177), at a constant rate, with an early stop, and with three rates if there is
                  time for each
    continue      otherwise: a rate that rises and falls again (arXiv 2403.08763), and no early stop
    replay        1% of general text in a finetune (arXiv 2502.06042); 5% in continued pretraining, which moves the
                  weights further (arXiv 2403.08763)
    rate          4e-5 at 1B parameters, the middle one of three in arXiv 2603.16177, times the square root of 1B /
                  parameters (our choice): 1e-4 at 135M and 1e-5 at 8B, which are usual values
    window        2,048 tokens, or the base's context if that is shorter; shorter for small corpora
    memory        the fastest way to hold a step that fits a GPU
    study         `forgetting` for a finetune, `dcpt` for continued pretraining, from the same base: an eighth of the
                  tokens, with the domain cut so that it repeats as often; none if that is over half of the training
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from textwrap import fill, indent
from typing import ClassVar

from spt_fast.advice.prior import FINETUNE_EPOCHS, REPLAY
from spt_fast.advice.sizing import (
    TRAINING_SHARE,
    Corpus,
    Device,
    Sizing,
    exact,
    one_digit,
    quoted,
    study_commands,
    two_digits,
)
from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.hf_tokenizer import HFTokenizer
from spt_fast.data.tokenizer import Tokenizer
from spt_fast.errors import CheckpointError, DataError, RecipeError, SptWarning, invalid
from spt_fast.model.config import GPTConfig
from spt_fast.model.flops import train_flops_per_token
from spt_fast.model.memory import CHECKPOINTING
from spt_fast.quantities import amount, duration
from spt_fast.study.load import WINDOW
from spt_fast.train.origin import origin_of, tokenizer_digest, tokenizer_file
from spt_fast.train.price import Way
from spt_fast.train.weights import chosen, stored_weights

CONTINUED_REPLAY = 0.05
FEWEST_EPOCHS = 2
"""Epochs of the domain that a finetune needs at least."""
ARMS = 3
"""Learning rates that a finetune tries."""
RATE_OF_1B, LARGEST_RATE = 4e-5, 1e-3
FEWEST_WINDOWS = 200
"""Windows that a run needs at least: 1% replay is then two of them."""
SHORTEST_WINDOW = 32
STUDY_PART = 8
"""The training has this many times the tokens of a run of the study."""
ONE_GPU = tuple(Way(0, "none", checkpointing) for checkpointing in CHECKPOINTING)
SEVERAL_GPUS = (
    *(Way(1, "none", checkpointing) for checkpointing in CHECKPOINTING),
    *(Way(stage, "none", checkpointing) for stage in (2, 3) for checkpointing in CHECKPOINTING[1:]),
)
OFFLOADED = (Way(2, "optimizer", "full"), Way(3, "optimizer", "full"), Way(3, "all", "full"))
"""Ways to hold a step in memory, the fastest first."""


@dataclass(frozen=True)
class Base:
    """Weights to start from."""

    weights: Path
    """The path as the user gave it."""
    config: GPTConfig
    tokenizer: BaseTokenizer
    """The base's tokenizer, with the end and begin tokens of documents in the base's pretraining."""

    @classmethod
    def of(cls, given: Path, tokenizer: str | os.PathLike[str] | None) -> Base:
        """The base at a path with its own tokenizer, or with the named one if it has none.

        Raises CheckpointError, DataError, or RecipeError for a tokenizer that is not the base's.
        """
        try:
            weights = chosen(given)
            config, _ = stored_weights(weights)
        except CheckpointError as error:
            raise CheckpointError(f"init: {error}", argument=True) from None
        own = tokenizer_file(weights)
        loaded = Tokenizer.load(tokenizer or own or weights)
        known = tokenizer_digest(weights)
        if known and loaded.digest != known:
            remedy = "leave it out" if own else "name the original one"
            says = f"the weights at {given} were trained with another one; {remedy}"
            raise RecipeError(invalid("tokenizer", str(tokenizer), says), argument=True)
        origin = origin_of(weights)
        if origin.eos_id is not None:
            loaded.eos_id, loaded.bos_id = origin.eos_id, origin.bos_id
        elif isinstance(loaded, HFTokenizer):
            loaded.bos_id = loaded.usual_bos_id
        if loaded.eos_id is None:
            raise DataError(
                f"tokenizer: {tokenizer or own} names no end-of-text token; prepare both texts with "
                "`spt-fast prepare --eos TOKEN`, and give the prefixes of the datasets",
                argument=True,
            )
        if doubt := loaded.beyond(config.vocab_size):
            source = str(tokenizer or own)
            if max(loaded.eos_id, loaded.bos_id or 0) >= config.vocab_size:
                says = f"its token that ends or begins documents has no row in the weights at {given}"
                raise RecipeError(invalid("tokenizer", source, f"{says}; name the original one"), argument=True)
            warnings.warn(f"tokenizer: {source} {doubt}", SptWarning, stacklevel=2)
        return cls(given, config, loaded)

    @property
    def name(self) -> str:
        return self.weights.absolute().name


@dataclass(frozen=True, kw_only=True)
class FromBase(Sizing):
    """A training from a base, and the text of its recipe and study."""

    anchor: ClassVar[bool] = True
    """The study tries one."""
    base: Base
    finetunes: bool
    """Whether it is a finetune; else it continues pretraining."""

    @classmethod
    def of(cls, corpora: Sequence[Corpus], base: Base, device: Device, hours: float) -> FromBase:
        """As many tokens as the domain supports and the time allows; warns if the time is too short for a training."""
        twice, window = FEWEST_EPOCHS * corpora[1].tokens, _window(corpora, base.config.context)
        fewest = FEWEST_WINDOWS * window
        sized = cls(
            corpora=corpora,
            config=base.config,
            window=window,
            tokens=fewest,
            device=device,
            base=base,
            finetunes=False,
        ).fitted()
        flops = train_flops_per_token(base.config, window) * sized.way.time_factor
        by_time = TRAINING_SHARE * hours * 3600 * device.flops_per_s / flops
        arms = ARMS if by_time >= ARMS * twice else 1
        tokens = max(fewest, two_digits(min(by_time / arms, FINETUNE_EPOCHS * corpora[1].tokens)))
        sized = replace(sized, tokens=tokens, arms=arms, finetunes=by_time >= twice)
        if sized.hours > 1.1 * hours:
            warnings.warn(
                f"hours: {duration(3600 * hours)} is short for {amount(sized.parameters)} parameters on this machine "
                f"({device.kind}): the minimum of {amount(sized.tokens)} tokens takes about "
                f"{duration(3600 * sized.hours)}; allow more hours, or use a smaller base",
                SptWarning,
                stacklevel=3,
            )
        return sized

    def fitted(self) -> FromBase:
        """With the fastest way that fits a GPU's memory, or the last one, which needs the least, if none does."""
        ways = (*(ONE_GPU if self.device.count == 1 else SEVERAL_GPUS), *OFFLOADED)
        fitted = [replace(self, way=way) for way in ways]
        return next((one for one in fitted if one.fits(1)), fitted[-1])

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def share(self) -> Fraction:
        """The domain's share of the tokens."""
        return 1 - Fraction(str(REPLAY if self.finetunes else CONTINUED_REPLAY))

    def epochs(self) -> dict[str, float]:
        general, domain = self.corpora
        return {
            general.name: self.tokens * float(1 - self.share) / general.tokens,
            domain.name: self.tokens * float(self.share) / domain.tokens,
        }

    @property
    def rate(self) -> float:
        return float(f"{min(LARGEST_RATE, RATE_OF_1B * (1e9 / self.parameters) ** 0.5):.1g}")

    @property
    def study_tokens(self) -> int | None:
        """Tokens of a run of the study; None if that is over half of the training."""
        tokens = max(two_digits(self.tokens / STUDY_PART), FEWEST_WINDOWS * self.window)
        return None if tokens > self.tokens / 2 else tokens

    # -------------------------------------------------------------------------------------------- the texts

    def recipe(self, out: Path, tokenizer: str | os.PathLike[str] | None) -> str:
        (general, domain), times = self.corpora, self.epochs()[self.corpora[1].name]
        step = amount(self.sequences(self.tokens) * self.window)
        phase = "finetune" if self.finetunes else "continue"
        why = (
            f"{domain.name} is read {times:.2g} times. {exact(1 - self.share)} of {general.name} reduces forgetting, "
            "most if it is similar to the base's pretraining text. "
        )
        if self.study_tokens is None:
            why += "There is no study beside this recipe: its runs would take over half as long as this one."
        else:
            why += "The study finds the best share for your text."
        end = f"at most: it stops when the held-out loss of {domain.name} no longer falls"
        if not self.finetunes:
            end = "as many as the time allows"
        about = f"about {duration(3600 * self.hours)} on this machine ({self.device.kind})"
        return f"""\
# {self.name} of {amount(self.parameters)} parameters, trained on {domain.name} for {about}, by `spt-fast init`.
{self.commands(out / "recipe.yaml")}
run: {quoted(out / "runs" / phase)}
init: {quoted(self.base.weights)}  # its shape, tokenizer, chat template and context of {self.config.context:,} tokens
{"" if tokenizer is None else f"tokenizer: {quoted(tokenizer)}" + chr(10)}{self._engine()}\
{self.before_phases()}
phases:
  - name: {phase}
    tokens: {amount(self.tokens)}  # {end}
{indent(fill(why, 90), "    # ")}
    mixture: {{{quoted(domain.name)}: {exact(self.share)}, {quoted(general.name)}: {exact(1 - self.share)}}}
{self._steps(self.tokens, f"  # {step} tokens a step", f"  # by the size of the base: {amount(self.parameters)}")}\
{self._rates()}"""

    def study(self, out: Path, tokenizer: str | os.PathLike[str] | None) -> str | None:
        """The text of the study; None if its runs would be over half as long as the training."""
        domain, tokens = self.corpora[1], self.study_tokens
        if tokens is None:
            return None
        unique = max(two_digits(domain.tokens * tokens / self.tokens), 10 * self.window)
        one = replace(self, device=replace(self.device, count=1)).fitted()  # a study trains one run per GPU
        if self.finetunes:
            what = f"How much does {self.name} forget in a finetune on {domain.name}, and what reduces that?"
            axes = """\
  - name: finetune
    replay: [0, 1%, 5%]
    anchor: [0, 1]       # decay toward the base
    average: [0, 10%]    # of the base in the weights; trained once"""
        else:
            what = f"With which share of {domain.name} should {self.name} be trained further?"
            axes = """\
  - name: continue
    delta: [0, 33%, 67%, 90%, 95%, 1]"""
        return f"""\
# {what} Short runs answer that, by `spt-fast init`.
{study_commands(out)}
study: {quoted(out / "study")}
seeds: {2 if self.finetunes else 1}
models: [{{init: {quoted(self.base.weights)}}}]
{"" if tokenizer is None else f"tokenizer: {quoted(tokenizer)}" + chr(10)}{one._engine()}\
{self.corpora_of_study()}
domain_tokens: {amount(unique)}  # cut so that it repeats as often as in the recipe
stages:
{axes}
    tokens: {amount(tokens)}
{one._steps(tokens)}"""

    def _steps(self, tokens: int, of_step: str = "", of_rate: str = "") -> str:
        """The batch, optimizer, schedule and evaluation of a phase of this many tokens, as YAML.

        of_step, of_rate: comments on the batch and on the learning rate.
        """
        sequences = self.sequences(tokens)
        decay, schedule = "0.1", "{name: cosine, warmup: 5%, final: 10%}"
        if self.finetunes:
            decay, schedule = "1e-7", "{name: constant, warmup: 5%}"
        return f"""\
    batch: {{sequences: {sequences}, micro: {self.micro(sequences)}, context: {self.window}}}{of_step}
    optimizer: {{lr: {one_digit(self.rate)}, weight_decay: {decay}}}{of_rate}
    schedule: {schedule}
    eval: {self.evaluation(tokens)}
"""

    def _rates(self) -> str:
        """A finetune's early stopping and learning rates to try, as YAML; empty for continued pretraining."""
        if not self.finetunes:
            return ""
        stop = f"    stop: {{on: {quoted(self.corpora[1].name)}, patience: 3}}\n"
        if self.arms == 1:
            return stop
        rates = ", ".join(one_digit(self.rate * by) for by in (1 / 3, 1, 3))
        return f"{stop}    grid: {{lr: [{rates}]}}  # each from the base; the best by held-out loss is kept\n"

    def _engine(self) -> str:
        """The section `engine`, as YAML; empty if the defaults fit the memory."""
        way = self.way
        asked = {
            f"stage: {way.stage}": way.stage > 1,
            f"offload: {way.offload}": way.offload != "none",
            f"checkpointing: {way.checkpointing}": way.checkpointing != "none",
        }
        said = ", ".join(setting for setting, matters in asked.items() if matters)
        slow = "; it takes longer than the hours say" if way.offload != "none" else ""
        return f"engine: {{{said}}}  # so that a step fits the GPU's memory{slow}\n" if said else ""


def _window(corpora: Sequence[Corpus], context: int) -> int:
    """Tokens of a window: at most WINDOW and the base's context, and few enough that every text has several windows."""
    window = min(WINDOW, context)
    fewest = min(min(corpus.tokens // 40, corpus.heldout_tokens // 4) for corpus in corpora)
    while window // 2 >= SHORTEST_WINDOW and window > fewest:
        window //= 2
    return window

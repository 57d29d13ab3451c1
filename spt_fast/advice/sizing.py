"""What all first recipes share, from scratch or from a base: machine, corpora, batch, evaluations, memory.

batch         0.292 · C^0.327 tokens for C FLOPs (arXiv 2401.02954), but few enough for 200 steps
evaluation    at most a tenth of the FLOPs of each phase
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from spt_fast.data.prepare import heldout_prefix
from spt_fast.kernels.measured import medians
from spt_fast.model.config import GPTConfig
from spt_fast.model.flops import parameters, peak_flops, train_flops_per_token
from spt_fast.model.memory import Step
from spt_fast.quantities import amount, percent
from spt_fast.train.evaluate import FORWARD_SHARE
from spt_fast.train.precision import multiplies_bf16
from spt_fast.train.price import Way

EFFICIENCY = {"cpu": 0.3, "cuda": 0.4}
"""The share of a machine's matmul rate that training reaches."""
TRAINING_SHARE = 0.75
"""The main phase's share of the time; the rest is for a finetune, evaluations and start-up."""
EVALUATION_SHARE = 0.1
FEWEST_STEPS, WARMUP_STEPS = 200, 2000
HELDOUT_TOKENS = 200_000
"""Tokens to hold out of a corpus, if that is at most a tenth of it."""
MEMORY_SHARE = 0.85
"""The share of a GPU's memory that the estimate for a step may take."""


@dataclass(frozen=True)
class Corpus:
    """A prepared source with its held-out part."""

    name: str
    prefix: Path
    tokens: int
    heldout_tokens: int


@dataclass(frozen=True)
class Device:
    """The hardware to train on: the CPU, or all GPUs of this machine."""

    kind: str
    """"cpu" or "cuda"."""
    count: int
    flops_per_s: float
    """FLOP/s of training, all GPUs together."""
    memory_bytes: int | None
    """Memory of one GPU; None on a CPU."""

    @classmethod
    def here(cls) -> Device:
        """This machine. Its rate is measured if no peak is known for it, which takes a third of a second."""
        if torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory
            return cls("cuda", torch.cuda.device_count(), flops_per_s("cuda"), memory)
        return cls("cpu", 1, flops_per_s("cpu"), None)


def flops_per_s(device: str) -> float:
    """FLOP/s of training on this machine, all GPUs together; device: "cpu" or "cuda"."""
    peak = peak_flops("cuda") if device == "cuda" else None
    return EFFICIENCY[device] * (peak or _rate_of_products(device)) * max(1, torch.cuda.device_count())


def _rate_of_products(device: str) -> float:
    """FLOP/s of PyTorch's matmul of square matrices, in the faster dtype. EFFICIENCY is a share of this rate, and not
    of the one that `train.precision` measures: that times other shapes, in float32 with our own matmul."""
    dtypes = [torch.float32, *([torch.bfloat16] if device == "cuda" or multiplies_bf16() else [])]
    squares = [torch.ones(1024, 1024, dtype=dtype, device=device) for dtype in dtypes]
    seconds = medians([partial(_multiplied, square) for square in squares], rounds=15, seconds=0.3)
    return 2 * 1024**3 / min(seconds)


def _multiplied(square: torch.Tensor) -> float:
    return (square @ square)[0, 0].item()  # which waits for a GPU


def windows_of_step(most: float, tokens: float, window: int, gpus: int = 1) -> int:
    """Windows of a step: a power of two for each GPU, at most `most` together, and few enough for FEWEST_STEPS steps in
    a phase of `tokens`. At least one for each GPU."""
    each = min(most, tokens / FEWEST_STEPS / window) / gpus
    return gpus << max(0, int(each).bit_length() - 1)


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """The sizes of a run of one model on a general and a domain corpus."""

    anchor: ClassVar[bool] = False
    """Whether a step needs memory for an anchor: a copy of the starting weights, in float32."""
    corpora: Sequence[Corpus]
    config: GPTConfig
    window: int
    """Tokens of a training sequence."""
    tokens: int
    """Tokens of the main phase."""
    device: Device
    arms: int = 1
    """Learning rates that the main phase tries, each with all tokens."""
    way: Way = Way()

    @property
    def parameters(self) -> int:
        return parameters(self.config)

    @property
    def hours(self) -> float:
        """The time of the whole training. It is less than the user gave if the text is short, and more if even the
        shortest training takes longer."""
        flops = self.arms * self.tokens * train_flops_per_token(self.config, self.window) * self.way.time_factor
        return flops / (TRAINING_SHARE * self.device.flops_per_s * 3600)

    @property
    def flops(self) -> float:
        return self.tokens * train_flops_per_token(self.config, self.window)

    def sequences(self, tokens: int) -> int:
        """Windows of a step in a phase of `tokens`: a power of two for each GPU."""
        best = 0.292 * self.flops**0.3271 / self.window
        return windows_of_step(best, tokens, self.window, self.device.count)

    def steps(self, tokens: int) -> int:
        return max(1, tokens // (self.sequences(tokens) * self.window))

    def micro(self, sequences: int) -> int:
        """Windows of a forward pass of one process: up to 64 if they fit a GPU, up to 8 on a CPU, for its caches."""
        micro = min(sequences // self.device.count, 8 if self.device.kind == "cpu" else 64)
        while micro > 1 and not self.fits(micro):
            micro //= 2
        return micro

    def fits(self, micro: int) -> bool:
        """Whether a step with micro-batches of `micro` windows fits a GPU's memory; always true on a CPU."""
        if self.device.memory_bytes is None:
            return True
        step = Step(
            self.config,
            micro,
            dtype=torch.bfloat16,
            context=self.window,
            checkpointing=self.way.checkpointing,
            anchor=self.anchor,
            stage=self.way.stage,
            world=self.device.count,
            offload=self.way.offload,
        )
        return step.memory().total <= MEMORY_SHARE * self.device.memory_bytes

    def evaluation(self, tokens: int) -> str:
        """The section `eval` of a phase of `tokens`: amount of text and interval, for at most a tenth of its FLOPs."""
        # With a margin: the halves of the held-out text are not exactly equal, and a target is one token less.
        most = min(1_000_000, *(0.9 * corpus.heldout_tokens for corpus in self.corpora))
        for enough, often in (
            (HELDOUT_TOKENS, (5, 10)),
            (HELDOUT_TOKENS // 10, (10, 20)),
            (self.window, (20,)),
        ):
            for percents in often:
                # Both halves of each source's held-out text are scored, and half as much training text; also at the
                # first and the last step, and once more if the steps do not divide evenly.
                scored = 1.5 * len(self.corpora) * (100 // percents + 2)
                found = 0.9 * EVALUATION_SHARE * tokens / FORWARD_SHARE / scored
                if found >= min(enough, most):
                    return f"{{every: {percents}%, tokens: {amount(two_digits(min(found, most)))}}}"
        return f"{{every: 50%, tokens: {2 * self.window}}}"

    def commands(self, recipe: Path) -> str:
        """The next commands, as comments for the top of a recipe."""
        gpus = self.device.count
        plan, train = f"spt-fast plan {recipe}", f"spt-fast train {recipe}"
        if gpus > 1:
            plan = f"{plan} --gpus {gpus}"
            train = f"torchrun --standalone --nproc_per_node={gpus} -m spt_fast.train {recipe}"
        rows = {plan: "tokens, epochs, memory, hours", f"{train} --dry-run": "two steps of every phase", train: ""}
        return "\n".join(
            f"#   {row:<{len(train) + 12}}{'# ' + says if says else ''}".rstrip() for row, says in rows.items()
        )

    def sources(self) -> str:
        """The section `sources` of a recipe or study."""
        rows = (
            f"  {quoted(corpus.name)}: {{train: {quoted(corpus.prefix)}, "
            f"heldout: {quoted(heldout_prefix(corpus.prefix))}}}  # {amount(corpus.tokens)} tokens"
            for corpus in self.corpora
        )
        return "\n".join(["sources:", *rows])

    def before_phases(self) -> str:
        """The sections of a recipe on checkpoints, logs and sources."""
        steps = self.steps(self.tokens)
        return f"""\
checkpoint: {{every: {in_steps(max(1, steps // 10))}, keep: 2}}
log: {{every: {in_steps(max(1, min(100, steps // 50)))}}}
{self.sources()}"""

    def corpora_of_study(self) -> str:
        """The sections of a study on its sources."""
        general, domain = self.corpora
        return f"{self.sources()}\ngeneral: {quoted(general.name)}\ndomain: {quoted(domain.name)}"


def study_commands(out: Path) -> str:
    """The commands for a study in `out`, as comments for the top of its file."""
    return f"""\
# Price it with `spt-fast sweep {out / "study.yaml"} --dry-run`, train it without that flag, then
# `spt-fast report {out / "study"} --out report.html`."""


def two_digits(number: float) -> int:
    return int(float(f"{number:.2g}"))


def in_steps(number: int) -> str:
    """1 step, 2000 steps: a span as a recipe writes it, without separators."""
    return f"{number} step" if number == 1 else f"{number} steps"


def one_digit(number: float) -> str:
    """In the shortest form: 4e-5, 0.1."""
    return f"{number:.0e}".replace("e-0", "e-") if number < 0.01 else f"{number:.1g}"


def quoted(text: object) -> str:
    """A YAML scalar: a plain word as it is, anything else as a JSON string."""
    written = str(text)
    return written if written.replace("/", "").replace("_", "").isidentifier() else json.dumps(written)


def exact(share: Fraction) -> str:
    """The exact share as a recipe writes it: 2%, or 1/3."""
    return percent(float(share)) if Fraction(percent(float(share))[:-1]) == 100 * share else str(share)

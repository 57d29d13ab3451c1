"""The loss of trained weights on a whole dataset."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor

from spt_fast.config import Phase
from spt_fast.data.heldout import heldout_stretches
from spt_fast.data.shards import SAMPLED_BLOCKS, TokenDataset
from spt_fast.errors import DataError, SptWarning, counted, invalid
from spt_fast.model import hf
from spt_fast.printing import print_note, print_table
from spt_fast.progress import progress_of
from spt_fast.train.evaluate import EvalSet, Measured, measure
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.origin import Origin, origin_of, run_of, tokenizer_digest
from spt_fast.train.precision import pick_dtype
from spt_fast.train.weights import chosen, load_model
from spt_fast.train.world import World, dtype_name, pick_device

TOKENS_AT_A_TIME = 16_384
_LARGEST_LOG = math.log(sys.float_info.max)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The loss on a dataset."""

    loss: float
    """Nats per token."""
    perplexity: float
    """Infinite beyond the range of float64."""
    bits_per_byte: float | None
    """The nats of all scored tokens, those that end documents included, over all bytes; None if the dataset doesn't
    record its bytes."""
    tokens: int
    """Scored tokens."""
    bytes: int | None
    standard_error: float | None
    """Of the loss, over documents or windows; None if there is only one."""
    context: int
    """Tokens of a window."""
    documents: int | None
    """None if the dataset doesn't record them."""
    inside_documents: bool
    """Whether attention and positions stayed inside a document, as in the phase that trained the weights."""
    dtype: str
    """The compute dtype: that of the training, if it is known."""
    same_tokenizer: bool | None
    """Whether the ids come from the weights' tokenizer; None if the dataset or the weights don't record theirs."""
    reported: float | None
    """The loss on the report half that the run reported, if this is held-out text of the run."""
    rescored: float | None
    """The loss on that half as scored here; equal up to rounding."""


def score(weights: Path, prefix: Path, **options: Any) -> dict[str, Any]:
    """`scored` as a dict: the earlier call, which is kept for other people's code."""
    return asdict(scored(weights, prefix, **options))


def scored(
    weights: Path, prefix: Path, *, dtype: str | None = None, context: int | None = None, progress: bool = True
) -> Scored:
    """The loss of weights on the dataset at `prefix`.

    `weights` is a run, its weights/<phase>, a checkpoint or a Hugging Face folder. Every token but the first is scored
    once, in consecutive windows of `context` tokens, by default as long as in training, or as the model's context;
    documents are cut as in training. progress: show a bar on standard error. Raises DataError if the dataset doesn't
    fit the model, and warns if its documents begin or end with other ids than those of the run.
    """
    weights = chosen(weights)
    model, origin = load_model(weights), origin_of(weights)
    data = TokenDataset.open(prefix, dtype)
    data.verify(SAMPLED_BLOCKS)
    same = _check_fits(data, prefix, weights, origin, model.config.vocab_size)
    window = (origin.context or model.config.context) if context is None else context
    if not 0 < window <= model.config.context:
        expected = f"write 1 to {model.config.context:,}, the model's own"
        raise DataError(invalid("context", window, expected), argument=True)
    device = pick_device()
    by_name = {name: dtype for dtype, name in hf.DTYPES.items()}
    computed_in = by_name.get(origin.dtype or "") or pick_dtype("auto", device)
    model.to(device=device, dtype=computed_in).requires_grad_(False)
    inside = bool(origin.documents) and data.document_ends is not None
    text = EvalSet.of_stretches(data, np.array([[0, data.num_tokens]]), window, inside=inside)

    def measured_on(text: EvalSet, part: str = "") -> Measured:
        with progress_of(f"eval {prefix}{part}", text.num_targets, show=progress) as advance:

            def of_batch(tokens: Tensor, targets: Tensor, cuts: Tensor | None) -> Tensor:
                cuts = None if cuts is None else cuts.to(device)
                nats = model(tokens.to(device), targets.to(device), cuts, "none").float()
                advance(targets.numel())
                return nats

            return measure(of_batch, text, max(1, TOKENS_AT_A_TIME // window), world=World(0, 1, device))

    measured, rescored = measured_on(text), None
    if not math.isfinite(measured.loss):
        warnings.warn(
            f"{prefix}: its loss is not finite, as the weights at {weights} are those of a run that diverged, or "
            "damaged; use an earlier checkpoint, or copy the files again",
            SptWarning,
            stacklevel=2,
        )
    if reported := _reported(weights, data.digest):
        half = heldout_stretches(
            data, "report", max(1, reported.phase.evaluation.tokens // 2), windows=reported.windows
        )
        length = reported.phase.window(model.config.context)
        again = EvalSet.of_stretches(data, half, length, inside=reported.phase.documents)
        rescored = measured_on(again, ", report half").loss
    nats = measured.loss * text.num_targets
    return Scored(
        loss=measured.loss,
        standard_error=measured.standard_error,
        perplexity=math.inf if measured.loss > _LARGEST_LOG else math.exp(measured.loss),
        bits_per_byte=nats / math.log(2) / data.num_bytes if data.num_bytes else None,
        tokens=text.num_targets,
        bytes=data.num_bytes,
        context=window,
        documents=data.num_documents,
        inside_documents=inside,
        dtype=dtype_name(computed_in),
        same_tokenizer=same,
        reported=reported.loss if reported else None,
        rescored=rescored,
    )


def _check_fits(data: TokenDataset, prefix: Path, weights: Path, origin: Origin, vocab_size: int) -> bool | None:
    """Whether the ids come from the weights' tokenizer; None if one of them doesn't record its own. DataError for
    another tokenizer, too few tokens and unknown ids; a warning for other tokens around documents."""
    if data.num_tokens < 2:
        raise DataError(f"{prefix}: holds {counted(data.num_tokens, 'token')}; at least two are needed to score one")
    theirs = tokenizer_digest(weights)
    same = None if None in (theirs, data.tokenizer_digest) else theirs == data.tokenizer_digest
    if same is False:
        raise DataError(
            f"{prefix}: was made with another tokenizer ({str(data.tokenizer_digest)[:12]}) than the one that the "
            f"weights at {weights} were trained with ({str(theirs)[:12]}); prepare it with the weights' tokenizer"
        )
    for name in ("eos_id", "bos_id") if None not in (data.eos_id, origin.eos_id) else ():
        if (this := getattr(data, name)) != (trained := getattr(origin, name)):
            warnings.warn(
                f"{prefix}: has {name} {this}, but the weights' training text has {trained}; prepare it with the "
                "same tokens that begin and end a document",
                SptWarning,
                stacklevel=3,
            )
    largest = data.max_id if data.max_id is not None else int(data.tokens.max())
    smallest = 0 if data.max_id is not None else int(data.tokens.min())
    if smallest < 0 or largest >= vocab_size:
        raise DataError(
            f"{prefix}: holds token id {smallest if smallest < 0 else largest}, the model's vocabulary is "
            f"{vocab_size}; prepare it with the tokenizer of these weights, without tokens that they lack, or correct "
            "its dtype"
        )
    return same


@dataclass(frozen=True)
class _Reported:
    """A loss on the report half, and the run's settings for it. windows: see `split_heldout`."""

    loss: float
    phase: Phase
    windows: bool


def _reported(weights: Path, digest: str) -> _Reported | None:
    """What the run of weights/<phase> records about them and this held-out text."""
    run = run_of(weights)
    summary = summary_of(run) if run else None
    if summary is None or weights.name not in summary["phases"]:
        return None
    losses = summary["phases"][weights.name]["heldout"]
    known = {summary["data"].get(f"sources.{source}.heldout"): loss for source, loss in losses.items()}
    phase = next((phase for phase in recipe_of(run).phases if phase.name == weights.name), None) if run else None
    if phase is None or (loss := known.get(digest)) is None:
        return None
    return _Reported(loss, phase, summary.get("heldout_halves", "documents") == "windows")


def print_scores(weights: Path, scored: Mapping[str, Scored], console: Console) -> None:
    """Print a row for each dataset, then how it was scored."""
    shown = ("loss", "standard_error", "perplexity", "bits_per_byte", "tokens", "bytes")
    rows = [[prefix, *(getattr(s, name) for name in shown)] for prefix, s in scored.items()]
    print_table(console, str(weights), ["dataset", *(name.replace("_", " ") for name in shown)], rows)
    for prefix, s in scored.items():
        documents = "documents not recorded" if s.documents is None else counted(s.documents, "document")
        where = "inside documents" if s.inside_documents else "across documents"
        unknown = "" if s.same_tokenizer else "; whether its ids come from the weights' tokenizer is not recorded"
        how = f"windows of {counted(s.context, 'token')}, in {s.dtype}, attention {where}"
        print_note(console, f"{prefix}: {documents}, {how}{unknown}")
        if s.reported is not None:
            half = f"on its report half the run reported {s.reported:.4g}; it is {s.rescored:.4g} here"
            print_note(console, f"{prefix}: {half}")

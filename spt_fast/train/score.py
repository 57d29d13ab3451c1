"""The loss of trained weights on a whole dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from rich.console import Console

from spt_fast.data.shards import TokenDataset
from spt_fast.errors import DataError
from spt_fast.printing import print_table
from spt_fast.train.evaluate import EvalSet, mean_loss
from spt_fast.train.weights import load_model
from spt_fast.train.world import World, pick_device, pick_dtype

TOKENS_AT_A_TIME = 16_384


class Scored(TypedDict):
    """The loss on a dataset."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """None where the dataset doesn't record its bytes."""
    tokens: int
    """That were scored."""
    bytes: int | None


def score(weights: Path, prefix: Path, *, dtype: str | None = None) -> Scored:
    """The loss of weights on the dataset at `prefix`.

    `weights` is a run, its weights/<phase>, a checkpoint or a Hugging Face folder. Every token but the first is scored
    once, in consecutive windows of the model's context. Raises DataError where the dataset doesn't fit the model.
    """
    model = load_model(weights)
    data = TokenDataset.open(prefix, dtype)
    if data.num_tokens < 2:
        raise DataError(f"{prefix}: holds {data.num_tokens} tokens; at least two are needed to score one")
    largest = data.max_id if data.max_id is not None else int(data.tokens.max())
    if largest >= model.config.vocab_size:
        raise DataError(
            f"{prefix}: holds token id {largest}, the model's vocabulary is {model.config.vocab_size}; "
            "prepare it with the model's own tokenizer"
        )
    device = pick_device()
    model.to(device=device, dtype=pick_dtype("auto", device)).requires_grad_(False)
    text = EvalSet.of_tokens(data.tokens, model.config.context)
    loss = mean_loss(
        lambda tokens, targets, _: model(tokens.to(device), targets.to(device)).float(),
        text,
        max(1, TOKENS_AT_A_TIME // model.config.context),
        world=World(0, 1, device),
    )
    nats = loss * text.num_targets
    return Scored(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=nats / math.log(2) / data.num_bytes if data.num_bytes else None,
        tokens=text.num_targets,
        bytes=data.num_bytes,
    )


def print_scores(weights: Path, scored: Mapping[str, Scored], console: Console) -> None:
    """A row by dataset."""
    rows = [[prefix, *s.values()] for prefix, s in scored.items()]
    columns = ["dataset", "loss", "perplexity", "bits per byte", "tokens", "bytes"]
    print_table(console, str(weights), columns, rows)

"""The loss of trained weights on a whole dataset."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from spt_fast.data.shards import TokenDataset
from spt_fast.errors import DataError
from spt_fast.train.device import pick_device, pick_dtype
from spt_fast.train.evaluate import EvalSet, mean_loss
from spt_fast.train.weights import load_model
from spt_fast.train.world import World

TOKENS_AT_A_TIME = 16_384


def score(weights: Path, prefix: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Loss (nats per token), perplexity, bits_per_byte (None where bytes aren't recorded), tokens scored, bytes.

    `weights` is a run, its weights/<phase>, a checkpoint or a Hugging Face folder. Every token but the first is scored
    once, in consecutive windows of the model's context. Raises DataError where the dataset doesn't fit the model.
    """
    model = load_model(weights)
    data = TokenDataset.open(prefix, dtype)
    if data.num_tokens < 2:
        raise DataError(f"--data {prefix}: holds {data.num_tokens} tokens; at least two are needed to score one")
    largest = data.max_id if data.max_id is not None else int(data.tokens.max())
    if largest >= model.config.vocab_size:
        raise DataError(
            f"--data {prefix}: holds token id {largest}, the model's vocabulary is {model.config.vocab_size}; "
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
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / data.num_bytes if data.num_bytes else None,
        "tokens": text.num_targets,
        "bytes": data.num_bytes,
    }

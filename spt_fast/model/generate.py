"""Sampling from a GPT, one token at a time, without a cache of keys and values: for a look at what it has learnt."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from spt_fast.errors import SptError, invalid


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    tokens: list[int],
    new_tokens: int,
    *,
    context: int,
    device: torch.device,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_id: int | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """The prompt `tokens` and up to `new_tokens` more, ending early with `stop_id` where that is drawn.

    model: tokens int64 [1, T] on `device` to logits [1, T, V]; T is at most `context`, so that in a longer text each
    token sees the last `context` tokens only. temperature 0 takes the likeliest token; top_k draws from that many
    likeliest only. vocab_size: the tokenizer's, where the model's is padded beyond it; only its ids are drawn. The draw
    depends on seed alone, not on the global generator.
    SptError (a ValueError): an empty prompt, new_tokens below 0, a temperature below 0 or not finite, a top_k below 1,
    a seed that isn't one of 64 bits, logits that are not finite.
    """
    if not tokens:
        raise SptError(invalid("tokens", tokens, "give a prompt of at least one token"))
    if new_tokens < 0:
        raise SptError(invalid("new_tokens", new_tokens, "write a whole number of at least 0"), argument=True)
    if not 0 <= temperature < math.inf:
        raise SptError(invalid("temperature", temperature, "write a number of at least 0"), argument=True)
    if top_k is not None and top_k < 1:
        raise SptError(invalid("top_k", top_k, "write a whole number of at least 1"), argument=True)
    if not -(2**63) <= seed < 2**64:
        raise SptError(invalid("seed", seed, "write a whole number of at most 64 bits"), argument=True)
    generator = torch.Generator().manual_seed(seed)
    tokens = list(tokens)
    for _ in range(new_tokens):
        seen = torch.tensor([tokens[-context:]], device=device)
        logits_V = model(seen)[0, -1, :vocab_size].double().cpu()
        if not logits_V.isfinite().all():
            raise SptError("weights: give logits that are not finite; the run diverged, so take an earlier checkpoint")
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            if top_k is not None and top_k < len(logits_V):
                logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -torch.inf
            token = int(
                torch.multinomial(((logits_V - logits_V.max()) / temperature).softmax(0), 1, generator=generator)
            )
        tokens.append(token)
        if token == stop_id:
            break
    return tokens

"""Sampling from a GPT, one token at a time, without a cache of keys and values: for a look at what it has learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from spt_fast.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    tokens: list[int],
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_id: int | None = None,
    vocab_size: int | None = None,
) -> list[int]:
    """The prompt `tokens` and up to `new_tokens` more, ending early with `stop_id` where that is drawn.

    temperature 0 takes the likeliest token; top_k draws from that many likeliest only. Once the text is longer than
    the model's context, each token sees the last `context` tokens. `vocab_size`: the tokenizer's, where the model's is
    padded beyond it; only its ids are drawn. The draw depends on seed alone, not on the global generator.
    ValueError: an empty prompt, a negative temperature or a top_k below 1.
    """
    if not tokens:
        raise ValueError("generate: the prompt must have at least one token")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"generate: temperature must be >= 0 and top_k >= 1; given {temperature}, {top_k}")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(tokens)
    for _ in range(new_tokens):
        seen = torch.tensor([tokens[-model.config.context :]], device=model.embedding.device)
        logits_V = model(seen)[0, -1, :vocab_size].float().cpu()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            if top_k is not None and top_k < len(logits_V):
                logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -torch.inf
            token = int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))
        tokens.append(token)
        if token == stop_id:
            break
    return tokens

"""Sampling from a GPT, one token at a time, for many texts in one batch."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from spt_fast.errors import SptError, SptWarning, invalid
from spt_fast.model.cache import Cache
from spt_fast.model.config import GPTConfig

NOT_FINITE = (
    "weights: give logits that are not finite, as those of a run that diverged; use an earlier checkpoint, or copy the "
    "files again"
)


class Model(Protocol):
    """The interface that sampling needs of a GPT."""

    config: GPTConfig

    @property
    def embedding(self) -> Tensor: ...

    def next_logits(self, tokens_NT: Tensor, cache: Cache | None = None) -> Tensor: ...


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int] | Tensor] | Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Each prompt, a list of ids or an integer tensor [T], and up to `new_tokens` more; a text ends early if `stop_id`,
    or one of them, is drawn.

    A token sees the last `context` tokens before it. While that is the whole text, keys and values are cached and a
    token costs one position; in a longer text every token costs a pass over `context` positions, with a warning.
    temperature 0 takes the likeliest token; top_k draws only from that many likeliest tokens, and top_p from the fewest
    of these whose probabilities, at the temperature, sum to at least that (Holtzman et al. 2019, 3.1). vocab_size: the
    tokenizer's, if the model's is padded beyond it; only its ids are drawn. Each text depends on `seed` alone, not on
    the other texts; the global generator is not used. SptError (a ValueError): a prompt of another type or empty, an id
    outside of the model's vocabulary, new_tokens below 0, a temperature below 0 or not finite, a top_k below 1, a top_p
    that isn't above 0 and at most 1, a seed that isn't one of 64 bits, logits that are not finite.
    """
    texts = [_ids(tokens) for tokens in prompts]
    for tokens in texts:
        if not tokens:
            raise SptError(invalid("tokens", tokens, "give a prompt of at least one token"))
        for token in tokens:
            if not 0 <= token < model.config.vocab_size:
                expected = f"the model knows ids from 0 to {model.config.vocab_size - 1}; use its own tokenizer"
                raise SptError(invalid("tokens", token, expected))
    if new_tokens < 0:
        raise SptError(invalid("new_tokens", new_tokens, "write a whole number of at least 0"), argument=True)
    if not 0 <= temperature < math.inf:
        raise SptError(invalid("temperature", temperature, "write a number of at least 0"), argument=True)
    if top_k is not None and top_k < 1:
        raise SptError(invalid("top_k", top_k, "write a whole number of at least 1"), argument=True)
    if top_p is not None and not 0 < top_p <= 1:
        raise SptError(invalid("top_p", top_p, "write a number above 0 and at most 1"), argument=True)
    if not -(2**63) <= seed < 2**64:
        raise SptError(invalid("seed", seed, "write a whole number of at most 64 bits"), argument=True)
    generators = [torch.Generator().manual_seed(seed) for _ in texts]
    stops = stop_id if isinstance(stop_id, Collection) else (stop_id,)
    reader, growing = _Reader(model, texts, new_tokens), list(range(len(texts)))
    for _ in range(new_tokens):
        for n, logits_V in reader.read(growing).items():
            texts[n].append(_draw(logits_V[:vocab_size].double().cpu(), temperature, top_k, top_p, generators[n]))
        growing = [n for n in growing if texts[n][-1] not in stops]
        if not growing:
            break
    return texts


def _ids(prompt: Sequence[int] | Tensor) -> list[int]:
    try:
        return [operator.index(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
    except TypeError:
        raise SptError(invalid("tokens", prompt, "give a prompt as a list of ids or an integer tensor [T]")) from None


def _draw(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    if not logits_V.isfinite().all():
        raise SptError(NOT_FINITE)
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -torch.inf
    probabilities_V = ((logits_V - logits_V.max()) / temperature).softmax(0)
    if top_p is not None:
        falling_V, order_V = probabilities_V.sort(descending=True, stable=True)
        probabilities_V[order_V[falling_V.cumsum(0) - falling_V >= top_p]] = 0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


class _Reader:
    """Reads growing texts: with a cache while the model sees all of a text, else its last `context` tokens each
    time."""

    def __init__(self, model: Model, texts: list[list[int]], new_tokens: int) -> None:
        self.model, self.texts, self.new_tokens = model, texts, new_tokens
        self.cache: Cache | None = None
        self.rows: list[int] = []
        """The texts in the cache."""
        self.warned = False

    def read(self, growing: list[int]) -> dict[int, Tensor]:
        """Logits [V] of the next token of each of these texts, by number."""
        context = self.model.config.context
        seen = [n for n in growing if len(self.texts[n]) <= context]
        found = self._read_cached(seen) if seen else {}
        if cut := [n for n in growing if n not in found]:
            if not self.warned:
                warnings.warn(
                    f"context: the text is longer than the model's context of {context:,} tokens; from here on each "
                    f"token sees the last {context:,} only and is slow: ask for fewer tokens, or give a shorter prompt",
                    SptWarning,
                    stacklevel=5,
                )
                self.warned = True
            windows = self._tensor([self.texts[n][-context:] for n in cut])
            found |= zip(cut, self.model.next_logits(windows), strict=True)
        return found

    def _read_cached(self, rows: list[int]) -> dict[int, Tensor]:
        if self.cache is None:
            lengths = [len(self.texts[n]) for n in rows]
            last = min(max(lengths) + self.new_tokens, max(lengths) - min(lengths) + self.model.config.context)
            self.cache, self.rows = Cache(self.model.config, lengths, last, self.model.embedding), rows
            whole = [self._tensor([self.texts[n]]) for n in rows]
            logits = [self.model.next_logits(tokens, self.cache.row(i))[0] for i, tokens in enumerate(whole)]
            return dict(zip(rows, logits, strict=True))
        if rows != self.rows:
            self.cache.keep([self.rows.index(n) for n in rows])
            self.rows = rows
        newest = self._tensor([self.texts[n][-1:] for n in rows])
        return dict(zip(rows, self.model.next_logits(newest, self.cache), strict=True))

    def _tensor(self, tokens: list[list[int]]) -> Tensor:
        return torch.tensor(tokens, device=self.model.embedding.device)

"""Log-likelihoods of text. It is cut into tokens in the same way as by lm-eval's own model for Hugging Face folders, so
that both give the same numbers.

B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from spt_fast.data.base_tokenizer import BaseTokenizer, check_rows
from spt_fast.data.hf_tokenizer import HFTokenizer
from spt_fast.errors import SptError, SptWarning, counted, invalid
from spt_fast.model.generate import NOT_FINITE
from spt_fast.model.gpt import GPT
from spt_fast.progress import progress_of
from spt_fast.train.precision import pick_dtype
from spt_fast.train.weights import load_model
from spt_fast.train.weights_tokenizer import ends_of, tokenizer_for
from spt_fast.train.world import dtype_name, pick_device

TOKENS_AT_A_TIME = 16_384
LOGITS_BYTES = 1 << 30
"""Limit for the float32 logits of a batch."""
TEXTS_AT_A_TIME = 32
"""Texts that are continued in one batch."""
LOOK_EVERY = 32
"""Tokens that are generated between checks for stop strings."""


class Pair(NamedTuple):
    """Ids; the context has at least one."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """The score of a continuation after its context."""

    nats: float
    """The logarithm of its probability."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""


class TextModel:
    """A model that scores and continues text.

    context: tokens that it sees at most. bos: the id that every text begins with; None for none. If a context is empty,
    the end-of-text id replaces it. stops: ids that end a text besides the end-of-text id. batch: rows at a time; None
    for as many as fit. progress: show a bar on standard error. SptError for a context that the model doesn't have.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: BaseTokenizer,
        *,
        stops: Sequence[int] = (),
        context: int | None = None,
        batch: int | None = None,
        progress: bool = False,
    ) -> None:
        longest = model.config.context
        if context is not None and not 1 < context <= longest:
            raise SptError(invalid("context", context, f"from 2 to {longest}, the model's own"), argument=True)
        if batch is not None and batch < 1:
            raise SptError(invalid("batch", batch, "write a whole number of at least 1"), argument=True)
        self.context, self._longest = context or longest, longest
        # If a run's documents began with no token, texts still begin with the one of its Hugging Face tokenizer, so
        # that base and finetune, and the served weights, see the same.
        usual = tokenizer.usual_bos_id if isinstance(tokenizer, HFTokenizer) else None
        self.bos = usual if tokenizer.bos_id is None else tokenizer.bos_id
        prefix = tokenizer.eos_id if self.bos is None else self.bos
        if prefix is None:
            raise SptError("tokenizer: names no token that ends or begins a text; add it to its tokenizer_config.json")
        self._prefix = prefix
        self.batch, self.progress, self._stops = batch, progress, [tokenizer.eos_id, *stops]
        self._model, self._tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def load(
        cls,
        weights: Path,
        tokenizer: Path | None = None,
        *,
        bos: str | None = None,
        context: int | None = None,
        batch: int | None = None,
        progress: bool = False,
    ) -> TextModel:
        """The model at `weights` on this machine's device, in the dtype with fast matmuls: the same for all weights.
        bos: the token that texts begin with, if it differs from the weights' own. CheckpointError if their tokenizer is
        unknown, DataError for an unknown token."""
        found = tokenizer_for(weights, tokenizer)
        found.set_ends(None, bos)
        device = pick_device()
        model = load_model(weights).to(device=device, dtype=pick_dtype("auto", device))
        return cls(model, found, stops=ends_of(weights, found), context=context, batch=batch, progress=progress)

    @property
    def tokenizer_digest(self) -> str:
        return self._tokenizer.digest

    @property
    def dtype(self) -> str:
        """The compute dtype."""
        return dtype_name(self._model.embedding.dtype)

    def encode(self, text: str) -> list[int]:
        return [*([] if self.bos is None else [self.bos]), *self._ids(text)]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode_array(text).tolist()

    def _check(self, rows: Sequence[list[int]]) -> None:
        for row in rows:
            check_rows(self._tokenizer, row, self._model.config.vocab_size)

    def pair(self, context: str, continuation: str) -> Pair:
        """Encoded as one text and cut at the end of the context; spaces at the end of the context belong to the
        continuation. SptError for a continuation without tokens."""
        if kept := context.rstrip():
            whole, before = self.encode(context + continuation), self.encode(kept)
            pair = Pair(before, whole[len(before) :])
        else:
            ids = self._ids(context + continuation)
            pair = Pair(ids[:1], ids[1:]) if ids[:1] == [self._prefix] else Pair([self._prefix], ids)
        if not pair.continuation:
            raise SptError(f"{continuation!r} has no tokens of its own after its context; write a longer answer")
        return pair

    def windows(self, text: str) -> list[Pair]:
        """Every token of `text` once, each window but the first after as much context as fits. The begin-of-text id is
        scored too, as in lm-eval."""
        ids, T = self.encode(text), self.context
        starts = range(0, len(ids), T)
        ends = [min(start + T, len(ids)) for start in starts]
        return [
            Pair(ids[end - T - 1 : start] if start else [self._prefix], ids[start:end])
            for start, end in zip(starts, ends, strict=True)
        ]

    def likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Scores in the order of `pairs`; the longest are computed first, in batches of similar length.

        A pair that is longer than the context loses its beginning, with a warning. SptError if part of the continuation
        would be lost, and for likelihoods that are not finite.
        """
        longest = max((len(pair.continuation) for pair in pairs), default=0)
        if longest > self._longest:
            raise SptError(
                f"tasks: an answer has {longest:,} tokens, and the model reads at most {self._longest:,} at a time; "
                "shorten that answer, or leave its question out",
                argument=True,
            )
        if longest > self.context:
            raise SptError(
                invalid("context", self.context, f"at least {longest}, the tokens of the longest answer"), argument=True
            )
        rows = [[*pair.context, *pair.continuation] for pair in pairs]
        self._check(rows)
        cut = sum(len(row) > self.context + 1 for row in rows)
        if cut:
            warnings.warn(
                f"context: {cut:,} of {counted(len(rows), 'text', 'are')} longer than "
                f"{counted(self.context, 'token')} and lost their beginning",
                SptWarning,
                stacklevel=2,
            )
        rows = [row[-self.context - 1 :] for row in rows]
        left = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, Likelihood] = {}
        with progress_of(f"score {counted(len(rows), 'text')}", sum(map(len, rows)), show=self.progress) as advance:
            while left:
                T = len(rows[left[0]]) - 1
                fit = min(TOKENS_AT_A_TIME // T, LOGITS_BYTES // (4 * T * self._model.config.vocab_size))
                B = self.batch or max(1, fit)
                batch, left = left[:B], left[B:]
                scored = self._score([rows[i] for i in batch], [len(pairs[i].continuation) for i in batch])
                found |= zip(batch, scored, strict=True)
                advance(sum(len(rows[i]) for i in batch))
        return [found[i] for i in range(len(rows))]

    @torch.no_grad()
    def _score(self, rows: Sequence[list[int]], counts: Sequence[int]) -> list[Likelihood]:
        """Log-probabilities of the last `counts` tokens of each row; the first row is the longest."""
        device = self._model.embedding.device
        tokens_BT = torch.zeros(len(rows), len(rows[0]) - 1, dtype=torch.int64)
        scored_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            end = len(row) - 1
            tokens_BT[i, :end] = torch.tensor(row[:-1])
            scored_BT[i, end - count : end] = True
        targets = torch.tensor([id for row, count in zip(rows, counts, strict=True) for id in row[-count:]])
        logits_NV = self._model(tokens_BT.to(device))[scored_BT.to(device)].float()
        nats = -F.cross_entropy(logits_NV, targets.to(device), reduction="none").double().cpu()
        if not nats.isfinite().all():
            raise SptError(NOT_FINITE)  # of choices without likelihoods, the first would be taken
        greedy = logits_NV.argmax(-1).cpu() == targets
        return [
            Likelihood(float(n.sum()), bool(g.all()))
            for n, g in zip(nats.split([*counts]), greedy.split([*counts]), strict=True)
        ]

    def continuations(
        self,
        contexts: Sequence[str],
        until: Sequence[str],
        tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> list[str]:
        """The continuation of each context: at most this many tokens, up to the end of the text or the first of the
        strings `until`. SptError if the model's context has no room for them."""
        if tokens >= self.context:
            raise SptError(
                invalid("context", self.context, f"more than the {tokens} tokens that are to be generated"),
                argument=True,
            )
        rows = [(self.encode(context) or [self._prefix])[-(self.context - tokens) :] for context in contexts]
        self._check(rows)
        starts, size = [*map(len, rows)], self.batch or TEXTS_AT_A_TIME
        named = self._tokenizer.named_tokens()
        # Special tokens may be invisible in the text.
        last = {*self._stops, *(named[stop] for stop in until if stop in named)}
        found: dict[int, str] = {}
        with progress_of(f"continue {counted(len(rows), 'text')}", len(rows), show=self.progress) as advance:
            for first in range(0, len(rows), size):
                left = [*range(first, min(first + size, len(rows)))]
                for made in range(0, tokens, LOOK_EVERY):
                    new = min(LOOK_EVERY, tokens - made)
                    longer = self._model.generate_batch(
                        [rows[i] for i in left],
                        new,
                        temperature=temperature,
                        top_k=top_k,
                        top_p=top_p,
                        seed=made,  # otherwise each part would repeat the draws of the first
                        stop_id=self._stops,
                        vocab_size=self._tokenizer.vocab_size,
                    )
                    for i, row in zip(left, longer, strict=True):
                        rows[i], ids = row, row[starts[i] :]
                        ended = next((place for place, id_ in enumerate(ids) if id_ in last), None)
                        text = self._tokenizer.decode(ids[:ended])
                        ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
                        if ends or ended is not None or made + new == tokens:
                            found[i] = text[: min(ends, default=len(text))]
                    advance(sum(i in found for i in left))
                    left = [i for i in left if i not in found]
                    if not left:
                        break
        return [found[i] for i in range(len(rows))]

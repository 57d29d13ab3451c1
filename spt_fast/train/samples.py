"""Texts that the model generates at evaluations, for people to read.

B texts, T tokens, V vocabulary. Prompts come from the *select* half of held-out text and are the same at every
evaluation, and decoding is greedy: two evaluations differ only by the weights, and no random numbers are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spt_fast.config import Phase
from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.model import hf
from spt_fast.train.evaluate import EvalSet

PROMPT_TOKENS = 32
NEW_TOKENS = 32


def samples(
    logits: Callable[[Tensor], Tensor],
    texts: Mapping[str, EvalSet],
    phase: Phase,
    tokenizer: BaseTokenizer | None,
    run: Path,
) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Under "samples" by source as many texts as the phase asks for, {"prompt": …, "text": the continuation}; an
    end-of-text token or one at which the base of the run ends a text ends it early. Empty if none are requested.

    logits: tokens int64 [B, T] -> [B, T, V], of a model of at least the context that `texts` are cut for.
    """
    number = phase.evaluation.samples
    if not number or tokenizer is None:
        return {}
    found, ends = {}, {tokenizer.eos_id, *hf.stop_ids(run)}
    for source, text in texts.items():
        prompts_BP = _prompts(text, number)
        P = prompts_BP.shape[1]
        new = min(NEW_TOKENS, text.stacks[0][0].shape[1] - 1 - P)
        ids_BT = _continued(logits, prompts_BP, new, tokenizer.vocab_size)
        found[source] = [
            {"prompt": tokenizer.decode(ids[:P]), "text": tokenizer.decode(_until(ids[P:], ends))}
            for ids in ids_BT.tolist()
        ]
    return {"samples": found}


def _prompts(text: EvalSet, number: int) -> Tensor:
    """The beginnings of windows spread over the text, int64 [B, P]; fewer if it has fewer windows."""
    windows = text.stacks[0][0]
    P = min(PROMPT_TOKENS, max(1, (windows.shape[1] - 1) // 2))
    chosen = np.unique(np.linspace(0, len(windows) - 1, number).astype(int))
    return torch.from_numpy(windows[chosen, :P].astype(np.int64))


@torch.no_grad()
def _continued(logits: Callable[[Tensor], Tensor], prompts_BP: Tensor, new: int, vocab_size: int) -> Tensor:
    """Prompts and the `new` likeliest tokens after them [B, P + new]; every pass has one shape, since no token sees
    those after it."""
    B, P = prompts_BP.shape
    ids_BT = torch.cat([prompts_BP, torch.zeros(B, new, dtype=torch.int64)], 1)
    for position in range(P, P + new):
        ids_BT[:, position] = logits(ids_BT)[:, position - 1, :vocab_size].argmax(-1).cpu()
    return ids_BT


def _until(ids: list[int], ends: Collection[int | None]) -> list[int]:
    return [*takewhile(lambda id_: id_ not in ends, ids)]

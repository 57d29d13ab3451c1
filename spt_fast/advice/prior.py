"""What the papers say where there are no runs: the share of domain data, the regime, replay and what to expect.

It is a prior. The figures are from published runs of models of 300M to 3B parameters on up to 200B tokens (forgetting:
41M to 1.27B), on other corpora and other tokenizers than the user's, and `FACTS` has the source and the standing of
each. What is computed from them here is one rule, by *epochs*: how often pretraining reads the domain corpus.

    the published best shares of a corpus of 300M tokens    10% under 30B tokens, 2–5% at 200B, 2% from 240–280B on
    are so many epochs                                      up to 10, 13–33, 17 (at 260B)
    scarce data was found to be reusable                    15–20 times
    best repetition by model size                           24 times at 30M parameters, 11 at 124M, 5 from 757M on
    so                                                      delta = epochs · domain_tokens / budget, at most 10%
                                                            epochs = 17, up to 24 for models below 64M

which gives 10% up to 51B, 2.6% at 200B and 2% at 255B for that corpus. From 757M on the two sources disagree: 17 is of
models of 1B, judged after finetuning, 5 before it (arXiv 2606.07597); `delta_range` spans both. That the epochs, and
not the tokens, carry over to corpora of other sizes is an assumption, the one behind simulated epoching. It ends where
a small corpus meets a large budget: there mixing the corpus in late (SCPT) was better for 30M tokens, and at 3M the
published share of it still overfitted, so SCPT too reads the corpus no more often.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TypedDict

import numpy as np

from spt_fast.fields import parse_count
from spt_fast.laws import DataConstrainedLaw
from spt_fast.study.words import percent, times

BEST_EPOCHS, FEWEST_EPOCHS, MOST_EPOCHS = 17, 10, 33
"""Of SPT's published best shares."""
REPETITION = {30e6: 24.0, 124e6: 11.0, 757e6: 5.0}
"""Epochs that are best, by parameters."""
SMALLEST_SHARE, LARGEST_SHARE = 0.001, 0.1
SPT_UP_TO, SCPT_FROM = 280e9 / 300e6, 200e9 / 30e6
"""Budget per domain token: up to the one, SPT was seen to win; from the other, SCPT."""
SCPT_LAST, SCPT_SHARE = 0.1, 0.01
"""SCPT as published: the last 10% of the pretraining tokens (20B of 200B) hold 1% of domain text."""
REPLAY = 0.01
FINETUNE_EPOCHS = 5
R_GAIN, COMPUTE_MULTIPLIER = (0.8, 2.0), (1.40, 1.75)
GAP_CLOSED = {"ChemPile": 0.23, "MusicPile": 0.81, "ProofPile": 1.33}
"""Share of the step in domain loss from a 1B to a 3B model, both finetuned only, that SPT of the 1B makes up for."""
PROGRESS_LOST = {41e6: 0.95, 109e6: 0.80, 334e6: 0.50, 665e6: 0.30, 1.27e9: 0.20}
PUBLISHED_RUNS = {"params": (300e6, 3e9), "budget": (40e9, 280e9), "domain_tokens": (3e6, 300e6)}

SAYS = (
    "a prior from published runs (300M to 3B parameters, up to 200B tokens, fitted laws to 280B), not a measurement on "
    "your data"
)


@dataclass(frozen=True)
class Fact:
    """Something that a paper says. `standing`: "paper" read there, "secondary" read in texts about it, "derived"."""

    says: str
    source: str
    standing: str


FACTS: dict[str, Fact] = {
    "delta": Fact(
        "best share for 300M domain tokens: 2–5% at 200B and 2% at 280B, after finetuning; before it 10% under 30B and "
        "2% past 240B",
        "arXiv 2603.16177",
        "paper",
    ),
    "reuse": Fact("scarce data can be reused 15–20 times", "arXiv 2605.12715", "secondary"),
    "repetition": Fact(
        "the domain is best read about 24 times by a model of 30M parameters, 11 by one of 124M, 5 from 757M on",
        "arXiv 2606.07597",
        "secondary",
    ),
    "repetition by domain": Fact(
        "best epochs: mathematics 5–6, code 4–5, encyclopedia and medicine 3–4", "arXiv 2608.14071", "secondary"
    ),
    "epochs": Fact(
        "delta = epochs · domain tokens / budget, at most 10%: 17 epochs, up to 24 below 64M parameters",
        "the four before",
        "derived",
    ),
    "weight decay": Fact(
        "where data repeats, the best weight decay is some 30 times the usual one", "arXiv 2509.14786", "secondary"
    ),
    "regime": Fact(
        "corpora of 3–30M tokens repeat too often at large budgets: gains shrink or turn negative; SCPT beats SPT for "
        "30M tokens, and for 3M SCPT at 1% still overfits",
        "arXiv 2603.16177",
        "paper",
    ),
    "boundary": Fact(
        "SPT up to 930 pretraining tokens per domain token, SCPT from 6,700 on, open between",
        "the one before",
        "derived",
    ),
    "replay after SPT": Fact(
        "SPT finetuned without replay beats plain pretraining finetuned with any", "arXiv 2603.16177", "paper"
    ),
    "replay": Fact(
        "1% of general data in a finetune stops forgetting, at no cost in its loss", "arXiv 2502.06042", "secondary"
    ),
    "gain": Fact(
        "SPT lowers the domain loss after finetuning by 0.8% (ChemPile) to 2.0% (MusicPile)",
        "arXiv 2603.16177",
        "paper",
    ),
    "which domains": Fact(
        "among real domains the loss that plain finetuning ends with ranks the gain; n-gram divergence hardly does "
        "(r = 0.32 to 0.57)",
        "arXiv 2603.16177",
        "paper",
    ),
    "compute": Fact(
        "SPT needs 1.40 (ChemPile) to 1.75 (MusicPile) times fewer pretraining tokens for the same domain loss",
        "arXiv 2603.16177",
        "paper",
    ),
    "gap": Fact(
        "a 1B model by SPT makes up for 23% (ChemPile), 81% (MusicPile), 133% (ProofPile) of the step to a 3B one that "
        "was only finetuned",
        "arXiv 2603.16177",
        "paper",
    ),
    "general": Fact("general loss hardly moves up to a share of 5%, and rises at 10%", "arXiv 2603.16177", "paper"),
    "forgetting": Fact(
        "finetuning without replay undoes about 95% (41M), 80% (109M), 50% (334M), 30% (665M), 20% (1.27B) of the "
        "progress that pretraining has made in general loss",
        "arXiv 2502.06042",
        "secondary",
    ),
    "finetuning": Fact("a finetune begins to overfit after about 5 epochs", "arXiv 2603.16177", "paper"),
    "repeats": Fact("what repeated tokens are worth: R* = 15.4", "arXiv 2305.16264", "paper"),
}


class Worth(TypedDict):
    """Of tokens `read` more than once."""

    read: float
    fresh: float
    """Fresh ones that they are worth."""
    next_epoch: float
    """What one more epoch would be worth, as a share of a fresh one."""


class Published(TypedDict):
    """[low, high] over the published domains."""

    r_gain: list[float]
    """Percent."""
    compute_multiplier: list[float]
    gap_closed: list[float]
    progress_lost: float | None
    """None without params."""


class Prior(TypedDict):
    """What the papers say of a question: a dict, so that it can be printed as it is."""

    says: str
    regime: str
    """"SPT", "SCPT", or "SPT or SCPT" where nothing is published."""
    why: str
    delta: float
    """The domain's share of all pretraining tokens."""
    delta_range: list[float] | None
    """By 10 to 33 epochs, or from the best repetition of models of the size, where that is less."""
    epochs: float
    """How often pretraining then reads the domain corpus."""
    replay: float
    """The general data's share of the finetune."""
    expected: Published
    worth: Worth
    outside: dict[str, float]
    """The factor by which the question lies outside of the published runs; 1 is within."""
    facts: list[dict[str, str]]
    """What it rests on: what is said, where, and its standing."""


def prior(*, domain_tokens: int | str, budget: int | str, params: int | str | None = None) -> Prior:
    """What to do with `domain_tokens` unique domain tokens and `budget` pretraining tokens, by the papers. Counts are
    read as in recipes. Raises RecipeError."""
    domain_tokens, budget = parse_count(domain_tokens, "domain_tokens"), parse_count(budget, "budget")
    params = None if params is None else parse_count(params, "params")
    per_token = budget / domain_tokens
    regime = "SPT" if per_token <= SPT_UP_TO else "SCPT" if per_token >= SCPT_FROM else "SPT or SCPT"
    repetition = None if params is None else best_repetition(params)
    epochs = max(BEST_EPOCHS, repetition or 0)
    if regime == "SCPT":
        delta, delta_range = min(SCPT_LAST * SCPT_SHARE, share_of(epochs, per_token)), None
    else:
        delta = share_of(epochs, per_token)
        fewest = min(FEWEST_EPOCHS, repetition or FEWEST_EPOCHS)
        delta_range = [share_of(fewest, per_token), share_of(MOST_EPOCHS, per_token)]
    asked = {"budget": budget, "domain_tokens": domain_tokens} | ({} if params is None else {"params": params})
    return {
        "says": SAYS,
        "regime": regime,
        "why": _why(regime, delta, per_token),
        "delta": delta,
        "delta_range": delta_range,
        "epochs": delta * per_token,
        "replay": 0.0 if regime == "SPT" else REPLAY,
        "expected": {
            "r_gain": list(R_GAIN),
            "compute_multiplier": list(COMPUTE_MULTIPLIER),
            "gap_closed": [min(GAP_CLOSED.values()), max(GAP_CLOSED.values())],
            "progress_lost": None if params is None else progress_lost(params),
        },
        "worth": worth(delta * budget, domain_tokens),
        "outside": {what: outside(value, *PUBLISHED_RUNS[what]) for what, value in asked.items()},
        "facts": [{"of": name} | asdict(fact) for name, fact in FACTS.items()],
    }


def share_of(epochs: float, per_token: float) -> float:
    """The share with which a corpus is read `epochs` times, to two digits, at most 10%."""
    return min(float(f"{epochs / per_token:.2g}"), LARGEST_SHARE)


def best_repetition(params: float) -> float:
    """Epochs of the domain that are best before finetuning."""
    return _by_size(REPETITION, params)


def progress_lost(params: float) -> float:
    """Share of the progress in general loss that a finetune without replay undoes."""
    return _by_size(PROGRESS_LOST, params)


def _by_size(published: dict[float, float], params: float) -> float:
    """By log(params) between the published sizes, the outermost one's beyond them."""
    return float(np.interp(math.log(params), [math.log(size) for size in published], list(published.values())))


def worth(read: float, unique: float) -> Worth:
    """What `read` tokens from `unique` ones are worth in fresh ones, and the next one, by the published fit."""
    law = DataConstrainedLaw.published()
    epochs = max(read / unique, 1.0)
    return {
        "read": read,
        "fresh": law.effective_tokens(tokens=read, unique_tokens=unique),
        "next_epoch": math.exp((1 - epochs) / law.params_["R_star_D"]),
    }


def outside(value: float, low: float, high: float) -> float:
    """The factor by which a value lies outside of a range; 1 within it."""
    return max(value / high, low / value, 1.0)


def _why(regime: str, delta: float, per_token: float) -> str:
    if regime == "SCPT":
        late = (
            f"at {per_token:,.0f} pretraining tokens per domain token the corpus would repeat too often if mixed in "
            "from the first step; published corpora of this kind did better when mixed in late"
        )
        if delta == SCPT_LAST * SCPT_SHARE:
            return late
        return f"{late}, but smaller ones still overfitted, so it is read {times(delta * per_token)}"
    if delta == LARGEST_SHARE:
        return (
            f"at 10% the corpus is read {times(delta * per_token)}, fewer than it could be, but general loss "
            "rises at 10%, and no larger share is published"
        )
    epochs = f"at {percent(delta)} the corpus is read {times(delta * per_token)}, as at the best published shares"
    if regime == "SPT":
        return epochs
    return (
        f"{epochs}; but at {per_token:,.0f} pretraining tokens per domain token nothing is published: SPT wins up to "
        f"{SPT_UP_TO:,.0f}, SCPT from {SCPT_FROM:,.0f} on. Try both"
    )

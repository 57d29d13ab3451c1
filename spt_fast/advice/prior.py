"""The answer of the papers without any runs: the share of domain data, the regime, replay and expected gains.

It is a prior. The figures are from published runs of models of 300M to 3B parameters on up to 200B tokens (forgetting:
41M to 1.27B), on other corpora and with other tokenizers than the user's. `FACTS` has the source and the standing of
each. One rule is derived from them, in *epochs*: how often pretraining reads the domain corpus.

    published best shares of a corpus of 300M tokens    10% under 30B tokens, 2–5% at 200B, 2% from 240–280B on
    these shares in epochs                              up to 10, 13–33, 17 (at 260B)
    published reuse of scarce data                      15–20 times
    published best repetition by model size             24 times at 30M parameters, 11 at 124M, 5 from 757M on
    the rule                                            delta = epochs · domain_tokens / budget, at most 10%
                                                        epochs = 17, up to 24 for models below 64M

For that corpus the rule gives 10% up to 51B, 2.6% at 200B and 2% at 255B. From 757M on the sources disagree: 17 epochs
are best for models of 1B after finetuning, 5 before it (arXiv 2606.07597); `delta_range` spans both. That epochs, and
not tokens, carry over to corpora of other sizes is an assumption, the one behind simulated epoching. It fails for a
small corpus and a large budget: there SCPT, which mixes the corpus in late, was better for 30M tokens. At 3M tokens the
published share of SCPT still overfitted, so the rule limits the epochs of SCPT too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TypedDict

import numpy as np

from spt_fast.fields import parse_count
from spt_fast.laws import DataConstrainedLaw
from spt_fast.quantities import percent, times

BEST_EPOCHS, FEWEST_EPOCHS, MOST_EPOCHS = 17, 10, 33
"""Epochs at SPT's published best shares."""
REPETITION = {30e6: 24.0, 124e6: 11.0, 757e6: 5.0}
"""Best epochs, by parameters."""
SMALLEST_SHARE, LARGEST_SHARE = 0.001, 0.1
SPT_UP_TO, SCPT_FROM = 280e9 / 300e6, 200e9 / 30e6
"""Pretraining tokens per domain token: up to the first SPT won in the published runs, from the second on SCPT."""
SCPT_LAST, SCPT_SHARE = 0.1, 0.01
"""SCPT as published: 1% domain text in the last 10% of the pretraining tokens (20B of 200B)."""
REPLAY = 0.01
FINETUNE_EPOCHS = 5
R_GAIN, COMPUTE_MULTIPLIER = (0.8, 2.0), (1.40, 1.75)
GAP_CLOSED = {"ChemPile": 0.23, "MusicPile": 0.81, "ProofPile": 1.33}
"""The share of the difference in domain loss between 1B and 3B models, both only finetuned, that SPT gains at 1B."""
PROGRESS_LOST = {41e6: 0.95, 109e6: 0.80, 334e6: 0.50, 665e6: 0.30, 1.27e9: 0.20}
PUBLISHED_RUNS = {"params": (300e6, 3e9), "budget": (40e9, 280e9), "domain_tokens": (3e6, 300e6)}

SAYS = (
    "a prior from published runs (300M to 3B parameters, up to 200B tokens, fitted laws to 280B), not a measurement on "
    "your data"
)


@dataclass(frozen=True)
class Fact:
    """A statement of a paper. `standing`: "paper" if it was read there, "secondary" if in texts about the paper,
    "derived" if it is computed from other facts."""

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
        "best epochs of the domain: about 24 for a model of 30M parameters, 11 for 124M, 5 from 757M on",
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
        "when data repeats, the best weight decay is about 30 times the usual one", "arXiv 2509.14786", "secondary"
    ),
    "regime": Fact(
        "corpora of 3–30M tokens repeat too often at large budgets: gains shrink or become negative; SCPT beats SPT "
        "for 30M tokens; for 3M SCPT at 1% still overfits",
        "arXiv 2603.16177",
        "paper",
    ),
    "boundary": Fact(
        "SPT up to 930 pretraining tokens per domain token, SCPT from 6,700 on, unknown between them",
        "the one before",
        "derived",
    ),
    "replay after SPT": Fact(
        "SPT finetuned without replay beats plain pretraining finetuned with any replay", "arXiv 2603.16177", "paper"
    ),
    "replay": Fact(
        "1% of general data in a finetune stops forgetting, at no cost in domain loss", "arXiv 2502.06042", "secondary"
    ),
    "gain": Fact(
        "SPT lowers the domain loss after finetuning by 0.8% (ChemPile) to 2.0% (MusicPile)",
        "arXiv 2603.16177",
        "paper",
    ),
    "which domains": Fact(
        "for real domains the loss after plain finetuning ranks the gain; n-gram divergence predicts it poorly (r = "
        "0.32 to 0.57)",
        "arXiv 2603.16177",
        "paper",
    ),
    "compute": Fact(
        "SPT needs 1.40 (ChemPile) to 1.75 (MusicPile) times fewer pretraining tokens for the same domain loss",
        "arXiv 2603.16177",
        "paper",
    ),
    "gap": Fact(
        "a 1B model by SPT gains 23% (ChemPile), 81% (MusicPile), 133% (ProofPile) of the difference to an only "
        "finetuned 3B model",
        "arXiv 2603.16177",
        "paper",
    ),
    "general": Fact("general loss changes little up to a share of 5%, and rises at 10%", "arXiv 2603.16177", "paper"),
    "forgetting": Fact(
        "finetuning without replay undoes about 95% (41M), 80% (109M), 50% (334M), 30% (665M), 20% (1.27B) of the "
        "progress of pretraining in general loss",
        "arXiv 2502.06042",
        "secondary",
    ),
    "finetuning": Fact("a finetune begins to overfit after about 5 epochs", "arXiv 2603.16177", "paper"),
    "repeats": Fact("the value of repeated tokens: R* = 15.4", "arXiv 2305.16264", "paper"),
}


class Worth(TypedDict):
    """The value of `read` tokens, some of which repeat."""

    read: float
    fresh: float
    """The number of fresh tokens of equal value."""
    next_epoch: float
    """The value of one more epoch, relative to an epoch of fresh tokens."""


class Published(TypedDict):
    """[low, high] over the published domains."""

    r_gain: list[float]
    """Percent."""
    compute_multiplier: list[float]
    gap_closed: list[float]
    progress_lost: float | None
    """None without params."""


class Prior(TypedDict):
    """The papers' answer to a question; a dict, so that `--json` prints it unchanged."""

    says: str
    regime: str
    """"SPT", "SCPT", or "SPT or SCPT" where nothing is published."""
    why: str
    delta: float
    """The domain's share of all pretraining tokens."""
    delta_range: list[float] | None
    """The shares at 10 and at 33 epochs; the lower one at the best repetition for the model size, if that is less."""
    epochs: float
    """How often pretraining reads the domain corpus at `delta`."""
    replay: float
    """The general data's share of the finetune."""
    expected: Published
    worth: Worth
    outside: dict[str, float]
    """The factor by which the question lies outside the published runs; 1 within them."""
    facts: list[dict[str, str]]
    """The evidence: FACTS as dicts, with the name of each in `of`."""


def prior(*, domain_tokens: int | str, budget: int | str, params: int | str | None = None) -> Prior:
    """The papers' answer for `domain_tokens` unique domain tokens, `budget` pretraining tokens and a model of `params`
    parameters. Counts are numbers or texts such as "30M". Raises RecipeError for others."""
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
    """The share at which a corpus is read `epochs` times, to two digits, at most 10%. per_token: the budget per domain
    token."""
    return min(float(f"{epochs / per_token:.2g}"), LARGEST_SHARE)


def best_repetition(params: float) -> float:
    """The best epochs of the domain before finetuning."""
    return _by_size(REPETITION, params)


def progress_lost(params: float) -> float:
    """The share of pretraining's progress in general loss that a finetune without replay undoes."""
    return _by_size(PROGRESS_LOST, params)


def _by_size(published: dict[float, float], params: float) -> float:
    """Interpolated in log(params) between the published sizes; constant beyond them."""
    return float(np.interp(math.log(params), [math.log(size) for size in published], list(published.values())))


def worth(read: float, unique: float) -> Worth:
    """The value of `read` tokens from a corpus of `unique` ones, by the published fit."""
    law = DataConstrainedLaw.published()
    epochs = max(read / unique, 1.0)
    return {
        "read": read,
        "fresh": law.effective_tokens(tokens=read, unique_tokens=unique),
        "next_epoch": math.exp((1 - epochs) / law.params_["R_star_D"]),
    }


def outside(value: float, low: float, high: float) -> float:
    """The factor by which a value lies outside a range; 1 within it."""
    return max(value / high, low / value, 1.0)


def _why(regime: str, delta: float, per_token: float) -> str:
    if regime == "SCPT":
        late = (
            f"at {per_token:,.0f} pretraining tokens per domain token the corpus would repeat too often if mixed in "
            "from the first step; published corpora of this size gained more when mixed in late"
        )
        if delta == SCPT_LAST * SCPT_SHARE:
            return late
        return f"{late}, but the smallest still overfitted, so this one is read only {times(delta * per_token)}"
    if delta == LARGEST_SHARE:
        return (
            f"at 10% the corpus is read {times(delta * per_token)}; more repetition would be possible, but general "
            "loss rises at 10%, and no larger share is published"
        )
    epochs = f"at {percent(delta)} the corpus is read {times(delta * per_token)}, as at the best published shares"
    if regime == "SPT":
        return epochs
    return (
        f"{epochs}; but at {per_token:,.0f} pretraining tokens per domain token nothing is published: SPT wins up to "
        f"{SPT_UP_TO:,.0f}, SCPT from {SCPT_FROM:,.0f} on. Try both"
    )

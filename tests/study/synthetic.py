"""Runs tables generated from known laws, in the form in which `read_table` returns those of a study."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from spt_fast import laws
from spt_fast.study.runs_table import COLUMNS
from tests.synthetic_runs import DOMAIN, GENERAL, OVERFITTING, gain

PARAMS, DOMAIN_TOKENS = 109_000_000, 300_000_000
"""The model size and corpus for which OVERFITTING and `gain` hold unscaled."""
SIZE_EXPONENT, CORPUS_EXPONENT, FLOOR = 0.12, 0.08, 0.9
"""The part of the domain loss above FLOOR falls as params^-0.12, and after finetuning also as domain_tokens^-0.08."""
FORGETTING = laws.ForgettingLaw.from_params(A=2, B=829, alpha=0.38, beta=0.28)
"""The general loss after finetuning a model without domain data in pretraining; it rises less for delta > 0."""
ADAMW = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip": 1.0, "momentum": np.nan}
BEST_EPOCHS, LONGEST_EPOCHS = 4, 8
"""Evaluations of a finetune: the domain loss falls to its minimum and ends above it, overfitted."""


def spt_table(
    deltas: Sequence[float] = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05),
    budgets: Sequence[int] = (20_000_000_000, 50_000_000_000, 100_000_000_000, 150_000_000_000, 200_000_000_000),
    seeds: Sequence[int] = (0, 1),
    params: Sequence[int] = (PARAMS,),
    domain_tokens: Sequence[int] = (DOMAIN_TOKENS,),
    injected: Sequence[float] = (0.0,),
    anchors: Sequence[float] = (0.0,),
    noise: float = 0.003,
    seed: int = 0,
) -> pd.DataFrame:
    """One pretraining run at a plateau rate per delta, size, corpus and seed, with weights at every budget; after each
    budget, a finetune per injected share and anchor, which keeps its best weights by `domain_select`. noise: relative,
    of each loss; half as much again is common to all losses of a run."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for size, corpus, delta, run_seed in product(params, domain_tokens, deltas, seeds):
        run = f"pretrain-{size}-{corpus}-{100 * delta:g}%-seed{run_seed}"
        shared = np.exp(noise / 2 * rng.standard_normal())
        given = {"params": size, "domain_tokens": corpus, "seed": run_seed}
        grid = np.unique([*np.linspace(0.05, 1, 20) * max(budgets), *budgets]).astype(int)
        for tokens in [0, *grid]:
            domain, train, general = before(tokens, delta, size, corpus) if tokens else (9.0, 9.0, 9.0)
            row = given | {
                "run": run,
                "phase": f"pretrain-{next(budget for budget in sorted(budgets) if budget >= tokens)}",
                "stage": 0,
                "start": "scratch",
                "lr": 1e-3,
                "tokens": tokens,
                "delta": delta,
                "pretrain_tokens": 0.0,
                "handed_on": tokens in budgets,
            }
            losses = observed(domain, train, general, shared, noise, rng)
            rows.append(row | losses)
            if tokens not in budgets:
                continue
            for share, anchor in product(injected, anchors):
                finetune = given | {
                    "run": f"{run}-{tokens}-finetune-{100 * share:g}%-anchor{anchor:g}",
                    "phase": "finetune",
                    "stage": 1,
                    "after": run,
                    "start": "pretrained",
                    "lr": 1e-4,
                    "anchor": anchor,
                    "delta": 1 - share,
                    "pretrain_tokens": float(tokens),
                    "pretrain_delta": delta,
                    "pretrain_epochs": delta * tokens / corpus,
                    "domain_before": losses["domain_heldout"],
                    "general_before": losses["general_heldout"],
                }
                lowest = after(tokens, delta, size, corpus, share, anchor)
                rise = forgotten(delta, size, corpus, share, anchor)
                path = []
                for epochs in np.arange(0, LONGEST_EPOCHS + 0.5, 0.5):
                    done = epochs / BEST_EPOCHS
                    ends = observed(
                        domain - (domain - lowest) * done * np.exp(1 - done),
                        train - (train - lowest + 0.3) * (1 - np.exp(-2 * done)),
                        losses["general_heldout"] / shared + rise * np.expm1(-4 * done) / np.expm1(-4),
                        shared,
                        noise,
                        rng,
                    )
                    path.append({"tokens": int(epochs * corpus / (1 - share))} | (ends if epochs else losses))
                best = min(path, key=lambda at: at["domain_select"])
                rows += [finetune | at | {"handed_on": at is best} for at in path]
    return completed(rows)


def dcpt_table(
    deltas: Sequence[float] = (0.0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0),
    params: Sequence[int] = (200_000_000, 1_000_000_000),
    seeds: Sequence[int] = (0,),
    tokens: int = 20_000_000_000,
    evaluations: int = 12,
    noise: float = 0.003,
    seed: int = 0,
) -> pd.DataFrame:
    """Continual pretraining of a base, one run of `tokens` per share, size and seed, by DOMAIN and GENERAL. At the
    start of a run the domain loss is at its highest and the general loss at its lowest."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for size in params:
        first = tokens / evaluations
        start = {
            "domain": 1.02 * DOMAIN.predict(params=size, tokens=first, own_ratio=0.0),
            "general": 0.99 * GENERAL.predict(params=size, tokens=tokens, own_ratio=1.0),
        }
        start = {name: loss * np.exp(noise * rng.standard_normal()) for name, loss in start.items()}
        for delta, run_seed in product(deltas, seeds):
            shared = np.exp(noise / 2 * rng.standard_normal())
            for done in np.linspace(0, tokens, evaluations + 1).astype(int):
                at = {"params": size, "tokens": done}
                domain = DOMAIN.predict(own_ratio=delta, **at) if done else start["domain"]
                general = GENERAL.predict(own_ratio=1 - delta, **at) if done else start["general"]
                losses = observed(domain, domain - 0.02, general, shared, noise, rng)
                if not done:
                    losses |= {f"{name}_heldout": loss for name, loss in start.items()}
                rows.append(
                    {
                        "run": f"continue-{size}-{100 * delta:g}%-seed{run_seed}",
                        "phase": "continue",
                        "stage": 1,
                        "start": "pretrained",
                        "params": size,
                        "seed": run_seed,
                        "lr": 3e-4,
                        "tokens": done,
                        "delta": delta,
                        "domain_tokens": tokens,
                        "domain_before": start["domain"],
                        "general_before": start["general"],
                        "handed_on": done == tokens,
                    }
                    | losses
                )
    return completed(rows)


def before(tokens: float, delta: float, params: int, domain_tokens: int) -> tuple[float, float, float]:
    """Held-out domain loss, training domain loss, and general loss in pretraining, without noise."""
    at = {"tokens": float(tokens), "fraction": delta}
    size = (params / PARAMS) ** -SIZE_EXPONENT
    train = FLOOR + (OVERFITTING.predict(of="train_loss", **at) - FLOOR) * size
    gap = OVERFITTING.predict(**at) - OVERFITTING.predict(of="train_loss", **at)
    general = laws.DataConstrainedLaw.published().params_
    fresh = max((1 - delta) * tokens, 1e6)
    return (
        train + gap * size * (domain_tokens / DOMAIN_TOKENS) ** -0.5,
        train,
        general["E"] + general["A"] * params ** -general["alpha"] + general["B"] * fresh ** -general["beta"],
    )


def after(
    tokens: float, delta: float, params: int, domain_tokens: int, injected: float = 0.0, anchor: float = 0.0
) -> float:
    """The domain loss of a finetune's final weights, without noise."""
    loss = OVERFITTING.predict(tokens=float(tokens), fraction=delta) - gain(np.array(float(tokens)), np.array(delta))
    size = (params / PARAMS) ** -SIZE_EXPONENT * (domain_tokens / DOMAIN_TOKENS) ** -CORPUS_EXPONENT
    return float(FLOOR + (loss - FLOOR) * size + 0.1 * injected + 0.05 * anchor)


def forgotten(delta: float, params: int, domain_tokens: int, injected: float = 0.0, anchor: float = 0.0) -> float:
    """The rise of the general loss in a finetune, at its final weights, without noise."""
    given = {"params": params, "unique_tokens": domain_tokens, "injected": injected, "loss_before": 1.0}
    return (FORGETTING.predict(**given) - 1.0) * float(np.exp(-6 * delta)) / (1 + 20 * anchor)


def observed(
    domain: float, train: float, general: float, shared: float, noise: float, rng: np.random.Generator
) -> dict[str, float]:
    exact = {
        "domain_train": train,
        "general_train": general,
        "domain_heldout": domain,
        "general_heldout": general,
        "domain_select": domain,
        "general_select": general,
    }
    return {name: loss * shared * np.exp(noise * rng.standard_normal()) for name, loss in exact.items()}


def completed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    missing = {name: np.nan for name in ("anchor", "pretrain_tokens", "pretrain_delta", "pretrain_epochs")}
    missing |= {"domain_before": np.nan, "general_before": np.nan}
    table = table.assign(**{name: value for name, value in missing.items() if name not in table})
    table["anchor"] = table["anchor"].fillna(0.0)
    table["after"] = table["after"].fillna("") if "after" in table else ""
    return table.assign(
        status="done",
        average=0.0,
        injected=1 - table["delta"],
        epochs=table["tokens"] * table["delta"] / table["domain_tokens"],
        flops=6.0 * table["params"] * (table["tokens"] + table["pretrain_tokens"].fillna(0)),
        tokenizer="4f5ca1b2",
        heldout="90e3dd11",
        domain="chem",
        general="web",
        domain_text="77ab" + table["domain_tokens"].astype(str),
        general_text="1c9f",
        domain_error=0.01,
        general_error=0.02,
        domain_documents=40.0,
        general_documents=50.0,
        domain_scored=6000.0,
        general_scored=7000.0,
        sequences=32.0,
        window=2048.0,
        rate=table.get("rate", np.nan),
        base=None,
        optimizer="adamw",
        **{name: table.get(name, value) for name, value in ADAMW.items()},
        grid="",
        other="",
    )[list(COLUMNS)].astype({"tokens": "float", "domain_tokens": "float", "handed_on": "bool"})

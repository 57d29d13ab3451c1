"""Tables of runs drawn from known laws, for tests and benchmarks of the fits.

Parameters are the papers' where they publish them (data-constrained law; B of forgetting); the others are chosen so
that losses, gaps and optima lie where the papers' figures have them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from spt_fast import laws
from spt_fast.laws.base import Law

Table = dict[str, Any]

CHINCHILLA = laws.ChinchillaLaw.from_params(E=1.87, A=521, alpha=0.35, B=1488, beta=0.35)
SPARSE = laws.SparsePretrainingLaw.from_params(E=1.87, A=521, alpha=0.35, B=1488, beta=0.35)
CONSTRAINED = laws.DataConstrainedLaw.published()
FINETUNE = laws.FinetuneLaw.from_params(A=120, alpha=0.12, beta=0.16, E=0.9)
RECTIFIED = laws.FinetuneLaw.from_params(A=20_000, alpha=0.15, beta=0.4, E=1.1, D_l=600)
FORGETTING = laws.ForgettingLaw.from_params(A=14, B=829, alpha=0.38, beta=0.28)
DOMAIN = laws.DCPTLaw.from_params(E=1.1, A=400, alpha=0.32, B=300, eta=0.25, beta=0.3, C=0.35, epsilon=0.08, gamma=0.6)
GENERAL = laws.DCPTLaw.from_params(E=1.8, A=350, alpha=0.32, B=200, eta=0.3, beta=0.3, C=0.2, epsilon=0.05, gamma=0.35)
CROSS_DOMAIN = laws.CrossDomainDCPTLaw.from_params(**DOMAIN.params_ | {"E": 0.6, "F": 0.5, "mu": 0.7})
OVERFITTING = laws.OverfittingLaw.from_params(
    A_train=60,
    b_train_g=-0.2,
    b_train_s=-0.55,
    kappa0=1.2,
    kappa1=0.1,
    kappa2=0.004,
    kappa3=0.5,
    alpha1=50,
    alpha2=1.0,
    alpha3=-160.0,
    b_gap_g=-0.1,
    b_gap_s=6.0,
)

SIZES = np.array([41e6, 109e6, 334e6, 665e6, 1.27e9])
RATIOS = np.array([0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9])
FRACTIONS = np.array([0.001, 0.005, 0.01, 0.02, 0.05])


def grid(**axes: Any) -> Table:
    """Every combination of the axes' values, as columns; `run` numbers the combinations of all axes but the last."""
    rows = np.array(list(product(*axes.values())), dtype=float)
    last = len(list(axes.values())[-1])
    return {name: rows[:, i] for i, name in enumerate(axes)} | {"run": np.arange(len(rows)) // last}


def noisy(losses: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    return losses * np.exp(noise * rng.standard_normal(losses.shape))


def drawn(truth: Law, table: Table, rng: np.random.Generator, noise: float = 0.01) -> Table:
    """`table` with the truth's losses, each with its own relative noise."""
    given = {name: table[name] for name in truth.inputs}
    return table | {of: noisy(truth.predict(of=of, **given), rng, noise) for of in truth.outputs}


def overfitting_grid(fractions: Any = FRACTIONS, most: float = 200e9) -> Table:
    return grid(fraction=fractions, tokens=np.linspace(0.1, 1, 20) * most)


def gain(tokens: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Δ(T) by finetuning: the less, the more of the domain pretraining has seen."""
    return (0.25 + 30 * tokens**-0.2) * np.exp(-8 * fraction)


def finetuned(table: Table, rng: np.random.Generator, noise: float = 0.01) -> Table:
    """Held-out losses before finetuning by the overfitting law, and after."""
    before = OVERFITTING.predict(tokens=table["tokens"], fraction=table["fraction"])
    after = before - gain(table["tokens"], table["fraction"])
    return table | {"heldout_loss": noisy(before, rng, noise), "finetuned_loss": noisy(after, rng, noise)}


def increments(tokens: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(general, domain) of the CMR law: the general loss rises, the more so the larger the share, and comes down
    again."""
    x = tokens / 1e9
    general = 0.5 * ratio * x**0.25 - 0.06 * x**0.5
    domain = -0.3 * ratio**0.3 * x**0.2
    return general, domain


def continued(rng: np.random.Generator, noise: float = 0.01, ratios: Any = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)) -> Table:
    """Losses of continued pretraining, the start included."""
    table = grid(domain_ratio=ratios, tokens=np.concatenate([[0], np.geomspace(0.5e9, 20e9, 24)]))
    general, domain = increments(table["tokens"], table["domain_ratio"])
    return table | {"general_loss": noisy(2.6 + general, rng, noise), "domain_loss": noisy(2.2 + domain, rng, noise)}


REPEATED = laws.MixtureRepetitionLaw.from_params(E=1.2, A=300, alpha=0.27, tau=8, r1=12, gamma=0.4)
DCPT_GRID = grid(params=[0.2e9, 0.5e9, 1e9, 1.8e9], own_ratio=RATIOS, tokens=np.linspace(1e9, 20e9, 10))
FORGETTING_GRID = grid(
    params=SIZES, unique_tokens=[3e5, 3e6, 3e7], loss_before=[3.0], injected=[0, 0.001, 0.005, 0.01, 0.05]
)

TABLES: dict[str, tuple[Law, Callable[[], Law], Table]] = {
    "Chinchilla": (CHINCHILLA, laws.ChinchillaLaw, grid(params=SIZES, tokens=np.geomspace(1e9, 5e10, 8))),
    "sparse": (SPARSE, laws.SparsePretrainingLaw, grid(average_params=SIZES, tokens=np.geomspace(1e9, 5e10, 8))),
    "data-constrained": (
        CONSTRAINED,
        laws.DataConstrainedLaw,
        grid(params=SIZES, unique_tokens=[1e8, 1e9, 1e10], tokens=[1e9, 4e9, 1.5e10, 5e10]),
    ),
    "finetuning": (FINETUNE, laws.FinetuneLaw, grid(params=SIZES, unique_tokens=[3e5, 1e6, 3e6, 1e7, 3e7])),
    "finetuning of what is known": (
        RECTIFIED,
        laws.FinetuneLaw,
        grid(params=SIZES, unique_tokens=np.geomspace(1e5, 1e8, 30)),
    ),
    "mixture and repetition": (
        REPEATED,
        laws.MixtureRepetitionLaw,
        grid(fraction=[0, 0.005, 0.02, 0.05, 0.1, 0.3], unique_tokens=[1e8, 3e8], tokens=np.geomspace(5e9, 2e11, 12)),
    ),
    "forgetting": (FORGETTING, laws.ForgettingLaw, FORGETTING_GRID),
    "D-CPT, domain": (DOMAIN, laws.DCPTLaw, DCPT_GRID),
    "D-CPT, general": (GENERAL, laws.DCPTLaw, DCPT_GRID),
    "cross-domain D-CPT": (
        CROSS_DOMAIN,
        laws.CrossDomainDCPTLaw,
        grid(
            learnability=[0.4, 0.6, 0.9, 1.4],
            params=[0.2e9, 0.5e9, 1e9],
            own_ratio=RATIOS,
            tokens=np.linspace(1e9, 20e9, 6),
        ),
    ),
    "overfitting": (OVERFITTING, laws.OverfittingLaw, overfitting_grid()),
}
"""name: (the truth, what to fit, the inputs of the runs)"""

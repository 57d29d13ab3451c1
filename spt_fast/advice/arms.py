"""The finetunes of a runs table in arms: how each was pretrained, and its final losses.

An *arm* is a regime, a domain share of pretraining, a share of general data in the finetune, and a pretraining budget;
its runs differ by seed. Regimes:

    FT    domain data in the finetune only
    SPT   a fixed share of domain data from the first step of pretraining
    SCPT  a share that rises during pretraining
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from spt_fast.advice.result import Arm
from spt_fast.study.finetunes import after_pretraining
from spt_fast.study.usable import UsableRows

REGIMES = ("FT", "SPT", "SCPT")


def finetunes(table: UsableRows) -> pd.DataFrame:
    """A row per finetune, as `after_pretraining` returns it, also of SCPT runs, which no law is fitted to."""
    left_out = table.left_out[~table.left_out["beaten"]]
    late = after_pretraining(left_out[left_out["after"].isin(_rising(left_out))])
    rows = pd.concat([after_pretraining(table.rows), late.assign(regime="SCPT")], ignore_index=True)
    return rows.dropna(subset=["domain_heldout", "domain_before"])


def _rising(rows: pd.DataFrame) -> set[str]:
    """Runs that read clearly less domain data in the first half of pretraining than in the second: under 45%."""
    found: set[str] = set()
    pretraining = rows[(rows["stage"] == 0) & (rows["tokens"] > 0)]
    for name, run in pretraining.groupby("run"):
        run = run.sort_values("tokens")
        tokens, delta = (np.concatenate([[0.0], run[column].to_numpy(float)]) for column in ("tokens", "delta"))
        read = tokens * delta
        if read[-1] > 0 and np.interp(tokens[-1] / 2, tokens, read) < 0.45 * read[-1]:
            found.add(str(name))
    return found


def arms(rows: pd.DataFrame) -> list[Arm]:
    """The arms of a group, the lowest domain loss first."""
    by_arm = rows.groupby(["regime", "pretrain_delta", "injected", "pretrain_tokens"])
    return sorted((_arm(own) for _, own in by_arm), key=lambda arm: arm.domain.mean)


def _arm(own: pd.DataFrame) -> Arm:
    first = own.iloc[0]
    return Arm(
        regime=first["regime"],
        delta=float(first["pretrain_delta"]),
        injected=float(first["injected"]),
        tokens=int(first["pretrain_tokens"]),
        epochs=float(own["pretrain_epochs"].mean()),
        **Arm.losses(own),
    )

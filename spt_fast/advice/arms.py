"""The finetunes of a runs table in arms: how each was pretrained, and its final losses.

An *arm* is a regime, a domain share of pretraining and the part before it is mixed in, a share of general data in the
finetune, and a pretraining budget; its runs differ by seed. Regimes:

    FT    domain data in the finetune only
    SPT   a fixed share of domain data from the first step of pretraining
    SCPT  general data alone, then a fixed share of domain data in the last part of pretraining
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from spt_fast.advice.result import Arm
from spt_fast.quantities import three_digits
from spt_fast.study.finetunes import after_pretraining
from spt_fast.study.usable import UsableRows

REGIMES = ("FT", "SPT", "SCPT")


def finetunes(table: UsableRows) -> pd.DataFrame:
    """A row per finetune, as `after_pretraining` returns it, also of SCPT runs, which no law is fitted to. Adds the
    column `domain_from`, the part of pretraining before the domain is mixed in."""
    left_out = table.left_out[~table.left_out["beaten"]]
    before = left_out["after"].map(_general_tokens(left_out)).astype(float) / left_out["pretrain_tokens"]
    late = [
        after_pretraining(own).assign(regime="SCPT")
        for _, own in left_out.assign(domain_from=before.map(three_digits)).groupby("domain_from")
    ]
    rows = pd.concat([after_pretraining(table.rows).assign(domain_from=0.0), *late], ignore_index=True)
    return rows.dropna(subset=["domain_heldout", "domain_before"])


def _general_tokens(rows: pd.DataFrame) -> dict[str, float]:
    """By run: the tokens of pretraining before its domain text, if that has one share afterwards."""
    found: dict[str, float] = {}
    pretraining = rows[(rows["stage"] == 0) & (rows["tokens"] > 0)]
    for name, run in pretraining.drop_duplicates(["run", "tokens"]).sort_values("tokens").groupby("run"):
        tokens = run["tokens"].to_numpy(float)
        read = tokens * run["delta"].to_numpy(float)
        if len(run) < 2 or read[-1] <= read[-2]:
            continue
        share = (read[-1] - read[-2]) / (tokens[-1] - tokens[-2])
        start = tokens[-1] - read[-1] / share
        if start > 0 and np.allclose(read, share * (tokens - start).clip(min=0), rtol=0, atol=0.01 * read[-1]):
            found[str(name)] = start
    return found


def arms(rows: pd.DataFrame) -> list[Arm]:
    """The arms of a group, the lowest domain loss first."""
    by_arm = rows.groupby(["regime", "pretrain_delta", "domain_from", "injected", "pretrain_tokens"])
    return sorted((_arm(own) for _, own in by_arm), key=lambda arm: arm.domain.mean)


def _arm(own: pd.DataFrame) -> Arm:
    first = own.iloc[0]
    return Arm(
        regime=first["regime"],
        delta=float(first["pretrain_delta"]),
        domain_from=float(first["domain_from"]),
        injected=float(first["injected"]),
        tokens=int(first["pretrain_tokens"]),
        epochs=float(own["pretrain_epochs"].mean()),
        **Arm.losses(own),
    )

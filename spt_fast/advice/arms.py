"""The finetunes of a runs table, side by side: how each was pretrained, and what it ended with.

An *arm* is a regime, a domain share of pretraining, a share of general data in the finetune, and a pretraining budget;
its runs differ by seed. Regimes:

    FT    the domain in the finetune only
    SPT   a fixed share of it from the first step of pretraining
    SCPT  a share that rises in the course of pretraining
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from spt_fast.study.views import after_pretraining, usable
from spt_fast.study.words import three_digits

REGIMES = ("FT", "SPT", "SCPT")
GROUP = ["params", "domain_tokens"]
"""Laws are fitted, and arms compared, where these are one."""
ARM = [*GROUP, "regime", "delta", "injected", "tokens"]


def finetunes(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """A row per finetune that is mostly on the domain, with the least anchor that was run; and what was left out.

    Columns: params, domain_tokens, seed, regime, delta, tokens, epochs (of pretraining), injected, domain_before,
    domain_after, general_before, general_after, finetune_tokens, finetune_epochs. Of finetunes that differ in learning
    rate only, the rate with the lowest mean `domain_select` over seeds is kept.

    Raises DataError for a table that mixes tokenizers or held-out texts.
    """
    steady, notes = usable(table)
    others = table[(table["status"] == "done") & ~_stages(table).isin(_stages(steady))]
    late = _described(others[others["after"].isin(_rising(others))])
    late = late.assign(regime="SCPT", delta=late["delta"].map(three_digits))
    steady = _described(steady)
    steady = steady.assign(regime=np.where(steady["delta"] > 0, "SPT", "FT"))
    rows = pd.concat([steady, _best_rates(late)], ignore_index=True)
    return rows[rows["anchor"] == rows["anchor"].min()].drop(columns=["lr", "anchor", "domain_select"]), notes


def _stages(table: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(table[["run", "stage"]])


def _described(table: pd.DataFrame) -> pd.DataFrame:
    done = after_pretraining(table).dropna(subset=["domain_heldout", "domain_before"])
    return pd.DataFrame(
        {
            **{name: done[name] for name in (*GROUP, "seed", "lr", "anchor", "domain_select")},
            "delta": done["pretrain_delta"],
            "tokens": done["pretrain_tokens"],
            "epochs": done["pretrain_epochs"],
            "injected": done["injected"].map(three_digits),
            "domain_before": done["domain_before"],
            "domain_after": done["domain_heldout"],
            "general_before": done["general_before"],
            "general_after": done["general_heldout"],
            "finetune_tokens": done["tokens"],
            "finetune_epochs": done["epochs"],
        }
    ).reset_index(drop=True)


def _rising(table: pd.DataFrame) -> set[str]:
    """Runs whose pretraining held clearly less of the domain in its first half than in its second."""
    found: set[str] = set()
    pretraining = table[(table["stage"] == 0) & (table["tokens"] > 0)]
    for name, run in pretraining.groupby("run"):
        run = run.sort_values("tokens")
        tokens, delta = (np.concatenate([[0.0], run[column].to_numpy(float)]) for column in ("tokens", "delta"))
        read = tokens * delta
        if read[-1] > 0 and np.interp(tokens[-1] / 2, tokens, read) < 0.45 * read[-1]:
            found.add(str(name))
    return found


def _best_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """One row of each seed of an arm: at the rate with the lowest mean over seeds where it has that, else its best."""
    arm = [*ARM, "anchor"]
    means = rows.groupby([*arm, "lr"])["domain_select"].transform("mean")
    others = means > means.groupby([rows[key] for key in arm]).transform("min")
    order = rows.assign(others=others).sort_values(["others", "domain_select"])
    return order.drop_duplicates([*arm, "seed"]).drop(columns="others")


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Those with the least general data in the finetune."""
    return rows[rows["injected"] == rows["injected"].min()]


def arms(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """What each arm of a group ended with, best domain loss first; losses as {mean, low, high} over its seeds, None
    where they were not measured."""
    found = [
        {
            "regime": regime,
            "delta": float(delta),
            "injected": float(injected),
            "tokens": int(tokens),
            "epochs": float(arm["epochs"].mean()),
            "seeds": len(arm),
            "domain": over_seeds(arm["domain_after"]),
            "general": over_seeds(arm["general_after"]),
            "forgetting": over_seeds(arm["general_after"] - arm["general_before"]),
        }
        for (regime, delta, injected, tokens), arm in rows.groupby(["regime", "delta", "injected", "tokens"])
    ]
    return sorted(found, key=lambda arm: arm["domain"]["mean"])


def over_seeds(values: pd.Series) -> dict[str, float] | None:
    """{mean, low, high}"""
    if values.isna().any() or values.empty:
        return None
    return {"mean": float(values.mean()), "low": float(values.min()), "high": float(values.max())}

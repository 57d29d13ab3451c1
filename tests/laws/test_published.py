"""Laws on figures that others published: what was fitted to the runs of a part predicts those that were left out."""

from __future__ import annotations

import numpy as np
import pytest

from spt_fast import laws

pytestmark = pytest.mark.filterwarnings("ignore::spt_fast.laws.LawWarning")

EXAMPLES = 200 * 2 ** np.arange(14)
ON_FLAN = {
    "gpt2": [
        *(4.3860, 4.2883, 4.1913, 4.0599, 3.8905, 3.8257, 3.5457, 3.2725),
        *(2.9884, 2.6864, 2.4488, 2.1932, 1.9785, 1.7906),
    ],
    "cerebras-gpt-1.3b": [
        *(2.7913, 2.7129, 2.6459, 2.5867, 2.4918, 2.4121, 2.3245, 2.2431),
        *(2.1309, 2.0419, 1.9601, 1.8813, 1.7861, 1.6832),
    ],
    "bart-base": [
        *(4.1588, 3.9896, 3.8498, 3.6853, 3.5316, 3.3444, 3.1811, 2.9785),
        *(2.7112, 2.4570, 2.2506, 2.0505, 1.8582, 1.6848),
    ],
}
"""Losses on FLAN after finetuning on EXAMPLES (github.com/linhaowei1/Fine-tuning-Scaling-Law, arXiv 2402.02314)."""


def test_finetunes_on_eight_times_the_data_are_predicted_where_the_plain_power_law_is_far_off() -> None:
    few = EXAMPLES < 250_000
    worst = {}
    for model, losses in ON_FLAN.items():
        table = {"params": np.full(len(EXAMPLES), 1e8), "unique_tokens": EXAMPLES, "loss": np.array(losses)}
        law = laws.FinetuneLaw().fit({name: values[few] for name, values in table.items()})
        predicted = law.predict(params=1e8, unique_tokens=EXAMPLES[~few])
        worst[model] = float(np.abs(predicted / table["loss"][~few] - 1).mean())
        assert law.params_["D_l"] > 0
    assert worst == pytest.approx(dict.fromkeys(ON_FLAN, 0.0), abs=0.05)  # plain: 0.20, 0.04, 0.14
    assert np.mean(list(worst.values())) < 0.02

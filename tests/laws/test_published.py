"""Laws on published figures: a fit to part of the runs predicts those that were left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spt_fast import laws
from spt_fast.errors import RecipeError

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


def test_finetunes_on_eight_times_the_data_are_predicted_better_than_by_a_plain_power_law() -> None:
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


STEEPENING = {
    "cerebras-gpt-256m": [
        *(3.3933, 3.3190, 3.2299, 3.1273, 3.0540, 2.9745, 2.8979, 2.8174),
        *(2.7076, 2.5718, 2.4093, 2.2114, 2.0371, 1.8799),
    ],
    "bart-large-cnn": [
        *(3.5914, 3.4452, 3.2128, 3.0365, 2.8936, 2.7568, 2.6061, 2.4708),
        *(2.3380, 2.1637, 1.9987, 1.8292, 1.6743, 1.5548),
    ],
    "t5-base": [
        *(2.6424, 2.5847, 2.4798, 2.4119, 2.3440, 2.2807, 2.2015, 2.1314),
        *(2.0410, 1.9468, 1.8370, 1.7150, 1.6001, 1.5203),
    ],
}
"""From the same source: curves that fall faster beyond 205K examples than any such law fitted below."""


def test_the_interval_of_one_curve_covers_the_error_on_its_last_third() -> None:
    for examples in (60_000, 250_000):
        few, inside = examples > EXAMPLES, []
        for losses in STEEPENING.values():
            table = {"params": np.full(len(EXAMPLES), 1e8), "unique_tokens": EXAMPLES, "loss": np.array(losses)}
            law = laws.FinetuneLaw().fit({name: values[few] for name, values in table.items()})
            assert "alpha" in law.unidentified_
            _, low, high = law.predict(params=1e8, unique_tokens=EXAMPLES[~few], interval=0.9)
            inside += ((low <= table["loss"][~few]) & (table["loss"][~few] <= high)).tolist()
        assert np.mean(inside) >= 0.75


CONTINUED = {
    0.5: (
        [2.8548, 2.8582, 2.8553, 2.8552, 2.8496, 2.8459, 2.8433, 2.8415, 2.8394, 2.8388],
        [1.5523, 1.5102, 1.4838, 1.4696, 1.4566, 1.4451, 1.4399, 1.4346, 1.4319, 1.4309],
    ),
    0.625: (
        [2.8666, 2.8760, 2.8706, 2.8720, 2.8635, 2.8631, 2.8598, 2.8571, 2.8561, 2.8571],
        [1.5364, 1.4929, 1.4673, 1.4499, 1.4317, 1.4241, 1.4158, 1.4116, 1.4090, 1.4084],
    ),
    0.71484375: (
        [2.8842, 2.8844, 2.8809, 2.8831, 2.8792, 2.8905, 2.8766, 2.8740, 2.8725, 2.8721],
        [1.5266, 1.4819, 1.4514, 1.4341, 1.4179, 1.4101, 1.4021, 1.3973, 1.3947, 1.3933],
    ),
    0.75: (
        [2.8835, 2.8836, 2.8964, 2.8916, 2.8882, 2.8865, 2.8865, 2.8832, 2.8813, 2.8805],
        [1.5236, 1.4696, 1.4486, 1.4249, 1.4136, 1.4020, 1.3961, 1.3913, 1.3885, 1.3863],
    ),
    0.875: (
        [2.9037, 2.9201, 2.9295, 2.9295, 2.9339, 2.9334, 2.9297, 2.9278, 2.9266, 2.9262],
        [1.5079, 1.4587, 1.4301, 1.4107, 1.3947, 1.3860, 1.3786, 1.3726, 1.3699, 1.3679],
    ),
}
"""By share of Python, losses on the Pile and on Python after 1,000 to 10,000 steps of Pythia 70M, whose own are START
(github.com/yegcjs/mixinglaws, arXiv 2403.16952; the critical share there, checked by a run, is 0.714)."""
STEPS = range(1000, 11_000, 1000)
START = (2.8734, 1.8381)


def test_the_critical_share_of_code_is_the_published_one_and_early_steps_do_not_determine_it() -> None:
    def fitted(last: int) -> laws.CMRLaw:
        rows = [(0, share, *START) for share in CONTINUED]
        for share, losses in CONTINUED.items():
            rows += [(step, share, *both) for step, both in zip(STEPS, zip(*losses, strict=True), strict=True)]
        table = np.array([row for row in rows if row[0] <= last]).T
        return laws.CMRLaw().fit(
            dict(zip(("tokens", "domain_ratio", "general_loss", "domain_loss"), table, strict=True))
        )

    share, low, high = fitted(10_000).critical_ratio(tokens=10_000, tolerance=0, interval=0.9)
    assert share == pytest.approx(0.714, abs=0.015)
    assert low < 0.714 < high < low + 0.1
    with pytest.raises(RecipeError, match=r"do not determine the critical ratio at 10000 tokens: .* run more ratios"):
        fitted(6000).critical_ratio(tokens=10_000, tolerance=0)


ANNEALED = {
    "cosine": [
        *(3.7755, 3.5643, 3.4528, 3.3789, 3.3248, 3.2866, 3.2477, 3.2222, 3.1958, 3.1739, 3.1543, 3.1374),
        *(3.1208, 3.1053),
        *(3.0915, 3.0787, 3.0657, 3.0548, 3.0437, 3.0332, 3.0241, 3.0152, 3.0078, 3.0010, 2.9950, 2.9900),
        *(2.9856, 2.9823),
    ],
    "constant": [
        *(3.7666, 3.5619, 3.4505, 3.3759, 3.3243, 3.2851, 3.2530, 3.2273, 3.2057, 3.1871, 3.1728, 3.1562),
        *(3.1427, 3.1318),
        *(3.1214, 3.1120, 3.1033, 3.0961, 3.0878, 3.0819, 3.0759, 3.0697, 3.0647, 3.0608, 3.0535, 3.0497),
        *(3.0443, 3.0412),
    ],
    "drop to 9e-5": [
        *(3.7666, 3.5619, 3.4505, 3.3759, 3.3243, 3.2851, 3.2530, 3.2273, 3.1472, 3.1227, 3.1095, 3.1001),
        *(3.0922, 3.0853),
        *(3.0793, 3.0732, 3.0683, 3.0631),
    ],
    "drop to 3e-5": [
        *(3.7666, 3.5619, 3.4505, 3.3759, 3.3243, 3.2851, 3.2530, 3.2273, 3.1474, 3.1209, 3.1088, 3.1004),
        *(3.0939, 3.0883),
        *(3.0832, 3.0789, 3.0749, 3.0712),
    ],
    "decay at the end": [
        *(3.7666, 3.5619, 3.4505, 3.3759, 3.3243, 3.2851, 3.2530, 3.2273, 3.2057, 3.1871, 3.1728, 3.1562),
        *(3.1427, 3.1318),
        *(3.1214, 3.1120, 3.1033, 3.0961, 3.0878, 3.0819, 3.0759, 3.0697, 3.0647, 3.0608, 3.0291, 2.9987),
        *(2.9779, 2.9635),
    ],
}
"""Losses of 100M parameters every 768 steps after 2,160 of warm-up to 3e-4, by schedule of 24,000 steps
(github.com/thu-yao-01-luo/MultiPowerLaw, arXiv 2503.12811)."""


def annealed(schedule: str) -> dict[str, Any]:
    losses = np.array(ANNEALED[schedule])
    step = (2160 if schedule == "cosine" else 2176) + 768.0 * np.arange(len(losses))
    lr = np.full(len(step), 3e-4)
    if schedule == "cosine":
        lr = 3e-5 + 1.35e-4 * (1 + np.cos(np.pi * (step - 2160) / (24_000 - 2160)))
    elif schedule.startswith("drop"):
        lr[step >= 8000] = float(schedule.removeprefix("drop to "))
    elif schedule.startswith("decay"):
        step[24:] -= 32
        lr = np.minimum(lr, 3e-4 * 0.1 ** ((step - 20_000) / 4000))
    return {"run": np.full(len(step), schedule), "step": step, "lr": lr, "loss": losses}


def test_a_schedule_that_was_not_run_is_predicted_from_three_that_were() -> None:
    def together(*schedules: str) -> dict[str, Any]:
        curves = [annealed(schedule) for schedule in schedules]
        return {name: np.concatenate([curve[name] for curve in curves]) for name in curves[0]}

    law = laws.MultiPowerLaw().fit(together("drop to 9e-5", "cosine", "constant"))
    inside: list[bool] = []
    for schedule, within in ("decay at the end", 0.001), ("drop to 3e-5", 0.004):
        asked = annealed(schedule)
        given = {"step": asked["step"], "lr": asked["lr"]}
        mean, low, high = law.predict(**given, interval=0.9)
        assert np.abs(mean / asked["loss"] - 1).mean() < within
        inside += ((low <= asked["loss"]) & (asked["loss"] <= high)).tolist()
        assert ((high - low) / mean).max() < 0.02
    assert np.mean(inside) >= 0.75
    plateau = annealed("constant")["loss"]
    assert plateau[-1] / annealed("decay at the end")["loss"][-1] > 1.02  # the error of a law of plateaus
    two = together("decay at the end", "drop to 3e-5")
    assert law.score(two)["mre"] < 0.002
    longer = {"step": np.append(given["step"], 60_000), "lr": np.append(given["lr"], 3e-4)}
    with pytest.raises(laws.OpenError, match="run one curve that long"):
        law.predict(**longer, interval=0.9)
    with pytest.raises(laws.OpenError, match=r"the curves of 3 schedules or more.* the table has 2"):
        laws.MultiPowerLaw().fit(two).predict(**given, interval=0.9)

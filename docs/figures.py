"""Draws the pictures of README and docs/ from the results of our studies: `python docs/figures.py`.

Colours and grey text are chosen to be read on a white and on a dark page.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

IMAGES = Path(__file__).with_name("img")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GREY, ORANGE, GREEN, BLUE = "#808891", "#d97b29", "#2f9e62", "#4a86cf"

plt.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "spt_fast",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.solid_capstyle": "round",
}


def new(width: float, height: float) -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(width, height), layout="constrained")


SCALE_MODEL = "2026-11-29-cpu2-spt-abc.csv"


def finetune_path() -> Figure:
    """The finetune's path in the plane of domain and general loss, for NPT and for SPT, a line per seed."""
    table = pd.read_csv(RESULTS / SCALE_MODEL)
    largest = table.pretrain_tokens > 0.99 * table.pretrain_tokens.max()
    finetunes = table[(table.stage == 1) & largest & table.pretrain_delta.isin([0, 0.02])]
    figure, axes = new(7, 3.6)
    for (delta, seed), path in finetunes.groupby(["pretrain_delta", "seed"]):
        name, colour = ("SPT, 2% domain", BLUE) if delta else ("NPT", ORANGE)
        path = path.sort_values("tokens")
        path = path[path.tokens <= path[path.handed_on].tokens.max()]
        domain, general = path.domain_heldout.to_numpy(), path.general_heldout.to_numpy()
        label = name if seed == 0 else None
        axes.plot(domain, general, color=colour, linewidth=1.8, marker=".", markersize=5, label=label)
        axes.plot(domain[0], general[0], "o", color=colour, markerfacecolor="none", markersize=9)
        axes.plot(domain[-1], general[-1], "o", color=colour, markersize=9)
    axes.set_xlabel("← better   domain loss, nats per token")
    axes.set_ylabel("← better   general loss")
    axes.set_title("Finetuning on 15K tokens of tunes after 40M tokens of pretraining (○ before, ● after)", fontsize=10)
    axes.legend(frameon=False, loc="upper right")
    return figure


def best_share() -> Figure:
    """R_gain by share and budget: the best share falls as the budget grows."""
    table = pd.read_csv(RESULTS / SCALE_MODEL)
    ends = table[(table.stage == 1) & table.handed_on]
    loss = ends.set_index(["pretrain_delta", "pretrain_tokens", "seed"]).domain_heldout
    gain = 100 * (1 - loss / loss[0.0].reindex(loss.index.droplevel(0)).to_numpy())
    figure, axes = new(7, 3.4)
    shades = plt.colormaps["plasma"](np.linspace(0.05, 0.8, 5))
    for (delta, own), colour in zip(gain[gain.index.get_level_values(0) > 0].groupby(level=0), shades, strict=True):
        by_budget = own.groupby(level=1)
        mean, tokens = by_budget.mean(), own.index.levels[1] / 1e6
        axes.fill_between(tokens, by_budget.min(), by_budget.max(), color=colour, alpha=0.18, linewidth=0)
        axes.plot(tokens, mean, "o-", color=colour, label=f"{100 * delta:g}%")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(tokens, [f"{count:.0f}M" for count in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens of pretraining")
    axes.set_ylabel("R_gain, %")
    axes.set_title("Tunes, 15K domain tokens, 0.17M parameters; bands: range of the seeds", fontsize=10)
    axes.legend(frameon=False, title="domain", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def schedules() -> Figure:
    """The phases of each regime."""
    figure, axes = new(7, 2.3)
    regimes = {
        "NPT": [(6, 0.0), (1.2, 1.0)],
        "SPT": [(6, 0.2), (1.2, 1.0)],
        "SCPT": [(4.8, 0.0), (1.2, 0.2), (1.2, 1.0)],
        "replay": [(6, 0.0), (1.2, 0.88)],
    }
    for row, phases in enumerate(regimes.values()):
        left = 0.0
        for length, domain in phases:
            axes.barh(row, length - 0.04, left=left, height=0.62, color=GREY, alpha=0.45)
            axes.barh(row - 0.31 + 0.31 * domain, length - 0.04, left=left, height=0.62 * domain, color=BLUE)
            left += length
    axes.set_yticks(range(len(regimes)), list(regimes))
    axes.invert_yaxis()
    axes.set_xticks([3, 6.6], ["pretraining", "finetuning"])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("grey: general text, blue: the domain, repeated as often as needed", fontsize=10)
    return figure


def gain() -> Figure:
    """R_gain and the compute multiplier, on the study of SMILES strings."""
    table = pd.read_csv(RESULTS / "2026-11-21-cpu2-spt-smiles.csv")
    ends = table[(table.stage == 1) & table.handed_on]
    means = ends.groupby(["pretrain_delta", "pretrain_tokens"]).domain_heldout.mean().unstack(0)
    tokens, npt, spt = means.index / 1e6, means[0.0], means[0.1]
    figure, axes = new(7, 3.2)
    axes.plot(tokens, npt, "o-", color=ORANGE, label="NPT, then finetuned")
    axes.plot(tokens, spt, "o-", color=BLUE, label="SPT with 10% domain, then finetuned")
    arrow = {"arrowstyle": "->", "color": GREY, "linewidth": 1.2}
    axes.annotate("", (tokens[1], spt.iloc[1]), (tokens[1], npt.iloc[1]), arrowprops=arrow)
    axes.text(tokens[1] * 1.015, (npt.iloc[1] + spt.iloc[1]) / 2, "R_gain", va="center")
    axes.annotate("", (tokens[0], npt.iloc[1]), (tokens[1], npt.iloc[1]), arrowprops={**arrow, "linestyle": "--"})
    axes.text(tokens.to_numpy().mean(), npt.iloc[1] - 0.008, "compute multiplier: at least 2", ha="center", va="top")
    axes.set_xscale("log")
    axes.set_xticks(tokens, [f"{count:.0f}M" for count in tokens])
    axes.minorticks_off()
    axes.set_xlim(2.8, 6.9)
    axes.set_xlabel("tokens of pretraining")
    axes.set_ylabel("domain loss after finetuning")
    axes.legend(frameon=False)
    return figure


def replay() -> Figure:
    """How much of the forgetting general text in the finetune takes back."""
    table = pd.read_csv(RESULTS / "2026-11-21-cpu2-forgetting-music.csv")
    ends = table[(table.stage == 1) & table.handed_on & (table.anchor == 0)]
    rise = (ends.general_heldout - ends.general_before).groupby([ends.domain_tokens, ends.injected]).mean()
    figure, axes = new(7, 2.8)
    for tokens, colour in zip(rise.index.levels[0], (ORANGE, BLUE), strict=True):
        axes.plot(
            [f"{100 * share:g}%" for share in rise[tokens].index],
            rise[tokens],
            "o-",
            color=colour,
            label=f"corpus of {tokens / 1e6:.1f}M tokens",
        )
    axes.set_ylim(0)
    axes.set_xlabel("general text in the finetune")
    axes.set_ylabel("forgetting\n(nats per token)")
    axes.legend(frameon=False)
    return figure


PICTURES = (finetune_path, schedules, gain, best_share, replay)


def draw(folder: Path) -> None:
    """Write every picture into `folder`."""
    for picture in PICTURES:
        figure = picture()
        figure.savefig(folder / f"{picture.__name__}.svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(IMAGES)

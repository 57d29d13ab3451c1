"""The picture of a comparison: the gain of each arm in domain loss, and its cost in general loss.

On the left, each finetune is a path in the plane of domain loss and general loss, from the end of pretraining to its
final weights; down and left is better. On the right are the gain in the domain and the forgetting of each seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from statistics import fmean

from spt_fast.files import replacing, write_text
from spt_fast.outputs import check_folder, check_output, is_figure, is_json_with
from spt_fast.printing import as_json
from spt_fast.study.compare import Comparison, Finetune
from spt_fast.study.drawing import PLAIN, Axes, Figure, mpl
from spt_fast.study.finetunes import Treatment
from spt_fast.study.runs import FinetunePath

NPT_COLOUR = "#4d4d4d"
SPT_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""The colours of Okabe and Ito, which are safe for colour-blind readers."""
LINE_HEIGHT = 0.05
"""Room for a line of text, as a share of the plane's height."""


def check_place(folder: Path) -> None:
    """Raises SptError if `write` would replace files of others there."""
    check_folder(folder, "out")
    check_output(folder / "comparison.json", "out", is_json_with("runs", "arms", "r_gain"))
    check_output(folder / "comparison.png", "out", is_figure)


def write(comparison: Comparison, out_folder: str | Path) -> None:
    """Write comparison.json and comparison.png."""
    out_folder = Path(out_folder)
    check_place(out_folder)
    out_folder.mkdir(parents=True, exist_ok=True)
    write_text(out_folder / "comparison.json", json.dumps(as_json(comparison), indent=1, allow_nan=False))
    with replacing(out_folder / "comparison.png") as path:
        draw_comparison(comparison, path)


@mpl.rc_context(PLAIN)
def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw the arms of the compared budget as a PNG, 1600 pixels wide."""
    arms = {arm: list(runs.values()) for arm, runs in comparison.compared.items()}
    others = cycle(SPT_COLOURS)
    colours = {arm: NPT_COLOUR if not (arm.delta or any(arm.finetune)) else next(others) for arm in arms}

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    after = f"after {comparison.tokens:,} tokens of pretraining" if comparison.tokens else f"from {comparison.base}"
    title = f"Finetuning on {comparison.domain!r} {after}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1))
    draw_plane(figure.add_subplot(grid[:, 0]), comparison, arms, colours)

    upper, lower = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    gains = comparison.r_gain or {}
    per_seed = {arm: list(gain.per_seed.values()) for arm in arms if (gain := gains.get(arm))}
    if per_seed:
        over = "the plainest" if comparison.base else "NPT"
        _draw_seeds(upper, per_seed, colours, f"R_gain in the domain, over {over} (%)")
        upper.axvline(0, color="0.6", linewidth=0.8)
    else:
        domain_after = {arm: [run.domain_after for run in runs] for arm, runs in arms.items()}
        _draw_seeds(upper, domain_after, colours, "domain loss after FT (nats/token)")
    forgotten = {arm: [run.forgetting for run in runs] for arm, runs in arms.items()}
    _draw_seeds(lower, forgotten, colours, "forgetting in FT (nats/token)")
    lower.axvline(0, color="0.6", linewidth=0.8)
    figure.savefig(path, dpi=160, format="png")


def draw_plane(
    axes: Axes, comparison: Comparison, arms: Mapping[Treatment, list[Finetune]], colours: Mapping[Treatment, str]
) -> None:
    """The path of each finetune. The kept grid arm is drawn dark up to its final weights, all others pale."""
    for arm, runs in arms.items():
        colour = colours[arm]
        for run in runs:
            for position, path in enumerate(run.paths):
                axes.plot(*_domain_and_general(path), color=colour, linewidth=0.8, alpha=0.3, zorder=1)
                if position == run.arm:
                    handed_on = _until(path, (run.domain_after, run.general_after))
                    axes.plot(*_domain_and_general(handed_on), color=colour, linewidth=1.8, zorder=2)
            axes.plot(run.domain_before, run.general_before, "o", color=colour, markerfacecolor="white", zorder=3)
            axes.plot(run.domain_after, run.general_after, "o", color=colour, zorder=3)
    if len(arms) > 1:
        equal_domain = comparison.general_at_equal_domain.domain_loss
        axes.axvline(equal_domain, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    _label_ends(axes, arms, colours)
    axes.set_xlabel(f"held-out loss on {comparison.domain} (nats/token)")
    axes.set_ylabel(f"held-out loss on {comparison.general} (nats/token)")
    axes.set_title("○ after pretraining   ● after finetuning   ┆ equal domain loss", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93")


def _domain_and_general(path: FinetunePath) -> tuple[list[float], list[float]]:
    return [domain for _, domain, _ in path], [general for _, _, general in path]


def _until(path: FinetunePath, losses: tuple[float, float]) -> FinetunePath:
    """The path up to the evaluation with these (domain, general) losses; the whole path if there is none."""
    ends = [index for index, point in enumerate(path) if point[1:] == losses]
    return path[: ends[0] + 1] if ends else path


def _label_ends(axes: Axes, arms: Mapping[Treatment, list[Finetune]], colours: Mapping[Treatment, str]) -> None:
    """Label each arm to the left of the ends of its finetunes, with labels moved apart."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    axes.set_xlim(left - 0.24 * (right - left), right)
    axes.set_ylim(bottom, top)
    line = LINE_HEIGHT * (top - bottom)
    ends = {
        arm: (min(run.domain_after for run in runs), fmean(run.general_after for run in runs))
        for arm, runs in arms.items()
    }
    free = bottom
    for arm, (domain, general) in sorted(ends.items(), key=lambda end: end[1][1]):
        height = max(general, free)
        free = height + line
        axes.annotate(
            arm.name,
            (domain, general),
            (left - 0.02 * (right - left), height),
            color=colours[arm],
            fontweight="bold",
            ha="right",
            va="center",
            arrowprops={"arrowstyle": "-", "color": colours[arm], "linewidth": 0.6, "alpha": 0.5, "shrinkB": 5},
        )
    axes.set_ylim(bottom, max(top, free - line / 2))


def _draw_seeds(
    axes: Axes, values: Mapping[Treatment, list[float]], colours: Mapping[Treatment, str], title: str
) -> None:
    """A row per arm: a ring per seed, and the mean as a bar with its value."""
    for height, (arm, seeds) in enumerate(values.items()):
        mean = fmean(seeds)
        axes.plot(seeds, [height] * len(seeds), "o", color=colours[arm], markerfacecolor="none", markersize=5)
        axes.plot([mean], [height], "|", color=colours[arm], markersize=16, markeredgewidth=2)
        axes.annotate(
            f"{mean:.2f}", (mean, height), (0, 10), textcoords="offset points", ha="center", color=colours[arm]
        )
    axes.set_yticks(range(len(values)), [arm.name for arm in values])
    for label, arm in zip(axes.get_yticklabels(), values, strict=True):
        label.set_color(colours[arm])
    axes.set_ylim(-0.6, len(values) - 0.2)
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.grid(axis="x", color="0.93")

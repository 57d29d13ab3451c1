"""The panels of a report: small pictures as inline SVG, whose text has the page's font and colour.

A panel is drawn for one column of a page. Its lines are labelled at their ends, so that colour is never the only
distinction. Colours that depend on the background are CSS variables, for pages in dark mode.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from spt_fast.laws import Law
from spt_fast.quantities import amount, percent
from spt_fast.study.crossover import ARMS, THRESHOLD, Crossover, Subset
from spt_fast.study.curves import Curve
from spt_fast.study.drawing import PLAIN, Axes, Figure, FuncFormatter, LogLocator, NullFormatter, mpl
from spt_fast.study.figures import NPT_COLOUR, SPT_COLOURS

PAPER, INK, GRID, MUTED = "#ffffff", "#1c2024", "#ededed", "#80868d"
"""Placeholders in the SVG that become the page's variables."""
VARIABLES = {
    PAPER: "var(--paper)",
    INK: "var(--ink)",
    GRID: "var(--line)",
    **dict.fromkeys((MUTED, "#666666", "#999999"), "var(--muted)"),
    NPT_COLOUR: "var(--npt)",
    **{colour: f"var(--hue-{i})" for i, colour in enumerate(SPT_COLOURS, 1)},
}
SHADE = "#fe00"
"""Prefix of the colours of `shades`; the percentage of the first hue follows, in hexadecimal."""
WIDTH_IN, HEIGHT_IN = 4.8, 3.3
STYLE: dict[Any, Any] = {
    **PLAIN,
    "svg.fonttype": "none",
    "svg.hashsalt": "",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
LABEL_POINTS = 10.5
"""Height of a line's label."""

Line = tuple[float, float, str, str]
"""The end of a line (x, y), its label, and its colour."""


@dataclass(frozen=True)
class Panel:
    title: str
    svg: Markup


def panel(title: str, says: str, draw: Callable[[Axes], None], *, height_in: float = HEIGHT_IN) -> Panel:
    """Draw one panel; `says` is its text for screen readers."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        draw(figure.add_subplot())
        drawn = StringIO()
        figure.savefig(drawn, format="svg", transparent=True)
    return Panel(title, _inline(drawn.getvalue(), title, says))


def _inline(svg: str, title: str, says: str) -> Markup:
    """Only the <svg> element, without metadata and external references, and with only the ids that are used."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    assert viewbox
    svg = re.sub(r"^<svg[^>]*>", "", svg)
    unique = hashlib.sha256((title + svg).encode()).hexdigest()[:6]
    used = dict.fromkeys(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    names = {name: f"{unique}-{number}" for number, name in enumerate(used)}
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{names[found[1]]}"' if found[1] in names else "", svg)
    svg = re.sub(r'(url\(|href=")#([^")]+)', lambda found: f"{found[1]}#{names[found[2]]}", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r">\s+<", "><", re.sub(r"\s+", " ", svg))
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(SHADE + "(..)", lambda at: f"color-mix(in srgb, var(--hue-1) {int(at[1], 16)}%, var(--paper))", svg)
    return Markup('<svg role="img" aria-label="{}" {}>').format(says, Markup(viewbox[0])) + Markup(svg)


# ------------------------------------------------------------------------------------------------ colours and labels


def colours_of(deltas: Iterable[float]) -> dict[float, str]:
    """A colour for each δ; grey for δ = 0."""
    spt = cycle(SPT_COLOURS)
    return {delta: next(spt) if delta else NPT_COLOUR for delta in sorted(set(deltas))}


def shades(n: int) -> list[str]:
    """Shades of the first hue, from pale to strong, for ordered values."""
    return [f"{SHADE}{round(at):02x}" for at in (np.linspace(35, 100, n) if n > 1 else (100,))]


def label_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Label lines at the right edge, each connected to its end in its colour, moved so that labels don't overlap."""
    if not lines:
        return
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    step = LABEL_POINTS / (0.8 * 72 * HEIGHT_IN) * (top - bottom)
    lines = sorted(lines, key=lambda line: line[1])
    heights = [min(max(line[1], bottom), top) for line in lines]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + step)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], top - (len(heights) - 1 - i) * step)
    for height, (x, y, text, colour) in zip(heights, lines, strict=True):
        axes.annotate(
            text,
            (x, y),
            (1.045, height),
            xycoords="data",
            textcoords=axes.get_yaxis_transform(),
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.3, "shrinkB": 3, "relpos": (0, 0.5)},
        )


def token_axis(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: amount(tokens)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)


def share_axis(axes: Axes, shares: Sequence[float], label: str) -> None:
    """A square-root axis, which includes 0 and separates small shares; labels that would overlap are left out."""
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(0, max(shares) * 1.04 or 1)
    shown: list[float] = []
    room = 0.085 * np.sqrt(max(shares))
    for share in sorted(shares):
        if not shown or np.sqrt(share) - np.sqrt(shown[-1]) > room:
            shown.append(share)
    axes.set_xticks(shown, [percent(share) for share in shown])
    axes.set_xlabel(label)


# ------------------------------------------------------------------------------------------------ panels


def loss_after_finetuning(axes: Axes, finetunes: pd.DataFrame, chosen: float | None) -> None:
    """Domain loss against δ: a line through the means per budget, a ring per seed; chosen: a δ to mark."""
    budgets = sorted(finetunes["pretrain_tokens"].unique())
    ends: list[Line] = []
    for budget, colour in zip(budgets, shades(len(budgets)), strict=True):
        own = finetunes[finetunes["pretrain_tokens"] == budget]
        means = own.groupby("pretrain_delta")["domain_heldout"].mean()
        axes.plot(means.index, means, color=colour, zorder=2)
        axes.plot(own["pretrain_delta"], own["domain_heldout"], "o", color=colour, markerfacecolor=PAPER, zorder=3)
        ends.append((means.index[-1], means.iloc[-1], amount(budget), colour))
    share_axis(axes, sorted(finetunes["pretrain_delta"].unique()), "domain share of the pretraining tokens, δ")
    if chosen is not None:
        axes.axvline(chosen, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
    axes.set_ylabel("domain loss after finetuning (nats/token)")
    label_lines(axes, ends)


def losses_in_pretraining(axes: Axes, rows: pd.DataFrame, column: str, colours: Mapping[float, str]) -> None:
    """The losses in `column` over tokens, a line per run."""
    ends: dict[float, Line] = {}
    for (delta, _), run in rows.dropna(subset=[column]).groupby(["delta", "run"], sort=True):
        run = run[run["tokens"] > 0].sort_values("tokens")
        if len(run):
            axes.plot(run["tokens"], run[column], color=colours[delta], linewidth=1.1, alpha=0.85)
            ends[delta] = (run["tokens"].iloc[-1], run[column].iloc[-1], percent(delta), colours[delta])
    later = rows.loc[rows["tokens"] > 0.1 * rows["tokens"].max(), column].dropna()
    if later.nunique() > 1:
        low, high = later.min(), later.max()
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    token_axis(axes, "pretraining tokens")
    axes.set_ylabel(f"held-out {column.removesuffix('_heldout')} loss (nats/token)")
    label_lines(axes, list(ends.values()))


def steps_of_runs(axes: Axes, curves: Sequence[tuple[float, Curve]], of: str, colours: Mapping[float, str]) -> None:
    """One quantity of the training steps over tokens, a line per run. curves: (δ, curve), some value above 0."""
    ends: dict[float, Line] = {}
    for delta, curve in curves:
        values = curve.figures[of]
        dot = "." if len(values) == 1 else ""
        axes.plot(curve.tokens, values, marker=dot, color=colours[delta], linewidth=1.0, alpha=0.85)
        if np.isfinite(values[-1]):
            ends[delta] = (curve.tokens[-1], values[-1], percent(delta), colours[delta])
    if of == "grad_norm":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda norm, _: f"{norm:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if of in ("lr", "tokens_per_s"):
        axes.set_ylim(0, 1.05 * np.nanmax(np.concatenate([curve.figures[of] for _, curve in curves])))
    if of == "tokens_per_s":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda speed, _: amount(speed) if speed else "0"))
    token_axis(axes, "tokens trained")
    axes.set_ylabel(STEP_LABELS[of])
    if of in ("loss", "tokens_per_s"):
        label_lines(axes, list(ends.values()))


STEP_LABELS = {
    "loss": "training loss (nats/token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_s": "tokens per second",
}


def law_over_tokens(axes: Axes, law: Law, rows: pd.DataFrame, of: str) -> None:
    """A fitted curve for each δ with its 90% interval, and the runs as rings."""
    colours = colours_of(rows["fraction"])
    ends: list[Line] = []
    for delta in sorted(rows["fraction"].unique()):
        own = rows[rows["fraction"] == delta].dropna(subset=[of])
        if not len(own):
            continue
        tokens = np.geomspace(own["tokens"].min(), own["tokens"].max(), 40)
        mean = draw_curve(axes, tokens, law.predict(tokens=tokens, fraction=delta, of=of, interval=0.9), colours[delta])
        axes.plot(own["tokens"], own[of], "o", color=colours[delta], markerfacecolor=PAPER, markersize=3.2, zorder=3)
        ends.append((tokens[-1], mean[-1], percent(delta), colours[delta]))
    token_axis(axes, "pretraining tokens")
    axes.set_ylabel("domain loss (nats/token)")
    label_lines(axes, ends)


def law_over_ratio(axes: Axes, law: Law, rows: pd.DataFrame, of: str) -> None:
    """A fitted curve per model size at its largest number of tokens, with its 90% interval; runs as rings."""
    ends: list[Line] = []
    sizes = sorted(rows["params"].unique())
    for size, colour in zip(sizes, shades(len(sizes)), strict=True):
        own = rows[rows["params"] == size]
        own = own[own["tokens"] == own["tokens"].max()]
        seen = own["own_ratio"] if of == "domain" else 1 - own["own_ratio"]
        share = np.linspace(seen.min(), seen.max(), 80)
        given: dict[str, Any] = {"params": float(size), "tokens": float(own["tokens"].iloc[0])}
        curve = law.predict(own_ratio=share if of == "domain" else 1 - share, interval=0.9, **given)
        mean = draw_curve(axes, share, curve, colour)
        axes.plot(seen, own["loss"], "o", color=colour, markerfacecolor=PAPER, zorder=3)
        ends.append((share[-1], mean[-1], amount(size), colour))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: percent(share)))
    axes.set_xlabel("domain share of the continual pretraining")
    axes.set_ylabel(f"{of} loss (nats/token)")
    label_lines(axes, ends)


def draw_curve(axes: Axes, x: Any, curve: Sequence[Any], colour: str) -> Any:
    mean, low, high = curve
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(x, mean, color=colour, zorder=2)
    return mean


def general_before_and_after(axes: Axes, arms: Sequence[tuple[str, str, pd.DataFrame]]) -> None:
    """A row for each arm (name, colour, finetunes): rings before, dots after, and a line between the means."""
    for height, (_, colour, own) in enumerate(arms):
        before, after = own["general_before"], own["general_heldout"]
        axes.plot([before.mean(), after.mean()], [height, height], color=colour, linewidth=2.2, zorder=1)
        axes.plot(before, [height] * len(own), "o", color=colour, markerfacecolor=PAPER, zorder=2)
        axes.plot(after, [height] * len(own), "o", color=colour, zorder=3)
        axes.annotate(
            f"+{(after - before).mean():.3f}".replace("+-", "−"),
            (max(before.max(), after.max()), height),
            (7, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(arms)), [name for name, *_ in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.margins(x=0.16)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("held-out general loss (nats/token)")
    axes.spines["left"].set_visible(False)


def draw_losses(axes: Axes, arms: Mapping[str, Sequence[Subset]]) -> None:
    """The mean of each arm as a line with a marker; seeds as rings."""
    styles = dict(zip(ARMS, zip((SPT_COLOURS[0], NPT_COLOUR, *SPT_COLOURS[1:3]), "osD^", strict=True), strict=True))
    for arm, subsets in arms.items():
        colour, marker = styles[arm]
        tokens = [subset.domain_tokens for subset in subsets]
        axes.plot(tokens, [subset.mean for subset in subsets], color=colour, marker=marker, label=arm)
        for subset in subsets:
            seeds = list(subset.seeds.values())
            axes.plot([subset.domain_tokens] * len(seeds), seeds, "o", color=colour, markerfacecolor="none", ms=4)
    token_axis(axes, "unique tokens of the domain")
    axes.set_title("held-out loss on the domain (nats/token)", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)


def draw_gap(axes: Axes, found: Crossover) -> None:
    """The gap of every seed and the mean with its interval; the fit, dotted beyond the largest subset."""
    gaps, fit, level = found.gap, found.fit, 100 * THRESHOLD
    tokens = np.array([gap.domain_tokens for gap in gaps], float)
    means = np.array([gap.percent for gap in gaps])
    for gap in gaps:
        seeds = list(gap.seeds.values())
        axes.plot([gap.domain_tokens] * len(seeds), seeds, "o", color=NPT_COLOUR, markerfacecolor="none", ms=4)
    if gaps[0].interval:
        low, high = np.array([gap.interval for gap in gaps]).T
        axes.fill_between(tokens, low, high, color=SPT_COLOURS[0], alpha=0.15, linewidth=0)
    axes.plot(tokens, means, "-o", color=SPT_COLOURS[0])
    at = found.crossover or found.extrapolated
    if fit:
        for ends, style in (((tokens[0], tokens[-1]), "-"), ((tokens[-1], max(at or 0, tokens[-1])), ":")):
            x = np.array(ends)
            axes.plot(x, fit.intercept + fit.slope * np.log10(x), style, color=SPT_COLOURS[1], linewidth=1)
    axes.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
    axes.annotate(f"{level:g}%", (tokens[0], level), (0, 3), textcoords="offset points", color="0.4", fontsize=9)
    if at:
        axes.plot([at], [level], "D", color=SPT_COLOURS[1], markerfacecolor="white", zorder=3)
        axes.annotate(amount(at), (at, level), (6, 6), textcoords="offset points", color=SPT_COLOURS[1])
        if found.interval:
            low, high = found.interval
            axes.plot([max(low, tokens[0]), high or axes.get_xlim()[1]], [level] * 2, color=SPT_COLOURS[1])
    token_axis(axes, "unique tokens of the domain")
    axes.set_title("loss from scratch, % above pretrained", fontsize=10, loc="left")


def height_of_rows(n: int) -> float:
    return max(1.6, 0.75 + 0.27 * n)

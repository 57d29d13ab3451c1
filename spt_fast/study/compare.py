"""Runs side by side: what specialized pretraining gains in the domain, and how much less is forgotten for it.

An *arm* is all runs with the same treatment (delta, the domain's share of the pretraining tokens; replay, the others'
share of the finetune; its anchor) and the same pretraining budget; its runs differ by seed. NPT is delta = 0, and what
an arm is held against is NPT with the same finetune, where there is one, else NPT with the plainest. Losses are
held-out, in nats per token. The definitions are those of "The Finetuner's Fallacy", arXiv 2603.16177:

    R_gain(delta)       100 · (L_NPT→FT − L_SPT(delta)→FT) / L_NPT→FT, L the domain loss after finetuning
    forgetting          general loss after finetuning − before
    compute multiplier  tokens that NPT needs for the domain loss after finetuning of SPT(delta) / tokens of SPT(delta)

and one of our own, *general at equal domain*: the general loss at the moment when each finetune reaches the same domain
loss, which is the lowest one that every run reaches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spt_fast.errors import RecipeError
from spt_fast.study import figures
from spt_fast.study.finetunes import OverSeeds, Treatment, held_against
from spt_fast.study.runs import FinetunePath, FinishedRun, check_comparable, differences

FIGURES = (
    "domain_epochs",
    "domain_before",
    "domain_after",
    "general_before",
    "general_after",
    "forgetting",
    "general_at_equal_domain",
)
JUDGED = {
    "domain_after": "domain loss after finetuning",
    "forgetting": "forgetting",
    "general_after": "general loss after finetuning",
    "general_at_equal_domain": "general loss at equal domain loss",
}
"""The figures by which arms are judged, in words; less is better in each."""

Row = dict[str, Any]
"""The figures of one run."""
Arm = dict[int, Row]
"""The rows of one arm by seed."""


def compare(run_folders: Sequence[str | Path]) -> dict[str, Any]:
    """Compare finished runs; returns plain data for JSON.

    domain, general  the sources' names
    tokens           the pretraining budget that `r_gain`, `general_at_equal_domain` and `verdict` are about: the
                     largest of those at which the most arms, NPT among them, can be compared
    runs             a row of figures per run; `paths` holds, per arm of its finetune's grid (`arm` is the one kept),
                     the evaluations as [tokens finetuned, domain loss, general loss]
    arms             per treatment and tokens, mean, min, max and std over seeds of each figure, and R_gain
    r_gain           {arm: {mean, low, high, per_seed}} in percent, seed by seed against NPT; None without NPT
    compute_multiplier  {arm: factor}, None where NPT's budgets don't bracket SPT's loss; None without NPT
    general_at_equal_domain  {domain_loss, general: {arm: statistics}}
    verdict          {figure: {arm: ...}}, whether the arms differ by more than seeds do; see `judge`
    warnings         what else differs between the runs

    Arms are written as their delta, "0.05", with what their finetune adds, "0.05 replay 0.01 anchor 0.1".

    Raises RecipeError or CheckpointError for runs that are unfinished, lack pretraining or a finetune, are the same arm
    and seed, or differ in domain, held-out text, tokenizer or model.
    """
    if not run_folders:
        raise RecipeError("nothing to compare; give the folders of finished runs")
    runs = [FinishedRun.read(folder) for folder in run_folders]
    check_comparable(runs)
    return {
        "domain": runs[0].domain,
        "general": runs[0].general,
        **compare_rows([_row(run) for run in runs]),
        "warnings": differences(runs),
    }


def compare_rows(rows: list[Row]) -> dict[str, Any]:
    """Compare finetunes by their figures: all of `compare`'s result that does not depend on where they come from.

    Of a row it reads its treatment, tokens (of pretraining), seed, folder, arm, paths, and FIGURES but the last, which
    it adds.
    """
    arms = _by_arm(rows)
    budget = _widest_budget(arms)
    compared = _at(arms, budget)
    equal_domain = _add_general_at_equal_domain(rows, budget)
    return {
        "tokens": budget,
        "runs": rows,
        "arms": [_arm_figures(treatment, tokens, arm, _at(arms, tokens)) for (treatment, tokens), arm in arms.items()],
        "r_gain": {
            treatment.key: _gain(arm, compared[base])
            for treatment, arm in compared.items()
            if (base := held_against(treatment, compared)) is not None
        }
        if any(treatment.delta == 0 for treatment in compared)
        else None,
        "compute_multiplier": _compute_multipliers(arms),
        "general_at_equal_domain": {
            "domain_loss": equal_domain,
            "general": {t.key: _statistics(arm, "general_at_equal_domain") for t, arm in compared.items()},
        },
        "verdict": {figure: _verdicts(figure, compared) for figure in JUDGED},
    }


def _at(arms: dict[tuple[Treatment, int], Arm], budget: int) -> dict[Treatment, Arm]:
    return {treatment: arm for (treatment, tokens), arm in arms.items() if tokens == budget}


def _row(run: FinishedRun) -> Row:
    kept = run.finetuned["arm"]
    grid = run.finetune.arms()
    chosen = run.finetune.with_overrides(grid[kept])
    paths = [run.finetune_path(arm) for arm in range(len(grid))]
    _, domain_before, general_before = paths[kept][0]
    domain_after, general_after = run.heldout(run.finetuned["heldout"])
    return {
        "name": run.folder.resolve().name,
        "folder": str(run.folder),
        **run.treatment._asdict(),
        "seed": run.summary["seed"],
        "tokens": sum(done["tokens"] for _, done in run.pretraining),
        "domain_epochs": math.fsum(done["epochs"].get(run.domain, 0.0) for _, done in run.pretraining),
        "domain_before": domain_before,
        "domain_after": domain_after,
        "general_before": general_before,
        "general_after": general_after,
        "forgetting": general_after - general_before,
        "lr": chosen.optimizer.lr,
        "warmup": str(chosen.schedule.warmup),
        "arm": kept,
        "paths": paths,
    }


def treatment_of(row: Row) -> Treatment:
    """The treatment of a run's or an arm's figures."""
    return Treatment(row["delta"], row["replay"], row["anchor"])


def _by_arm(rows: Iterable[Row]) -> dict[tuple[Treatment, int], Arm]:
    """Rows by treatment and tokens, then by seed; budgets, treatments and seeds ascend."""
    arms: dict[tuple[Treatment, int], Arm] = {}
    for row in sorted(rows, key=lambda row: (row["tokens"], treatment_of(row), row["seed"])):
        treatment = treatment_of(row)
        arm = arms.setdefault((treatment, row["tokens"]), {})
        same = arm.setdefault(row["seed"], row)
        if same is not row:
            raise RecipeError(
                f"{same['folder']} and {row['folder']} have the same delta ({treatment.key}), the same "
                f"pretraining tokens ({row['tokens']:,}) and the same seed ({row['seed']}); give one of them"
            )
    return arms


def _widest_budget(arms: dict[tuple[Treatment, int], Arm]) -> int:
    """That at which the most arms, NPT among them, can be compared."""

    def breadth(tokens: int) -> tuple[bool, int, int]:
        treatments = _at(arms, tokens)
        return any(t.delta == 0 for t in treatments) and len(treatments) > 1, len(treatments), tokens

    return max({tokens for _, tokens in arms}, key=breadth)


def _add_general_at_equal_domain(rows: list[Row], budget: int) -> float:
    """Fill in each row's general loss at the domain loss, returned, that all runs of this budget reach."""
    kept = {id(row): row["paths"][row["arm"]] for row in rows}
    reached = [min(domain for _, domain, _ in kept[id(row)]) for row in rows if row["tokens"] == budget]
    for row in rows:
        row["general_at_equal_domain"] = general_when(kept[id(row)], max(reached)) if row["tokens"] == budget else None
    return max(reached)


def general_when(path: FinetunePath, domain_loss: float) -> float:
    """General loss where a path first comes down to `domain_loss`, which it must; linear between evaluations."""
    if path[0][1] <= domain_loss:
        return path[0][2]
    for (_, domain, general), (_, next_domain, next_general) in pairwise(path):
        if next_domain <= domain_loss:
            return general + (next_general - general) * (domain - domain_loss) / (domain - next_domain)
    raise AssertionError(f"the path never reaches {domain_loss}")


def _arm_figures(treatment: Treatment, tokens: int, arm: Arm, others: dict[Treatment, Arm]) -> dict[str, Any]:
    base = held_against(treatment, others)
    return {
        **treatment._asdict(),
        "tokens": tokens,
        "seeds": list(arm),
        **{figure: _statistics(arm, figure) for figure in FIGURES},
        "r_gain": None if base is None else _gain(arm, others[base]),
    }


def _statistics(arm: Arm, figure: str) -> dict[str, float | None] | None:
    over = OverSeeds.of(row[figure] for row in arm.values())
    return None if over is None else {"mean": over.mean, "min": over.low, "max": over.high, "std": over.std}


def _gain(arm: Arm, npt: Arm) -> dict[str, Any] | None:
    """R_gain in percent over the seeds that both arms have; None where there are none."""
    per_seed = {
        str(seed): 100 * (npt[seed]["domain_after"] - row["domain_after"]) / npt[seed]["domain_after"]
        for seed, row in arm.items()
        if seed in npt
    }
    over = OverSeeds.of(per_seed.values())
    return None if over is None else {"mean": over.mean, "low": over.low, "high": over.high, "per_seed": per_seed}


def _compute_multipliers(arms: dict[tuple[Treatment, int], Arm]) -> dict[str, float | None] | None:
    curves: dict[Treatment, dict[int, float]] = {}
    for (treatment, tokens), arm in arms.items():
        curves.setdefault(treatment, {})[tokens] = fmean(row["domain_after"] for row in arm.values())
    if not any(treatment.delta == 0 for treatment in curves):
        return None
    return {
        treatment.key: compute_multiplier(curves[base], curve)
        for treatment, curve in sorted(curves.items())
        if (base := held_against(treatment, curves)) is not None
    }


def compute_multiplier(npt: dict[int, float], spt: dict[int, float]) -> float | None:
    """Tokens that NPT needs for SPT's loss / tokens that SPT took; both are {tokens: domain loss after finetuning}.

    Linear in log tokens between NPT's budgets. Taken at SPT's largest budget whose loss they bracket; None without one.
    """
    for tokens, loss in sorted(spt.items(), reverse=True):
        for (fewer, worse), (more, better) in pairwise(sorted(npt.items())):
            if worse > better and worse >= loss >= better:
                return fewer * (more / fewer) ** ((worse - loss) / (worse - better)) / tokens
    return None


def _verdicts(figure: str, arms: dict[Treatment, Arm]) -> dict[str, dict[str, Any]]:
    """Every arm against the NPT that it is held against; without NPT, against the one with the smallest delta."""
    verdicts = {}
    for treatment, arm in arms.items():
        base = held_against(treatment, arms) or min(arms)
        if treatment != base:
            names = f"{treatment.name} against {base.name}"
            verdicts[treatment.key] = judge(figure, arm, arms[base], names)
    return verdicts


def judge(figure: str, arm: Arm, base: Arm, names: str) -> dict[str, Any]:
    """Whether two arms differ by more than seeds do, over the seeds that both have.

    `difference` is the mean over seeds, `spread` the larger of the two arms' ranges (max − min) over seeds. `exceeds`:
    the difference has one sign at every seed and is larger than the spread; None with fewer than two seeds: cannot say.
    """
    seeds = sorted(arm.keys() & base.keys())
    pairs = [(arm[seed][figure], base[seed][figure]) for seed in seeds]
    verdict: dict[str, Any] = {"difference": None, "spread": None, "seeds": len(seeds), "exceeds": None}
    if not pairs:
        return verdict | {"says": f"{JUDGED[figure]}, {names}: cannot say, the arms have no seed in common"}
    by_seed = [ours - theirs for ours, theirs in pairs]
    difference = fmean(by_seed)
    direction = "lower" if difference < 0 else "higher"
    says = f"{JUDGED[figure]}, {names}: {abs(difference):.3f} {direction}"
    if len(seeds) == 1:
        says += "; with one seed nobody can say whether that is more than chance"
        return verdict | {"difference": difference, "says": says}
    spread = max(max(values) - min(values) for values in zip(*pairs, strict=True))
    exceeds = abs(difference) > spread and (max(by_seed) < 0 or min(by_seed) > 0)
    seen = f"the spread between {len(seeds)} seeds ({spread:.3f})"
    says += f", more than {seen}" if exceeds else f", not clear of {seen}: that may be chance"
    return verdict | {"difference": difference, "spread": spread, "exceeds": exceeds, "says": says}


# ------------------------------------------------------------------------------------------------ what people read


def print_comparison(result: dict[str, Any], console: Console) -> None:
    """The arms as a table, then what can be said about them."""
    console.print(arm_table(result))
    for line in findings(result):
        console.print(f"- {line}", highlight=False)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", highlight=False)


def arm_table(result: dict[str, Any]) -> Table:
    """A row of figures per arm, 80 columns wide."""
    table = Table(
        title=f"domain: {result['domain']}, general: {result['general']}; held-out nats/token\n± half the seeds' range",
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("arm", no_wrap=True)
    headings = ("tokens", "epochs", "seeds", "domain\nbefore", "domain\nafter", "general\nbefore", "general\nafter")
    for heading in (*headings, "forget-\nting", "R_gain\n%"):
        table.add_column(heading, justify="right")
    for arm in result["arms"]:
        gain = arm["r_gain"]
        table.add_row(
            treatment_of(arm).name,
            f"{arm['tokens'] / 1e6:,.4g}M",
            f"{arm['domain_epochs']['mean']:.1f}",
            str(len(arm["seeds"])),
            *(_with_spread(arm[figure]["mean"], arm[figure]["min"], arm[figure]["max"]) for figure in FIGURES[1:6]),
            _with_spread(gain["mean"], gain["low"], gain["high"], digits=2) if gain else "",
        )
    return table


def _with_spread(mean: float, low: float, high: float, digits: int = 3) -> str:
    return f"{mean:.{digits}f}" + (f"\n±{(high - low) / 2:.{digits}f}" if high > low else "")


def findings(result: dict[str, Any]) -> list[str]:
    """What the figures say, a sentence each."""
    names = {treatment_of(arm).key: treatment_of(arm).name for arm in result["arms"]}
    found = [verdict["says"] for by_arm in result["verdict"].values() for verdict in by_arm.values()]
    equal = result["general_at_equal_domain"]
    if len(equal["general"]) > 1:
        losses = ", ".join(f"{names[arm]} {loss['mean']:.3f}" for arm, loss in equal["general"].items())
        level = f"{equal['domain_loss']:.3f}"
        found.append(f"when the finetune comes down to a domain loss of {level}, the general loss is at: {losses}")
    for arm, factor in (result["compute_multiplier"] or {}).items():
        if factor:
            found.append(f"{names[arm]} does with its tokens what NPT does with {factor:.2f} times as many")
    return found


def write(result: dict[str, Any], out_folder: str | Path) -> None:
    """Write comparison.json and comparison.png."""
    out_folder = Path(out_folder)
    out_folder.mkdir(parents=True, exist_ok=True)
    (out_folder / "comparison.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    figures.draw_comparison(result, out_folder / "comparison.png")

"""How well laws are recovered from noisy runs: 100 tables drawn from each with 1% noise, fitted, and tested on new
points.

    python -m benchmarks.laws [--draws N] [--json FILE] [--fits | --intervals [--tables FOLDER]]

Held-out points are beyond the fitted ones: at twice the size (D-CPT: also at ratios that were not run), or at up to
1.67 times the budget (overfitting, finetuned, CMR; CMR at ratios that were not run). `error` is the mean relative error
of their predictions against the truth without noise, the mean over draws and the worst draw; `covered` is the share of
new noisy points inside 90% prediction intervals, for the inputs of the fit and for the held-out ones. Seconds are CPU
time.

Then `spt-fast fit` as a separate process on whole tables of runs, from start to end: wall and CPU seconds, and peak
memory. `--fits` measures only these.

In between: the share of new runs inside 90% intervals, within the range of the runs and at ten times their size, if the
points of a run share an error: for studies with 1 to 3 seeds and 1 to 6 sizes. The requirement is 80 to 97% within the
range and 75% or more beyond. The width is relative to an interval with known law and noise. `--intervals` measures only
these, `--tables` also on public tables of real runs, with the largest budgets left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.machine import machine
from spt_fast import laws
from spt_fast.laws.base import Law
from tests.study.synthetic import DOMAIN_TOKENS, PARAMS, dcpt_table, spt_table
from tests.synthetic_runs import (
    CHINCHILLA,
    CONSTRAINED,
    CROSS_DOMAIN,
    DOMAIN,
    FINETUNE,
    FORGETTING,
    FRACTIONS,
    OVERFITTING,
    RATIOS,
    RECTIFIED,
    REPEATED,
    TABLES,
    Table,
    continued,
    drawn,
    finetuned,
    gain,
    grid,
    increments,
    noisy,
    overfitting_grid,
)

NOISE = 0.01
LEVEL = 0.9
INTERVAL_DRAWS = 10
"""Draws of each study for the intervals, which are measured beside the rest."""
B = 10**9

STUDIES: dict[str, Callable[[], pd.DataFrame]] = {
    "42 runs, SPT": lambda: spt_table(
        deltas=(0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1),
        budgets=tuple(b * B for b in (20, 50, 100, 150, 200)),
        seeds=(0,),
    ),
    "42 runs, D-CPT": lambda: dcpt_table(deltas=(0.0, 0.1, 0.2, 0.33, 0.5, 0.75, 1.0), seeds=(0, 1, 2)),
    "5,040 runs, SPT": lambda: spt_table(
        deltas=(0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1),
        budgets=tuple(b * B for b in (20, 40, 60, 80, 100, 125, 150, 200)),
        seeds=range(8),
        params=tuple(round(PARAMS * 1.5**i) for i in range(5)),
        domain_tokens=(DOMAIN_TOKENS // 10, DOMAIN_TOKENS),
    ),
    "5,000 runs, D-CPT": lambda: dcpt_table(
        deltas=np.linspace(0, 1, 25).round(3).tolist(), params=[round(2e8 * 1.3**i) for i in range(10)], seeds=range(20)
    ),
}
"""Tables of runs for `spt-fast fit`."""


def held_out(name: str, table: Table) -> Table:
    """Twice the largest size, at ratios that were not run; for the overfitting law, larger budgets."""
    if name == "overfitting":
        return grid(fraction=FRACTIONS, tokens=np.linspace(1.05, 1.67, 8) * 200e9)
    size = next(name for name in ("average_params", "params", "tokens") if name in table)
    largest = table[size] == table[size].max()
    further = {column: values[largest] for column, values in table.items()}
    further[size] = 2 * further[size]
    if "own_ratio" in further:
        further["own_ratio"] = 0.95 * further["own_ratio"]
    return further


def one_draw(
    law: Law, table: Table, places: dict[str, tuple[Table, Any]], rng: np.random.Generator
) -> dict[str, float]:
    began = time.process_time()
    law.fit(table)
    result = {"seconds": time.process_time() - began}
    for place, (columns, truth) in places.items():
        mean, low, high = law.predict(interval=LEVEL, **columns)
        new = noisy(truth, rng, NOISE)
        result[f"{place} covered"] = float(np.mean((new >= low) & (new <= high)))
        result[f"{place} error"] = float(np.abs(mean / truth - 1).mean())
    return result


def inputs_of(law: type[Law] | Law, table: Table) -> Table:
    return {name: table[name] for name in law.inputs}


def by_formula(name: str) -> Callable[[np.random.Generator], dict[str, float]]:
    truth, make, table = TABLES[name]
    places = {"fitted": inputs_of(truth, table), "held-out": inputs_of(truth, held_out(name, table))}
    with_truth = {place: (columns, truth.predict(**columns)) for place, columns in places.items()}
    return lambda rng: one_draw(make(), drawn(truth, table, rng, NOISE), with_truth, rng)


def post_finetune(rng: np.random.Generator) -> dict[str, float]:
    def after(table: Table) -> tuple[Table, np.ndarray]:
        columns = {"tokens": table["tokens"], "fraction": table["fraction"]}
        return columns, OVERFITTING.predict(**columns) - gain(**columns)

    table, beyond = overfitting_grid(), grid(fraction=FRACTIONS, tokens=np.linspace(1.05, 1.67, 8) * 200e9)
    return one_draw(
        laws.PostFinetuneLaw(), finetuned(table, rng, NOISE), {"fitted": after(table), "held-out": after(beyond)}, rng
    )


def critical_mixture(rng: np.random.Generator) -> dict[str, float]:
    def general(ratios: Any, budgets: Any) -> tuple[Table, np.ndarray]:
        columns = grid(domain_ratio=ratios, tokens=budgets)
        del columns["run"]
        return columns, 2.6 + increments(columns["tokens"], columns["domain_ratio"])[0]

    table = continued(rng, NOISE)
    places = {
        "fitted": general((0.1, 0.2, 0.3, 0.4, 0.5, 0.7), np.geomspace(0.5e9, 20e9, 24)),
        "held-out": general((0.15, 0.25, 0.35, 0.45), np.geomspace(20e9, 33e9, 5)),
    }
    return one_draw(laws.CMRLaw(), table, places, rng)


Draw = Callable[[np.random.Generator, float, float], Table]
"""(generator, relative error of a run, of a point) -> a table of runs"""
Place = tuple[Table, np.ndarray]
"""(inputs, the true losses)"""


def intervals_of_study(
    make: Callable[[], Law], draw: Draw, places: list[Place], by_run: float, noise: float, draws: int
) -> list[tuple[float, float]]:
    """(covered share, width) by place; a refused interval counts as the requested share, with infinite width."""
    rng = np.random.default_rng(7)
    held: list[list[tuple[float, float]]] = [[] for _ in places]
    for _ in range(draws):
        law = make().fit(draw(rng, by_run, noise))
        for (given, true), found in zip(places, held, strict=True):
            new = noisy(true, rng, float(np.hypot(by_run, noise)))
            try:
                _, low, high = law.predict(interval=LEVEL, **given)
            except laws.OpenError:
                found.append((LEVEL, np.inf))
                continue
            width = np.median((high - low) / true) / (2 * 1.645 * np.hypot(by_run, noise))
            found.append((float(np.mean((low <= new) & (new <= high))), float(width)))
    return [(float(np.mean([h for h, _ in found])), float(np.median([w for _, w in found]))) for found in held]


def together(runs: Table, rng: np.random.Generator, by_run: float) -> np.ndarray:
    """The factor on each row that its run shares."""
    return np.exp(by_run * rng.standard_normal(runs["run"].max() + 1)[runs["run"]])


def of_formula(truth: Law, runs: Table, *places: Table) -> tuple[Callable[[], Law], Draw, list[Place]]:
    def draw(rng: np.random.Generator, by_run: float, noise: float) -> Table:
        table, shared = drawn(truth, runs, rng, noise), together(runs, rng, by_run)
        return table | {of: table[of] * shared for of in truth.outputs}

    return type(truth), draw, [(place, np.atleast_1d(truth.predict(**place))) for place in places]


def of_finetunes(seeds: int, of: str) -> tuple[Callable[[], Law], Draw, list[Place]]:
    """At 5% the loss before finetuning rises beyond the runs, by overfitting that they hardly show."""
    runs = grid(seed=range(seeds), fraction=FRACTIONS, tokens=np.linspace(0.1, 1, 8) * 200e9)

    def draw(rng: np.random.Generator, by_run: float, noise: float) -> Table:
        table, shared = finetuned(runs, rng, noise), together(runs, rng, by_run)
        return table | {of: table[of] * shared for of in laws.PostFinetuneLaw.outputs}

    places = [{"tokens": np.full(3, tokens), "fraction": np.array([0.005, 0.02, 0.05])} for tokens in (100e9, 2000e9)]
    gains = [gain(**place) if of == "finetuned_loss" else 0 for place in places]
    true = [OVERFITTING.predict(**place) - gained for place, gained in zip(places, gains, strict=True)]
    return laws.PostFinetuneLaw, draw, [(place | {"of": of}, loss) for place, loss in zip(places, true, strict=True)]


def of_continued(seeds: int) -> tuple[Callable[[], Law], Draw, list[Place]]:
    """Runs of a ratio continue one start, which has no error of its own."""

    def draw(rng: np.random.Generator, by_run: float, noise: float) -> Table:
        tables = [continued(rng, noise) for _ in range(seeds)]
        for number, table in enumerate(tables):
            later = table["tokens"] > 0
            shared = np.where(later, together(table, rng, by_run), 1.0)
            table |= {of: table[of] * shared for of in laws.CMRLaw.outputs}
            table["run"] = table["run"] + number * (table["run"].max() + 1)
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    places = [{"tokens": np.full(2, tokens), "domain_ratio": np.array([0.15, 0.4])} for tokens in (8e9, 200e9)]
    true = [2.6 + increments(place["tokens"], place["domain_ratio"])[0] for place in places]
    return laws.CMRLaw, draw, list(zip(places, true, strict=True))


def studies_of_runs() -> dict[str, tuple[Callable[[], Law], Draw, list[Place]]]:
    """name: (the law, its runs, inputs among them and at ten times their size)"""
    found: dict[str, tuple[Callable[[], Law], Draw, list[Place]]] = {}
    for seeds in (1, 2, 3):
        many = f"{seeds} seed" + "s" * (seeds > 1)
        for sizes in (2, 3, 4, 6):
            params = np.geomspace(1e7, 1e8 if sizes < 4 else 1e9, sizes)
            inside = {"params": np.sqrt(params[0] * params[-1]), "tokens": np.array([1e9, 3e9])}
            far = {"params": 10 * params[-1], "tokens": np.array([1e10, 1e11])}
            runs = grid(seed=range(seeds), params=params, tokens=np.geomspace(1e8, 1e10, 10))
            found[f"Chinchilla, {sizes} sizes, {many}"] = of_formula(CHINCHILLA, runs, inside, far)
        for sizes in (2, 3, 5):
            params, ratios = np.geomspace(2e8, 1e9, sizes), [0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 1]
            runs = grid(seed=range(seeds), params=params, own_ratio=ratios, tokens=np.linspace(1e9, 20e9, 10))
            inside = {"params": 5e8, "tokens": 8e9, "own_ratio": np.array([0.15, 0.4])}
            far = {"params": 1e10, "tokens": np.array([2e10, 2e11]), "own_ratio": 0.3}
            found[f"D-CPT, {sizes} sizes, {many}"] = of_formula(DOMAIN, runs, inside, far)
        for sizes in (1, 3, 5):
            params = np.geomspace(4e7, 1.2e9, sizes) if sizes > 1 else [3e8]
            for name, truth in ("finetuning", FINETUNE), ("rectified", RECTIFIED):
                runs = grid(params=params, unique_tokens=np.geomspace(1e5, 1e8, 10), seed=range(seeds))
                runs["run"] = np.arange(len(runs["run"]))
                inside, far = (
                    {"params": size, "unique_tokens": np.array(tokens)}
                    for size, tokens in ((params[sizes // 2], (1e6, 2e7)), (params[-1], (1e9, 2e9)))
                )
                found[f"{name}, {sizes} sizes, {many}"] = of_formula(truth, runs, inside, far)
            runs = grid(params=params, unique_tokens=[3e5, 3e6, 3e7], injected=[0, 1e-3, 1e-2, 5e-2], seed=range(seeds))
            runs |= {"loss_before": np.full(len(runs["run"]), 3.0), "run": np.arange(len(runs["run"]))}
            of = {"loss_before": 3.0, "injected": np.array([0, 0.005])}
            inside = of | {"params": params[sizes // 2], "unique_tokens": 1e6}
            far = of | {"params": params[-1], "unique_tokens": 3e8}
            found[f"forgetting, {sizes} sizes, {many}"] = of_formula(FORGETTING, runs, inside, far)
        size, unique = np.geomspace(4e7, 1.2e9, 4), [1e8, 1e9, 1e10]
        runs = grid(seed=range(seeds), params=size, unique_tokens=unique, tokens=np.geomspace(1e9, 5e10, 6))
        inside, far = (
            {"params": p, "unique_tokens": 1e9, "tokens": np.array([t])} for p, t in ((2e8, 1e10), (1e9, 5e11))
        )
        found[f"repeated data, 4 sizes, {many}"] = of_formula(CONSTRAINED, runs, inside, far)
        tokens = np.geomspace(5e9, 2e11, 12)
        runs = grid(seed=range(seeds), fraction=[0, 0.005, 0.02, 0.05, 0.1], unique_tokens=[3e8], tokens=tokens)
        inside, far = ({"fraction": np.array([0.01, 0.05]), "unique_tokens": 3e8, "tokens": t} for t in (5e10, 2e12))
        found[f"mixture and repetition, {many}"] = of_formula(REPEATED, runs, inside, far)
        runs = grid(seed=range(seeds), fraction=FRACTIONS, tokens=np.linspace(0.1, 1, 20) * 200e9)
        inside, far = ({"tokens": t, "fraction": np.array([0.003, 0.02])} for t in (100e9, 1000e9))
        found[f"overfitting, 5 shares, {many}"] = of_formula(OVERFITTING, runs, inside, far)
        for name, of in ("before", "heldout_loss"), ("after", "finetuned_loss"):
            found[f"{name} finetuning, 5 shares, {many}"] = of_finetunes(seeds, of)
        found[f"CMR, 6 shares, {many}"] = of_continued(seeds)
    domains = [0.4, 0.6, 0.9, 1.4]
    runs = grid(learnability=domains, params=[2e8, 5e8, 1e9], own_ratio=RATIOS[::2], tokens=np.linspace(1e9, 20e9, 6))
    of = {"learnability": 0.7, "params": 5e8, "own_ratio": 0.4}
    inside, far = (of | {"tokens": np.array([tokens])} for tokens in (8e9, 2e11))
    found["across domains, 4 domains, 1 seed"] = of_formula(CROSS_DOMAIN, runs, inside, far)
    return found


def left_out_of_tables(folder: Path) -> dict[str, tuple[Law, pd.DataFrame, pd.Series]]:
    """name: (the law, a table of real runs, the rows left out: the largest budgets)"""
    chinchilla, repeated = (pd.read_csv(folder / f"{name}.csv") for name in ("chinchilla", "datablations"))
    found: dict[str, tuple[Law, pd.DataFrame, pd.Series]] = {}
    for name, law, table in (
        ("Chinchilla", laws.ChinchillaLaw(), chinchilla),
        ("repeated data", laws.DataConstrainedLaw(), repeated),
    ):
        flops = table["params"] * table["tokens"]
        found[f"{name}, largest tenth"] = law, table, flops > flops.quantile(0.9)
        found[f"{name}, a tenth of the FLOPs"] = law, table, flops > flops.max() / 10
    mixed = pd.read_csv(folder / "mix2.csv").rename(columns={"steps": "tokens"})
    for domain, table in mixed.groupby("domain"):
        found[f"two domains, {domain}"] = laws.DCPTLaw(), table, table["params"] == table["params"].max()
    continued_runs = pd.read_csv(folder / "ct_pythia70m_python.csv").rename(columns={"steps": "tokens"})
    found["continued, last fifth"] = laws.CMRLaw(), continued_runs, continued_runs["tokens"] > 8000
    tuned = pd.read_csv(folder / "finetune_flan.csv").rename(columns={"examples": "unique_tokens", "model": "run"})
    for family, table in tuned[tuned["unique_tokens"] > 0].groupby("family"):
        if table["params"].nunique() > 1:
            found[f"finetunes, {family}"] = laws.FinetuneLaw(), table, table["unique_tokens"] > 2e5
    for model, table in tuned[tuned["unique_tokens"] > 0].groupby("run"):
        own = table.drop(columns="run")
        found[f"finetunes, {model} alone"] = laws.FinetuneLaw(), own, own["unique_tokens"] > 2e5
    return {
        name: (law, table.drop(columns=["name", "seed"], errors="ignore"), out)
        for name, (law, table, out) in found.items()
    }


def intervals(draws: int, folder: Path | None) -> dict[str, Any]:
    results: dict[str, Any] = {}
    print(f"{'90% intervals hold':<50}{'inside':>8}{'width':>7}{'beyond':>8}{'width':>7}")

    def show(name: str, places: list[tuple[float, float]]) -> None:
        results[name] = places
        print(f"{name:<50}" + "".join(f"{held:>8.3f}{width:>7.2f}" for held, width in places), flush=True)

    for name, (make, draw, places) in studies_of_runs().items():
        for by_run, noise in ((0.003, 0.003), (0.006, 0.002)):
            label = f"{name}, {100 * by_run:.1f}% {100 * noise:.1f}%"
            show(label, intervals_of_study(make, draw, places, by_run, noise, draws))
    for name, (law, table, out) in (left_out_of_tables(folder) if folder else {}).items():
        of, found = next(iter(law.outputs)), []
        law.fit(table[~out])
        for part in (table[~out], table[out]):
            mean, low, high = law.predict(interval=LEVEL, **{i: part[i].to_numpy(float) for i in law.inputs})
            inside = (low <= part[of]) & (part[of] <= high)
            found.append((float(inside.mean()), float(np.median((high - low) / mean))))
        show(name, found)
    return results


def fit_of_study(table: pd.DataFrame) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.parquet"
        table.to_parquet(path, index=False)
        began = time.perf_counter()
        fit = subprocess.Popen(
            [sys.executable, "-m", "spt_fast", "fit", str(path), "--json"], stdout=subprocess.DEVNULL
        )
        _, status, used = os.wait4(fit.pid, 0)
        assert status == 0
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": 1024 * used.ru_maxrss}


def recoveries(draw_from: dict[str, Callable[[np.random.Generator], dict[str, float]]], draws: int) -> dict[str, Any]:
    results = {}
    print(f"{'':<20}{'fit s':>8}{'worst':>7}{'covered':>9}{'held-out':>9}{'error %':>9}{'worst':>7}")
    for name, draw in draw_from.items():
        drawn_tables = [draw(np.random.default_rng(seed)) for seed in range(draws)]
        mean = {key: float(np.mean([d[key] for d in drawn_tables])) for key in drawn_tables[0]}
        worst = {key: float(np.max([d[key] for d in drawn_tables])) for key in drawn_tables[0]}
        results[name] = {"mean": mean, "worst": worst}
        print(
            f"{name:<20}{mean['seconds']:>8.2f}{worst['seconds']:>7.2f}{mean['fitted covered']:>9.3f}"
            f"{mean['held-out covered']:>9.3f}{100 * mean['held-out error']:>9.2f}"
            f"{100 * worst['held-out error']:>7.2f}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the results here")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--fits", action="store_true", help="measure `spt-fast fit` only")
    only.add_argument("--intervals", action="store_true", help="measure what intervals hold only")
    parser.add_argument("--tables", type=Path, help="a folder of public tables of runs, for the intervals")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", laws.LawWarning)
    about = machine("numpy", "scipy")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results: dict[str, Any] = {}
    if not (arguments.fits or arguments.intervals):
        draw_from = {name: by_formula(name) for name in TABLES}
        draw_from |= {"after finetuning": post_finetune, "CMR, general": critical_mixture}
        results |= recoveries(draw_from, arguments.draws)
    interval_draws = arguments.draws if arguments.intervals else INTERVAL_DRAWS
    if not arguments.fits:
        results |= intervals(interval_draws, arguments.tables)
    if not arguments.intervals:
        results |= fits_of_studies()
    if arguments.json:
        draws = {"draws": arguments.draws, "draws of intervals": interval_draws}
        arguments.json.write_text(json.dumps({"machine": about, **draws, "results": results}, indent=1) + "\n")


def fits_of_studies() -> dict[str, Any]:
    results = {}
    print(f"{'spt-fast fit':<20}{'s':>8}{'CPU s':>8}{'peak MB':>9}")
    for name, study in STUDIES.items():
        results[name] = fit = fit_of_study(study())
        print(f"{name:<20}{fit['seconds']:>8.1f}{fit['cpu_seconds']:>8.1f}{fit['peak_bytes'] / 1e6:>9.0f}", flush=True)
    return results


if __name__ == "__main__":
    main()

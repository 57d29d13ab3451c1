"""The pages of docs/ are right: commands and recipes in them parse as written, links lead somewhere, the site builds.

The tutorial runs as a whole in tests/test_tutorial.py, the README in tests/test_readme.py, the page of base models in
tests/test_base_models.py.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
import typer
import yaml

from spt_fast.cli import app
from spt_fast.config import Recipe, recipe_from
from spt_fast.fields import apply_overrides, key_of, parse_yaml
from spt_fast.study.study import study_from
from tests.pages import BLOCKS, PAGES, ROOT, Block, commands_of

COMMANDS = [pytest.param(command, id=f"{block} {command}"[:60]) for block in BLOCKS for command in commands_of(block)]
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = {
    "run": "run",
    "model": {"preset": "1m"},
    "sources": {name: {"train": name, "heldout": f"{name}.heldout"} for name in ("general", "chem")},
    "phases": [
        {"name": name, "tokens": "1M", "mixture": {"general": 1}, "optimizer": {"lr": 1e-3}}
        for name in ("pretrain", "finetune")
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_is_read_as_written(command: str) -> None:
    """Flags exist and values are of their types; nothing is run."""
    words = shlex.split(command)[1:]
    program: Any = typer.main.get_command(app)
    context = program.make_context("spt-fast", words)
    while hasattr(program, "commands"):
        name, program, rest = program.resolve_command(context, [*context._protected_args, *context.args])
        context = program.make_context(name, rest, parent=context)
    if context.command.name in ("train", "plan", "reweight"):
        apply_overrides(raw := yaml.safe_load(yaml.safe_dump(RECIPE)), context.params.get("overrides") or ())
        recipe_from(raw)


@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in BLOCKS if block.language == "yaml"])
def test_yaml_of_the_docs_is_a_recipe_a_study_or_a_part_of_one(block: Block) -> None:
    raw = parse_yaml(block.text, str(block))
    if "stages" in raw:
        study_from(raw)
    elif "output_type" not in raw:  # a task of lm-eval
        known = {key_of(item) for item in fields(Recipe)}
        assert set(raw) <= known, f"{block}: {set(raw) - known}"
        recipe_from(raw if "run" in raw else RECIPE | raw)


PYTHON = [block for block in BLOCKS if block.language == "python" and block.page not in ("README.md", "tutorial.md")]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_of_the_docs_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block.text, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_file(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", prose) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", prose)
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_references_are_what_the_dataclasses_say() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "reference.py"))["pages"]()
    assert [file.name for file in pages] == ["recipe.md", "studies_reference.md"]
    for file, text in pages.items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: write it again with `python docs/reference.py`"


def test_the_readme_is_at_most_200_lines_of_100_columns() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100 and not line.startswith(("|", "spt-fast "))] == []


def test_pictures_are_drawn_from_the_results(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs" / "figures.py"))["draw"](tmp_path)
    shown = {file.name: file.read_text() for file in (ROOT / "docs" / "img").glob("*.svg")}
    said = "docs/img is out of date: draw it again with `python docs/figures.py`"
    assert shown == {file.name: file.read_text() for file in tmp_path.iterdir()}, said


def ends_of(name: str) -> pd.DataFrame:
    """The finetunes of a study in benchmarks/results, one row each."""
    table = pd.read_csv(RESULTS / name)
    table = table[table.handed_on & (table.stage == 1)]
    return table.assign(forgotten=table.general_heldout - table.general_before)


def spt_against_npt(name: str) -> str:
    """Domain loss, R_gain seed by seed and forgetting at 6M tokens of pretraining, as the README writes them."""
    ends = ends_of(name)
    ends = ends[ends.pretrain_tokens > 5.9e6].set_index(["pretrain_delta", "seed"])
    npt, spt = ends.loc[0.0], ends.loc[0.1]
    gain = 100 * (npt.domain_heldout - spt.domain_heldout) / npt.domain_heldout
    domain = f"domain loss {npt.domain_heldout.mean():.3f} → {spt.domain_heldout.mean():.3f}"
    half_range = (gain.max() - gain.min()) / 2
    forgotten = f"forgetting {npt.forgotten.mean():.2f} → {spt.forgotten.mean():.2f} nats"
    return f"{domain} (R_gain {gain.mean():.1f} ± {half_range:.1f}%), {forgotten}"


def best_shares(name: str) -> str:
    """The share with the largest mean R_gain at every budget of pretraining, and what 10% does at the largest."""
    loss = ends_of(name).set_index(["pretrain_tokens", "pretrain_delta", "seed"]).domain_heldout.unstack(1)
    gains = (100 * (1 - loss.div(loss[0.0], axis=0))).groupby(level=0).mean()
    best = ", ".join(
        f"{own.idxmax():.0%} at {tokens / 1e6:.0f}M tokens ({own.max():.1f}%)" for tokens, own in gains.iterrows()
    )
    return f"best share (R_gain): {best}; there 10% loses {-gains[0.1].iloc[-1]:.1f}%"


def after_a_later_finetune(name: str) -> str:
    """Domain loss before and after a later finetune on other text, after NPT and after SPT with 5%."""
    table = pd.read_csv(RESULTS / name)
    later = table[table.handed_on & (table.stage == 2)]
    delta = later.run.str.extract(r"pretrain-d([0-9.]+)-", expand=False).astype(float)
    npt, spt = (
        f"{own.domain_before.mean():.2f} → {own.domain_heldout.mean():.2f}"
        for own in (later[delta == 0], later[delta == 0.05])
    )
    return f"domain loss {npt} in the second after NPT, {spt} after 5% SPT"


def test_the_table_of_the_readme_is_what_the_results_say() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {name: row for row in readme.splitlines() for name in re.findall(r"\(benchmarks/results/([^)]+)\)", row)}
    for name in ("2026-11-21-cpu2-spt-music.csv", "2026-11-21-cpu2-spt-smiles.csv"):
        assert spt_against_npt(name) in rows[name]
    assert best_shares("2026-11-29-cpu2-spt-abc.csv") in rows["2026-11-29-cpu2-spt-abc.csv"]
    assert after_a_later_finetune("2026-11-29-cpu2-third-abc.csv") in rows["2026-11-29-cpu2-third-abc.csv"]

    runs = json.loads((RESULTS / "2026-11-21-cpu2-spt-3m.json").read_text())["runs"]
    npt, spt = ({r["seed"]: r["domain_after"] for r in runs if r["delta"] == delta} for delta in (0, 0.1))
    gain = sum(100 * (npt[seed] - spt[seed]) / npt[seed] for seed in npt) / len(npt)
    assert f"R_gain −{abs(gain):.1f}%" in rows["2026-11-21-cpu2-spt-3m.json"]

    ends = ends_of("2026-11-28-cpu2-forgetting-base.csv")
    forgotten = ends[ends.anchor == 0].groupby(["injected", "average"]).forgotten.mean()
    taken_back = [f"{1 - forgotten[0.01, average] / forgotten[0, 0]:.0%}" for average in (0, 0.1)]
    said = "1% replay takes back {} of the forgetting, with averaging {}".format(*taken_back)
    assert said in rows["2026-11-28-cpu2-forgetting-base.csv"]

    loader = json.loads((RESULTS / "2026-11-21-cpu2-loader.json").read_text())["results"]
    ready, located = loader["schedule of 1e12 samples: build, ms"], loader["locate 2 sources, M/s"]
    assert f"ready in {ready:.2f} ms, {located:.0f}M positions" in rows["2026-11-21-cpu2-loader.json"]

    counts = json.loads((RESULTS / "2026-11-21-cpu2-faults.json").read_text())["first"]["results"]["counts"]
    damaged, full = counts["damaged checkpoints: survived"], counts["full disks: survived"]
    said = f"{counts['kills']} kills, {damaged} damaged checkpoints, {full} full disks"
    assert said in rows["2026-11-21-cpu2-faults.json"]


class Links(HTMLParser):
    """Where the links and pictures of a page lead, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.targets += [target for target in (given.get("href"), given.get("src")) if target]
        self.anchors |= {anchor for anchor in (given.get("id"), given.get("name") if tag == "a" else None) if anchor}


def dead_links(site: Path) -> list[str]:
    """Links inside of a site to a file that it lacks, or to an anchor that a page lacks."""
    pages = {page: Links(page) for page in site.rglob("*.html")}
    dead = []
    for page, links in pages.items():
        for target in links.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            path = unquote(url.path)
            place = (
                (site / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve() if path else page
            )
            place = place / "index.html" if place.is_dir() else place
            if not place.exists() or (url.fragment and unquote(url.fragment) not in pages[place].anchors):
                dead.append(f"{page.relative_to(site)}: {target}")
    return dead


def test_a_link_out_of_the_docs_leads_to_the_repository_or_is_text() -> None:
    hook = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_markdown"]

    def shown(repo_url: str | None) -> Any:
        page, config = SimpleNamespace(url="studies/"), SimpleNamespace(repo_url=repo_url, extra={})
        return hook("see [log](../benchmarks/LOG.md#today), [laws](laws.md)", page=page, config=config)

    assert shown(None) == "see log, [laws](laws.md)"
    there = "https://example.org/spt/blob/main/benchmarks/LOG.md#today"
    assert shown("https://example.org/spt") == f"see [log]({there}), [laws](laws.md)"


def test_the_site_builds_without_a_warning_and_no_link_in_it_is_dead(tmp_path: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    tmp_path = tmp_path.resolve()
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True, extra={"reports": False})
    build(config)
    assert "linear_cross_entropy" in (tmp_path / "kernels" / "index.html").read_text()
    assert dead_links(tmp_path) == []
    page = tmp_path / "why" / "index.html"
    page.write_text(page.read_text() + '<a href="../nowhere/">a</a><a href="../laws/#no-such-law">b</a>')
    assert dead_links(tmp_path) == ["why/index.html: ../nowhere/", "why/index.html: ../laws/#no-such-law"]

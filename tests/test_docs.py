"""The pages of docs/ are right: commands and recipes in them parse as written, links lead somewhere, the site builds.

The tutorial runs as a whole in tests/test_tutorial.py, the README in tests/test_readme.py.
"""

from __future__ import annotations

import re
import runpy
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from spt_fast.cli import app
from spt_fast.config import Recipe, recipe_from
from spt_fast.fields import apply_overrides, key_of, parse_yaml
from spt_fast.study.study import study_from
from tests.pages import BLOCKS, PAGES, ROOT, Block, commands_of

COMMANDS = [pytest.param(command, id=f"{block} {command}"[:60]) for block in BLOCKS for command in commands_of(block)]
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
        recipe_from(RECIPE | raw)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_file(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", prose) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", prose)
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_recipe_reference_is_what_the_dataclasses_say() -> None:
    reference = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    said = "docs/recipe.md is out of date: write it anew with `python docs/reference.py`"
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == reference["page"](), said


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    build(config)
    assert "linear_cross_entropy" in (tmp_path / "kernels" / "index.html").read_text()

"""MkDocs hooks: `::: package` stands for every name of its `__all__`; links out of docs/ lead to the repository; a link
to a study's table also leads to its report, drawn when the site is built (`extra: {reports: true}` in mkdocs.yml).
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import spt_fast

ROOT = Path(__file__).parents[1]
PACKAGE = re.compile(r"^::: ([a-z_.]+)$", re.MULTILINE)  # mkdocstrings handles classes, which have capitals
RESULTS = "benchmarks/results"
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def public_names(package: str) -> list[str]:
    """Where each function and class of a package's `__all__` is defined: spt_fast.train.run.run."""
    module = importlib.import_module(package)
    members = [getattr(module, name) for name in module.__all__]
    members = [getattr(member, "_call", member) for member in members]  # a package that is a call too
    return [f"{member.__module__}.{member.__qualname__}" for member in members if hasattr(member, "__qualname__")]


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    def entries(match: re.Match[str]) -> str:
        return "\n\n".join(f"::: {name}" for name in public_names(match[1]))

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{path}: a page links to it, and it does not exist")
        linked = f"[{text}]({config.repo_url}/blob/main/{path}{anchor or ''})" if config.repo_url else text
        if config.extra.get("reports") and path.startswith(RESULTS) and path.endswith(".csv"):
            linked += f' (<a href="{"../" * page.url.count("/")}reports/{Path(path).stem}.html">report</a>)'
        return linked

    return OUTSIDE.sub(link, PACKAGE.sub(entries, markdown))


def on_post_build(config: Any) -> None:
    if not config.extra.get("reports"):
        return
    folder = Path(config.site_dir) / "reports"
    folder.mkdir()
    for table in sorted((ROOT / RESULTS).glob("*.csv")):
        spt_fast.report(table, folder / f"{table.stem}.html")

"""MkDocs hooks: `::: package` stands for every name of its `__all__`; links out of docs/ lead to the repository."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = re.compile(r"^::: ([a-z_.]+)$", re.MULTILINE)  # a class, which has capitals, is left to mkdocstrings
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def public_names(package: str) -> list[str]:
    """Where each function and class of a package's `__all__` is defined: spt_fast.train.run.run."""
    module = importlib.import_module(package)
    members = [getattr(module, name) for name in module.__all__]
    members = [getattr(member, "_call", member) for member in members]  # a package that is a call too
    return [f"{member.__module__}.{member.__qualname__}" for member in members if hasattr(member, "__qualname__")]


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    def entries(match: re.Match[str]) -> str:
        return "\n\n".join(f"::: {name}" for name in public_names(match[1]))

    def link(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{path}: a page links to it, and it does not exist")
        return f"[{text}]({config.repo_url}/blob/main/{path}{anchor or ''})" if config.repo_url else text

    return OUTSIDE.sub(link, PACKAGE.sub(entries, markdown))

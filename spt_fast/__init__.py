"""spt_fast: a GPT trainer for specialized pretraining.

    import spt_fast as spt
    spt.run(spt.load_recipe("recipe.yaml"))

The names below are loaded on first use, so that `import spt_fast` costs nothing (worker processes rely on it).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spt_fast import laws
    from spt_fast.config import Recipe, load_recipe
    from spt_fast.data.mixture import Mixture
    from spt_fast.data.shards import TokenDataset
    from spt_fast.data.tokenizer import Tokenizer
    from spt_fast.model.config import GPTConfig
    from spt_fast.model.gpt import GPT
    from spt_fast.train.run import run

    __version__: str

_HOMES = {
    "GPT": "spt_fast.model.gpt",
    "GPTConfig": "spt_fast.model.config",
    "Mixture": "spt_fast.data.mixture",
    "Recipe": "spt_fast.config",
    "TokenDataset": "spt_fast.data.shards",
    "Tokenizer": "spt_fast.data.tokenizer",
    "load_recipe": "spt_fast.config",
    "run": "spt_fast.train.run",
}

__all__ = [
    "GPT",
    "GPTConfig",
    "Mixture",
    "Recipe",
    "TokenDataset",
    "Tokenizer",
    "__version__",
    "laws",
    "load_recipe",
    "run",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("spt-fast")
    if name == "laws":
        return import_module("spt_fast.laws")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spt_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

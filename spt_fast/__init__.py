"""spt_fast: a GPT trainer for specialized pretraining.

    import spt_fast as spt
    spt.train("recipe.yaml")

The calls are those of `spt_fast.library`. The names below are loaded on first use, so that `import spt_fast` costs
nothing (worker processes rely on it).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spt_fast import kernels, laws
    from spt_fast.config import Recipe, load_recipe
    from spt_fast.data.mixture import Mixture
    from spt_fast.data.shards import TokenDataset
    from spt_fast.data.tokenizer import Tokenizer
    from spt_fast.errors import SptError
    from spt_fast.library import (
        advise,
        audit,
        compare,
        evaluate,
        export,
        fit,
        generate,
        init,
        load_study,
        plan,
        prepare,
        report,
        sweep,
        tokenizer,
        train,
    )
    from spt_fast.model.config import GPTConfig
    from spt_fast.model.gpt import GPT
    from spt_fast.train.run import run

__version__ = "0.2.0"

_HOMES = {
    "GPT": "spt_fast.model.gpt",
    "GPTConfig": "spt_fast.model.config",
    "Mixture": "spt_fast.data.mixture",
    "Recipe": "spt_fast.config",
    "SptError": "spt_fast.errors",
    "TokenDataset": "spt_fast.data.shards",
    "Tokenizer": "spt_fast.data.tokenizer",
    "load_recipe": "spt_fast.config",
    "run": "spt_fast.train.run",
}
_CALLS = (
    "advise",
    "audit",
    "compare",
    "evaluate",
    "export",
    "fit",
    "generate",
    "init",
    "load_study",
    "plan",
    "prepare",
    "sweep",
    "tokenizer",
)
_HOMES |= dict.fromkeys(_CALLS, "spt_fast.library")
_ROOMS = ("kernels", "laws", "report", "train")

__all__ = [
    "GPT",
    "GPTConfig",
    "Mixture",
    "Recipe",
    "SptError",
    "TokenDataset",
    "Tokenizer",
    "__version__",
    "advise",
    "audit",
    "compare",
    "evaluate",
    "export",
    "fit",
    "generate",
    "init",
    "kernels",
    "laws",
    "load_recipe",
    "load_study",
    "plan",
    "prepare",
    "report",
    "run",
    "sweep",
    "tokenizer",
    "train",
]


class CallableRoom(ModuleType):
    """A package with the name of a call: `spt_fast.train` is the package, `spt_fast.train(recipe)` the call."""

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """The call's, which `help` shows."""
        from inspect import getdoc

        first, _, rest = (getdoc(self._call) or "").partition("\n")
        return f"{first}\n\n{self._call.__name__}{self.__signature__}\n{rest}"

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        return signature(self._call)

    @property
    def _call(self) -> Any:
        return getattr(import_module("spt_fast.library"), self.__name__.removeprefix("spt_fast."))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"spt_fast.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'spt_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Loads a study from its YAML file, or a ready one, which is completed with the user's data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_fast.errors import RecipeError, invalid, nearest, shown_path
from spt_fast.fields import apply_overrides, naming, read_yaml
from spt_fast.files import place
from spt_fast.study.study import Study, study_from
from spt_fast.study.tree import expand
from spt_fast.train.weights import read_config

READY = Path(__file__).with_name("ready")
"""The folder of ready studies, <name>.yaml, without data; with `init`, their section `from_base` replaces parts."""
WINDOW = 2048
"""Tokens of a window in studies that start from weights; their own context may be far longer."""


def load_study(name: str, overrides: Sequence[str] = (), *, given: Mapping[str, Any] | None = None) -> Study:
    """A study from its YAML file, or a ready one by name.

    overrides  "a.b=c" strings
    given      what completes a ready study: general, domain, tokenizer, out, and init, the weights to start from;
               with init the tokenizer is theirs

    Raises RecipeError, and CheckpointError for `init` without weights.
    """
    ready = name in ready_studies()
    name = name if ready else str(place(name, "study", RecipeError))
    if not ready and not os.path.exists(name):
        expected = f"give the path of a study in YAML; {nearest(name, ready_studies())}"
        raise RecipeError(f"{shown_path(name)}: neither a file nor a ready study; {expected}")
    raw = read_yaml(READY / f"{name}.yaml" if ready else name)
    if not isinstance(raw, dict):
        raise RecipeError(f"{name}: holds no study; write keys such as study, models, sources and stages")
    if "phases" in raw and "stages" not in raw:
        raise RecipeError(f"{name}: is a recipe, not a study; train it with `spt-fast train`")
    given = {key: value for key, value in (given or {}).items() if value}
    needless = list(given)
    if needless and not ready:
        raise RecipeError(
            f"{needless[0]}: is for ready studies ({', '.join(ready_studies())}); {name} has its own sources and "
            "folder; change them there",
            argument=True,
        )
    if ready:
        needed = ("general", "domain", "out") if "init" in given else ("general", "domain", "tokenizer", "out")
        if missing := [key for key in needed if key not in given]:
            raise RecipeError(
                f"{name}: a ready study needs your data; give {', '.join(f'`{key}=…`' for key in missing)}"
            )
        raw = _with_data(name, raw, given)
    with naming(name):
        apply_overrides(raw, overrides)
        loaded = study_from(raw)
        expand(loaded)  # finds invalid recipes
    return loaded


def _with_data(name: str, raw: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    from_base = raw.pop("from_base", None)
    if inits := [str(init) for init in given.get("init", ())]:
        if from_base is None:
            expected = f"{name} trains from scratch; leave it out, or use dcpt or forgetting"
            raise RecipeError(invalid("init", inits[0], expected), argument=True)
        raw |= from_base | {"models": [{"init": init} for init in inits]}
        with naming("init"):
            contexts = [read_config(Path(init)).context for init in inits]
        if max(contexts) > (window := min(WINDOW, *contexts)):
            for stage in raw["stages"]:
                stage["batch"]["context"] = window
    sources = {name: {"train": str(given[name]), "heldout": f"{given[name]}.heldout"} for name in ("general", "domain")}
    return {
        "study": str(given["out"]),
        "tokenizer": str(given["tokenizer"]) if "tokenizer" in given else None,
        "sources": sources,
        "general": "general",
        "domain": "domain",
        **raw,
    }


def ready_studies() -> list[str]:
    """Names of the ready studies."""
    return sorted(path.stem for path in READY.glob("*.yaml"))

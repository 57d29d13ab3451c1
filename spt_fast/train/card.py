"""The model card of an export: everything known of the weights, as README.md with the header that model hubs read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import torch

from spt_fast import __version__
from spt_fast.model.config import GPTConfig
from spt_fast.model.families import family_of
from spt_fast.model.flops import parameters
from spt_fast.train.origin import History, Origin, Part
from spt_fast.train.world import dtype_name

FILE = "README.md"

LICENCE = "# license: yours to choose; those of the base and of the data apply"

LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

With spt_fast: `spt-fast generate FOLDER`, `spt-fast eval FOLDER --data PREFIX`, or `init: FOLDER` in a recipe."""


def model_card(
    name: str,
    origin: Origin,
    config: GPTConfig,
    dtype: torch.dtype,
    begin: str | None = None,
    end: str | None = None,
) -> str:
    """The card in Markdown. begin: the token that began documents, if the tokenizer's files don't put it before a text.
    end: the one that ended them, if the base's settings don't end a text with it. The licence field is left to the
    user."""
    shape = f"{parameters(config):,} parameters ({family_of(config)}), {config.context:,} tokens of context"
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{LICENCE}\n---",
        f"# {_text(name)}",
        f"{shape}, stored in {dtype_name(dtype)}. Written by spt_fast {__version__}.",
        f"## Loading\n\n{LOADING}",
    ]
    parts += _making(origin)
    known = {
        "Computed in": origin.dtype,
        "Training window": origin.context and f"{origin.context:,} tokens",
        "Attention": origin.documents and "inside documents",
        "Tokenizer": origin.tokenizer and f"`{origin.tokenizer}`",
        "Documents began with": begin and f"{_code(begin)}; the tokenizer does not add it: prompts need it",
        "Documents ended with": end and f"{_code(end)}; the base's settings do not end a text with it",
    }
    if lines := [f"- {what}: {value}" for what, value in known.items() if value]:
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _making(of: Origin | Part) -> list[str]:
    """Sections on the training; for an average, on its models and the training of each."""
    name = f" of {_code(of.path)}" if isinstance(of, Part) else ""
    found = []
    if of.merged:
        rows = [[_code(part.path), part.share, f"`{part.digest}`"] for part in of.merged]
        found.append(
            f"## Average{name}\n\nThe average of these weights:\n\n{_table(['model', 'share', 'digest'], rows)}"
        )
    if of.history or not of.merged:
        training = _training(of.history) if of.history else "Not recorded."
        found.append(f"## Training{name}\n\n{training}")
    return [*found, *(section for part in of.merged for section in _making(part))]


def _training(history: History) -> str:
    base = (
        f"{_code(history.base)} (`{history.digests.get('init', 'unknown')}`)" if history.base else "none, from scratch"
    )
    phases = [
        [
            phase.name,
            f"{phase.tokens:,}",
            ", ".join(f"{_text(source)} {share}" for source, share in phase.mixture.items()),
            f"{phase.lr:g}",
            phase.optimizer,
            _treatment(phase.anchor, phase.average),
        ]
        for phase in history.phases
    ]
    losses = [
        [phase.name, _text(source), _loss(loss, phase.standard_errors.get(source))]
        for phase in history.phases
        for source, loss in phase.heldout.items()
    ]
    data = [
        [_text(field.removeprefix("sources.")), _code(history.names.get(field, "unknown")), f"`{digest}`"]
        for field, digest in sorted(history.digests.items())
        if field.startswith("sources.")
    ]
    return "\n\n".join(
        [
            f"Base: {base}.",
            _table(["phase", "tokens", "mixture", "learning rate", "optimizer", "kept near the start by"], phases),
            "Loss on held-out text, in nats per token ± its standard error, of the weights at the end of each phase:",
            _table(["phase", "source", "loss"], losses),
            "Data, by the digests of its token datasets:",
            _table(["source", "dataset", "digest"], data),
        ]
    )


def _treatment(anchor: float, average: str) -> str:
    parts = [f"anchor {anchor:g}"] if anchor else []
    return ", ".join(parts + ([f"average {average}"] if average not in ("", "0") else [])) or "—"


def _loss(loss: float | None, error: float | None) -> str:
    if loss is None or not math.isfinite(loss):
        return "not a number"
    return f"{loss:.4f}" + (f" ± {error:.4f}" if error else "")


def _text(name: str) -> str:
    """A name with its markup escaped."""
    return re.sub(r"[\\`*~<>\[\]]", r"\\\g<0>", name)


def _code(name: str) -> str:
    return f"`` {name} ``" if "`" in name else f"`{name}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

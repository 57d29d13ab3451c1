"""The text behind held-out losses: its documents and tokens, and the standard error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from spt_fast.errors import counted


@dataclass(frozen=True)
class Behind:
    """The text that a loss was measured on."""

    documents: int | None
    """None if it is not recorded."""
    tokens: int | None
    """None if a runs table of an earlier version doesn't record it."""
    standard_error: float | None
    """Over documents, nats per token; None for one document."""

    @classmethod
    def of(cls, phase: Mapping[str, Any], source: str) -> Behind | None:
        """The text behind a source's held-out loss after a phase of summary.json; None if an earlier version did not
        record it."""
        scored, error = (phase.get(key, {}).get("heldout", {}).get(source) for key in ("scored", "standard_errors"))
        return None if scored is None else cls(**scored, standard_error=error)

    @classmethod
    def of_rows(cls, rows: pd.DataFrame, corpus: str) -> Behind | None:
        """The text behind the "domain" or "general" losses in rows of a runs table: the fewest documents and tokens,
        the largest error; None if nothing is recorded."""
        found = {name: rows[f"{corpus}_{name}"].dropna() for name in NAMES if f"{corpus}_{name}" in rows}
        documents, tokens, errors = (found.get(name, pd.Series(dtype=float)) for name in NAMES)
        if documents.empty and tokens.empty and errors.empty:
            return None
        return cls(
            int(documents.min()) if len(documents) else None,
            int(tokens.min()) if len(tokens) else None,
            float(errors.max()) if len(errors) else None,
        )

    @classmethod
    def least(cls, known: Iterable[Behind]) -> Behind:
        """The fewest documents and tokens, the largest error."""
        every = list(known)
        documents, tokens, errors = (
            [value for one in every if (value := getattr(one, name)) is not None]
            for name in ("documents", "tokens", "standard_error")
        )
        return cls(min(documents, default=None), min(tokens, default=None), max(errors, default=None))

    @property
    def size(self) -> str:
        """Such as "12 documents, 3,456 tokens"; empty if neither is known."""
        documents = [] if self.documents is None else [counted(self.documents, "document")]
        return ", ".join(documents + ([] if self.tokens is None else [counted(self.tokens, "token")]))

    def __str__(self) -> str:
        """Such as "12 documents, 3,456 tokens, standard error 0.020"."""
        error = [] if self.standard_error is None else [f"standard error {self.standard_error:.3f}"]
        return ", ".join(filter(None, [self.size, *error]))


NAMES = ("documents", "scored", "error")
"""Suffixes of their columns in a runs table, after "domain" or "general"."""


def rests_on(behind: Mapping[str, Behind | None]) -> str:
    """A sentence on the text behind losses; behind: by the corpus's name, None if unknown."""
    known = [f"{name} {one}" for name, one in behind.items() if one is not None]
    if not known:
        return "the amount of held-out text is not recorded for these losses: the runs are of an earlier version"
    return f"losses are measured on the report half of the held-out text ({'; '.join(known)})"

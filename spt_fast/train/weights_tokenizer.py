"""The tokenizer of weights: the one that they were trained with, and the ids that end a text."""

from __future__ import annotations

import warnings
from pathlib import Path

from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.hf_tokenizer import HF_FILE, SLOW_FILES, HFTokenizer, without_hf_file
from spt_fast.data.tokenizer import Tokenizer, check_alike
from spt_fast.errors import CheckpointError, DataError, SptWarning
from spt_fast.model import hf
from spt_fast.train.folder import recipe_of
from spt_fast.train.origin import carrier_of, origin_of, run_of, tokenizer_file
from spt_fast.train.weights import locate, read_config


def tokenizer_of(path: Path, name: str | Path | None = None, *, needed: bool = False) -> BaseTokenizer | None:
    """The named tokenizer, else the one beside the weights at `path` or in their run; None if there is none, and with a
    warning if that of a base can't be read and isn't `needed`.

    CheckpointError for another one than the weights were trained with; a warning for ids for which they have no row.
    """
    weights = locate(path)
    origin, own = origin_of(weights), name or tokenizer_file(weights)
    known = origin.tokenizer
    try:
        source, found = (str(own), Tokenizer.load(own)) if own else _of_an_earlier_run(weights, known)
    except DataError as error:
        if needed or name or known or not own:
            raise
        says = f"{error}; until then no text can be prepared or generated with it"
        warnings.warn(says, SptWarning, stacklevel=2)
        return None
    if found is None:
        return None
    if known and found.digest != known:
        raise CheckpointError(
            f"tokenizer: {source} ({found.digest[:12]}) is not the one that the weights at {path} were trained with "
            f"({known[:12]}); give that one",
            argument=True,
        )
    if own and not name:
        check_alike(found, Path(own).parent)
    if doubt := found.beyond(read_config(weights).vocab_size):
        warnings.warn(f"tokenizer: {source} {doubt}", SptWarning, stacklevel=2)
    if origin.eos_id is not None:
        found.eos_id, found.bos_id = origin.eos_id, origin.bos_id
    elif known is None and isinstance(found, HFTokenizer):
        found.bos_id = found.usual_bos_id
    return found


def _of_an_earlier_run(weights: Path, known: str | None) -> tuple[str, BaseTokenizer | None]:
    """For weights of a run of an earlier version, which has no copy: where its tokenizer is, and the tokenizer; None if
    there is none. known: the digest that the weights record."""
    run = run_of(weights)
    source = recipe_of(run).tokenizer if run else None
    if source is None:
        place = weights / HF_FILE
        return str(place), Tokenizer.load(weights) if place.exists() else None
    try:
        found = Tokenizer.load(source)
    except DataError:
        says = f"{run} is of an earlier version and has no copy, and {source} is missing; name the one it was trained"
        raise CheckpointError(f"tokenizer: {says} with", argument=True) from None
    if known is None:
        warnings.warn(
            f"{run} is of an earlier version and doesn't record its tokenizer: {source} is assumed to be the same",
            SptWarning,
            stacklevel=3,
        )
    return source, found


def tokenizer_for(path: Path, name: str | Path | None = None) -> BaseTokenizer:
    """`tokenizer_of`; CheckpointError if there is none or no model, DataError if it must be converted first."""
    if found := tokenizer_of(path, name, needed=True):
        return found
    if any((path / file).exists() for file in SLOW_FILES):
        raise without_hf_file(path)
    read_config(path)  # a folder that holds no model is named as such
    raise CheckpointError(
        f"tokenizer: missing; {path} does not say which tokenizer its ids come from: name it", argument=True
    )


def ends_of(weights: Path, tokenizer: BaseTokenizer) -> list[int]:
    """The ids that end a text: the tokenizer's own, and those at which transformers ends a text of these weights."""
    carrier = carrier_of(weights)
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return own + (hf.stop_ids(carrier) if carrier else [])

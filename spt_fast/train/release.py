"""Outputs of a run: a Hugging Face folder with its tokenizer, and generated text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_fast.data.base_tokenizer import check_rows
from spt_fast.data.hf_tokenizer import HFTokenizer
from spt_fast.errors import CheckpointError, SptWarning, invalid, shown
from spt_fast.files import write_text
from spt_fast.model import hf
from spt_fast.model.config import GPTConfig
from spt_fast.outputs import check_name
from spt_fast.train.card import FILE as CARD
from spt_fast.train.card import model_card
from spt_fast.train.folder import owned
from spt_fast.train.origin import Origin, carrier_of, run_of, with_history
from spt_fast.train.weights import chosen, load_model, stored_dtype, stored_weights
from spt_fast.train.weights_tokenizer import ends_of, tokenizer_for, tokenizer_of
from spt_fast.train.world import pick_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

AT_A_TIME = 32
"""Texts that are generated in one batch."""


def export(
    path: Path,
    folder: Path,
    tokenizer: str | Path | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the weights at `path` as a Hugging Face folder, with their tokenizer if it is known; another model in that
    folder is replaced only with `overwrite`. dtype: fp32, bf16 or fp16; by default the stored one."""
    with outside_runs(folder):
        weights = chosen(path)
        shape_and_tensors, origin = stored_weights(weights), with_history(weights)
        write_release(weights, *shape_and_tensors, folder, tokenizer, origin, dtype=dtype, overwrite=overwrite)


def write_release(
    weights: Path,
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
    tokenizer: str | Path | None,
    origin: Origin,
    *,
    dtype: str | None,
    overwrite: bool,
) -> None:
    """Write tensors as a Hugging Face folder, with the files that belong to `weights`, as `export` does, and a model
    card, which replaces a README.md only with `overwrite`."""
    if dtype not in (None, *DTYPES):
        raise CheckpointError(invalid("dtype", dtype, f"write {', '.join(DTYPES)}"), argument=True)
    found = tokenizer_of(weights, tokenizer)
    stored_in, known = DTYPES[dtype] if dtype else stored_dtype(weights), origin.as_metadata()
    like, begin, end = carrier_of(weights), None, None
    stops = hf.stop_ids(like) if like else []
    named = tokenizer is not None
    hf.save(config, tensors, folder, found, stored_in, known, like=like, named=named, overwrite=overwrite)
    if isinstance(found, HFTokenizer) and found.bos_id not in (None, found.usual_bos_id):
        begin = found.name_of(found.bos_id)
        warnings.warn(
            f"{folder}: documents began with {begin!r} in training, but the tokenizer does not add it; write it before "
            "each prompt",
            SptWarning,
            stacklevel=2,
        )
    if isinstance(found, HFTokenizer) and origin.eos_id is not None and stops and origin.eos_id not in stops:
        end = found.name_of(origin.eos_id)
        warnings.warn(
            f"{folder}: documents ended with {end!r} ({origin.eos_id}) in training, but the base's settings end a text "
            f"with {shown(stops)}; add it to eos_token_id in {hf.GENERATION}, or stop at it where you generate",
            SptWarning,
            stacklevel=2,
        )
    if overwrite or not (folder / CARD).exists():
        write_text(folder / CARD, model_card(folder.resolve().name, origin, config, stored_in, begin, end))


def take_over(model: Path, folder: Path, *, overwrite: bool = False) -> None:
    """Copy a Hugging Face folder, checked and with our names, for a recipe's `init`."""
    config, tensors = hf.stored_weights(model)
    tokenizer_of(model)
    hf.stop_ids(model)
    with outside_runs(folder):
        hf.save(config, tensors, folder, like=model, overwrite=overwrite)


@contextmanager
def outside_runs(folder: Path) -> Iterator[None]:
    """Lock a folder outside of every run; CheckpointError for a folder of a run."""
    check_name(folder, "out")
    place = folder.resolve()
    around = [part.parent for part in (place, *place.parents) if part.name in ("weights", "checkpoints")]
    if run := next(filter(None, map(run_of, (place, *around))), None):
        raise CheckpointError(f"out: {folder} belongs to the run {run}; choose a folder outside it", argument=True)
    with owned(folder, "out"):
        yield


@dataclass(frozen=True)
class Generated:
    """Generated text."""

    prompt: str
    text: str
    """The prompt and its continuation."""
    new_tokens: int
    ended: bool
    """Whether a token that ends a text was drawn; `text` leaves it out."""


def generate_text(path: Path, prompt: str, tokens: int, *, tokenizer: str | Path | None = None, **sampling: Any) -> str:
    """The text of `generate_texts` for one prompt: the earlier call, which is kept for other people's code."""
    return next(generate_texts(path, [prompt], tokens, tokenizer=tokenizer, **sampling)).text


def generate_texts(
    path: Path, prompts: Iterable[str], tokens: int, *, tokenizer: str | Path | None = None, **sampling: Any
) -> Iterator[Generated]:
    """Text that continues each prompt, or begins a document if that is empty; in order, `AT_A_TIME` in a batch.
    `sampling`: arguments of `GPT.generate`."""
    weights = chosen(path)
    encoding = tokenizer_for(weights, tokenizer)
    model, eos, waiting = load_model(weights).to(pick_device()), encoding.eos_id, iter(prompts)
    ends = ends_of(weights, encoding)
    while batch := list(islice(waiting, AT_A_TIME)):
        before = [encoding.prompt(prompt) or ([] if eos is None else [eos]) for prompt in batch]
        for ids in before:
            check_rows(encoding, ids, model.config.vocab_size)
        after = model.generate_batch(before, tokens, stop_id=ends, vocab_size=encoding.vocab_size, **sampling)
        for prompt, given, ids in zip(batch, before, after, strict=True):
            ended = len(ids) > len(given) and ids[-1] in ends
            shown = ids[(encoding.bos_id is not None) if prompt else len(given) : len(ids) - ended]
            yield Generated(prompt, encoding.decode(shown, special=True), len(ids) - len(given), ended)

"""Commands from text to tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

import spt_fast as spt
from spt_fast.cli.flags import Dtype, Inputs, Json, PathArgument, PathOption, text
from spt_fast.cli.program import app, out, print_json, tokenizer_app
from spt_fast.printing import print_facts


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Inputs,
    vocab_size: Annotated[int, Option(help="Ids in all, the end-of-text id included.")],
    out_file: Annotated[Path, PathOption("--out", help="File for the tiktoken ranks.")],
    text_key: Annotated[str, Option(parser=text, help="Key or column of the text.")] = "text",
    skip_bad: Annotated[bool, Option(help="Leave broken lines out instead of stopping at the first.")] = False,
) -> None:
    """Train a byte-level BPE and save it as tiktoken ranks."""
    tokenizer = spt.tokenizer(inputs, vocab_size, out_file, text_key=text_key, skip_bad=skip_bad)
    out.print(f"{out_file}: {tokenizer.vocab_size:,} ids, end of text {tokenizer.eos_id}", soft_wrap=True)


@app.command()
def prepare(
    inputs: Inputs,
    out_prefix: Annotated[Path, PathOption("--out", metavar="PREFIX", help="Writes PREFIX.bin, .idx and .json.")],
    tokenizer: Annotated[
        Path, PathOption(help="A Hugging Face folder or tokenizer.json, a .tiktoken file, or a tiktoken name.")
    ],
    eos: Annotated[str | None, Option(metavar="TOKEN", help="Ends each document; the tokenizer's by default.")] = None,
    bos: Annotated[str | None, Option(metavar="TOKEN", help="Begins each document; none by default.")] = None,
    text_key: Annotated[str, Option(parser=text, help="Key or column of the text.")] = "text",
    heldout: Annotated[str | None, Option(metavar="SHARE", help="Of the text, in bytes; for PREFIX.heldout.")] = None,
    skip_bad: Annotated[bool, Option(help="Count broken lines instead of stopping at the first.")] = False,
    workers: Annotated[int | None, Option(help="Processes; all cores by default.")] = None,
    as_json: Json = False,
) -> None:
    """Turn text into a token dataset."""
    summary = spt.prepare(
        inputs,
        out_prefix,
        tokenizer,
        eos=eos,
        bos=bos,
        text_key=text_key,
        heldout=heldout,
        skip_bad=skip_bad,
        workers=workers,
    )
    print_json(summary) if as_json else print_facts(out, str(out_prefix), summary)


@app.command()
def inspect(
    prefix: Annotated[Path, PathArgument(metavar="PREFIX")],
    verify: Annotated[bool, Option(help="Check every hash and id.")] = False,
    overlap: Annotated[Path | None, PathOption(metavar="PREFIX2", help="Share of text that PREFIX2 holds too.")] = None,
    divergence: Annotated[Path | None, PathOption(metavar="PREFIX2", help="Distance from PREFIX2, in bits.")] = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """What a token dataset holds."""
    from spt_fast.data.inspection import inspect as inspect_dataset

    facts = inspect_dataset(prefix, dtype=dtype, verify=verify, overlap=overlap, divergence=divergence)
    print_json(facts) if as_json else print_facts(out, str(prefix), facts)

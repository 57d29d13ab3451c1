"""Commands that turn text into tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

import spt_fast as spt
from spt_fast.cli.flags import Dtype, Inputs, Json, PathArgument, PathOption, SkipBad, TextKey
from spt_fast.cli.program import app, example, out, print_json, tokenizer_app
from spt_fast.printing import print_facts, print_note


@tokenizer_app.command(
    "train",
    epilog=example("spt-fast tokenizer train general.jsonl chem.jsonl --vocab-size 16384 --out data/bpe.tiktoken"),
)
def tokenizer_train(
    inputs: Inputs,
    vocab_size: Annotated[int, Option(metavar="COUNT", help="Set the number of ids, end-of-text included.")],
    out_file: Annotated[Path, PathOption("--out", metavar="FILE", help="Write the tiktoken ranks to this file.")],
    text_key: TextKey = "text",
    skip_bad: SkipBad = False,
) -> None:
    """Train a byte-level BPE tokenizer."""
    tokenizer = spt.tokenizer(inputs, vocab_size, out_file, text_key=text_key, skip_bad=skip_bad)
    print_note(out, f"{out_file}: {tokenizer.vocab_size:,} ids, end of text {tokenizer.eos_id}")


@app.command(epilog=example("spt-fast prepare chem.jsonl --out data/chem --tokenizer data/bpe.tiktoken --heldout 5%"))
def prepare(
    inputs: Inputs,
    out_prefix: Annotated[
        Path, PathOption("--out", metavar="PREFIX", help="Write PREFIX.bin, PREFIX.idx and PREFIX.json.")
    ],
    tokenizer: Annotated[
        Path,
        PathOption(
            metavar="TOKENIZER", help="Use a .tiktoken file, a Hugging Face folder, or an encoding of tiktoken."
        ),
    ],
    eos: Annotated[
        str | None, Option(metavar="TOKEN", help="End each document with this token; by default the tokenizer's own.")
    ] = None,
    bos: Annotated[
        str | None, Option(metavar="TOKEN", help="Begin each document with this token; by default with none.")
    ] = None,
    text_key: TextKey = "text",
    heldout: Annotated[
        str | None, Option(metavar="SHARE", help="Hold out this share of the text as PREFIX.heldout, such as 5%.")
    ] = None,
    skip_bad: SkipBad = False,
    workers: Annotated[
        int | None, Option(metavar="COUNT", help="Use this many processes; by default one for each core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn text into a token dataset, with a held-out part."""
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


@app.command(epilog=example("spt-fast inspect data/chem.heldout --verify --overlap data/chem"))
def inspect(
    prefix: Annotated[Path, PathArgument(metavar="PREFIX", help="The prefix of a dataset.")],
    verify: Annotated[bool, Option(help="Check every hash and every id.")] = False,
    overlap: Annotated[
        Path | None, PathOption(metavar="PREFIX2", help="Measure how much of the text is in PREFIX2 too.")
    ] = None,
    divergence: Annotated[
        Path | None, PathOption(metavar="PREFIX2", help="Measure the distance to the text of PREFIX2, in bits.")
    ] = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show what a token dataset holds, and check it."""
    from spt_fast.data.inspection import inspect as inspect_dataset

    facts = inspect_dataset(prefix, dtype=dtype, verify=verify, overlap=overlap, divergence=divergence)
    if as_json:
        print_json(facts)
        return
    if "overlap" in facts:
        facts["overlap"] = {name if name == "with" else f"{name}_share": got for name, got in facts["overlap"].items()}
    print_facts(out, str(prefix), facts)

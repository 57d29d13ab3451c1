"""Commands for weights: export, merge, import, generation, kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import BadParameter, Option

import spt_fast as spt
from spt_fast.cli.flags import (
    Json,
    ManyValues,
    OutFolder,
    Overrides,
    Overwrite,
    PathArgument,
    PathOption,
    WeightsDtype,
    WeightsPath,
    is_number,
    text,
)
from spt_fast.cli.program import app, example, out, print_json
from spt_fast.printing import print_named, print_note, print_table


@app.command("export", epilog=example("spt-fast export runs/spt --out hf --dtype bf16"))
def export_weights(
    weights: WeightsPath,
    out_folder: OutFolder,
    tokenizer: Annotated[
        Path | None,
        PathOption(metavar="TOKENIZER", help="Save this tokenizer with the weights; by default the run's own."),
    ] = None,
    dtype: WeightsDtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Write weights as a Hugging Face folder."""
    spt.export(weights, out_folder, tokenizer, dtype=dtype, overwrite=overwrite)
    print_note(out, f"{out_folder}: load it with AutoModelForCausalLM.from_pretrained")


@app.command(
    "merge",
    cls=ManyValues.of("--weights", is_number),
    epilog=example("spt-fast merge runs/spt runs/spt/weights/pretrain --weights 0.9 0.1 --out merged"),
)
def merge_weights(
    models: Annotated[list[Path], PathArgument(metavar="MODEL", help="Two or more runs or folders of weights.")],
    weights: Annotated[list[str], Option(metavar="WEIGHT…", help="Give each model its weight, such as 0.9 0.1.")],
    out_folder: OutFolder,
    tokenizer: Annotated[
        Path | None,
        PathOption(metavar="TOKENIZER", help="Save this tokenizer with the weights; by default the first model's."),
    ] = None,
    dtype: WeightsDtype = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Average the weights of models, such as a finetune and its base."""
    from spt_fast.train.merge import merge

    shares = merge(models, weights, out_folder, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite)
    parts = [{"model": str(model), "share": str(share)} for model, share in zip(models, shares, strict=True)]
    if as_json:
        print_json({"out": str(out_folder), "parts": parts})
    else:
        print_table(out, str(out_folder), ["model", "share"], [[*part.values()] for part in parts])


@app.command("import", epilog=example("spt-fast import SmolLM2-135M --out bases/smollm2"))
def import_weights(
    folder: Annotated[Path, PathArgument(metavar="DIR", help="A Hugging Face folder with safetensors.")],
    out_folder: Annotated[Path, PathOption("--out", metavar="CHECKPOINT", help="Copy the weights to this folder.")],
    overwrite: Overwrite = False,
) -> None:
    """Check that a Hugging Face model can be trained further, and copy it for a recipe's `init`."""
    from spt_fast.train.release import take_over

    take_over(folder, out_folder, overwrite=overwrite)
    print_note(out, f"{out_folder}: name it in a recipe as `init: {out_folder}`")


@app.command(epilog=example("spt-fast generate runs/spt --prompt 'The reaction' --tokens 200"))
def generate(
    weights: WeightsPath,
    prompt: Annotated[
        list[str] | None,
        Option(metavar="TEXT", parser=text, help="Continue this text, or begin a document without one; repeatable."),
    ] = None,
    prompts: Annotated[
        Path | None,
        PathOption(
            metavar="FILE", help='Read prompts from a .jsonl file with the key "prompt", or one from each line.'
        ),
    ] = None,
    tokens: Annotated[
        int, Option(min=0, max=1_000_000, metavar="COUNT", help="Generate at most this many tokens.")
    ] = 100,
    temperature: Annotated[
        float, Option(metavar="NUMBER", help="Sample at this temperature; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[int | None, Option(metavar="K", help="Sample among the K likeliest tokens.")] = 50,
    top_p: Annotated[
        float | None, Option(metavar="P", help="Sample among the likeliest tokens with total probability P.")
    ] = None,
    seed: Annotated[int, Option(metavar="NUMBER", help="Set the seed of the samples.")] = 0,
    tokenizer: Annotated[
        Path | None,
        PathOption(metavar="TOKENIZER", help="Use this tokenizer; by default the run's own."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text with a trained model."""
    from spt_fast.train.prompts import read_prompts
    from spt_fast.train.release import generate_texts

    asked = [*(prompt or []), *(read_prompts(prompts) if prompts else [])] or [""]
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    generated = generate_texts(weights, asked, tokens, tokenizer=tokenizer, **sampling)
    if as_json:
        print_json([*generated])
        return
    for i, one in enumerate(generated):
        print(f"\n---\n\n{one.text}" if i else one.text, flush=True)


@app.command(epilog=example("spt-fast kernels recipe.yaml --tune"))
def kernels(
    recipe: Annotated[
        Path | None,
        PathArgument(metavar="RECIPE", help="Take the shapes of this recipe; by default those of a small model."),
    ] = None,
    overrides: Overrides = None,
    tune: Annotated[bool, Option("--tune", help="Measure what has not been measured yet.")] = False,
    seconds: Annotated[
        float | None, Option(min=1, metavar="NUMBER", help="Stop --tune after this many seconds; by default 300.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which backend each op uses on this machine, and why."""
    from spt_fast.train.tuning import overview

    if seconds is not None and not tune:
        raise BadParameter("--seconds is for measuring; add --tune")
    chosen, found = overview(recipe, overrides or (), seconds=(seconds or 300.0) if tune else None)
    if as_json:
        print_json({**chosen, **({"measured": found} if found else {})})
    else:
        print_named(out, "kernels", chosen)
        print_note(out, "N times: as many times as fast, on the machine in brackets")

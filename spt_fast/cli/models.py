"""Commands for weights: out, in, and what they write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

import spt_fast as spt
from spt_fast.cli.flags import (
    Json,
    ManyValues,
    Overrides,
    Overwrite,
    PathArgument,
    PathOption,
    WeightsDtype,
    WeightsPath,
    text,
)
from spt_fast.cli.program import app, out, print_json
from spt_fast.printing import print_facts, print_table


@app.command("export")
def export_weights(
    weights: WeightsPath,
    out_folder: Annotated[Path, PathOption("--out", metavar="DIR")],
    tokenizer: Annotated[Path | None, PathOption(help="Saved along for AutoTokenizer; a run's own by default.")] = None,
    dtype: WeightsDtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a Hugging Face folder, in the form of the base that the weights come from."""
    spt.export(weights, out_folder, tokenizer, dtype=dtype, overwrite=overwrite)
    out.print(f"{out_folder}: load it with AutoModelForCausalLM.from_pretrained", soft_wrap=True)


@app.command("merge", cls=ManyValues.of("--weights"))
def merge_weights(
    models: Annotated[list[Path], PathArgument(metavar="MODEL…", help="Two or more runs or folders of weights.")],
    weights: Annotated[list[str], Option(metavar="WEIGHT…", help="One a model, such as 0.9 0.1.")],
    out_folder: Annotated[Path, PathOption("--out", metavar="DIR")],
    tokenizer: Annotated[Path | None, PathOption(help="Saved along; the first model's own by default.")] = None,
    dtype: WeightsDtype = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Average the weights of models, such as a finetuned one and its base, into a Hugging Face folder."""
    from spt_fast.train.merge import merge

    shares = merge(models, weights, out_folder, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite)
    parts = [{"model": str(model), "share": str(share)} for model, share in zip(models, shares, strict=True)]
    if as_json:
        print_json({"out": str(out_folder), "parts": parts})
    else:
        print_table(out, str(out_folder), ["model", "share"], [[*part.values()] for part in parts])


@app.command("import")
def import_weights(
    folder: Annotated[Path, PathArgument(metavar="DIR", help="A Hugging Face folder: Llama, Qwen2 or Qwen3.")],
    out_folder: Annotated[Path, PathOption("--out", metavar="CHECKPOINT")],
    overwrite: Overwrite = False,
) -> None:
    """Check that a Hugging Face folder can be trained on, and copy it to where a recipe's `init` may point."""
    from spt_fast.train.release import take_over

    take_over(folder, out_folder, overwrite=overwrite)
    out.print(f"{out_folder}: name it in a recipe as `init: {out_folder}`", soft_wrap=True)


@app.command()
def generate(
    weights: WeightsPath,
    prompt: Annotated[
        list[str] | None, Option(parser=text, help="May be repeated; without any, a document begins.")
    ] = None,
    prompts: Annotated[
        Path | None, PathOption(metavar="FILE", help='.jsonl with "prompt", or a prompt a line.')
    ] = None,
    tokens: Annotated[int, Option(min=0, max=1_000_000, help="How many to generate.")] = 100,
    temperature: Annotated[float, Option(help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int | None, Option(help="Sample among the k likeliest only.")] = 50,
    top_p: Annotated[float | None, Option(help="And among the likeliest whose probabilities sum to this.")] = None,
    seed: int = 0,
    tokenizer: Annotated[Path | None, PathOption(help="A run's own by default.")] = None,
    as_json: Json = False,
) -> None:
    """Text from a trained model; each text is drawn by the seed alone."""
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


@app.command()
def kernels(
    recipe: Annotated[
        Path | None, PathArgument(metavar="[RECIPE]", help="Whose shapes; a small model by default.")
    ] = None,
    overrides: Overrides = None,
    tune: Annotated[bool, Option("--tune", help="Measure what is not measured yet.")] = False,
    seconds: Annotated[float, Option(min=1, help="At most, for --tune.")] = 300.0,
    as_json: Json = False,
) -> None:
    """The backend that each op uses on this machine, and why: a measurement at these shapes, or else what is known."""
    from spt_fast.train.tuning import overview

    chosen, found = overview(recipe, overrides or (), seconds=seconds if tune else None)
    if as_json:
        print_json({**chosen, **({"measured": found} if found else {})})
    else:
        print_facts(out, "kernels", chosen)

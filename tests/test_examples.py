"""The ready recipes, study and notebook in examples/ work as they are written, with stand-ins for data and bases."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_fast.config import load_recipe
from spt_fast.data.prepare import prepare
from spt_fast.data.tokenizer import train_tokenizer
from spt_fast.model.config import GPTConfig
from spt_fast.model.gpt import GPT
from spt_fast.model.presets import PRESETS
from spt_fast.study.load import load_study
from spt_fast.train.plan import make_plan
from spt_fast.train.price import Machine, phase_memory, price, speed_of

EXAMPLES = Path(__file__).parents[1] / "examples"
BASES = {"Llama-3.2-3B": "3b", "Llama-3.2-1B": "1b", "SmolLM2-135M": "124m"}
"""With the preset whose size and vocabulary is nearest."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    texts = {name: folder / f"{name}.jsonl" for name in ("general", "chem")}
    for name, file in texts.items():
        lines = (json.dumps({"text": f"{name} {i} of {i * i} and {i % 7} more words" * 20}) for i in range(200))
        file.write_text("\n".join(lines))
    tokenizer = train_tokenizer([*map(str, texts.values())], 300, folder / "bpe.tiktoken", progress=False)
    for where in ("data", "data/llama", "data/smollm2"):
        for name, file in texts.items():
            (folder / where).mkdir(parents=True, exist_ok=True)
            prepare(file, folder / where / name, tokenizer, heldout=Fraction(1, 5), workers=1, progress=False)
    tokenizer.save(folder / "data" / "bpe.tiktoken")
    shape = GPTConfig(layers=1, width=16, heads=1, kv_heads=1, ffn=16, context=8192, vocab_size=320)
    for base in BASES:
        GPT(shape).save_hf(folder / "bases" / base, tokenizer)
    return folder


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore::spt_fast.errors.SptWarning")
def test_an_example_is_planned_and_fits_its_machine(file: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    written = file.read_text()
    assert max(map(len, written.splitlines())) <= 100
    assert f"examples/{file.name}" in written
    if file.stem == "study":
        assert load_study(str(file)).domain == "chem"
        return
    recipe = load_recipe(file)
    gpus = 8 if "eight" in file.stem else 1
    plan = make_plan(recipe, world=gpus)
    machine = Machine.of(recipe, gpus=gpus, gpu="H100", memory=80 * 10**9)
    for times in price(plan, machine, speed_of(plan, machine)).times:
        asked = recipe.phases[[phase.name for phase in recipe.phases].index(times.phase)]
        evaluations = 1 / float(asked.evaluation.every.amount) + 1 + bool(asked.average)
        scored = evaluations * asked.evaluation.tokens * 1.5 * len(recipe.sources)
        assert scored / 3 <= 0.1 * asked.tokens, f"{times.phase} would be evaluated for {scored:,.0f} tokens"
    preset = recipe.model.preset or BASES[Path(recipe.init or "").name]
    real = replace(plan, model=GPTConfig(**PRESETS[preset]))
    for index in range(len(plan.phases)):
        assert machine.holds(phase_memory(real, index, machine).total)


def test_the_notebook_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    cells = json.loads((EXAMPLES / "library.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["trained"].status == "done"
    assert names["audited"]["chem"].epochs > 1
    assert torch.is_tensor(names["loss"])

"""Every `spt-fast` command of the README runs as written, on small text under the names that it uses."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml

from spt_fast.fields import read_yaml
from spt_fast.study import sweep as sweeping
from tests.pages import ROOT, blocks_of, commands_of, run
from tests.study.tiny_study import HereAlone

pytestmark = pytest.mark.long

README = ROOT / "README.md"
BLOCKS = list(blocks_of(README))
RECIPE, FINETUNE = (block.text for block in BLOCKS if block.language == "yaml")
COMMANDS = [command for block in BLOCKS if block.language == "sh" for command in commands_of(block)]
PREPARING = [
    command for command in COMMANDS if command.split()[1] in ("tokenizer", "prepare") and "base" not in command
]
USING = [command for command in COMMANDS if command not in PREPARING]
WORDS = {
    "general": "the a of and river city walked under seven old house",
    "chem": "acid base CCO C1=CC=CC=C1 moles react heat",
}
REPORTING = [
    "plan recipe.yaml",
    "compare runs/npt runs/spt",
    "audit runs/spt",
    "audit runs/spt --source chem --document 7",
    "inspect data/chem",
    "kernels",
    "eval runs/spt --data data/chem.heldout",
    "eval runs/spt --tasks questions.jsonl",
    "checkpoint list runs/spt",
    "checkpoint verify runs/spt",
    "fit studies/chem",
    "report studies/chem",
    "advise --domain-tokens 30M --budget 20B --runs studies/chem",
]
SMALLER = {
    "model": {"layers": 1, "width": 32, "heads": 2, "context": 32},
    "phases.pretrain": {"tokens": "8K", "batch": {"sequences": 8}, "eval": {"every": "50%", "tokens": "2K"}},
    "phases.finetune": {"tokens": "2K", "batch": {"sequences": 4}, "schedule": {"name": "constant", "warmup": "10%"}},
}
SMALLER_BASE = {"phases.finetune": {"tokens": "2K", "batch": {"sequences": 4}}}
SMALLER_STUDY = {
    "seeds": "1",
    "models": "{layers: 1, width: 32, heads: 2, context: 32}",
    "domain_tokens": "1K",
    "stages.pretrain.delta": "[0, 25%]",
    "stages.pretrain.budgets": "[4K, 8K]",
    "stages.pretrain.batch": "{sequences: 8}",
    "stages.pretrain.eval": "{every: 2K, tokens: 2K}",
    "stages.finetune.tokens": "2K",
    "stages.finetune.batch": "{sequences: 4}",
    "stages.finetune.eval": "{every: 50%, tokens: 2K}",
    "stages.finetune.grid": "null",
    "stages.finetune.schedule": "{name: constant, warmup: 10%}",
}


def smaller(command: str) -> str:
    """A sweep in seconds, and the start of a training that `init` has sized for an hour."""
    if "train chem/recipe.yaml" in command:
        return f"{command} --dry-run"
    changes = "".join(f" --set '{key}={value}'" for key, value in SMALLER_STUDY.items())
    return command + changes if " sweep " in command else command


def write_recipe(path: Path, text: str, smaller: dict[str, Any]) -> None:
    """The README's recipe with small settings in their places."""
    path.write_text(text)
    raw = read_yaml(path)
    if "model" in raw:
        raw["model"] = SMALLER["model"]
    for phase in raw["phases"]:
        phase |= smaller[f"phases.{phase['name']}"]
    path.write_text(yaml.safe_dump(raw))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts and the recipe that the README speaks of, small, with the preparing commands already run."""
    folder = tmp_path_factory.mktemp("readme")
    rng = random.Random(0)
    for name, words in WORDS.items():
        documents = [" ".join(rng.choices(words.split(), k=rng.randrange(20, 200))) + f" {i}." for i in range(400)]
        text = "\n".join(json.dumps({"text": document}) for document in documents).encode()
        if name == "general":
            with pa.output_stream(folder / "general.jsonl.zst", compression="zstd") as stream:
                stream.write(text)
        else:
            (folder / "chem.jsonl").write_bytes(text)
    question = {"question": "Which reacts?", "choices": ["acid", "river"], "answer": "A"}
    (folder / "questions.jsonl").write_text(json.dumps(question))
    write_recipe(folder / "recipe.yaml", RECIPE, SMALLER)
    write_recipe(folder / "finetune.yaml", FINETUNE, SMALLER_BASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in PREPARING:
            assert run(command.replace("32768", "400")) == 0, command
    return folder


def test_the_example_of_the_kernels_runs() -> None:
    q, k, v = (torch.randn(2, 8, heads, 16) for heads in (4, 2, 2))
    given = {"x_ND": q.reshape(16, 64), "weight_VD": torch.randn(9, 64), "targets_N": torch.arange(16) % 9}
    given |= {"q_BTHD": q, "k_BTHD": k, "v_BTHD": v, "cuts": torch.tensor([0, 5, 16], dtype=torch.int32)}
    code = next(block.text for block in BLOCKS if block.language == "python")
    exec(code, given)
    shown = re.findall(r"^(mixture\.\w+\(.*?\))  # (\(.*?\)|\{.*?\})", code, re.MULTILINE)
    assert [repr(eval(call, given)) for call, _ in shown] == [result for _, result in shown]
    assert len(shown) == 2
    assert given["loss"].shape == ()
    assert given["o"].shape == q.shape


def test_there_are_commands_to_run() -> None:
    assert len(PREPARING) == 3
    documented = {command.split()[1] for command in USING}
    assert documented >= {"train", "plan", "compare", "audit", "inspect", "eval", "export", "generate"}
    assert documented >= {"sweep", "fit", "advise", "report", "reweight"}


def test_every_command_runs_in_the_order_of_the_readme(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sweeping, "Local", lambda *_: HereAlone())
    for command in USING:
        if "--tokenizer base" in command and not Path("base").exists():
            shutil.copytree("hf", "base")  # stands for the base model of the README
        assert run(smaller(command)) == 0, command + capsys.readouterr().err
    assert (workplace / "tuned" / "model.safetensors").exists()
    assert (workplace / "cmp" / "comparison.png").stat().st_size > 10_000
    assert (workplace / "hf" / "tokenizer.json").exists()
    assert (workplace / "studies" / "chem" / "table.parquet").exists()
    assert "<svg" in (workplace / "chem.html").read_text()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workplace / "hf")
    model = AutoModelForCausalLM.from_pretrained(workplace / "hf")
    assert model(**tokenizer("acid base", return_tensors="pt")).logits.shape[-1] == 448  # 400 rounded up to 64s

    for command in REPORTING:
        capsys.readouterr()
        assert run(f"spt-fast {command} --json") == 0, command
        json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train absent.yaml", "absent.yaml: cannot be read"),
        ("train recipe.yaml --set phases.pretrain.tokns=1M", "tokns: unknown key; did you mean 'tokens'"),
        ("eval absent --data data/chem", "absent: is not a folder"),
        ("inspect data/absent", "data/absent"),
        ("prepare chem.jsonl --out data/x --tokenizer absent.tiktoken", "absent.tiktoken"),
        ("prepare chem.jsonl --out data/x --tokenizer data/bpe.tiktoken --heldout 5", "--heldout"),
        ("audit data", "holds no recipe.yaml"),
        ("compare runs/absent", "runs/absent"),
        ("tokenizer train nothing.jsonl --vocab-size 300 --out t.tiktoken", "nothing.jsonl"),
        ("sweep absent.yaml", "absent.yaml: neither a file nor a ready study"),
        ("sweep spt", "spt: a ready study needs your data; give --general …, --domain …, --tokenizer …, --out …"),
        ("fit absent", "absent: is neither a study"),
        ("report absent", "absent: is neither a study"),
        ("advise --domain-tokens 30X --budget 20B", "--domain-tokens: '30X' is invalid"),
        ("reweight recipe.yaml --target cem", "--target: 'cem' is invalid: name a source; did you mean 'chem'"),
        ("train", "RECIPE"),
        ("train recipe.yaml --resum", "--resum"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    monkeypatch.chdir(workplace)
    assert run(f"spt-fast {command}") == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error

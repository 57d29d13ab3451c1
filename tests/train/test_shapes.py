"""Other shapes than the plain one in a whole run: train, checkpoint, resume, untie, pass weights on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spt_fast.config import recipe_from
from spt_fast.model.gpt import GPT
from spt_fast.train.run import run
from tests import tiny

transformers = pytest.importorskip("transformers")

SHAPES: list[dict[str, Any]] = [
    {"qkv_bias": True, "qk_norm": False},
    {
        "rope_scaling": {
            "factor": 4,
            "low_freq_factor": 1,
            "high_freq_factor": "4e0",
            "original_max_position_embeddings": 8,
        }
    },
    {
        "norms": "after",
        "qk_norm_over": "width",
        "window": 3,
        "full_layers": [1],
        "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8},
        "scaled_windows": False,
    },
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: next(iter(shape)))
def test_a_run_of_this_shape_resumes_to_itself_and_its_weights_are_those_of_transformers(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    tiny.write_corpora(tmp_path)
    raw = tiny.raw_recipe(tmp_path)
    raw |= {"model": raw["model"] | shape, "checkpoint": {"every": "7 steps", "keep": 99}}
    raw["phases"][1] |= {"grid": None, "stop": None}
    assert run(recipe_from(raw), progress=False)["status"] == "done"
    killed = Path(shutil.copytree(raw["run"], tmp_path / "killed"))
    (killed / "summary.json").unlink()
    for lost in sorted((killed / "checkpoints").iterdir())[2:]:
        shutil.rmtree(lost)
    assert run(recipe_from(raw | {"run": str(killed)}), resume=True, progress=False)["status"] == "done"
    assert tiny.metrics(killed) == tiny.metrics(Path(raw["run"]))

    tokens = torch.arange(2 * tiny.CONTEXT).view(2, -1) % tiny.VOCAB
    for phase, tied in (("pretrain", True), ("finetune", False)):
        folders = [folder / "weights" / phase for folder in (Path(raw["run"]), killed)]
        tensors, again = (load_file(folder / "model.safetensors") for folder in folders)
        assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
        ours = GPT.from_hf(folders[0]).float()
        assert ours.config.tied is tied
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
        assert all(parameter.abs().sum() > 0 for parameter in ours.parameters())

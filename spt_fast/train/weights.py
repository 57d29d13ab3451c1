"""Trained weights in any place: a run, its weights/<phase>, one of its checkpoints, or a Hugging Face folder.

weights/<phase> is a Hugging Face folder itself, so that a run's result needs no conversion.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spt_fast.errors import CheckpointError, SptWarning
from spt_fast.files import download
from spt_fast.model import hf
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train import checkpoint
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.lineage import weights_digest
from spt_fast.train.state import SavedState


def is_checkpoint(weights: Path) -> bool:
    """Whether located weights are a run's checkpoint; else they are a Hugging Face folder."""
    return (weights / "manifest.json").exists()


def read_config(path: Path) -> GPTConfig:
    """The shape of the weights at `path`; CheckpointError if there are none."""
    path = locate(path)
    if is_checkpoint(path):
        return SavedState.read(checkpoint.read(path), path).model
    return hf.read_config(path)


def digest_of(path: Path) -> str:
    """A digest of samples of the weights at `path`; CheckpointError if there are none."""
    return weights_digest(locate(path))


def stored_weights(path: Path) -> tuple[GPTConfig, Mapping[str, Tensor]]:
    """Shape and weights at `path`, fp32 on the CPU, each read when needed; for a run, those of its last finished phase.
    CheckpointError if some are missing."""
    path = locate(path)
    if not is_checkpoint(path):
        return hf.stored_weights(path, torch.float32)
    return read_config(path), checkpoint.load(path)["current"].weights


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype of the weights at `path`; float32 if their tensors differ in it."""
    path = locate(path)
    return torch.float32 if is_checkpoint(path) else hf.stored_weights(path)[1].like["embedding"].dtype


def load_model(path: Path) -> GPT:
    """The model of `stored_weights`."""
    config, weights = stored_weights(path)
    return GPT.with_weights(config, dict(weights))


def chosen(path: Path) -> Path:
    """`locate`, with a warning that names the weights where they are not those of a finished run's last phase."""
    if doubt := unfinished(path):
        warnings.warn(doubt, SptWarning, stacklevel=3)
    return locate(path)


def unfinished(path: Path) -> str | None:
    """If `path` is a run that isn't done, or lacks its last weights, which of its weights are used, and why."""
    weights = locate(path)
    if weights == path:
        return None
    summary, last = summary_of(path) or {"status": "not finished"}, path / "weights" / recipe_of(path).phases[-1].name
    if summary["status"] == "done":
        return None if weights == last else f"{last}: is missing; {weights} is used. Put it back, or name other weights"
    why = f" ({summary['reason']})" if summary.get("reason") else ""
    return f"{path}: is {summary['status']}{why}; {weights} is used"


def locate(path: Path) -> Path:
    """The folder of the weights that `path` means: for a run its newest weights/<phase>, else its newest checkpoint."""
    if not path.is_dir():
        remedy = "give the folder that holds it" if path.is_file() else download(path)
        expected = "give a run, its weights/<phase>, a checkpoint or a Hugging Face folder"
        raise CheckpointError(f"{path}: is not a folder; {remedy or expected}")
    if not (path / "recipe.yaml").exists():
        return path
    folders = [path / "weights" / phase.name for phase in reversed(recipe_of(path).phases)]
    done = [folder for folder in folders if (folder / hf.CONFIG).exists()]  # the config is written last
    if done:
        return done[0]
    found = checkpoint.newest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path}: holds neither weights nor a checkpoint; give a run that has trained")
    return found.path

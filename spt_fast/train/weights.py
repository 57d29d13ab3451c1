"""Trained weights, wherever they are: a run, its weights/<phase>, one of its checkpoints, or a Hugging Face folder.

weights/<phase> is a Hugging Face folder itself, so that a run's result needs no conversion.
"""

from __future__ import annotations

from pathlib import Path

from spt_fast.data.formats import sampled_digest
from spt_fast.data.tokenizer import Tokenizer
from spt_fast.errors import CheckpointError
from spt_fast.model import hf
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train import checkpoint
from spt_fast.train.folder import recipe_of
from spt_fast.train.state import SavedState


def read_config(path: Path) -> GPTConfig:
    """The shape of the weights at `path`; CheckpointError where there are none."""
    path = locate(path)
    if (path / "manifest.json").exists():
        return SavedState.read(checkpoint.read(path), path).model
    return hf.read_config(path)


def digest_of(path: Path) -> str:
    """Identifies the weights at `path` by samples of them; CheckpointError where there are none."""
    return sampled_digest(*sorted(locate(path).glob("*.safetensors")))


def load_model(path: Path) -> GPT:
    """The model at `path`, fp32 on the CPU; of a run, what its last finished phase handed on."""
    path = locate(path)
    if not (path / "manifest.json").exists():
        return GPT.from_hf(path).float()
    return GPT.with_weights(read_config(path), checkpoint.load(path)["current"].weights)


def locate(path: Path) -> Path:
    """The folder of the weights that `path` means: of a run its newest weights/<phase>, else its newest checkpoint."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: is not a folder; give a run, its weights/<phase>, a checkpoint or a Hugging Face folder"
        )
    if not (path / "recipe.yaml").exists():
        return path
    folders = [path / "weights" / phase.name for phase in reversed(recipe_of(path).phases)]
    done = [folder for folder in folders if folder.exists()]
    if done:
        return done[0]
    found = checkpoint.newest(path / "checkpoints")
    if found is None:
        raise CheckpointError(f"{path}: has no weights and no checkpoint yet; train the run further")
    return found.path


def tokenizer_of(path: Path, name: str | None) -> Tokenizer:
    """The tokenizer by name, else the one that the run which holds `path` was trained with."""
    if name:
        return Tokenizer.load(name)
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "recipe.yaml").exists() and (known := recipe_of(folder).tokenizer):
            return Tokenizer.load(known)
    raise CheckpointError(
        f"tokenizer: missing; {path} does not say which tokenizer its ids come from: name it", argument=True
    )


def export(path: Path, folder: Path, tokenizer: str | None) -> None:
    """Write the weights at `path` as a Hugging Face folder, with the run's tokenizer where it is known."""
    try:
        saved_along = tokenizer_of(path, tokenizer)
    except CheckpointError:
        saved_along = None
    load_model(path).save_hf(folder, saved_along)


def generate_text(
    path: Path, prompt: str, tokens: int, *, temperature: float, top_k: int | None, seed: int, tokenizer: str | None
) -> str:
    """Text that continues `prompt`, or begins a document where it is empty."""
    encoding = tokenizer_of(path, tokenizer)
    ids = encoding.encode(prompt) or [encoding.eos_id]
    model = load_model(path)
    continued = model.generate(
        ids,
        tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_id=encoding.eos_id,
        vocab_size=encoding.vocab_size,
    )
    return encoding.decode(continued[0 if prompt else 1 :])

"""Tensors in safetensors files: each is read when it is used and written when it arrives, so that memory holds one
piece of a file at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spt_fast.errors import CheckpointError, cut, shown
from spt_fast.files import check_regular

PIECE = 32 * 2**20
"""Bytes of a file that are mapped into memory at once."""
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The names of dtypes in safetensors."""
REFUSALS = re.compile(
    r'(access to|invalid|unauthori[sz]ed|forbidden|entry not|not found|<!doctype|<html|{"error)\b', re.I
)
"""First words of a server's answer that was saved instead of a file."""


class Stored(Mapping[str, Tensor]):
    """Tensors by name, each read every time it is used."""

    def __init__(self, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        """like: shape and dtype of each tensor, on the meta device."""
        self.like, self._read = like, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.like:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def unread(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same shapes and dtypes; nothing is read for them."""
    return tensors.like if isinstance(tensors, Stored) else tensors


def picked(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Some of the tensors, under new names; nothing is read for it."""
    if not isinstance(tensors, Stored):
        return {new: tensors[old] for new, old in names.items()}
    return Stored({new: tensors.like[old] for new, old in names.items()}, lambda new: tensors[names[new]])


def contents(file: Path) -> dict[str, Tensor]:
    """Shape and dtype of every tensor in the file, on the meta device. CheckpointError if it can't be read."""
    with opened(file) as stored:
        return {name: stored.get_tensor(name).to("meta") for name in stored.keys()}  # noqa: SIM118


def pieces(file: Path, name: str) -> Iterator[Tensor]:
    """A tensor in the file, some of its rows at a time; each is valid until the next."""
    start, rows, end = 0, 1, 1
    while start < end:
        with opened(file) as stored:  # again for each piece: pages of a mapped file stay in memory
            whole = torch.atleast_1d(stored.get_tensor(name))
            end, rows = len(whole), _rows(whole)
            yield whole[start : start + rows]
        start += rows


def _rows(tensor: Tensor) -> int:
    """Numbers in a piece, the same for every dtype."""
    return max(1, PIECE // (4 * max(1, math.prod(tensor.shape[1:]))))


def fill(target: Tensor, file: Path, name: str) -> None:
    """Copy a tensor of the same shape out of the file, converted to the target's dtype."""
    target, start = torch.atleast_1d(target), 0
    for piece in pieces(file, name):
        target[start : start + len(piece)].copy_(piece)
        start += len(piece)


def finite(tensor: Tensor) -> bool:
    """Whether no number in it is NaN or infinite."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # a NaN is both; much faster than a look at each


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    try:
        check_regular(file)
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError, UnicodeError) as error:
        why = mistaken(file) or f"cannot be read as safetensors ({cut(str(error), 160)}); copy it again"
        raise CheckpointError(f"{file}: {why}") from None


def mistaken(file: Path) -> str | None:
    """What a failed download left instead of the file, and the remedy; None if it is nothing of that kind."""
    try:
        check_regular(file)
        with file.open("rb") as content:
            head = content.read(200).decode("utf-8", "replace").strip()
    except OSError:
        return None
    if head.startswith("version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download the file"
    if REFUSALS.match(head):
        return (
            f"holds a server's error message ({shown(head)}), not the file; ask for access on the model's page, log "
            "in and download it again"
        )
    return None


def write(
    file: Path,
    shapes: Mapping[str, Iterable[int]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[str]:
    """Write tensors as they arrive, in any order, cast to `dtype` (float32, bfloat16 or float16); return the names of
    those with a NaN or an infinite number, in that order.

    shapes: of all tensors. Equal tensors and metadata make equal files. CheckpointError for a number that
    float16 cannot hold.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + dtype.itemsize * math.prod(shape := [*shape])
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    missing, unusable = set(shapes), dict[str, None]()
    with file.open("wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert list(tensor.shape) == header[name]["shape"], name
            missing.remove(name)
            written.seek(8 + len(text) + header[name]["data_offsets"][0])
            for piece in tensor.detach().split(_rows(tensor)):
                cast = piece.to("cpu", dtype).contiguous()
                if not finite(cast):
                    unusable[name] = None
                    if dtype == torch.float16 and bool((cast.isinf() & piece.cpu().isfinite()).any()):
                        says = f"it cannot hold the {piece.abs().max():.4g} in {name}; use bf16 or fp32"
                        raise CheckpointError(f"dtype: float16 is invalid: {says}", argument=True)
                written.write(cast.view(torch.uint8).numpy())
    assert not missing, missing
    return [*unusable]

"""The dtype that a run computes in: the recipe's, or for `auto` the one that this machine multiplies faster.

Instructions for bf16 don't make it fast: an Intel Xeon with AVX512-BF16 and no AMX multiplies fp32 up to twice as fast.
So on a CPU with such instructions, matmuls of the model's shapes are timed in both.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spt_fast.config import Recipe
from spt_fast.errors import RecipeError, counted
from spt_fast.files import write_text
from spt_fast.kernels.matmul import multiply
from spt_fast.kernels.measured import machine, medians, remembered
from spt_fast.model.config import GPTConfig
from spt_fast.model.parameters import around_blocks, of_block
from spt_fast.train.state import Compute

ROWS = 256
LARGEST = 1024
"""Limit for the dimensions of a matmul in the test: larger ones run at the same rate and take longer."""
GAIN = 1.05
"""bf16 must be faster by this factor, since fp32 is more exact."""
ROUNDS = 15
SECONDS = 0.35
BY_NAME = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in BY_NAME.items()}

Shapes = Mapping[tuple[int, int], int]
"""By (rows, columns) of a weight, the share of a model's work in such weights."""


@dataclass(frozen=True)
class Precision:
    """A dtype, and the reason for it."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{NAMES[self.dtype]}: {self.reason}"


def begin_or_keep(recipe: Recipe, device: torch.device, config: GPTConfig, before: Compute | None) -> Precision:
    """The precision of a resumed run: `before` is how it was computed so far."""
    if before is None:
        return precision_of(recipe, device, config, record=True)
    return Precision(getattr(torch, before.dtype), before.measured.get("precision", "as the run began"))


def precision_of(recipe: Recipe, device: torch.device, config: GPTConfig, *, record: bool = False) -> Precision:
    """The recipe's precision. For `auto` that in the recipe's `precision_file`, which `record` writes if it doesn't
    exist yet, else what this machine multiplies faster. RecipeError for a precision_file that holds none."""
    file = Path(recipe.precision_file) if recipe.precision_file and recipe.precision == "auto" else None
    if file and file.exists():
        return read_precision(file)
    found = pick_precision(recipe.precision, device, config)
    if file and record:
        write_precision(file, found)
        return read_precision(file)
    return found


def write_precision(file: Path, precision: Precision) -> None:
    """Write it, unless it exists by now."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}")
    write_text(mine, json.dumps({"precision": NAMES[precision.dtype], "reason": precision.reason}, indent=1))
    try:
        with suppress(FileExistsError):
            os.link(mine, file)  # atomic, and doesn't replace what another run has written meanwhile
    finally:
        mine.unlink()


def read_precision(file: Path) -> Precision:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Precision(BY_NAME[kept["precision"]], f"from {file}, {kept['reason']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"precision_file: {file} cannot be read ({error!r}); put it back, or write `precision: bf16` or fp32, as "
            "in summary.json of the runs beside this one"
        ) from None


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Without a model: for "auto" the dtype that multiplies matrices of 1,024 rows and columns faster."""
    return pick_precision(precision, device).dtype


def pick_precision(precision: str, device: torch.device, config: GPTConfig | None = None) -> Precision:
    """The recipe's ("bf16", "fp32"), or for "auto" the faster one for matmuls of the model's shapes."""
    if precision != "auto":
        return Precision(BY_NAME[precision], "as the recipe says")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        dtype = torch.bfloat16 if major >= 8 else torch.float32
        return Precision(dtype, f"the GPU's compute capability is {major}.{minor}")
    if not multiplies_bf16():
        return Precision(torch.float32, "this CPU has no instructions that multiply bf16")
    shapes = shapes_of(config) if config else {(LARGEST, LARGEST): 1}
    key = {**machine(device), "shapes": sorted([*shape, share] for shape, share in shapes.items())}
    found = remembered("precision", key, partial(_measure, shapes), _read)
    name = "bf16" if found["bf16"] > GAIN * found["fp32"] else "fp32"
    rates = f"{found['bf16']:.0f} GFLOP/s in bf16 and {found['fp32']:.0f} in fp32"
    threads = counted(int(str(key["threads"])), "thread")
    return Precision(BY_NAME[name], f"this CPU reaches {rates}, measured {found['date']} with {threads}")


def multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def shapes_of(config: GPTConfig) -> Shapes:
    """The matrices that multiply every token, cut to LARGEST; the head's counts even if it is the embedding."""
    matrices = [(row.shape, config.layers * row.size) for row in of_block(config) if row.kind.multiplies]
    matrices += [(row.shape, row.size) for row in around_blocks(config) if row.name == "embedding"]
    shapes: dict[tuple[int, int], int] = {}
    for (rows, columns), size in matrices:
        cut = min(rows, LARGEST), min(columns, LARGEST)
        shapes[cut] = shapes.get(cut, 0) + size
    return shapes


def _read(found: Mapping[str, Any]) -> None:
    0.0 + found["bf16"] + found["fp32"], found["date"]  # float() would take text


def _measure(shapes: Shapes) -> dict[str, Any]:
    """GFLOP/s of the forward and both backward matmuls, by dtype."""
    work = {(shape, name): products(*shape, dtype) for shape in shapes for name, dtype in BY_NAME.items()}
    seconds = dict(zip(work, medians([*work.values()], rounds=ROUNDS, seconds=SECONDS), strict=True))
    total = sum(shapes.values())
    found: dict[str, Any] = {"date": f"{date.today()}"}
    for name in BY_NAME:
        took = sum(share * seconds[shape, name] / (6 * ROWS * shape[0] * shape[1]) for shape, share in shapes.items())
        found[name] = total / took / 1e9
    return found


def products(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """The operands of y = x wᵀ, dx = dy w and dw = dyᵀ x."""
    x, w, dy = (torch.ones(shape, dtype=dtype) for shape in ((ROWS, columns), (rows, columns), (ROWS, rows)))
    return lambda: (multiply(x, w.T), multiply(dy, w), multiply(dy.T, x))

"""The compiled half of the package: csrc/, built by setup.py against torch's stable ABI, behind typed functions.

Neither the extension nor torch is loaded before the first call, so that `import spt_fast` works without a built
extension, and commands that only read recipes start without torch. Every call releases the GIL while it runs. Arrays
are NumPy's; int64 and contiguous unless said otherwise.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

_LIBRARY = Path(__file__).with_name("_C.abi3.so")


def is_built() -> bool:
    return _LIBRARY.is_file()


@functools.cache
def ops() -> Any:
    """The compiled functions, as `torch.ops.spt_fast`."""
    if not is_built():
        raise ImportError(
            f"{_LIBRARY}: it is not built; run `pip install --no-build-isolation --no-deps -e .` in the checkout "
            "(it needs a C++20 compiler)"
        )
    import torch

    torch.ops.load_library(str(_LIBRARY))
    return torch.ops.spt_fast


def _tensor(values: np.ndarray | tuple[int, ...] | list[Any], dtype: type[np.integer] = np.int64) -> torch.Tensor:
    from torch import from_numpy

    return from_numpy(np.ascontiguousarray(values, dtype=dtype))


def _words(key: tuple[int, ...]) -> torch.Tensor:
    return _tensor(np.array(key, dtype=np.uint64).view(np.int64))


def permute(index: np.ndarray, size: int, key: tuple[int, ...], inverse: bool) -> np.ndarray:
    """`Permutation.at` (or `position_of`) of each of `index` [N], all in [0, size)."""
    return ops().permute(_tensor(index), size, _words(key), inverse).numpy()


def ring_starts(window: np.ndarray, num_tokens: int, context: int, source_key: tuple[int, ...]) -> np.ndarray:
    """`Ring.start` of each of `window` [N], all >= 0."""
    return ops().ring_starts(_tensor(window), num_tokens, context, _words(source_key)).numpy()


def locate_splits(splits: np.ndarray, num_sources: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples first .. first + count of a tree of splits [S, 4]: source int32 [count], k int64 [count]."""
    source, k = ops().locate_splits(_tensor(splits), num_sources, first, count)
    return source.numpy(), k.numpy()


def chairman_table(weights: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One period Q = sum(weights): the source of each slot (int16 [Q]), which of that source's slots it is (int32 [Q]),
    and the slots of each source, one source after another (int32 [Q])."""
    source, rank, slots = ops().chairman_table(_tensor(weights))
    return source.numpy(), rank.numpy(), slots.numpy()


def locate_table(
    source: np.ndarray, rank: np.ndarray, weights: list[int], first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples first .. first + count of the endless repetition of a chairman's table."""
    table = _tensor(source, np.int16), _tensor(rank, np.int32)
    located = ops().locate_table(*table, _tensor(weights), first, count)
    return located[0].numpy(), located[1].numpy()


CUT_SHORT, READ_ERROR, ID_TOO_LARGE = 1, 2, 3


class GatherFailure(NamedTuple):
    """The first row that could not be gathered; outcome 0 if there was none."""

    outcome: int
    """CUT_SHORT: the file ends before `token`; READ_ERROR: errno is `detail`; ID_TOO_LARGE: the id is `detail`."""
    row: int
    token: int
    """Place in the source."""
    detail: int


def gather(
    sources: np.ndarray, source: np.ndarray, start: np.ndarray, vocab_size: int, batch: torch.Tensor
) -> GatherFailure:
    """Read the windows that begin at `start` [R] of `source` [R] (int32) into `batch` int64 [2, R, T]: inputs, targets.

    sources [S, 4]: file descriptor, first byte, tokens of the ring, bytes of an id (negative: signed).
    """
    failure = ops().gather(_tensor(sources), _tensor(source, np.int32), _tensor(start), vocab_size, batch)
    return GatherFailure(*failure.tolist())


def advise(sources: np.ndarray, source: np.ndarray, start: np.ndarray, context: int) -> None:
    """Ask the kernel to read the pages of these windows ahead (posix_fadvise WILLNEED), unless a sample of the windows
    is in memory already."""
    ops().advise(_tensor(sources), _tensor(source, np.int32), _tensor(start), context)

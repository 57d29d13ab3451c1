"""The ids of several files as one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class JoinedTokens:
    """Reads like a one-dimensional array of integers; nothing is loaded before it is indexed."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._edges = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            parts = zip(self._edges[:-1], self._parts, strict=True)
            found = [part[max(0, start - at) : max(0, stop - at)] for at, part in parts if at < stop]
            return np.concatenate([*found, np.empty(0, self.dtype)])
        places = np.asarray(key)
        if places.dtype == bool:
            if places.shape != (len(self),):
                raise IndexError(f"a mask of shape {places.shape} for {len(self)} tokens")
            places = np.flatnonzero(places)
        places = np.where(places < 0, places + len(self), places)
        if places.size and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"{key} in {len(self)} tokens")
        owners, ids = np.searchsorted(self._edges, places, "right") - 1, np.empty(places.shape, self.dtype)
        for owner in np.unique(owners):
            ids[owners == owner] = self._parts[owner][places[owners == owner] - self._edges[owner]]
        return ids if ids.ndim else ids[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)

    def min(self) -> Any:
        return min(part.min() for part in self._parts if len(part))

    def max(self) -> Any:
        return max(part.max() for part in self._parts if len(part))

"""Records: the arguments of an op, as int64 words at an address.

`LAYER = fields("norm num_heads")` numbers the words by name, which Numba code uses as constants:
`word(layer, LAYER.num_heads)`; `Record(LAYER)` is the memory, filled from Python.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from cpu_kernels.memory import aligned_bytes


def fields(names: str) -> Any:
    """A named tuple of 0, 1, 2, ..."""
    return namedtuple("Fields", names)(*range(len(names.split())))


class Record:
    """Words named by `fields`; `address` is what an op gets."""

    def __init__(self, fields: Any, **values: Any) -> None:
        self._index = fields._asdict()
        array = np.zeros(len(fields), np.int64)
        self.address: int = array.ctypes.data
        self._words = memoryview(array)  # written to in half the time of an array
        self._floats = memoryview(array.view(np.float32))
        self._kept: dict[str, np.ndarray] = {}
        self._filled_for: tuple[Any, ...] = ()  # kept, so that nothing else gets their ids
        self._ids: tuple[int, ...] = ()
        self.set(**values)

    def set(self, **values: Any) -> None:
        """Integers; floats, kept as float32; arrays, kept alive and given as their address; None
        is 0."""
        kept, index, words = self._kept, self._index, self._words
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                if kept.get(name) is not value:  # to ask for an address again takes microseconds
                    kept[name] = value
                    words[index[name]] = value.ctypes.data
                continue
            if name in kept:
                del kept[name]
            if isinstance(value, float):
                self._floats[2 * index[name]] = value
            else:
                words[index[name]] = value or 0

    def is_filled_for(self, *arguments: Any) -> bool:
        """Whether it was filled for these very objects: then nothing need be checked or set again.

        A decoder's calls are mostly alike, and what Python does between two ops costs as much as
        some of the ops do.
        """
        return self._ids == tuple(map(id, arguments))

    def points_to(self, **arrays: np.ndarray) -> bool:
        """Whether it has the addresses of these arrays, however many rows of them."""
        words, index = self._words, self._index
        return all(words[index[name]] == array.ctypes.data for name, array in arrays.items())

    def resize(self, **counts: int) -> None:
        """Set numbers of rows, which are no part of what it was filled for."""
        for name, count in counts.items():
            self._words[self._index[name]] = count

    def mark_filled_for(self, *arguments: Any) -> None:
        self._filled_for, self._ids = arguments, tuple(map(id, arguments))


class Scratch:
    """Memory that ops use while they run, by name; it grows, and is never given back."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self._views: dict[str, np.ndarray] = {}

    def floats(self, name: str, num_rows: int, num_columns: int) -> np.ndarray:
        """float32 [num_rows, num_columns]: the same object as before, if it had this shape."""
        view = self._views.get(name)
        if view is None or view.shape != (num_rows, num_columns):
            nbytes = 4 * num_rows * num_columns
            view = self.room(name, nbytes)[:nbytes].view(np.float32)
            self._views[name] = view = view.reshape(num_rows, num_columns)
        return view

    def room(self, name: str, nbytes: int) -> np.ndarray:
        """uint8 [at least nbytes], aligned to 64 bytes; contents are undefined."""
        if name not in self._arrays or self._arrays[name].nbytes < nbytes:
            self._arrays[name] = aligned_bytes(nbytes)
        return self._arrays[name]


def floats(array: np.ndarray | None, name: str, size: int) -> np.ndarray | None:
    """A weight vector as contiguous float32 [size]; ValueError if it has another size."""
    if array is None:
        return None
    array = np.ascontiguousarray(array, np.float32).reshape(-1)
    if len(array) != size:
        raise ValueError(f"{name} must have {size} values, not {len(array)}")
    return array


def check_shapes(kind: str, weights: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError if a matrix of the `weights` is missing or has another shape."""
    for name, shape in shapes.items():
        matrix = getattr(weights, name)
        own = None if matrix is None else tuple(matrix.shape)
        if own != shape:
            raise ValueError(f"{kind} weight {name} must have shape {shape}, not {own}")

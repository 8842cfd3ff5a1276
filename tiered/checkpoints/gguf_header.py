"""The header of a GGUF file: its metadata and where its tensors lie.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is not trusted:
every count, length and offset is checked against the file's size before it is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.checkpoint import CheckpointError, Tensor

MAGIC = b"GGUF"

# ggml's type numbers. Those that are not in FORMATS are named to say what is not supported.
TENSOR_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1",
    10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 15: "q8_k", 16: "iq2_xxs",
    17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s",
    23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 29: "iq1_m",
    30: "bf16", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4",
}  # fmt: skip

# Metadata value types: struct's letter, or one of these two.
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


class StoredArray(NamedTuple):
    """An array of the metadata that stays in the file until it is asked for."""

    file: Path
    type: int
    num_values: int
    offset: int
    nbytes: int

    def read(self) -> list[Any]:
        with self.file.open("rb") as opened:
            opened.seek(self.offset)
            data = opened.read(self.nbytes)
        if len(data) != self.nbytes:
            raise OSError(f"{self.file}: the file became shorter while it was open")
        if self.type != _STRING:
            return list(np.frombuffer(data, "<" + _SCALARS[self.type]).tolist())
        values, position = [], 0
        for _ in range(self.num_values):
            start = position + 8
            position = start + int.from_bytes(data[position:start], "little")
            values.append(data[start:position].decode("utf-8", "replace"))
        return values


class Metadata(Mapping[str, Any]):
    """GGUF's keys and values; long arrays are read from the file at their first use."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, StoredArray):
            value = self._values[key] = value.read()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Header(NamedTuple):
    values: dict[str, Any]  # arrays as StoredArray
    tensors: list[Tensor]  # with the file's own names


def read_header(file: Path) -> Header:
    if file.stat().st_size < 24:
        raise CheckpointError(f"{file}: too short for a GGUF file")
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return _Parser(file, data).header()


class _Parser:
    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file = file
        self.data = data
        self.position = 0

    def header(self) -> Header:
        if self.data[:4] != MAGIC:
            raise self.error(f"no GGUF file: it starts with {self.data[:4]!r}, not {MAGIC!r}")
        self.position = 4
        version = self.scalar("I")
        if version not in (2, 3):
            hint = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise self.error(f"GGUF version {version} is not supported, only 2 and 3{hint}")
        num_tensors, num_values = self.scalar("Q"), self.scalar("Q")
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.string()
            if key in values:
                raise self.error(f"key {key!r} is there twice")
            values[key] = self.value(key)
        infos = [self.tensor_info() for _ in range(self.bounded(num_tensors, 24, "tensors"))]
        return Header(values, self.tensors(infos, self.alignment(values)))

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape with rows first, type number, offset in the data section)."""
        name = self.string()
        num_dims = self.scalar("I")
        if not 1 <= num_dims <= 4:
            raise self.error(f"tensor {name!r} has {num_dims} dimensions, not 1 to 4")
        shape = tuple(self.scalar("Q") for _ in range(num_dims))[::-1]
        return name, shape, self.scalar("I"), self.scalar("Q")

    def tensors(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> list[Tensor]:
        start = -(-self.position // alignment) * alignment
        found: dict[str, Tensor] = {}
        for name, shape, type, offset in infos:
            format = TENSOR_TYPES.get(type, "")
            if format not in FORMATS:
                called = format.upper() or "unknown"
                raise self.error(
                    f"tensor {name!r} has type {type} ({called}), which is not supported "
                    f"(supported: {', '.join(FORMATS).upper()})"
                )
            if name in found:
                raise self.error(f"tensor {name!r} is there twice")
            if offset % alignment or 0 in shape:
                raise self.error(
                    f"tensor {name!r} has shape {list(shape)} at offset {offset}, which must be "
                    f"a multiple of {alignment}"
                )
            nbytes = self.nbytes(name, format, shape)
            if start + offset + nbytes > len(self.data):
                raise self.error(
                    f"tensor {name!r} ends at byte {start + offset + nbytes}, but the file has "
                    f"only {len(self.data)}: it is truncated or damaged; download it again"
                )
            found[name] = Tensor(name, format, shape, self.file, start + offset, nbytes)
        return list(found.values())

    def nbytes(self, name: str, format: str, shape: tuple[int, ...]) -> int:
        try:
            nbytes = int(FORMATS[format].row_bytes(shape[-1]))
        except ValueError as error:
            raise self.error(f"tensor {name!r}: {error}") from None
        return nbytes * math.prod(shape[:-1])

    def alignment(self, values: dict[str, Any]) -> int:
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (1 << n for n in range(3, 21)):
            raise self.error(f"general.alignment is {alignment!r}, but must be a power of two")
        return alignment

    def value(self, key: str) -> Any:
        type = self.scalar("I")
        if type == _STRING:
            return self.string()
        if type == _ARRAY:
            return self.array(key)
        if type not in _SCALARS:
            raise self.error(f"the value of {key!r} has unknown type {type}")
        return self.scalar(_SCALARS[type])

    def array(self, key: str) -> StoredArray:
        """Skips the array, having checked that it lies within the file."""
        type, count = self.scalar("I"), self.scalar("Q")
        start = self.position
        if type == _STRING:
            self.bounded(count, 8, f"strings in {key!r}")
            self.skip_strings(count)
        elif type in _SCALARS:
            nbytes = struct.calcsize(_SCALARS[type])
            self.position += self.bounded(count, nbytes, f"values in {key!r}") * nbytes
        else:
            raise self.error(f"the array {key!r} has unsupported element type {type}")
        return StoredArray(self.file, type, count, start, self.position - start)

    def skip_strings(self, count: int) -> None:
        """A loop over a vocabulary: kept tight."""
        unpack, data, position = struct.Struct("<Q").unpack_from, self.data, self.position
        last = len(data) - 8
        for _ in range(count):
            if position > last:
                break
            position += 8 + unpack(data, position)[0]
        else:
            if position <= len(data):
                self.position = position
                return
        raise self.error("a text in the metadata ends beyond the end of the file")

    def string(self) -> str:
        length = self.bounded(self.scalar("Q"), 1, "bytes in a text")
        text = self.data[self.position : self.position + length]
        self.position += length
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.error(f"a text at byte {self.position - length} is no UTF-8") from None

    def scalar(self, letter: str) -> Any:
        try:
            (value,) = struct.unpack_from("<" + letter, self.data, self.position)
        except struct.error:
            raise self.error(f"the header ends early, at byte {self.position}") from None
        self.position += struct.calcsize(letter)
        return value

    def bounded(self, count: int, nbytes: int, what: str) -> int:
        """`count` things of at least `nbytes` each fit into the rest of the file."""
        if count * nbytes > len(self.data) - self.position:
            raise self.error(f"the header claims {count} {what}, more than the file can hold")
        return count

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {reason}")

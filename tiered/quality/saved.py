"""Saved sides: what a model said about a text, in a file that another machine can compare with.

A line `tiered-logits 1`, a line with 8 hex digits (crc32 of what follows in it) and JSON
(`_header`), then records of rows: num_rows u32, nbytes
u32, crc32 u32 (little-endian, also below) and zlib data with, one after the other,

    peak    float32 [num_rows]              the largest log-probability
    step    float32 [num_rows]              nats between codes
    losses  float64 [num_rows]
    best    int32   [num_rows]
    top_k   uint8
    experts int16   [num_sparse_layers, num_rows, top_k]
    codes   uint16  [num_rows, vocab_size]  (peak - log-probability) / step; all low bytes, then all
                                            high ones, which compress

The last record has no rows: a file without it was never finished. What is more than 24 nats below
the peak is stored as that; losses and likeliest tokens are exact.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tiered.quality.likelihood import by_rows
from tiered.quality.rows import Rows
from tiered.quality.side import Side, SideFacts, TextPlan, tasks_digest
from tiered.quality.tasks import Answer
from tiered.text.sampling import log_softmax

MAGIC = b"tiered-logits 1\n"
RANGE = 24.0  # nats below the likeliest token
LARGEST = 1 << 31  # bytes of a record; more is damage
_RECORD = struct.Struct("<III")


def is_saved(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def save(
    side: Side,
    plan: TextPlan,
    path: Path,
    progress: Callable[[int], None] = lambda rows: None,
    doing: Callable[[str], None] = lambda what: None,
) -> None:
    """Write what `side` says to `path`, which has that name only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            doing("continuing and answering")
            header = json.dumps(_header(side, plan)).encode()
            doing("saving")
            file.write(MAGIC + b"%08x %b\n" % (zlib.crc32(header), header))
            for rows in side.rows(plan):
                _write_record(file, rows)
                progress(len(rows.losses))
            file.write(_RECORD.pack(0, 0, 0))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _header(side: Side, plan: TextPlan) -> dict[str, Any]:
    return {
        "facts": side.facts._asdict(),
        "ids": plan.ids,
        "window": plan.size,
        "stride": plan.stride,
        "num_prompt": plan.num_prompt,
        "generated": side.generate(plan),
        "tasks": tasks_digest(plan.tasks),
        "answers": side.answers(plan),
    }


def _write_record(file: BinaryIO, rows: Rows) -> None:
    num_rows, vocab_size = rows.logits.shape
    peak, step = np.empty(num_rows, "<f4"), np.empty(num_rows, "<f4")
    codes = np.empty((num_rows, vocab_size), "<u2")
    for part in by_rows(num_rows):
        below = log_softmax(rows.logits[part])
        peak[part] = below.max(axis=1)
        below = np.minimum(below.max(axis=1, keepdims=True) - below, RANGE)
        step[part] = np.maximum(below.max(axis=1), 1e-6) / 65535
        codes[part] = np.minimum(np.rint(below / step[part, None]), 65535)
    parts = (
        peak.tobytes(),
        step.tobytes(),
        rows.losses.astype("<f8").tobytes(),
        rows.best.astype("<i4").tobytes(),
        struct.pack("<B", rows.experts.shape[2]) + rows.experts.astype("<i2").tobytes(),
        np.ascontiguousarray(codes.view(np.uint8).reshape(-1, 2).T).tobytes(),
    )
    data = zlib.compress(b"".join(parts), 1)
    file.write(_RECORD.pack(num_rows, len(data), zlib.crc32(data)) + data)


class SavedSide:
    """What a model once said: answers only what it was asked then."""

    def __init__(self, path: Path) -> None:
        """ValueError if the file's header is damaged."""
        self.path = path
        with path.open("rb") as file:
            if file.readline() != MAGIC:
                raise ValueError(f"{path} is no file of `tiered compare --save`")
            header = file.readline(LARGEST)
            self._start = file.tell()
        checksum, _, header = header.rstrip(b"\n").partition(b" ")
        if checksum != b"%08x" % zlib.crc32(header):
            raise self._damaged("its header")
        try:
            values = json.loads(header)
            facts = values["facts"]
            self.facts = SideFacts(
                str(facts["name"]),
                dict(facts["settings"]),
                _count(facts["vocab_size"]),
                str(facts["vocabulary"]),
                _count(facts["num_experts"]),
                tuple(map(_count, facts["sparse_layers"])),
            )
            self.generated = [_count(token) for token in values["generated"]]
            self.plan = TextPlan(
                tuple(map(_count, values["ids"])),
                _count(values["window"]),
                _count(values["stride"]),
                _count(values["num_prompt"]),
                len(self.generated),
            )
            self._tasks = str(values["tasks"])
            self._answers = [Answer(_count(p), _count(n)) for p, n in values["answers"]]
            self._num_rows = self.plan.num_predicted
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged("its header") from error

    def rows(self, plan: TextPlan) -> Iterator[Rows]:
        left = self._num_rows
        with self.path.open("rb") as file:
            file.seek(self._start)
            while True:
                rows = self._read_record(file, left)
                if rows is None:
                    break
                left -= len(rows.losses)
                yield rows
        if left:
            raise self._damaged("rows are missing")

    def generate(self, plan: TextPlan) -> list[int]:
        return self.generated

    def answers(self, plan: TextPlan) -> list[Answer]:
        if plan.tasks and tasks_digest(plan.tasks) != self._tasks:
            raise ValueError(
                f"{self.path} was saved with other tasks, or none: save it again with --tasks"
            )
        return self._answers

    def _read_record(self, file: BinaryIO, most_rows: int) -> Rows | None:
        head = file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            raise self._damaged("it is cut short")
        num_rows, nbytes, checksum = _RECORD.unpack(head)
        if num_rows == 0:
            return None
        if num_rows > most_rows or nbytes > LARGEST:
            raise self._damaged("a record is too large")
        data = file.read(nbytes)
        if len(data) < nbytes or zlib.crc32(data) != checksum:
            raise self._damaged("it is cut short, or a checksum is wrong")
        most = num_rows * (24 + 2 * self.facts.vocab_size + 512 * len(self.facts.sparse_layers)) + 1
        try:
            unpacked = zlib.decompressobj().decompress(data, most)
            return self._unpack(unpacked, num_rows)
        except (zlib.error, ValueError, IndexError) as error:
            raise self._damaged("a record") from error

    def _unpack(self, data: bytes, num_rows: int) -> Rows:
        vocab_size, num_layers = self.facts.vocab_size, len(self.facts.sparse_layers)
        at = 0

        def take(kind: str, *shape: int) -> np.ndarray:
            nonlocal at
            array = np.frombuffer(data, kind, int(np.prod(shape)), at)
            at += array.nbytes
            return array.reshape(shape)

        peak, step = take("<f4", num_rows), take("<f4", num_rows)
        losses, best = take("<f8", num_rows), take("<i4", num_rows)
        top_k = int(take("u1", 1)[0])
        experts = take("<i2", num_layers, num_rows, top_k)
        low, high = take("u1", 2, num_rows, vocab_size)
        if at != len(data) or not all(np.isfinite(a).all() for a in (peak, step, losses)):
            raise ValueError("there is more than there should be, or no number")
        logits = peak[:, None] - (low + 256 * high.astype(np.uint16)) * step[:, None]
        return Rows(logits.astype(np.float32), losses, best, experts)

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is damaged ({what}): save it again")


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a count")
    return value

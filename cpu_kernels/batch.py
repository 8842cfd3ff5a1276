"""Preparing a batch for attention: its rows in blocks of one sequence, checked once per batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.chain import Chain
from cpu_kernels.compiler import called
from cpu_kernels.flash import BATCH, block_rows, partial_bytes, workspace_bytes
from cpu_kernels.kv import CHUNK, KV, KVPages
from cpu_kernels.memory import load_i32, store_word, word
from cpu_kernels.record import Record, Scratch

SPLIT_ROWS = 16  # up to this many rows, chunks of positions are spread over the threads
SPLIT_BYTES = 64 << 20  # unless their partial results need more memory than this

_BAD_SEQUENCE, _BAD_POSITION, _BAD_PAGE = -1, -2, -3
_REASONS = {
    _BAD_SEQUENCE: "a row's sequence is no row of page_tables",
    _BAD_POSITION: "a position is negative or past its sequence's page table",
    _BAD_PAGE: "a page table lacks a page that attention needs",
}


@called()
def _plan(batch, kv, num_sequences, most_rows):
    """Write the blocks, of so many rows at most; returns the largest position, or what is wrong."""
    num_rows, max_pages = word(batch, BATCH.num_rows), word(batch, BATCH.max_pages)
    positions, sequences = word(batch, BATCH.positions), word(batch, BATCH.sequences)
    page_size, num_pages = word(kv, KV.page_size), word(kv, KV.num_pages)
    blocks, num_blocks, largest, first = word(batch, BATCH.blocks), 0, 0, 0
    for row in range(num_rows):
        sequence, position = load_i32(sequences, row), load_i32(positions, row)
        if sequence < 0 or sequence >= num_sequences:
            return _BAD_SEQUENCE
        if position < 0 or position >= max_pages * page_size:
            return _BAD_POSITION
        largest = max(largest, np.int64(position))
        if (
            row + 1 < num_rows
            and row + 1 - first < most_rows
            and load_i32(sequences, row + 1) == sequence
            and load_i32(positions, row + 1) > position
        ):
            continue
        table = word(batch, BATCH.tables) + 4 * sequence * max_pages
        for page in range(position // page_size + 1):
            if load_i32(table, page) < 0 or load_i32(table, page) >= num_pages:
                return _BAD_PAGE
        store_word(blocks, 2 * num_blocks, first)
        store_word(blocks, 2 * num_blocks + 1, row + 1 - first)
        num_blocks += 1
        first = row + 1
    store_word(batch, BATCH.num_blocks, num_blocks)
    return largest


class PreparedBatch:
    """The record of the batch at hand, which all layers share, and the memory they work in."""

    def __init__(self, chain: Chain) -> None:
        self.record = Record(BATCH)
        self.num_positions = 0
        self._chain = chain
        self._scratch = Scratch()
        self.current: tuple[Any, ...] = (None,) * 4
        self._reserved: tuple[Any, ...] = ()
        self._positions = self._sequences = np.empty(0, np.int32)
        self._tables = np.empty((0, 0), np.int32)

    def prepare(self, x: np.ndarray, batch: Any, kv: KVPages, geometry: Any) -> None:
        """Make the record say what attention on `x` needs; quick if it does already.

        Raises ValueError for arrays of the wrong type or shape, and for rows without a page.
        """
        old_x, old_batch, old_kv, old_geometry = self.current
        if x is old_x and batch is old_batch and kv is old_kv and geometry == old_geometry:
            return
        self._chain.finish_batch()  # layers that wait use the record
        self.current = (None,) * 4
        num_rows = len(x)
        _check(x, "x", np.float32, (num_rows, geometry.hidden_size))
        _check(batch.positions, "positions", np.int32, (num_rows,))
        _check(batch.sequences, "sequences", np.int32, (num_rows,))
        num_sequences, max_pages = batch.page_tables.shape
        _check(batch.page_tables, "page_tables", np.int32, (num_sequences, max_pages))
        if not self.record.is_filled_for(x, num_rows, num_sequences, max_pages):
            self._positions, self._sequences = np.empty((2, num_rows), np.int32)
            self._tables = np.empty((num_sequences, max_pages), np.int32)
            self.record.set(
                x=x,
                num_rows=num_rows,
                positions=self._positions,
                sequences=self._sequences,
                tables=self._tables,
                max_pages=max_pages,
                blocks=self._scratch.room("blocks", 16 * num_rows),
            )
            self.record.mark_filled_for(x, num_rows, num_sequences, max_pages)
        # Copied, because that is quicker than to ask for the addresses of new arrays.
        self._positions[:], self._sequences[:] = batch.positions, batch.sequences
        self._tables[:] = batch.page_tables
        most_rows = block_rows(geometry.num_heads // geometry.num_kv_heads)
        largest = _plan(self.record.address, kv.any_record.address, num_sequences, most_rows)
        if largest < 0:
            raise ValueError(f"attention cannot use this batch: {_REASONS[largest]}")
        self.num_positions = largest + 1
        self._reserve(num_rows, geometry)
        self.current = x, batch, kv, geometry

    def _reserve(self, num_rows: int, g: Any) -> None:
        num_chunks = -(-self.num_positions // CHUNK)
        if self._reserved == (num_rows, num_chunks, g):
            return
        partial = partial_bytes(g.padded_dim)
        partials = num_chunks * num_rows * g.num_heads * partial
        split = num_rows <= SPLIT_ROWS and partials <= SPLIT_BYTES
        workspace = -(-workspace_bytes(g.padded_dim, g.num_heads // g.num_kv_heads) // 64) * 64
        room = self._scratch.room
        self.record.set(
            num_chunks=num_chunks,
            split=int(split),
            normed=room("normed", 4 * num_rows * g.hidden_size),
            queries=room("queries", 4 * num_rows * g.num_heads * g.padded_dim),
            workspaces=room("workspaces", self._chain.num_threads * workspace),
            workspace_bytes=workspace,
            partials=room("partials", partials if split else 0),
            out=room("out", 4 * num_rows * g.hidden_size),
            head_rows=g.head_rows(num_rows),
            **{name: room(name, nbytes) for name, nbytes in g.rooms(num_rows).items()},
        )
        self._reserved = num_rows, num_chunks, g


def _check(array: np.ndarray, name: str, dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be contiguous {np.dtype(dtype)} {list(shape)}, "
            f"not {array.dtype} {list(array.shape)}"
        )

"""Sums of AMX's tiles, on their way to and from where they belong.

A tile has a line for each of SIDE rows of weights, and in it SIDE rows of activations; memory has a
row for each of the latter. `targets` are addresses of their first values, SIDE of them: where there
are fewer, the last one comes again, and gets the same.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.activations import SIDE, TILE_BYTES
from cpu_kernels.compiler import inner
from cpu_kernels.gemm import copy_row
from cpu_kernels.memory import load_f32, store_word, word
from cpu_kernels.simd import emitted, f32, i64

LINE = 64
SPARE_BYTES = 8 * SIDE + TILE_BYTES  # room for a tile, and the addresses of its rows


@emitted("void", "f32 i64")
def _fill_line(k, value, address):
    k.store(address, k.splat(value, SIDE))


@emitted("void", "i64 i64 i64")
def _load(k, sources, offset, tile):
    """What is `offset` bytes after the addresses at `sources`."""
    lines = [k.load(k.load(sources + 8 * i, i64(1)) + offset, f32(SIDE)) for i in range(SIDE)]
    for number, line in enumerate(k.transpose_square(lines)):
        k.store(tile + LINE * number, line)


@emitted("void", "i64 i64 i64")
def _store(k, tile, targets, offset):
    lines = [k.load(tile + LINE * number, f32(SIDE)) for number in range(SIDE)]
    for i, line in enumerate(k.transpose_square(lines)):
        k.store(k.load(targets + 8 * i, i64(1)) + offset, line)


@inner
def prepare_spare(spare):
    for i in range(SIDE):
        store_word(spare, i, spare + 8 * SIDE + LINE * i)


@inner
def biased_tile(tile, bias, row, num_rows):
    """A tile that begins with the bias of so many rows, from number `row` on."""
    for i in range(SIDE):
        _fill_line(load_f32(bias, row + i) if i < num_rows else np.float32(0.0), tile + LINE * i)


@inner
def load_tile(tile, targets, row, num_rows, spare):
    """A tile that begins with what is there."""
    if num_rows == SIDE:
        _load(targets, 4 * row, tile)
    else:
        for i in range(SIDE):
            copy_row(word(targets, i) + 4 * row, word(spare, i), max(num_rows, 0))
        _load(spare, 0, tile)


@inner
def store_tile(tile, targets, row, num_rows, spare):
    if num_rows == SIDE:
        _store(tile, targets, 4 * row)
    else:
        _store(tile, spare, 0)
        for i in range(SIDE):
            copy_row(word(spare, i), word(targets, i) + 4 * row, max(num_rows, 0))

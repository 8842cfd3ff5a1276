"""Weights of any format as float32: for embedding rows, exact products and GEMM panels."""

from __future__ import annotations

from cpu_kernels.activations import CHUNK, FIRST_SUMS, GROUP, POSITION, SECOND_SUMS, SUMS
from cpu_kernels.formats import FORMATS
from cpu_kernels.gemv import load_floats
from cpu_kernels.groups import GROUPS, Chunk, row_of_chunks
from cpu_kernels.simd import Emitter, Value, emitted, f32, i32


def scale_and_offset(k: Emitter, chunk: Chunk, group: int, half: int) -> tuple[Value, Value]:
    """Two scalars: a weight of this half group is scale * integer + offset."""
    position = POSITION[group]
    scale = chunk.scales[half if len(chunk.scales) == 2 else 0].lane(position)
    offset = k.constant(f32(1), 0.0)
    for values, sums in chunk.offsets:
        if sums in (SUMS, (FIRST_SUMS, SECOND_SUMS)[half]):
            offset = values.lane(position) * chunk.layout.offset_factor
    return scale, offset


def _dequantize_chunk(k: Emitter, format: str, weights: Value, target: Value) -> None:
    chunk = Chunk(k, format, weights, groups=1)
    for group in range(GROUPS):
        for half in (0, 1):
            scale, offset = scale_and_offset(k, chunk, group, half)
            values = chunk.integers(group, half).cast("sext" if chunk.is_signed else "zext", i32)
            values = k.multiply_add(
                values.cast("sitofp", f32), k.splat(scale, 16), k.splat(offset, 16)
            )
            k.store(target + 4 * (GROUP * group + 16 * half), values)


@emitted("void", "i64 i64 i64 i64 i64")
def dequantize_floats(k, format, weights, length, start, count, target):
    """Weights `start` to `start + count` of the row of `length` weights at `weights`: float32 at
    `target`. `start` is a multiple of 256, and so is `count`, or it is all that is left."""
    row = row_of_chunks(k, format, weights, length >> 5)
    first, whole, rest = start >> 8, count >> 8, count & (CHUNK - 1)
    with k.loop(whole) as i:
        _dequantize_chunk(k, format, row.chunk(first + i), target + i * (4 * CHUNK))
    if FORMATS[format].block_size == CHUNK:
        return
    with k.when(rest.compare(">", 0)):  # the end of a chunk that begins before
        values = k.stack(4 * CHUNK)
        _dequantize_chunk(k, format, row.chunk(first + whole), values)
        source, target = values + (rest * -4 + 4 * CHUNK), target + whole * (4 * CHUNK)
        with k.loop(rest) as i:
            k.store(target + i * 4, k.load(source + i * 4, f32(1)))


@emitted("void", "i64 i64 i64")
def floats_to_float32(k, format, weights, count, target):
    """`count` weights of format f32, f16 or bf16."""
    size = FORMATS[format].block_bytes
    whole = count >> 3
    with k.loop(whole) as i:
        k.store(target + i * 32, load_floats(k, format, weights + i * (8 * size), 8))
    with k.loop(count & 7) as i:
        at = (whole << 3) + i
        k.store(target + at * 4, load_floats(k, format, weights + at * size, 1))

"""Many rows of activations: weights are decoded once into a panel, then multiplied with all rows.

A panel has `panel_rows` rows of weights, one in each 32-bit lane of a register: four consecutive
weights of every row, then the next four. Four activations are broadcast to all lanes; what a GEMV
adds up at the end of a row stays in its lane here. Panels are small enough for the L2 cache, and
results are tiles of `panel_tokens` x `panel_rows` float32, which the caller adds to where they
belong. Panels of float32 weights work the same way, with one weight of each row per register.
"""

from __future__ import annotations

from cpu_kernels.activations import CHUNK_BYTES, FIRST_SUMS, SCALES, SUMS
from cpu_kernels.dequantize import scale_and_offset
from cpu_kernels.dot import multiply_bytes, wants_unsigned
from cpu_kernels.groups import GROUPS, LAYOUTS, Chunk, row_of_chunks
from cpu_kernels.isa import ISAS
from cpu_kernels.simd import Emitter, Value, emitted, f32, i8, i32, i64

STEPS = 8  # of four weights, in a group


def num_scales(format: str) -> int:
    """Scales of a group: one, or one for each half."""
    return LAYOUTS[format].num_scales


def group_bytes(isa: str, format: str) -> int:
    """Of a group in a panel: weights, then scales, then offsets."""
    return ISAS[isa].panel_rows * (4 * STEPS + 8 * num_scales(format))


@emitted("void", "i64 i64 i64 i64 i64 i64")
def pack_row(k, isa, format, weights, num_groups, first, num_chunks, panel, row):
    """Decode `num_chunks` chunks, from number `first`, of the row of `num_groups` groups at
    `weights` into row number `row` of a panel."""
    panel_bytes = GROUPS * group_bytes(isa, format)
    source, target = row_of_chunks(k, format, weights, num_groups), panel + row * 4
    with k.loop(num_chunks) as i:
        _pack_chunk(k, isa, format, source.chunk(first + i), target + i * panel_bytes)


def _pack_chunk(k: Emitter, isa: str, format: str, weights: Value, target: Value) -> None:
    rows, groups = ISAS[isa].panel_rows, ISAS[isa].groups
    chunk = Chunk(k, format, weights, groups, wants_unsigned(isa), isa)
    for group in range(GROUPS):
        at = target + group * group_bytes(isa, format)
        for half in (0, 1):
            if half < num_scales(format):
                scale, offset = scale_and_offset(k, chunk, group, half)
                k.store(at + rows * (4 * STEPS + 4 * half), scale)
                k.store(at + rows * (4 * STEPS + 4 * (num_scales(format) + half)), offset)
            if group % groups == 0:
                words = chunk.integers(group // groups, half)
                words = words.view(i32(4 * groups))
                for lane in range(4 * groups):
                    step, member = 4 * half + lane % 4, lane // 4
                    to = at + (member * group_bytes(isa, format) + 4 * rows * step)
                    k.store(to, words.lane(lane))


def panel_product(
    k: Emitter,
    isa: str,
    format: str,
    panel: Value,
    num_chunks: Value,
    sources: Value,
    position: Value,
    tile: Value,
) -> None:
    """See multiply_panel."""
    rows, tokens = ISAS[isa].panel_rows, ISAS[isa].panel_tokens
    size, scales = group_bytes(isa, format), num_scales(format)
    is_signed = LAYOUTS[format].signed and not wants_unsigned(isa)
    xs = [k.load(sources + 8 * t, i64(1)) + position for t in range(tokens)]
    totals = [k.variable(k.constant(f32(rows), 0.0)) for _ in range(tokens)]
    with k.loop(num_chunks) as chunk, k.loop(k.integer(GROUPS)) as group:
        at = panel + (chunk * GROUPS + group) * size
        # See activations.byte_offset and POSITION.
        bytes_at = chunk * CHUNK_BYTES + (group >> 2) * 128 + (group & 3) * 16
        scales_at = chunk * CHUNK_BYTES + ((group >> 1) + (group & 1) * 4) * 4
        for part in range(scales):
            steps = range(part * STEPS // scales, (part + 1) * STEPS // scales)
            weights = [k.load(at + 4 * rows * step, i8(4 * rows)) for step in steps]
            scale = k.load(at + 4 * rows * (STEPS + part), f32(rows))
            offset = k.load(at + 4 * rows * (STEPS + scales + part), f32(rows))
            sums = SUMS if scales == 1 else FIRST_SUMS + 32 * part
            for x, total in zip(xs, totals, strict=True):
                pairs = []
                for step, weight in zip(steps, weights, strict=True):
                    four = k.load(x + bytes_at + (64 * (step // 4) + 4 * (step % 4)), i32(1))
                    pairs.append((weight, k.splat(four, rows).view(weight.type)))
                dots = multiply_bytes(k, isa, pairs, LAYOUTS[format].largest, is_signed)
                x_scale = k.splat(k.load(x + scales_at + SCALES, f32(1)), rows)
                value = k.multiply_add(dots.cast("sitofp", f32), scale * x_scale, total.get())
                if not is_signed:
                    x_sum = k.splat(k.load(x + scales_at + sums, f32(1)), rows)
                    value = k.multiply_add(offset, x_sum, value)
                total.set(value)
    _store_tile(k, tile, totals)


@emitted("void", "i64 i64 i64 i64 i64")
def multiply_panel(k, isa, format, panel, num_chunks, sources, position, tile):
    """tile [panel_tokens, panel_rows] = a panel of whole chunks times prepared rows.

    `sources`: addresses of the prepared rows; `position`: the byte in them to start at.
    """
    panel_product(k, isa, format, panel, num_chunks, sources, position, tile)


@emitted("void", "i64 i64 i64 i64")
def pack_floats(k, isa, values, count, panel, row):
    """Copy `count` float32 weights into row number `row` of a panel."""
    target = panel + row * 4
    with k.loop(count) as i:
        k.store(target + i * (4 * ISAS[isa].panel_rows), k.load(values + i * 4, f32(1)))


@emitted("void", "i64 i64 i64 i64 i64")
def multiply_float_panel(k, isa, panel, count, sources, position, tile):
    """The same for a panel of `count` float32 weights per row and float32 activations."""
    rows, tokens = ISAS[isa].panel_rows, ISAS[isa].panel_tokens
    xs = [k.load(sources + 8 * t, i64(1)) + position for t in range(tokens)]
    totals = [k.variable(k.constant(f32(rows), 0.0)) for _ in range(tokens)]
    with k.loop(count) as i:
        weight = k.load(panel + i * (4 * rows), f32(rows))
        for x, total in zip(xs, totals, strict=True):
            value = k.splat(k.load(x + i * 4, f32(1)), rows)
            total.set(k.multiply_add(weight, value, total.get()))
    _store_tile(k, tile, totals)


def _store_tile(k: Emitter, tile: Value, totals: list) -> None:
    rows = totals[0].get().lanes
    for index, total in enumerate(totals):
        k.store(tile + 4 * rows * index, total.get())

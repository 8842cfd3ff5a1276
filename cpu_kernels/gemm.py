"""Many rows of activations: weights are decoded once into panels, then multiplied with all rows.

What a GEMV adds up at the end of a row stays in its lane of a panel (see pack.py) here: four
activations are broadcast to all lanes. Panels are small enough for the L2 cache, and results are
tiles of `panel_tokens` rows of activations times the weights' rows of `panels` panels, which the
caller adds to where they belong.
"""

from __future__ import annotations

import operator
from functools import reduce

from cpu_kernels.activations import CHUNK_BYTES, FIRST_PAIRS, FIRST_SUMS, SCALES, SUMS
from cpu_kernels.dot import is_centred, multiply_tile, wants_unsigned
from cpu_kernels.groups import GROUPS, LAYOUTS
from cpu_kernels.isa import ISAS
from cpu_kernels.lanes import by_lanes
from cpu_kernels.pack import STEPS, float_panel_bytes, group_bytes, num_scales, panel_bytes
from cpu_kernels.simd import Emitter, Value, emitted, f32, i8, i16, i32, i64


@emitted("void", "i64 i64 i64 i64")
def multiply_panels(k, isa, format, panels, num_chunks, sources, tile):
    """tile [panel_tokens, panels * panel_rows] = panels of whole chunks times prepared rows, from
    the addresses at `sources` on."""
    rows, tokens, width = ISAS[isa].panel_rows, ISAS[isa].panel_tokens, ISAS[isa].panels
    size, scales = group_bytes(isa, format), num_scales(format)
    is_signed = LAYOUTS[format].signed and not wants_unsigned(isa)
    centre = LAYOUTS[format].centre if is_centred(isa, format) else 0
    has_offsets = not (is_signed or centre)
    xs = [k.load(sources + 8 * t, i64(1)) for t in range(tokens)]
    zero = k.constant(f32(rows), 0.0)
    totals = [[k.variable(zero) for _ in range(width)] for _ in range(tokens)]
    at_once = 2 if is_signed else 1  # groups: one after the other, products of signed ones wait
    with k.loop(num_chunks) as chunk, k.loop(k.integer(GROUPS // at_once)) as turn:
        for group in [turn * at_once + i for i in range(at_once)]:
            at = panels + (chunk * GROUPS + group) * size
            starts = [at + panel_bytes(isa, format) * p for p in range(width)]
            # See activations.byte_offset and POSITION.
            bytes_at = chunk * CHUNK_BYTES + (group >> 2) * 128 + (group & 3) * 16
            scales_at = chunk * CHUNK_BYTES + ((group >> 1) + (group & 1) * 4) * 4

            def load_weights(step, starts=starts):
                return [k.load(start + 4 * rows * step, i8(4 * rows)) for start in starts]

            def load_x(step, token, bytes_at=bytes_at):
                place = bytes_at + (64 * (step // 4) + 4 * (step % 4))
                return k.splat(k.load(xs[token] + place, i32(1)), rows).view(i8(4 * rows))

            for part in range(scales):
                steps = range(part * STEPS // scales, (part + 1) * STEPS // scales)
                taken_off = None
                if centre:
                    places = [FIRST_PAIRS + 32 * (part + i) for i in range(2 // scales)]
                    taken_off = [
                        _taken_off(k, [x + scales_at + place for place in places], centre, rows)
                        for x in xs
                    ]
                dots = multiply_tile(
                    k, isa, steps, tokens, load_weights, load_x, LAYOUTS[format].largest, is_signed,
                    taken_off,
                )  # fmt: skip
                sums = SUMS if scales == 1 else FIRST_SUMS + 32 * part
                for x, row, products in zip(xs, totals, dots, strict=True):
                    x_scale = k.splat(k.load(x + scales_at + SCALES, f32(1)), rows)
                    x_sum = k.splat(k.load(x + scales_at + sums, f32(1)), rows)
                    for start, total, product in zip(starts, row, products, strict=True):
                        scale = k.load(start + 4 * rows * (STEPS + part), f32(rows)) * x_scale
                        value = k.multiply_add(product.cast("sitofp", f32), scale, total.get())
                        if has_offsets:
                            offset = k.load(start + 4 * rows * (STEPS + scales + part), f32(rows))
                            value = k.multiply_add(offset, x_sum, value)
                        total.set(value)
    _store_tile(k, tile, [[total.get() for total in row] for row in totals])


@emitted("void", "i64 i64 i64 i64")
def multiply_float_panels(k, isa, panels, count, sources, tile):
    """tile [float_tokens, panels * panel_rows] = panels of `count` float32 weights per row times
    float32 rows, from the addresses at `sources` on."""
    rows, tokens, width = ISAS[isa].panel_rows, ISAS[isa].float_tokens, ISAS[isa].panels
    xs = [k.load(sources + 8 * t, i64(1)) for t in range(tokens)]
    zero = k.constant(f32(rows), 0.0)
    totals = [[k.variable(zero) for _ in range(width)] for _ in range(tokens)]
    with k.loop(count) as i:
        at = panels + i * (4 * rows)
        weights = [k.load(at + float_panel_bytes(isa) * p, f32(rows)) for p in range(width)]
        for x, row in zip(xs, totals, strict=True):
            value = k.splat(k.load(x + i * 4, f32(1)), rows)
            for weight, total in zip(weights, row, strict=True):
                total.set(k.multiply_add(weight, value, total.get()))
    _store_tile(k, tile, [[total.get() for total in row] for row in totals])


def _taken_off(k: Emitter, pairs: list[Value], centre: int, rows: int) -> Value:
    """Centre times the sums of activations, of halves whose pairs are at these addresses."""
    sums = [k.splat(k.load(at, i32(1)), rows).view(i16(2 * rows)) for at in pairs]
    return reduce(operator.add, sums) * centre


def _store_tile(k: Emitter, tile: Value, sums: list[list[Value]]) -> None:
    for index, value in enumerate(value for row in sums for value in row):
        k.store(tile + 4 * value.lanes * index, value)


@emitted("void", "i64 i64")
def prefetch_lines(k, start, end):
    """Bring the bytes from `start` to `end` into the caches."""
    with k.loop((end - start + 63) >> 6) as line:
        k.prefetch(start + line * 64)


@emitted("void", "i64 i64 i64")
def copy_row(k, source, target, count):
    """`count` float32 of a tile to where they belong."""

    def do(offset, lanes):
        k.store(target + offset, k.load(source + offset, f32(lanes)))

    by_lanes(k, count, do)


@emitted("void", "i64 i64 i64 i64")
def add_row(k, source, added, target, count):
    """The same, plus `added`."""

    def do(offset, lanes):
        values = k.load(source + offset, f32(lanes)) + k.load(added + offset, f32(lanes))
        k.store(target + offset, values)

    by_lanes(k, count, do)

"""Rows of float weights times some rows of float32 activations.

Every result has the bits that gemv.dot_floats gives it: FLOAT_SUMS sums of vectors, added up at the
end. They do not need each other, so that one after the other is found for several results at once:
what is loaded is used more often, and a part of some rows of weights, converted once for all rows
of activations, stays in the first-level cache.
"""

from __future__ import annotations

from cpu_kernels.activations import FEW_ROWS
from cpu_kernels.formats import FORMATS
from cpu_kernels.gemv import FLOAT_SUMS, LINE, float_lanes, load_floats
from cpu_kernels.simd import Emitter, Value, emitted, f32, i64

TOKENS = 2  # rows of activations whose sums are in registers at once
WEIGHTS_AT_ONCE = 1024  # of a row; a part of them is converted


def float_rows(isa: str) -> int:
    """Rows of weights that are multiplied at once. With TOKENS rows of activations, they have as
    many results as a register has lanes."""
    return float_lanes(isa) // TOKENS


@emitted("void", "i64 i64 i64 i64 i64 i64 i64 i64 i64")
def multiply_few_floats(
    k, isa, format, weights, row_bytes, count, sources, num_rows, added, targets, offset, next_bytes
):
    """`float_rows` rows of `count` weights times up to FEW_ROWS rows of activations, whose
    addresses are at `sources`, an even number of them. The results for each, with the float32 at
    `added`, go `offset` bytes after its address at `targets`. So many bytes as come after these
    rows are wanted next."""
    lanes, rows, size = float_lanes(isa), float_rows(isa), FORMATS[format].block_bytes
    vector, tile, step = 4 * lanes, 4 * lanes * lanes, FLOAT_SUMS * lanes
    part_bytes = FEW_ROWS // TOKENS * tile
    converted = k.stack(WEIGHTS_AT_ONCE // step * rows * vector)
    sums = k.stack(FLOAT_SUMS * part_bytes)
    num_steps, num_tiles = count // step, num_rows // TOKENS
    # One at least, so that sums are 0 where a row is too short for any.
    num_turns = (num_steps * step + WEIGHTS_AT_ONCE - 1) // WEIGHTS_AT_ONCE
    num_turns = k.maximum(num_turns, k.integer(1))
    ahead = k.variable(weights + row_bytes * rows)
    pace = next_bytes // (num_turns * FLOAT_SUMS * num_tiles)
    with k.loop(num_turns) as turn, k.loop(k.integer(FLOAT_SUMS)) as part:
        first = turn * num_steps // num_turns
        num_vectors = (turn + 1) * num_steps // num_turns - first
        at = first * step + part * lanes
        starts = [weights + row_bytes * row + at * size for row in range(rows)]
        with k.loop(num_vectors) as i:
            for row, start in enumerate(starts):
                value = load_floats(k, format, start + i * (step * size), lanes)
                k.store(converted + (i * rows + row) * vector, value, align=vector)
        with k.loop(num_tiles) as t:
            # Each time a few lines, as many at once would have to wait for each other. And not into
            # the first-level cache, whose content is in use.
            with k.loop((pace + LINE - 1) // LINE) as line:
                k.prefetch(ahead.get() + line * LINE, level=2)
            ahead.set(ahead.get() + pace)
            xs = [x + at * 4 for x in _addresses(k, sources, t)]
            place = sums + part * part_bytes + t * tile
            _add_tile(k, lanes, converted, num_vectors, xs, place, turn)
    with k.loop(num_tiles) as t:
        results = []
        for place in range(0, tile, vector):
            a, b, c, d = (
                k.load(sums + part_bytes * part + t * tile + place, f32(lanes), align=vector)
                for part in range(FLOAT_SUMS)
            )
            results.append((a + b) + (c + d))
        total, xs = k.variable(k.sums(results)), _addresses(k, sources, t)
        done = num_steps * step
        with k.loop(count - done) as i:
            at = done + i
            places = [weights + row_bytes * row + at * size for row in range(rows)]
            w = k.gather([load_floats(k, format, place, 1) for place in places])
            x = k.concatenate([k.splat(k.load(x + at * 4, f32(1)), rows) for x in xs])
            total.set(k.multiply_add(k.concatenate([w] * TOKENS), x, total.get()))
        results = k.parts(total.get(), rows)
        for target, result in zip(_addresses(k, targets, t), results, strict=True):
            k.store(target + offset, result + k.load(added, f32(rows)))


def _addresses(k: Emitter, table: Value, tile: Value) -> list[Value]:
    return [k.load(table + (tile * TOKENS + i) * 8, i64(1)) for i in range(TOKENS)]


def _add_tile(
    k: Emitter,
    lanes: int,
    weights: Value,
    num_vectors: Value,
    xs: list[Value],
    sums: Value,
    turn: Value,
) -> None:
    """A part of the sums of TOKENS rows of activations with some rows of weights. It is added to
    what is there, except in the first turn."""
    rows, vector = lanes // TOKENS, 4 * lanes
    zero = k.constant(f32(lanes), 0.0)
    totals = {(t, row): k.variable(zero) for t in range(TOKENS) for row in range(rows)}
    places = [(sums + vector * i, total) for i, total in enumerate(totals.values())]
    with k.when(turn.compare(">", 0)):
        for place, total in places:
            total.set(k.load(place, f32(lanes), align=vector))
    with k.loop(num_vectors) as i:
        values = [k.load(x + i * (FLOAT_SUMS * vector), f32(lanes)) for x in xs]
        for row in range(rows):
            w = k.load(weights + (i * rows + row) * vector, f32(lanes), align=vector)
            for t, value in enumerate(values):
                totals[t, row].set(k.multiply_add(w, value, totals[t, row].get()))
    for place, total in places:
        k.store(place, total.get(), align=vector)

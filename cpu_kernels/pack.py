"""Panels: rows of weights, decoded and interleaved for products with many rows of activations.

A panel has `panel_rows` rows, one in each 32-bit lane of a register: four consecutive weights of
every row, then the next four. Of each group of 32 weights there are STEPS such registers, then the
rows' scales, then their offsets. Panels of float32 weights have one weight per row in a register.

Rows are packed four at a time: what four of them have in a register of four 32-bit lanes is
transposed, and then stored at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpu_kernels.dequantize import scales_and_offsets
from cpu_kernels.dot import wants_unsigned
from cpu_kernels.groups import GROUPS, LAYOUTS, Chunk, row_of_chunks
from cpu_kernels.isa import ISAS
from cpu_kernels.simd import Emitter, Value, emitted, f32, i32

STEPS = 8  # of four weights, in a group
CHUNKS_AT_ONCE = 8  # of 256 weights, in a panel
FLOATS_AT_ONCE = 512  # in a panel of float32
PACKED_ROWS = 4


def num_scales(format: str) -> int:
    """Scales of a group: one, or one for each half."""
    return LAYOUTS[format].num_scales


def group_bytes(isa: str, format: str) -> int:
    """Of a group in a panel."""
    return ISAS[isa].panel_rows * (4 * STEPS + 8 * num_scales(format))


def panel_bytes(isa: str, format: str) -> int:
    return CHUNKS_AT_ONCE * GROUPS * group_bytes(isa, format)


def float_panel_bytes(isa: str) -> int:
    return FLOATS_AT_ONCE * 4 * ISAS[isa].panel_rows


@emitted("void", "i64 i64 i64 i64 i64 i64 i64 i64 i64")
def pack_rows(k, isa, format, w0, w1, w2, w3, num_groups, first, num_chunks, panel, row):
    """Decode `num_chunks` chunks, from number `first`, of the rows of `num_groups` groups at these
    addresses into rows `row` to `row + 3` of a panel."""
    nbytes = GROUPS * group_bytes(isa, format)
    rows = [row_of_chunks(k, format, weights, num_groups) for weights in (w0, w1, w2, w3)]
    with k.loop(num_chunks) as i:
        starts = [source.chunk(first + i) for source in rows]
        _pack_chunks(k, isa, format, starts, panel + row * 4 + i * nbytes)


def _pack_chunks(k: Emitter, isa: str, format: str, starts: Sequence[Value], target: Value) -> None:
    """A chunk of each of four rows."""
    lanes, groups = 4 * ISAS[isa].panel_rows, ISAS[isa].groups
    size = group_bytes(isa, format)
    chunks = [Chunk(k, format, start, groups, wants_unsigned(isa), isa) for start in starts]
    for half in (0, 1):
        for step in range(GROUPS // groups):
            words = [chunk.integers(step, half).view(i32(4 * groups)) for chunk in chunks]
            for number, vector in enumerate(transpose(k, words)):
                for member, four in enumerate(_fours(k, vector)):
                    group = step * groups + member
                    k.store(target + (size * group + lanes * (4 * half + number)), four)
    for part in range(num_scales(format)):
        pairs = zip(*[scales_and_offsets(k, chunk, part) for chunk in chunks], strict=True)
        for kind, vectors in enumerate(pairs):
            place = STEPS + num_scales(format) * kind + part
            for number, vector in enumerate(transpose(k, vectors)):
                for member, four in enumerate(_fours(k, vector)):
                    group = 2 * number + member  # see activations.POSITION
                    k.store(target + (size * group + lanes * place), four)


def transpose(k: Emitter, rows: Sequence[Value]) -> list[Value]:
    """Of four vectors, in each four of their lanes."""
    lanes = rows[0].lanes

    def interleave(a: Value, b: Value, chosen: Sequence[int]) -> Value:
        starts = range(0, lanes, 4)
        mask = [start + i + (lanes - 4) * (i // 4) for start in starts for i in chosen]
        return k.shuffle(a, b, mask)

    a, b, c, d = rows
    halves = [
        (interleave(a, b, chosen), interleave(c, d, chosen))
        for chosen in ((0, 4, 1, 5), (2, 6, 3, 7))
    ]
    return [interleave(*half, chosen) for half in halves for chosen in ((0, 1, 4, 5), (2, 3, 6, 7))]


def _fours(k: Emitter, vector: Value) -> list[Value]:
    """A vector in parts of four lanes."""
    if vector.lanes == 4:
        return [vector]
    starts = range(0, vector.lanes, 4)
    return [k.shuffle(vector, mask=range(start, start + 4)) for start in starts]


@emitted("void", "i64 i64 i64 i64")
def pack_floats(k, isa, values, count, panel, row):
    """Copy four rows of `count` float32 weights, FLOATS_AT_ONCE apart, into rows `row` to `row + 3`
    of a panel."""
    target, step = panel + row * 4, 4 * ISAS[isa].panel_rows
    starts = [values + 4 * FLOATS_AT_ONCE * i for i in range(PACKED_ROWS)]
    whole = count >> 2
    with k.loop(whole) as i:
        vectors = [k.load(start + i * 16, f32(4)) for start in starts]
        for number, vector in enumerate(transpose(k, vectors)):
            k.store(target + (i * (4 * step) + step * number), vector)
    with k.loop(count & 3) as i:
        at = (whole << 2) + i
        for number, start in enumerate(starts):
            k.store(target + (at * step + 4 * number), k.load(start + at * 4, f32(1)))

"""Panels: rows of weights, decoded and interleaved for products with many rows of activations.

A panel has `panel_rows` rows, one in each 32-bit lane of a register: four consecutive weights of
every row, then the next four. Of each group of 32 weights there are STEPS such registers, then the
rows' scales, then their offsets, unless dot.is_centred. Panels of float32 weights have one weight
per row in a register.
"""

from __future__ import annotations

from cpu_kernels.activations import FIRST_SUMS, SECOND_SUMS, SUMS
from cpu_kernels.dot import is_centred
from cpu_kernels.few_rows import LANE, Panel
from cpu_kernels.groups import GROUPS, LAYOUTS, by_bytes, row_of_chunks
from cpu_kernels.isa import ISAS
from cpu_kernels.simd import Emitter, Value, emitted, f32

STEPS = 8  # of four weights, in a group
CHUNKS_AT_ONCE = 8  # of 256 weights, in a panel
FLOATS_AT_ONCE = 512  # in a panel of float32


def num_scales(format: str) -> int:
    """Scales of a group: one, or one for each half."""
    return LAYOUTS[format].num_scales


def group_bytes(isa: str, format: str) -> int:
    """Of a group in a panel."""
    per_scale = 4 if is_centred(isa, format) else 8
    return ISAS[isa].panel_rows * (4 * STEPS + per_scale * num_scales(format))


def panel_bytes(isa: str, format: str) -> int:
    return CHUNKS_AT_ONCE * GROUPS * group_bytes(isa, format)


def float_panel_bytes(isa: str) -> int:
    return FLOATS_AT_ONCE * 4 * ISAS[isa].panel_rows


@emitted("void", "i64 i64 i64 i64 i64 i64 i64")
def pack_panel(k, isa, format, weights, row_bytes, last, num_groups, first, num_chunks, panel):
    """Decode `num_chunks` chunks, from number `first`, of rows of `num_groups` groups into a panel.

    The rows begin at `weights` and are `row_bytes` apart; the one at `last` comes again where there
    are none left.
    """
    rows, nbytes = ISAS[isa].panel_rows, group_bytes(isa, format)
    starts = [k.minimum(weights + row_bytes * row, last) for row in range(rows)]
    sources = [row_of_chunks(k, format, start, num_groups) for start in starts]
    with k.loop(num_chunks) as i:
        decoded = Panel(k, isa, format, [source.chunk(first + i) for source in sources])
        targets = [panel + (i * GROUPS + number) * nbytes for number in range(GROUPS)]
        for number, half in by_bytes(format):
            for word, register in enumerate(decoded.integers(number, half)):
                k.store(targets[number] + 4 * rows * (STEPS // 2 * half + word), register)
        for number, target in enumerate(targets):
            registers = _scales(k, isa, format, *decoded.scales(number))
            for place, register in enumerate(registers, STEPS):
                k.store(target + 4 * rows * place, register)


def _scales(
    k: Emitter,
    isa: str,
    format: str,
    scales: list[Value],
    offsets: list[tuple[Value, int]],
) -> list[Value]:
    """What a panel has of a group besides integers: its scales, and an offset for each."""
    if is_centred(isa, format):
        return scales
    factor, nothing = LAYOUTS[format].offset_factor, k.constant(scales[0].type, 0.0)
    for_each = []
    for part in range(len(scales)):
        kinds = SUMS, (FIRST_SUMS, SECOND_SUMS)[part]
        own = [value * factor for value, sums in offsets if sums in kinds]
        for_each.append(own[0] if own else nothing)
    return [*scales, *for_each]


@emitted("void", "i64 i64 i64 i64")
def pack_floats(k, isa, values, count, panel, row):
    """Copy four rows of `count` float32 weights, FLOATS_AT_ONCE apart, into rows `row` to `row + 3`
    of a panel."""
    target, step = panel + row * 4, 4 * ISAS[isa].panel_rows
    starts = [values + 4 * FLOATS_AT_ONCE * i for i in range(LANE)]
    whole = count >> 2
    with k.loop(whole) as i:
        vectors = [k.load(start + i * 16, f32(4)) for start in starts]
        for number, vector in enumerate(k.transpose(vectors)):
            k.store(target + (i * (4 * step) + step * number), vector)
    with k.loop(count & 3) as i:
        at = (whole << 2) + i
        for number, start in enumerate(starts):
            k.store(target + (at * step + 4 * number), k.load(start + at * 4, f32(1)))

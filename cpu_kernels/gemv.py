"""A row of weights times a row of activations, straight from the file's bytes.

The trick: weights of two groups (four with 512-bit registers, one with 128) share a register, one
half of each group at a time. Products are summed in integers until each of eight lanes has the dot
product of one of the chunk's eight groups; then one conversion and one multiply-add with the eight
scales take them to float32. What is added to the integers (a minimum, or -8) is a second, much
smaller product: that of the groups' offsets with the activations' group sums. few_rows.py does the
same additions in the same order for several rows of activations.
"""

from __future__ import annotations

from cpu_kernels.activations import CHUNK_BYTES, SCALES, byte_offset
from cpu_kernels.dot import group_dots, wants_unsigned
from cpu_kernels.formats import FORMATS
from cpu_kernels.groups import GROUPS, LAYOUTS, Chunk, row_of_chunks
from cpu_kernels.isa import ISAS
from cpu_kernels.simd import Emitter, Value, Variable, emitted, f16, f32, i16, i32, i64

# Ahead of what is being multiplied. Weights are read once per token: what they would push out of
# the caches is the interpreter, whose turn comes between two layers.
PREFETCH_BYTES = 4096
LINE = 64


class _Sums:
    """Running sums over the chunks of a row."""

    def __init__(self, k: Emitter) -> None:
        self.k = k
        self.products = k.variable(k.constant(f32(GROUPS), 0.0))
        self.offsets = k.variable(k.constant(f32(GROUPS), 0.0))

    def add(self, to: Variable, a: Value, b: Value) -> None:
        to.set(self.k.multiply_add(a, b, to.get()))

    def total(self, offset_factor: float) -> Value:
        offsets = self.offsets.get()
        factor = self.k.constant(offsets.type, offset_factor)
        return self.k.sum(self.k.multiply_add(offsets, factor, self.products.get()))


def _multiply_chunk(
    k: Emitter, isa: str, format: str, weights: Value, x: Value, sums: _Sums
) -> None:
    groups = ISAS[isa].groups
    chunk = Chunk(k, format, weights, groups, wants_unsigned(isa), isa)
    for offset, kind in chunk.offsets:
        sums.add(sums.offsets, offset, k.load(x + kind, f32(GROUPS)))
    x_scales = k.load(x + SCALES, f32(GROUPS))
    pairs = []
    for step in range(GROUPS // groups):
        halves = [chunk.integers(step, half) for half in (0, 1)]
        at = [x + byte_offset(step * groups, half) for half in (0, 1)]
        pairs.append([(w, k.load(a, w.type)) for w, a in zip(halves, at, strict=True)])
    for part, scale in enumerate(chunk.scales):
        chosen = pairs if len(chunk.scales) == 1 else [[both[part]] for both in pairs]
        dots = group_dots(k, isa, chosen, LAYOUTS[format].largest, chunk.is_signed)
        sums.add(sums.products, dots.cast("sitofp", f32), scale * x_scales)


def dot(k: Emitter, isa: str, format: str, weights: Value, num_groups: Value, x: Value) -> Value:
    """The row at `weights` times the prepared row at `x`: float32."""
    sums = _Sums(k)
    row = row_of_chunks(k, format, weights, num_groups)
    with k.loop(row.num_chunks) as i:
        at = row.chunk(i)
        for line in range(-(-row.nbytes // LINE)):
            k.prefetch(at + (PREFETCH_BYTES + line * LINE), keep=False)
        _multiply_chunk(k, isa, format, at, x + i * CHUNK_BYTES, sums)
    return sums.total(LAYOUTS[format].offset_factor)


@emitted("f32", "i64 i64 i64")
def dot_quantized(k, isa, format, weights, num_groups, x):
    """Quantized weights (a row of `num_groups` groups of 32) times a prepared row."""
    return dot(k, isa, format, weights, num_groups, x)


def float_lanes(isa: str) -> int:
    return 16 if ISAS[isa].groups == 4 else 8


def load_floats(k: Emitter, format: str, address: Value, lanes: int) -> Value:
    if format == "f32":
        return k.load(address, f32(lanes))
    if format == "f16":
        return k.load(address, f16(lanes)).cast("fpext", f32)
    return (k.load(address, i16(lanes)).cast("zext", i32) << 16).view(f32(lanes))


def _dot_floats(
    k: Emitter,
    isa: str,
    format: str,
    weights: Value,
    count: Value,
    xs: list[Value],
    ahead: Value,
    keep: bool,
) -> list[Value]:
    lanes = float_lanes(isa)
    num_bytes = FORMATS[format].block_bytes
    sums = [[k.variable(k.constant(f32(lanes), 0.0)) for _ in range(4)] for _ in xs]
    step = 4 * lanes
    num_steps = count >> (step.bit_length() - 1)
    with k.loop(num_steps) as i:
        at = weights + i * (step * num_bytes)
        for line in range(0, step * num_bytes, LINE):
            k.prefetch(at + ahead + line, keep)
        for part in range(4):
            w = load_floats(k, format, at + part * lanes * num_bytes, lanes)
            for x, parts in zip(xs, sums, strict=True):
                values = k.load(x + i * (step * 4) + part * lanes * 4, f32(lanes))
                parts[part].set(k.multiply_add(w, values, parts[part].get()))
    totals = []
    for parts in sums:
        a, b, c, d = (part.get() for part in parts)
        totals.append(k.variable(k.sum((a + b) + (c + d))))
    done = num_steps * step
    with k.loop(count - done) as i:
        at = done + i
        w = load_floats(k, format, weights + at * num_bytes, 1)
        for x, total in zip(xs, totals, strict=True):
            total.set(k.multiply_add(w, k.load(x + at * 4, f32(1)), total.get()))
    return [total.get() for total in totals]


@emitted("f32", "i64 i64 i64")
def dot_floats(k, isa, format, weights, count, x):
    """Weights of format f32, f16 or bf16 times float32 activations."""
    ahead = k.integer(PREFETCH_BYTES)
    return _dot_floats(k, isa, format, weights, count, [x], ahead, False)[0]


@emitted("void", "i64 i64 i64 i64 f32 i64 i64")
def dot_few_floats(
    k, isa, format, num_rows, weights, count, ahead, sources, added, targets, offset
):
    """The same with `num_rows` (a literal string: 2, or 3, whose sums just fit in the registers of
    AVX2) rows of activations, whose addresses are at `sources`. Each result, with `added`, goes
    `offset` bytes after its address at `targets`. Weights `ahead` bytes further on are wanted next.
    """
    rows = range(int(num_rows))
    xs = [k.load(sources + 8 * row, i64(1)) for row in rows]
    totals = _dot_floats(k, isa, format, weights, count, xs, ahead, True)
    for row, total in zip(rows, totals, strict=True):
        k.store(k.load(targets + 8 * row, i64(1)) + offset, total + added)

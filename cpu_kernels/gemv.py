"""A row of weights times one row of activations, or a few, straight from the file's bytes.

The trick: weights of two groups (four with 512-bit registers, one with 128) share a register, one
half of each group at a time. Products are summed in integers until each of eight lanes has the dot
product of one of the chunk's eight groups; then one conversion and one multiply-add with the eight
scales take them to float32. What is added to the integers (a minimum, or -8) is a second, much
smaller product: that of the groups' offsets with the activations' group sums. A chunk is decoded
once for all rows of activations. few_rows.py does the same additions in the same order for more.
"""

from __future__ import annotations

from cpu_kernels.activations import CHUNK_BYTES, FEW_ROWS, SCALES, byte_offset
from cpu_kernels.dot import group_dots, wants_unsigned
from cpu_kernels.formats import FORMATS
from cpu_kernels.groups import GROUPS, LAYOUTS, Chunk, row_of_chunks
from cpu_kernels.isa import ISAS
from cpu_kernels.simd import Emitter, Value, emitted, f16, f32, i16, i32, i64

# Ahead of what is being multiplied. Weights are read once per token: what they would push out of
# the caches is the interpreter, whose turn comes between two layers.
PREFETCH_BYTES = 4096
LINE = 64
FLOAT_SUMS = 4  # of a product of floats, each of every fourth vector


class _Decoded:
    """A chunk of weights in registers, to be multiplied with rows of activations."""

    def __init__(self, k: Emitter, isa: str, format: str, weights: Value) -> None:
        self.k, self.isa, self.format, self.groups = k, isa, format, ISAS[isa].groups
        self.chunk = Chunk(k, format, weights, self.groups, wants_unsigned(isa), isa)
        self.steps = [
            [self.chunk.integers(step, half) for half in (0, 1)]
            for step in range(GROUPS // self.groups)
        ]

    def multiply(self, x: Value, products: Value, offsets: Value) -> tuple[Value, Value]:
        """float32 [8] and [8], with what the prepared chunk at `x` adds to them."""
        k, scales = self.k, self.chunk.scales
        for offset, kind in self.chunk.offsets:
            offsets = k.multiply_add(offset, k.load(x + kind, f32(GROUPS)), offsets)
        x_scales = k.load(x + SCALES, f32(GROUPS))
        for part, scale in enumerate(scales):
            halves = (0, 1) if len(scales) == 1 else (part,)
            pairs = [
                [(own[half], self._x(x, step, half, own[half])) for half in halves]
                for step, own in enumerate(self.steps)
            ]
            largest = LAYOUTS[self.format].largest
            dots = group_dots(k, self.isa, pairs, largest, self.chunk.is_signed)
            products = k.multiply_add(dots.cast("sitofp", f32), scale * x_scales, products)
        return products, offsets

    def _x(self, x: Value, step: int, half: int, like: Value) -> Value:
        return self.k.load(x + byte_offset(step * self.groups, half), like.type)


def _total(k: Emitter, products: Value, offsets: Value, offset_factor: float) -> Value:
    return k.sum(k.multiply_add(offsets, k.constant(offsets.type, offset_factor), products))


def prefetch_chunk(k: Emitter, address: Value, nbytes: int) -> None:
    """Weights that are used once, soon."""
    for line in range(-(-nbytes // LINE)):
        k.prefetch(address + line * LINE, keep=False)


@emitted("f32", "i64 i64 i64")
def dot_quantized(k, isa, format, weights, num_groups, x):
    """Quantized weights (a row of `num_groups` groups of 32) times a prepared row."""
    products, offsets = [k.variable(k.constant(f32(GROUPS), 0.0)) for _ in range(2)]
    row = row_of_chunks(k, format, weights, num_groups)
    with k.loop(row.num_chunks) as i:
        at = row.chunk(i)
        prefetch_chunk(k, at + PREFETCH_BYTES, row.nbytes)
        decoded = _Decoded(k, isa, format, at)
        new = decoded.multiply(x + i * CHUNK_BYTES, products.get(), offsets.get())
        for variable, value in zip((products, offsets), new, strict=True):
            variable.set(value)
    return _total(k, products.get(), offsets.get(), LAYOUTS[format].offset_factor)


@emitted("void", "i64 i64 i64 i64 f32 i64 i64")
def dot_few_quantized(
    k, isa, format, weights, num_groups, sources, num_rows, added, targets, offset
):
    """The same for up to FEW_ROWS prepared rows, whose addresses are at `sources`. Each result,
    with `added`, goes `offset` bytes after its address at `targets`."""
    vector = 4 * GROUPS
    sums = k.stack(FEW_ROWS * 2 * vector)
    row = row_of_chunks(k, format, weights, num_groups)
    with k.loop(num_rows * 2) as i:
        k.store(sums + i * vector, k.constant(f32(GROUPS), 0.0))
    with k.loop(row.num_chunks) as i:
        at = row.chunk(i)
        prefetch_chunk(k, at + PREFETCH_BYTES, row.nbytes)
        decoded = _Decoded(k, isa, format, at)
        with k.loop(num_rows) as r:
            x = k.load(sources + r * 8, i64(1)) + i * CHUNK_BYTES
            places = [sums + (r * 2 + kind) * vector for kind in (0, 1)]
            new = decoded.multiply(x, *[k.load(place, f32(GROUPS)) for place in places])
            for place, value in zip(places, new, strict=True):
                k.store(place, value)
    with k.loop(num_rows) as r:
        pair = [k.load(sums + (r * 2 + kind) * vector, f32(GROUPS)) for kind in (0, 1)]
        total = _total(k, *pair, LAYOUTS[format].offset_factor)
        k.store(k.load(targets + r * 8, i64(1)) + offset, total + added)


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
    sums = [[k.variable(k.constant(f32(lanes), 0.0)) for _ in range(FLOAT_SUMS)] for _ in xs]
    step = FLOAT_SUMS * lanes
    num_steps = count >> (step.bit_length() - 1)
    with k.loop(num_steps) as i:
        at = weights + i * (step * num_bytes)
        for line in range(0, step * num_bytes, LINE):
            k.prefetch(at + ahead + line, keep)
        for part in range(FLOAT_SUMS):
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

"""A row of weights times a few rows of activations, straight from the file's bytes.

The trick: weights of two groups (four with 512-bit registers, one with 128) share a register, one
half of each group at a time. Products are summed in integers until each of eight lanes has the dot
product of one of the chunk's eight groups; then one conversion and one multiply-add with the eight
scales take them to float32. What is added to the integers (a minimum, or -8) is a second, much
smaller product: that of the groups' offsets with the activations' group sums. Each row's additions
have the same order whatever rows it is computed with.
"""

from __future__ import annotations

from cpu_kernels.activations import CHUNK_BYTES, SCALES, byte_offset
from cpu_kernels.dot import group_dots, wants_unsigned
from cpu_kernels.groups import GROUPS, LAYOUTS, Chunk, row_of_chunks
from cpu_kernels.isa import ISAS
from cpu_kernels.simd import Emitter, Value, Variable, emitted, f16, f32, i16, i32

# Ahead of what is being multiplied. Weights are read once per token: what they would push out of
# the caches is the interpreter, whose turn comes between two layers.
PREFETCH_BYTES = 4096
LINE = 64


class _Sums:
    """The running sums of one row of activations."""

    def __init__(self, k: Emitter, x: Value) -> None:
        self.x = x
        self.products = k.variable(k.constant(f32(GROUPS), 0.0))
        self.offsets = k.variable(k.constant(f32(GROUPS), 0.0))

    def add(self, k: Emitter, to: Variable, a: Value, b: Value) -> None:
        to.set(k.multiply_add(a, b, to.get()))

    def total(self, k: Emitter, offset_factor: float) -> Value:
        offsets = self.offsets.get()
        factor = k.constant(offsets.type, offset_factor)
        return k.sum(k.multiply_add(offsets, factor, self.products.get()))


def _multiply_chunk(
    k: Emitter, isa: str, format: str, weights: Value, position: Value, rows: list[_Sums]
) -> None:
    groups = ISAS[isa].groups
    chunk = Chunk(k, format, weights, groups, wants_unsigned(isa), isa)
    steps = range(GROUPS // groups)
    halves = [[chunk.integers(step, half) for half in (0, 1)] for step in steps]
    for row in rows:
        x = row.x + position
        for offset, sums in chunk.offsets:
            row.add(k, row.offsets, offset, k.load(x + sums, f32(GROUPS)))
        x_scales = k.load(x + SCALES, f32(GROUPS))
        pairs = [
            [
                (w, k.load(x + byte_offset(step * groups, half), w.type))
                for half, w in enumerate(halves[step])
            ]
            for step in steps
        ]
        for part, scale in enumerate(chunk.scales):
            chosen = pairs if len(chunk.scales) == 1 else [[both[part]] for both in pairs]
            dots = group_dots(k, isa, chosen, LAYOUTS[format].largest, chunk.is_signed)
            row.add(k, row.products, dots.cast("sitofp", f32), scale * x_scales)


def dot(k: Emitter, isa: str, format: str, weights: Value, num_groups: Value, xs: list[Value]):
    """The row at `weights` times each of the prepared rows `xs`: float32 scalars."""
    rows = [_Sums(k, x) for x in xs]
    row = row_of_chunks(k, format, weights, num_groups)
    with k.loop(row.num_chunks) as i:
        at = row.chunk(i)
        for line in range(-(-row.nbytes // LINE)):
            k.prefetch(at + (PREFETCH_BYTES + line * LINE), keep=False)
        _multiply_chunk(k, isa, format, at, i * CHUNK_BYTES, rows)
    return [row.total(k, LAYOUTS[format].offset_factor) for row in rows]


@emitted("f32", "i64 i64 i64")
def dot_1(k, isa, format, weights, num_groups, x):
    """Quantized weights (a row of `num_groups` groups of 32) times a prepared row."""
    return dot(k, isa, format, weights, num_groups, [x])[0]


@emitted("void", "i64 i64 i64 i64 i64")
def dot_2(k, isa, format, weights, num_groups, x0, x1, results):
    """The same with two prepared rows; the two float32 go to `results`."""
    for index, total in enumerate(dot(k, isa, format, weights, num_groups, [x0, x1])):
        k.store(results + 4 * index, total)


@emitted("void", "i64 i64 i64 i64 i64 i64 i64")
def dot_4(k, isa, format, weights, num_groups, x0, x1, x2, x3, results):
    """The same with four."""
    for index, total in enumerate(dot(k, isa, format, weights, num_groups, [x0, x1, x2, x3])):
        k.store(results + 4 * index, total)


def load_floats(k: Emitter, format: str, address: Value, lanes: int) -> Value:
    if format == "f32":
        return k.load(address, f32(lanes))
    if format == "f16":
        return k.load(address, f16(lanes)).cast("fpext", f32)
    return (k.load(address, i16(lanes)).cast("zext", i32) << 16).view(f32(lanes))


@emitted("f32", "i64 i64 i64")
def dot_floats(k, isa, format, weights, count, x):
    """Weights of format f32, f16 or bf16 times float32 activations."""
    lanes = 16 if ISAS[isa].groups == 4 else 8
    num_bytes = 4 if format == "f32" else 2
    sums = [k.variable(k.constant(f32(lanes), 0.0)) for _ in range(4)]
    step = 4 * lanes
    num_steps = count >> (step.bit_length() - 1)
    with k.loop(num_steps) as i:
        at = weights + i * (step * num_bytes)
        for line in range(0, step * num_bytes, LINE):
            k.prefetch(at + (PREFETCH_BYTES + line), keep=False)
        for part, variable in enumerate(sums):
            w = load_floats(k, format, at + part * lanes * num_bytes, lanes)
            values = k.load(x + i * (step * 4) + part * lanes * 4, f32(lanes))
            variable.set(k.multiply_add(w, values, variable.get()))
    total = k.variable(k.sum((sums[0].get() + sums[1].get()) + (sums[2].get() + sums[3].get())))
    done = num_steps * step
    with k.loop(count - done) as i:
        at = done + i
        w = load_floats(k, format, weights + at * num_bytes, 1)
        total.set(k.multiply_add(w, k.load(x + at * 4, f32(1)), total.get()))
    return total.get()

"""Activations as the kernels want them: int8 groups of 32 with a scale each, computed once per row.

Prepared memory starts with a header of int64 (address of the float32 rows, bytes between them,
their number, their length, bytes of a prepared row; address of the rounded rows, bytes of one) and
continues with the rows. A row is a run of chunks of 256 values; before a last one that has fewer,
zeros fill the chunk:

    2 x 128 bytes   four groups each: their four first halves, then their four second halves
    8 x float32     scales of the groups, in the order of POSITION, of 11 significant bits
    8 x float32     scale x sum of the group, the same of its first half, of its second half
    8 x 2 int16     of each group's first half, the sum of the integers at places 0 and 1 of every
                    four, and that of those at places 2 and 3; the same of its second half

so that kernels with registers of 16, 32 and 64 bytes can all load what they multiply in one step.
Integers and scales are those of ggml's Q8_0, whose scales are float16, but in a float32's range.
Where there is AMX, and for more than FEW_ROWS rows, all rows follow once more, rounded to bfloat16:
as many chunks, with the same zeros, whose groups have their first and second halves in turn: values
0 and 16, 1 and 17, and so on are pairs. Either rows follow each other, for kernels that are told
which of them they multiply, or blocks of SIDE rows, for those that multiply all: a block has a tile
for each group, of a line for each pair that has this pair of every row (see amx.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from numba.extending import register_jitable

from cpu_kernels.bfloat16 import in_pairs, plain_nan
from cpu_kernels.compiler import inner
from cpu_kernels.isa import available
from cpu_kernels.memory import store_word
from cpu_kernels.simd import Emitter, Value, emitted, f32, i8, i16, i32
from cpu_kernels.team import share

GROUP = 32
CHUNK = 256
CHUNK_BYTES = 448
HEADER_BYTES = 64
FEW_ROWS = 16  # of activations, at most: their sums stay in the first-level cache
HAS_TILES = "amx_bf16" in available()
SIDE = 16  # rows of a tile, and pairs of a group
TILE_BYTES = 4 * SIDE * SIDE
ROWS_OF_TILES = 2 * SIDE  # that AMX multiplies at once: there are always as many
UNROUNDED, IN_ROWS, IN_BLOCKS = range(3)  # how rows are rounded
GROUPS = CHUNK // GROUP
# Byte offsets in a chunk.
SCALES, SUMS, FIRST_SUMS, SECOND_SUMS = 256, 288, 320, 352
FIRST_PAIRS, SECOND_PAIRS = 384, 416
# Even groups in the lower half of a 256-bit register, odd ones in the upper half: spreading the
# scales of groups (2j, 2j + 1) over the two halves is then one shuffle inside the halves.
POSITION = [(group >> 1) + 4 * (group & 1) for group in range(8)]


def byte_offset(group: int, half: int) -> int:
    """Where 16 values of a group lie in a chunk."""
    return 128 * (group // 4) + 64 * half + 16 * (group % 4)


@register_jitable
def prepared_row_bytes(k: int) -> int:
    return (k + CHUNK - 1) // CHUNK * CHUNK_BYTES


@register_jitable
def _rounded_row_bytes(k: int) -> int:
    """With a line more: rows that are a power of two apart share few places of a cache."""
    return (k + CHUNK - 1) // CHUNK * (2 * CHUNK) + 64


def prepared_bytes(n: int, k: int, rounds: bool = HAS_TILES) -> int:
    """Bytes that `prepare_activations` needs for n rows of k values; with `rounds`, those that
    `prepare_rows` needs to round them in any way."""
    nbytes = HEADER_BYTES + n * prepared_row_bytes(k)
    if rounds and n > FEW_ROWS:
        nbytes += (n + ROWS_OF_TILES - 1) * _rounded_row_bytes(k)
    return nbytes


@emitted("void", "i64 i64 i64")
def _quantize_chunk(k, x, first, target):
    """256 float32 at `x` to the chunk at `target`; groups before number `first` are not read, and
    count as zeros.

    What a group has one of is computed for all eight at once: for each alone, that chain of
    instructions, with two divisions, takes longer than the values do.
    """
    maxima, totals, inverses = (k.stack(GROUPS * nbytes) for nbytes in (16, 32, 4))
    with k.when(first.compare(">", 0)):
        _clear(k, maxima, GROUPS * 16)
        _clear(k, totals, GROUPS * 32)
        _clear(k, target, CHUNK_BYTES)

    def find_largest(group: Value, position: Value) -> Value:
        return _largest(k, x + group * (4 * GROUP))

    def largest_of(*values: Value) -> Value:
        return reduce(k.maximum, values)

    largest = _of_groups(k, first, maxima, largest_of, find_largest)[0].view(f32(GROUPS))
    # Below 1e-35 its inverse might be infinite: such a group counts as zero.
    tiny, zero = largest.compare("<", 1e-35), k.constant(f32(GROUPS), 0.0)
    most = k.constant(f32(GROUPS), 127.0)
    scale = k.select(tiny, zero, _to_11_bits(k, largest / most))
    k.store(inverses, k.select(tiny, zero, most / largest))

    def quantize(group: Value, position: Value) -> Value:
        bytes_at = target + (group >> 2) * 128 + (group & 3) * 16  # byte_offset(group, 0)
        inverse = k.load(inverses + position * 4, f32(1))
        return _quantize_group(k, x + group * (4 * GROUP), inverse, bytes_at)

    def pairs_of(a: Value, b: Value, c: Value, d: Value) -> Value:
        return ((a + b) & 0xFFFF) | ((c + d) << 16)

    pairs = _of_groups(k, first, totals, pairs_of, quantize)
    halves = [_sum_of_pair(k, pair).cast("sitofp", f32) for pair in pairs]
    k.store(target + SCALES, scale)
    k.store(target + SUMS, (halves[0] + halves[1]) * scale)
    k.store(target + FIRST_SUMS, halves[0] * scale)
    k.store(target + SECOND_SUMS, halves[1] * scale)
    k.store(target + FIRST_PAIRS, pairs[0])
    k.store(target + SECOND_PAIRS, pairs[1])


def _sum_of_pair(k: Emitter, pairs: Value) -> Value:
    """Of two int16 in each word: i32."""
    values = pairs.view(i16(2 * pairs.lanes))
    low, high = [k.shuffle(values, mask=range(i, values.lanes, 2)) for i in (0, 1)]
    return low.cast("sext", i32) + high.cast("sext", i32)


def _of_groups(
    k: Emitter,
    first: Value,
    memory: Value,
    combine: Callable[..., Value],
    write: Callable[[Value, Value], Value],
) -> list[Value]:
    """Numbers of all groups, in the order of POSITION: i32 [8], once or more. `write(group,
    position)` gives for each number four lanes, side by side, that `combine` makes one of; `memory`
    has those of groups before the first one."""
    lanes = 0
    with k.loop(k.integer(GROUPS) - first) as number:
        group = first + number
        position = (group >> 1) + (group & 1) * 4
        value = write(group, position)
        lanes = value.lanes
        k.store(memory + position * (4 * lanes), value)
    parts = []
    for start in range(0, GROUPS, 4):
        places = range(start, start + 4)
        vectors = [k.load(memory + place * (4 * lanes), i32(lanes)) for place in places]
        parts.append(combine(*k.transpose(vectors)))
    quarters = [
        [*range(at, at + 4), *range(lanes + at, lanes + at + 4)] for at in range(0, lanes, 4)
    ]
    return [k.shuffle(*parts, mask=quarter) for quarter in quarters]


def _clear(k: Emitter, address: Value, nbytes: int) -> None:
    for offset in range(0, nbytes, 32):
        k.store(address + offset, k.constant(i32(8), 0))


def _largest(k: Emitter, x: Value) -> Value:
    """i32 [4], of which the largest is the largest of a group. Without their sign, floats are
    ordered as integers are, NaN last."""
    parts = [k.load(x + 64 * half, f32(16)).view(i32(16)) & 0x7FFFFFFF for half in (0, 1)]
    return k.largest(k.maximum(*parts), 4)


def _quantize_group(k: Emitter, x: Value, inverse: Value, bytes_at: Value) -> Value:
    """Store a group's integers. i32 [8]: four lanes for each half, whose sum is its integers'."""
    sums = []
    for half in (0, 1):
        rounded = k.round(k.load(x + 64 * half, f32(16)) * k.splat(inverse, 16))
        # Keeps conversion defined for infinities; with a NaN, the scale is one already.
        for limit, operator in ((127.0, "<"), (-127.0, ">")):
            bound = k.constant(f32(16), limit)
            rounded = k.select(rounded.compare(operator, bound), rounded, bound)
        integers = rounded.cast("fptosi", i32)
        k.store(bytes_at + 64 * half, integers.cast("trunc", i8))
        sums.append(k.sum(integers, 4))
    return k.concatenate(sums)


def _to_11_bits(k: Emitter, scale: Value) -> Value:
    """The nearest number with as many significant bits as a float16 has; NaN stays NaN."""
    bits = scale.view(i32(scale.lanes))
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return k.select(bits.compare(">", 0x7F800000), bits, rounded).view(scale.type)


def _rounded_group(k: Emitter, x: Value, first: Value, group: Value) -> Value:
    """The pairs of a group of the chunk at `x`: i32 [16]; zeros of one that is before `first`."""
    at = x + k.maximum(group, first) * (4 * GROUP)
    halves = [plain_nan(k, k.load(at + 64 * half, f32(SIDE))) for half in (0, 1)]
    pairs = in_pairs(*halves)
    counts = k.splat(group.compare(">=", first), SIDE)
    return k.select(counts, pairs, k.constant(pairs.type, 0))


@emitted("void", "i64 i64 i64")
def _round_chunk(k, x, first, target):
    """The same rounded, in pairs."""
    with k.loop(k.integer(GROUPS)) as group:
        k.store(target + group * (2 * GROUP), _rounded_group(k, x, first, group))


@emitted("void", "i64 i64 i64 i64 i64")
def _round_block(k, x, x_bytes, num_rows, first, target):
    """The same of SIDE rows that are `x_bytes` apart, as tiles; the last one comes again."""
    starts = [x + x_bytes * k.minimum(k.integer(row), num_rows - 1) for row in range(SIDE)]
    with k.loop(k.integer(GROUPS)) as group:
        rows = [_rounded_group(k, start, first, group) for start in starts]
        for number, line in enumerate(k.transpose_square(rows)):
            k.store(target + (group * TILE_BYTES + 4 * SIDE * number), line)


@inner
def _chunk(k, number):
    """Where a chunk of a row begins, and how many of its groups do not count: a last one ends with
    the row, as that of weights does (see groups.Row)."""
    missing = GROUPS - min(k - number * CHUNK, CHUNK) // GROUP
    return 4 * min(number * CHUNK, k - CHUNK), missing


@inner
def prepare_rows(x, ldx, n, k, prepared, thread, num_threads, rounds):
    """What prepare_activations does; more than FEW_ROWS rows are rounded, too, as `rounds` says:
    UNROUNDED, IN_ROWS or IN_BLOCKS."""
    row_bytes, rounded_bytes = prepared_row_bytes(k), _rounded_row_bytes(k)
    rounded = prepared + HEADER_BYTES + n * row_bytes
    if thread == 0:
        store_word(prepared, 0, x)
        store_word(prepared, 1, 4 * ldx)
        store_word(prepared, 2, n)
        store_word(prepared, 3, k)
        store_word(prepared, 4, row_bytes)
        store_word(prepared, 5, rounded)
        store_word(prepared, 6, rounded_bytes)
    if n <= FEW_ROWS:
        rounds = UNROUNDED
    num_chunks = (k + CHUNK - 1) // CHUNK
    first, last = share(n * num_chunks, thread, num_threads)
    for i in range(first, last):
        row = i // num_chunks
        chunk = i - row * num_chunks
        start, missing = _chunk(k, chunk)
        source = x + 4 * row * ldx + start
        target = prepared + HEADER_BYTES + row * row_bytes + chunk * CHUNK_BYTES
        _quantize_chunk(source, missing, target)
        if rounds == IN_ROWS:
            _round_chunk(source, missing, rounded + row * rounded_bytes + chunk * (2 * CHUNK))
    if rounds == IN_BLOCKS:
        num_blocks = (n + ROWS_OF_TILES - 1) // ROWS_OF_TILES * (ROWS_OF_TILES // SIDE)
        first, last = share(num_blocks * num_chunks, thread, num_threads)
        for i in range(first, last):
            row = i // num_chunks * SIDE
            start, missing = _chunk(k, i % num_chunks)
            row = min(row, n - 1)  # a whole block may be missing
            source = x + 4 * row * ldx + start
            _round_block(source, 4 * ldx, n - row, missing, rounded + i * (GROUPS * TILE_BYTES))


@inner
def prepare_activations(x, ldx, n, k, prepared, thread, num_threads):
    """This thread's share of quantizing n float32 rows of k values, `ldx` values apart, for kernels
    that multiply all of them.

    `x` and `prepared` (prepared_bytes(n, k) of room, aligned to 64) are addresses. The rows must
    stay as they are while `prepared` is used: kernels of float formats read them. A barrier must
    follow, before anything is multiplied.
    """
    rounds = IN_BLOCKS if HAS_TILES else UNROUNDED
    prepare_rows(x, ldx, n, k, prepared, thread, num_threads, rounds)


@inner
def prepare_chosen(x, ldx, n, k, prepared, thread, num_threads):
    """The same for kernels that are told which rows they multiply."""
    rounds = IN_ROWS if HAS_TILES else UNROUNDED
    prepare_rows(x, ldx, n, k, prepared, thread, num_threads, rounds)

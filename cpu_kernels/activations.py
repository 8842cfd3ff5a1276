"""Activations as the kernels want them: int8 groups of 32 with a scale each, computed once per row.

Prepared memory starts with a header of int64 (address of the float32 rows, bytes between them,
their number, their length, bytes of a prepared row) and continues with the rows. A row is a run
of chunks of 256 values; before a last one that has fewer, zeros fill the chunk:

    2 x 128 bytes   four groups each: their four first halves, then their four second halves
    8 x float32     scales of the groups, in the order of POSITION, of 11 significant bits
    8 x float32     scale x sum of the group, the same of its first half, of its second half

so that kernels with registers of 16, 32 and 64 bytes can all load what they multiply in one step.
Integers and scales are those of ggml's Q8_0, whose scales are float16, but in a float32's range.
"""

from __future__ import annotations

from numba.extending import register_jitable

from cpu_kernels.compiler import inner
from cpu_kernels.memory import store_word
from cpu_kernels.simd import Emitter, Value, emitted, f32, i8, i32
from cpu_kernels.team import share

GROUP = 32
CHUNK = 256
CHUNK_BYTES = 384
HEADER_BYTES = 64
SCALES, SUMS, FIRST_SUMS, SECOND_SUMS = 256, 288, 320, 352  # byte offsets in a chunk
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
def prepared_bytes(n: int, k: int) -> int:
    """Bytes that `prepare_activations` needs for n rows of k values."""
    return HEADER_BYTES + n * prepared_row_bytes(k)


def quantize_chunk(k: Emitter, x: Value, target: Value) -> None:
    """256 float32 at `x` to the chunk at `target`."""
    with k.loop(k.integer(8)) as group:
        bytes_at = target + (group >> 2) * 128 + (group & 3) * 16  # byte_offset(group, 0)
        scales_at = target + ((group >> 1) + (group & 1) * 4) * 4  # POSITION[group]
        _quantize_group(k, x + group * (4 * GROUP), bytes_at, scales_at)


def _quantize_group(k: Emitter, x: Value, bytes_at: Value, scales_at: Value) -> None:
    parts = [k.load(x + 64 * half, f32(16)) for half in (0, 1)]
    # Without their sign, floats are ordered as integers are, NaN last.
    largest = k.largest(k.maximum(*[p.view(i32(16)) & 0x7FFFFFFF for p in parts])).view(f32(1))
    # Below 1e-35 its inverse might be infinite: such a group counts as zero.
    tiny = largest.compare("<", 1e-35)
    zero = k.constant(f32(1), 0.0)
    scale = k.select(tiny, zero, _to_11_bits(k, largest / k.constant(f32(1), 127.0)))
    inverse = k.select(tiny, zero, k.constant(f32(1), 127.0) / largest)
    sums = []
    for half, part in enumerate(parts):
        rounded = k.round(part * k.splat(inverse, 16))
        # Keeps conversion defined for infinities; with a NaN, the scale is one already.
        for limit, operator in ((127.0, "<"), (-127.0, ">")):
            bound = k.constant(f32(16), limit)
            rounded = k.select(rounded.compare(operator, bound), rounded, bound)
        integers = rounded.cast("fptosi", i32)
        k.store(bytes_at + 64 * half, integers.cast("trunc", i8))
        sums.append(k.sum(integers))
    first, second = [s.cast("sitofp", f32) for s in sums]
    k.store(scales_at + SCALES, scale)
    k.store(scales_at + SUMS, (first + second) * scale)
    k.store(scales_at + FIRST_SUMS, first * scale)
    k.store(scales_at + SECOND_SUMS, second * scale)


def _to_11_bits(k: Emitter, scale: Value) -> Value:
    """The nearest number with as many significant bits as a float16 has; NaN stays NaN."""
    bits = scale.view(i32(1))
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return k.select(bits.compare(">", 0x7F800000), bits, rounded).view(f32(1))


@emitted("void", "i64 i64")
def _quantize_whole(k, x, target):
    quantize_chunk(k, x, target)


@emitted("void", "i64 i64 i64")
def _quantize_last(k, x, count, target):
    """The same for a last chunk of `count` values: after zeros, where weights have them, whose last
    chunk begins earlier (see groups.Row)."""
    padded = k.stack(4 * CHUNK)
    for part in range(CHUNK // 16):
        k.store(padded + 64 * part, k.constant(f32(16), 0.0))
    with k.loop(count) as i:
        k.store(padded + (i - count + CHUNK) * 4, k.load(x + i * 4, f32(1)))
    quantize_chunk(k, padded, target)


@inner
def prepare_activations(x, ldx, n, k, prepared, thread, num_threads):
    """This thread's share of quantizing n float32 rows of k values, `ldx` values apart.

    `x` and `prepared` (prepared_bytes(n, k) of room, aligned to 64) are addresses. The rows must
    stay as they are while `prepared` is used: kernels of float formats read them. A barrier must
    follow, before anything is multiplied.
    """
    row_bytes = prepared_row_bytes(k)
    if thread == 0:
        store_word(prepared, 0, x)
        store_word(prepared, 1, 4 * ldx)
        store_word(prepared, 2, n)
        store_word(prepared, 3, k)
        store_word(prepared, 4, row_bytes)
    num_chunks = (k + CHUNK - 1) // CHUNK
    first, last = share(n * num_chunks, thread, num_threads)
    for i in range(first, last):
        row = i // num_chunks
        chunk = i - row * num_chunks
        source = x + 4 * (row * ldx + chunk * CHUNK)
        target = prepared + HEADER_BYTES + row * row_bytes + chunk * CHUNK_BYTES
        if (chunk + 1) * CHUNK <= k:
            _quantize_whole(source, target)
        else:
            _quantize_last(source, k - chunk * CHUNK, target)

"""The instruction at the bottom of everything: dot products of four bytes in each 32-bit lane."""

from __future__ import annotations

from collections.abc import Callable

from cpu_kernels.groups import LAYOUTS
from cpu_kernels.isa import ISAS, Isa
from cpu_kernels.simd import Emitter, Value, i16, i32, i64

# Instructions that multiply unsigned weights with signed activations, adding to 32-bit lanes.
_DPBUSD = {
    "amx_bf16": "llvm.x86.avx512.vpdpbusd.512",
    "avx512_vnni": "llvm.x86.avx512.vpdpbusd.512",
    "avx_vnni": "llvm.x86.avx512.vpdpbusd.256",
}
_CHAIN = 4  # of them, one after the other
_WIDEST_SUM = 32767  # of an int16
_INTEGERS = {32: i32, 64: i64}


def wants_unsigned(isa: str) -> bool:
    """Signed weights must get 128 added before they are multiplied."""
    return isa in _DPBUSD


def is_centred(isa: str, format: str) -> bool:
    """Whether panels are multiplied as if the integer that stands for 0 were 0, so that all
    products of a scale, added, fit in 16 bits, and no offsets are needed.

    They need to fit only in the end: what is taken off them at first, the centre times the
    activations' sums, makes up for every overflow until then."""
    layout = LAYOUTS[format]
    products = 2 * 127 * (8 // layout.num_scales)  # of a lane, for weights of 1
    is_too_large = products * layout.largest > _WIDEST_SUM >= products * layout.centre
    return isa == "avx2" and layout.centre > 0 and is_too_large


def as_on_a_gpu(isa: Isa, format: str) -> Isa:
    """Of the instruction sets that a processor with `isa` has, the one whose sums are those of a
    GPU: where signed weights get 128 added before, that is taken off again in float32, and AMX
    rounds what it multiplies."""
    if format in LAYOUTS and LAYOUTS[format].signed and wants_unsigned(isa.name):
        return ISAS["avx2"]
    return ISAS["avx512_vnni"] if isa.has_tiles else isa


def multiply_bytes(
    k: Emitter, isa: str, pairs: list[tuple[Value, Value]], largest: int, is_signed: bool
) -> Value:
    """Sum over `pairs` of weights [4 * n] i8 and activations [4 * n] i8: i32 [n].

    Lane i has the products of bytes 4i .. 4i + 3, exactly. `largest` bounds the weights.
    """
    lanes = pairs[0][0].lanes // 4
    total = k.constant(i32(lanes), 0)
    if isa in _DPBUSD:
        if len(pairs) > _CHAIN:  # sums wait for each other: two of them wait half as long
            halves = pairs[:_CHAIN], pairs[_CHAIN:]
            first, second = [multiply_bytes(k, isa, own, largest, is_signed) for own in halves]
            return first + second
        for weights, x in pairs:
            total = k.call(_DPBUSD[isa], i32(lanes), total, weights, x)
        return total
    if isa == "neon_dotprod":  # weights of up to 7 bits are as good as signed
        name = f"llvm.aarch64.neon.sdot.v{lanes}i32.v{4 * lanes}i8"
        for weights, x in pairs:
            total = k.call(name, i32(lanes), total, weights, x)
        return total
    if isa == "avx2":
        return _multiply_avx2(k, pairs, largest, is_signed)
    for weights, x in pairs:
        wide = weights.cast("sext" if is_signed else "zext", i16) * x.cast("sext", i16)
        for byte in range(4):
            lane = k.shuffle(wide, mask=[4 * i + byte for i in range(lanes)])
            total = total + lane.cast("sext", i32)
    return total


def multiply_tile(
    k: Emitter,
    isa: str,
    steps: range,
    num_rows: int,
    load_weights: Callable[[int], list[Value]],
    load_x: Callable[[int, int], Value],
    largest: int,
    is_signed: bool,
    taken_off: list[Value] | None = None,
) -> list[list[Value]]:
    """The same for each row of activations and each of some registers of weights: i32 [n], by row
    and register. `load_weights(step)` and `load_x(step, row)` give what a step multiplies.
    `taken_off`, for avx2: of each row, i16 [2 * n] that the sums are less by, after which they
    fit."""
    if isa == "avx2":
        return _multiply_tile_avx2(
            k, steps, num_rows, load_weights, load_x, largest, is_signed, taken_off
        )
    if isa in _DPBUSD:
        return _multiply_tile_vnni(k, isa, steps, num_rows, load_weights, load_x)
    columns = list(zip(*[load_weights(step) for step in steps], strict=True))
    dots = []
    for row in range(num_rows):
        xs = [load_x(step, row) for step in steps]
        pairs = [list(zip(column, xs, strict=True)) for column in columns]
        dots.append([multiply_bytes(k, isa, p, largest, is_signed) for p in pairs])
    return dots


def _multiply_tile_vnni(
    k: Emitter,
    isa: str,
    steps: range,
    num_rows: int,
    load_weights: Callable[[int], list[Value]],
    load_x: Callable[[int, int], Value],
) -> list[list[Value]]:
    """Step by step: activations are loaded once for all registers of weights. In the order of
    LLVM's choice they are loaded for each, and a core multiplies no faster than it loads."""
    dots: list[list[Value]] = []
    for step in steps:
        weights = load_weights(step)
        zeros = [k.constant(i32(w.lanes // 4), 0) for w in weights]
        dots = dots or [zeros] * num_rows
        for row, old in enumerate(dots):
            x = load_x(step, row)
            new = [
                k.call(_DPBUSD[isa], total.type, total, w, x)
                for total, w in zip(old, weights, strict=True)
            ]
            dots[row] = k.keep_order(new)
    return dots


def _multiply_tile_avx2(
    k: Emitter,
    steps: range,
    num_rows: int,
    load_weights: Callable[[int], list[Value]],
    load_x: Callable[[int, int], Value],
    largest: int,
    is_signed: bool,
    taken_off: list[Value] | None,
) -> list[list[Value]]:
    """Step by step, so that only sums and one step's weights need registers; and all products of a
    row before its additions: the order in which AMD's Zen spreads them evenly over its units. In
    that of LLVM's choice, it multiplies a fifth slower."""
    room = len(steps) if taken_off else _WIDEST_SUM // (2 * 127 * largest)
    dots: list[list[Value]] = []
    for start in range(0, len(steps), room):
        sums: list[list[Value]] = [[] for _ in range(num_rows)]
        for step in steps[start : start + room]:
            weights = load_weights(step)
            for row, old in enumerate(sums):
                x = load_x(step, row)
                new = [_products_of_16_bits(k, w, x, is_signed) for w in weights]
                if old:
                    new = [a + b for a, b in zip(old, new, strict=True)]
                elif taken_off:
                    new = [a - taken_off[row] for a in new]
                sums[row] = k.keep_order(new)
        wide = [[_widen(k, total) for total in row] for row in sums]
        if dots:
            wide = [
                [a + b for a, b in zip(*rows, strict=True)] for rows in zip(dots, wide, strict=True)
            ]
        dots = wide
    return dots


def _multiply_avx2(
    k: Emitter, pairs: list[tuple[Value, Value]], largest: int, is_signed: bool
) -> Value:
    """As many 16-bit sums as fit are added before the step to 32 bits, which costs as much as a
    multiplication."""
    room = _WIDEST_SUM // (2 * 127 * largest)
    total = None
    for start in range(0, len(pairs), room):
        sums = _sums_of_16_bits(k, pairs[start : start + room], is_signed)
        total = _widen(k, sums) if total is None else total + _widen(k, sums)
    return total


def _sums_of_16_bits(k: Emitter, pairs: list[tuple[Value, Value]], is_signed: bool) -> Value:
    """Bytes 2i and 2i + 1 of all pairs, multiplied and added: i16. They must fit."""
    total = None
    for weights, x in pairs:
        product = _products_of_16_bits(k, weights, x, is_signed)
        total = product if total is None else total + product
    return total


def _products_of_16_bits(k: Emitter, weights: Value, x: Value, is_signed: bool) -> Value:
    if is_signed:  # |w| is unsigned, and x takes the sign of w
        x = k.call("llvm.x86.avx2.psign.b", x.type, x, weights)
        weights = k.select(weights.compare("<", 0), weights * -1, weights)
    return k.call("llvm.x86.avx2.pmadd.ub.sw", i16(weights.lanes // 2), weights, x)


def _widen(k: Emitter, sums: Value) -> Value:
    """Sums of neighbours: i16 [2 * n] to i32 [n]."""
    one = k.constant(sums.type, 1)
    return k.call("llvm.x86.avx2.pmadd.wd", i32(sums.lanes // 2), sums, one)


def group_dots(
    k: Emitter, isa: str, steps: list[list[tuple[Value, Value]]], largest: int, is_signed: bool
) -> Value:
    """Dot products of the eight groups of a chunk, in the order of POSITION: i32 [8].

    `steps` has the pairs of each step, whose vectors have 16 bytes of each of the step's groups.
    Sums stay in the 128-bit lane of their group while vectors are interleaved and added, until
    every 32-bit lane is a whole group: fewer instructions than to convert and scale each step, and
    for AVX2 they are mostly not on the one port that multiplies.
    """
    bound = 2 * 127 * largest * len(steps[0])
    if isa == "avx2" and bound <= _WIDEST_SUM:
        sums = [_sums_of_16_bits(k, pairs, is_signed) for pairs in steps]
    else:
        sums = [multiply_bytes(k, isa, pairs, largest, is_signed) for pairs in steps]
    # With one group a step: groups 0, 2, 4, 6 and 1, 3, 5, 7 apart, as POSITION has them.
    parts = [sums[0::2], sums[1::2]] if len(sums) == 8 else [sums]
    results = []
    for vectors in parts:
        limit = bound
        for unit in (32, 64):
            limit *= 2
            if limit > _WIDEST_SUM:
                vectors = [_widen(k, v) if _is_short(v) else v for v in vectors]
            others = vectors[1::2] or vectors
            pairs = zip(vectors[::2], others, strict=True)
            vectors = [_add_interleaved(k, a, b, unit) for a, b in pairs]
        results.append(_widen(k, vectors[0]) if _is_short(vectors[0]) else vectors[0])
    if len(sums) == 2:  # lanes have groups 0, 4, 0, 4 | 1, 5, 1, 5 | 2, 6, 2, 6 | 3, 7, 3, 7
        return k.shuffle(results[0], mask=[0, 8, 1, 9, 4, 12, 5, 13])
    return k.concatenate(results)


def keeps_rows_whole(isa: str, format: str) -> bool:
    """Whether `row_dots` multiplies rows of this format: all products of a group, added, fit in 16
    bits, so that it takes few instructions."""
    layout = LAYOUTS[format]
    is_plain = not (layout.signed or layout.single_bits) and layout.num_scales == 1
    return isa == "avx2" and is_plain and 2 * 127 * layout.largest * 8 <= _WIDEST_SUM


def row_dots(k: Emitter, registers: list[list[tuple[Value, Value]]]) -> Value:
    """Dot products of rows that lie whole in 128 bits, where `keeps_rows_whole`: i32 [rows].

    `registers` has the pairs of both halves of a group for each of four registers: of rows 0, 4,
    ..., of rows 1, 5, ..., and so on.
    """
    sums = [_sums_of_16_bits(k, pairs, False) for pairs in registers]
    for unit in (32, 64):
        pairs = zip(sums[::2], sums[1::2], strict=True)
        sums = [_add_interleaved(k, a, b, unit) for a, b in pairs]
    return _widen(k, sums[0])


def _is_short(value: Value) -> bool:
    return value.type.element == i16(1)


def _add_interleaved(k: Emitter, a: Value, b: Value, unit: int) -> Value:
    """In each 128 bits: the lower half's units of a and b, in turn, plus the upper half's."""
    half = 64 // unit
    lanes = a.lanes // (8 if _is_short(a) else 4)
    width = lanes * 2 * half
    words = a.view(_INTEGERS[unit](width)), b.view(_INTEGERS[unit](width))
    masks = [], []
    for lane in range(lanes):
        for part, mask in enumerate(masks):
            for i in range(half):
                at = lane * 2 * half + part * half + i
                mask += [at, width + at]
    low, high = (k.shuffle(*words, mask=mask).view(a.type) for mask in masks)
    return low + high

"""The processor's peak: products of bytes, or with AMX of bfloat16, when nothing has to be loaded,
decoded or scaled."""

from __future__ import annotations

import time
from functools import cache

from cpu_kernels.amx import WHOLE_PRODUCTS, multiply_whole_tiles
from cpu_kernels.dot import multiply_tile
from cpu_kernels.isa import ISAS, choose
from cpu_kernels.memory import address_of, record, store_word, word
from cpu_kernels.simd import emitted, i8, i32, i64
from cpu_kernels.team import Op, Team, op

PAIRS = 8  # of registers multiplied in a step: so many sums of 4-bit weights fit in 16 bits
COLUMNS = 2  # of such registers, with the same activations, as in a tile
STEPS = 1 << 18
REPEATS = 5


@emitted("i64", "i64 i64")
def _multiply(k, isa, steps, seed):
    """`steps` times PAIRS x COLUMNS registers of weights by one of activations, or what tiles hold:
    the sum of all products."""
    if ISAS[isa].has_tiles:
        return multiply_whole_tiles(k, steps, seed)
    lanes = ISAS[isa].panel_rows
    bytes_ = k.splat(seed.cast("trunc", i8), 4 * lanes)
    columns = range(COLUMNS)
    weights = [[(bytes_ + pair + COLUMNS * c) & 15 for c in columns] for pair in range(PAIRS)]
    total = k.variable(k.constant(i32(lanes), 0))
    with k.loop(steps) as step:
        x = k.splat((step & 63).cast("trunc", i8), 4 * lanes)  # new in each step: nothing is saved
        (dots,) = multiply_tile(
            k, isa, range(PAIRS), 1, lambda pair: weights[pair], lambda pair, row: x, 15, False
        )
        for dot in dots:
            total.set(total.get() + dot)
    return k.sum(total.get()).cast("sext", i64)


def products_per_step(isa: str) -> int:
    if ISAS[isa].has_tiles:
        return WHOLE_PRODUCTS
    return PAIRS * COLUMNS * 4 * ISAS[isa].panel_rows


@cache
def _products(isa: str) -> Op:
    @op
    def multiply(arguments, thread, num_threads, team):
        products = _multiply(isa, word(arguments, 0), word(arguments, 1))
        store_word(arguments, 2 + thread, products)

    return multiply


def product_peak(num_threads: int) -> float:
    """Operations per second (a product and its addition are two) of so many threads: the best of
    some runs of a few milliseconds."""
    name = choose("auto").name
    address, words = _products(name).address, record(STEPS, 3, *[0] * num_threads)
    best = float("inf")
    with Team(num_threads) as team:
        for _ in range(REPEATS):
            start = time.perf_counter()
            team.run(address, address_of(words))
            best = min(best, time.perf_counter() - start)
    return 2.0 * STEPS * products_per_step(name) * num_threads / best

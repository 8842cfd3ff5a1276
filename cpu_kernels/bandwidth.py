"""How fast memory can be read here: what the kernels are measured against."""

from __future__ import annotations

import time

from cpu_kernels.gemv import LINE, PREFETCH_BYTES
from cpu_kernels.memory import address_of, aligned_bytes, record, store_word, word
from cpu_kernels.simd import emitted, i64
from cpu_kernels.team import Team, op, share

NBYTES = 256 << 20  # several times the caches
REPEATS = 3


@emitted("i64", "i64 i64")
def _read_lines(k, address, num_lines):
    """Read `num_lines` cache lines; the sum of their words, so that none is left out."""
    sums = [k.variable(k.constant(i64(4), 0)) for _ in range(2)]
    with k.loop(num_lines) as i:
        at = address + i * LINE
        k.prefetch(at + PREFETCH_BYTES, keep=False)
        for half, total in enumerate(sums):
            total.set(total.get() + k.load(at + 32 * half, i64(4), align=32))
    return k.sum(sums[0].get() + sums[1].get())


@op
def _read(arguments, thread, num_threads, team):
    """address, lines; then a word for each thread's sum"""
    first, last = share(word(arguments, 1), thread, num_threads)
    total = _read_lines(word(arguments, 0) + first * LINE, last - first)
    store_word(arguments, 2 + thread, total)


def read_bandwidth(num_threads: int) -> float:
    """Bytes per second that so many threads read from memory: the best of some passes over a
    buffer."""
    buffer = aligned_bytes(NBYTES)
    buffer[::4096] = 1  # so that the pages exist
    words = record(address_of(buffer), NBYTES // LINE, *[0] * num_threads)
    best = float("inf")
    with Team(num_threads) as team:
        for _ in range(REPEATS):
            start = time.perf_counter()
            team.run(_read.address, address_of(words))
            best = min(best, time.perf_counter() - start)
    return NBYTES / best

"""A tier's bookkeeping over integers: `tiered/cache/residency.py`, for replays of long traces.

A trace is int64: records, one after the other, of what happened to experts (numbered as in
eviction.py). The same records give the same counts as the tier itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cpu_kernels.cache import compiling
from cpu_kernels.compiler import called, inner
from cpu_kernels.eviction import (
    FIRST,
    NONE,
    SECOND,
    TIER,
    begin_batch,
    forget,
    get,
    insert,
    layer_of,
    put,
    touch,
    victim,
)
from cpu_kernels.memory import store_word, word
from cpu_kernels.record import Record, fields

# A record begins with one of these; keys are their number and the keys themselves.
FETCHED = 0  # num_asked (-1: all), keys
PASS = 1  # 1 if it writes a token
PREFETCHED = 2  # limit, keys, keys given up
DROPPED = 3  # key

STATS = fields(
    "hits misses evictions prefetches prefetches_used prefetches_wasted "
    "bytes_read bytes_prefetched "
    "stuck"  # had to evict, and nobody could be
)
NUM_STATS = len(STATS)


@inner
def add(stats, field, value):
    store_word(stats, field, word(stats, field) + value)


@inner
def is_resident(t, key):
    return FIRST <= get(t, TIER.lists, key) <= SECOND


@inner
def bytes_of(t, key):
    return get(t, TIER.nbytes, key)


@inner
def protect(t, keys, count, is_protected):
    for i in range(count):
        put(t, TIER.is_protected, word(keys, i), is_protected)
        put(t, TIER.is_stale, layer_of(t, word(keys, i)), 1)


@inner
def hold(t, key, nbytes):
    store_word(t, TIER.used, word(t, TIER.used) + nbytes)
    put(t, TIER.held, layer_of(t, key), get(t, TIER.held, layer_of(t, key)) + nbytes)


@inner
def leave(t, stats, key):
    forget(t, key)
    hold(t, key, -bytes_of(t, key))
    if get(t, TIER.is_guess, key):
        put(t, TIER.is_guess, key, 0)
        add(stats, STATS.prefetches_wasted, 1)


@inner
def make_room(t, stats, layer, nbytes, is_surplus):
    """Evict until there is room for `nbytes` of a layer; or who is a surplus after its batch."""
    while is_surplus or word(t, TIER.used) + nbytes > word(t, TIER.capacity):
        key = victim(t, layer, nbytes, is_surplus)
        if key == NONE:
            add(stats, STATS.stuck, not is_surplus)
            return
        leave(t, stats, key)
        add(stats, STATS.evictions, 1)


@inner
def lookup(t, stats, keys, count, also, num_also, is_bounded):
    """Demand experts, which are protected, as are `also`."""
    begin_batch(t, keys, count)
    num_missing = 0
    for i in range(count):
        num_missing += not is_resident(t, word(keys, i))
    if num_missing:
        protect(t, also, num_also, 1)
        protect(t, keys, count, 1)
    for i in range(count):
        key = word(keys, i)
        if not is_resident(t, key):
            if is_bounded:
                make_room(t, stats, layer_of(t, key), bytes_of(t, key), False)
            hold(t, key, bytes_of(t, key))
            add(stats, STATS.bytes_read, bytes_of(t, key))
        touch(t, key)
        if get(t, TIER.is_guess, key):
            put(t, TIER.is_guess, key, 0)
            add(stats, STATS.prefetches_used, 1)
    if num_missing:
        protect(t, also, num_also, 0)
        protect(t, keys, count, 0)
    add(stats, STATS.hits, count - num_missing)
    add(stats, STATS.misses, num_missing)


@inner
def total_bytes(t, keys, count):
    total = 0
    for i in range(count):
        total += bytes_of(t, word(keys, i))
    return total


@inner
def can_admit(t, keys, count, pinned, num_pinned):
    """Whether `keys` can be looked up while `pinned` (others) stay."""
    num_there = 0
    for i in range(count):
        num_there += is_resident(t, word(keys, i))
    together = total_bytes(t, keys, count) + total_bytes(t, pinned, num_pinned)
    return num_there == count or together <= word(t, TIER.capacity)


@inner
def resident_first(t, keys, count, ordered):
    at = 0
    for wanted in range(1, -1, -1):
        for i in range(count):
            if is_resident(t, word(keys, i)) == wanted:
                store_word(ordered, at, word(keys, i))
                at += 1


@inner
def demand(t, stats, keys, count, num_asked, as_published, ordered):
    """What a tier does for a fetch: piece by piece if it must, the previous one protected.

    In the published way of counting all that a batch asks for comes; then experts that it did not
    use leave until the budget holds."""
    room = total_bytes(t, keys, count)
    remaining = count
    if room > word(t, TIER.capacity) and not as_published:
        resident_first(t, keys, count, ordered)
        keys = ordered
        room = max(word(t, TIER.capacity) // 2, word(t, TIER.largest_blob))
        remaining = count if num_asked < 0 else num_asked
    begin, num_before = 0, 0
    while begin < count and remaining > 0:
        end, left = begin, room
        while end < count and bytes_of(t, word(keys, end)) <= left:
            left -= bytes_of(t, word(keys, end))
            end += 1
        piece, before = keys + 8 * begin, keys + 8 * (begin - num_before)
        if not can_admit(t, piece, end - begin, before, num_before):
            num_before = 0
        lookup(t, stats, piece, end - begin, before, num_before, not as_published)
        num_before = end - begin
        remaining -= num_before
        begin = end
    if as_published and count:
        protect(t, keys, count, 1)
        make_room(t, stats, layer_of(t, word(keys, 0)), 0, True)
        protect(t, keys, count, 0)


@inner
def protected_bytes(t, keys, count):
    """Bytes of resident keys; counted ones lose their protection, so that none counts twice."""
    total = 0
    for i in range(count):
        key = word(keys, i)
        if get(t, TIER.is_protected, key) and is_resident(t, key):
            total += bytes_of(t, key)
        put(t, TIER.is_protected, key, 0)
    return total


@inner
def guess(t, stats, keys, count, limit, also, num_also, is_bounded):
    """Load at most `limit` of `keys` as long as something else can be evicted."""
    protect(t, also, num_also, 1)
    protect(t, keys, count, 1)
    room = word(t, TIER.capacity) - protected_bytes(t, keys, count)
    room -= protected_bytes(t, also, num_also)
    protect(t, also, num_also, 1)
    protect(t, keys, count, 1)
    num_issued = 0
    for i in range(count):
        key = word(keys, i)
        nbytes = bytes_of(t, key)
        if num_issued < limit and not is_resident(t, key) and nbytes <= room:
            room -= nbytes
            num_issued += 1
            if is_bounded:
                make_room(t, stats, layer_of(t, key), nbytes, False)
            hold(t, key, nbytes)
            insert(t, key)
            put(t, TIER.is_guess, key, 1)
            add(stats, STATS.prefetches, 1)
            add(stats, STATS.bytes_prefetched, nbytes)
    protect(t, also, num_also, 0)
    protect(t, keys, count, 0)


@inner
def cancel(t, stats, key):
    """A guess was given up before its load started."""
    if get(t, TIER.is_guess, key):
        add(stats, STATS.bytes_prefetched, -bytes_of(t, key))
        leave(t, stats, key)


def _run(t, records, length, as_published, stats, decode, ordered):
    """Returns how many decode passes there were, and counts in `decode` what happened in them."""
    num_tokens = 0
    sign = 0  # within a decode pass, its counts are added when it ends: what is after, less before
    last, num_last = records, 0  # what the latest fetch asked for is not evicted for a guess
    at = 0
    while at < length:
        kind, value = word(records, at), word(records, at + 1)
        at += 2
        if kind == PASS:
            for field in range(NUM_STATS):
                add(decode, field, (sign - value) * word(stats, field))
            sign = value
            num_tokens += value
        elif kind == DROPPED:
            if is_resident(t, value):
                leave(t, stats, value)
        else:
            keys, count = records + 8 * (at + 1), word(records, at)
            at += 1 + count
            if kind == FETCHED:
                last, num_last = keys, count
                demand(t, stats, keys, count, value, as_published, ordered)
            else:
                given_up = word(records, at)
                for i in range(at + 1, at + 1 + given_up):
                    cancel(t, stats, word(records, i))
                at += 1 + given_up
                guess(t, stats, keys, count, value, last, num_last, not as_published)
    for field in range(NUM_STATS):
        add(decode, field, sign * word(stats, field))
    return num_tokens


@cache
def load() -> Any:
    """The compiled function."""
    with compiling():
        return called("i8(i8, i8, i8, i8, i8, i8, i8)")(_run)


def replay(
    tier: Record, records: np.ndarray, as_published: bool
) -> tuple[dict[str, int], dict[str, int], int]:
    """Run a trace (int64, see above): what was counted (STATS), the part of decode passes, and how
    many of these there were. Records are not checked."""
    stats, decode = np.zeros((2, NUM_STATS), np.int64)
    ordered = np.empty(len(records), np.int64)
    addresses: Any = [a.ctypes.data for a in (stats, decode, ordered)]
    length = len(records)
    num_tokens = load()(tier.address, records.ctypes.data, length, int(as_published), *addresses)
    if stats[STATS.stuck]:
        raise RuntimeError("every expert was protected when one had to be evicted")
    names = STATS._fields[: STATS.stuck]
    counted = [dict(zip(names, row.tolist(), strict=False)) for row in (stats, decode)]
    return counted[0], counted[1], int(num_tokens)

"""Eviction orders over integers: what `tiered/policies` decides, for replays of long traces.

Expert `e` of layer `l` is number `l * num_experts + e`. A resident one is in the first or second
list of its layer; policies differ in who is in which list, and in the order within it: by rank, of
equals by tie, of equals by number. `tests/test_replay.py` holds every policy to its original.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cpu_kernels.compiler import inner
from cpu_kernels.memory import store_word, word
from cpu_kernels.record import Record, fields
from cpu_kernels.simd import emitted, f64, i64

POLICIES = (
    "lru", "lfu", "layer_lru", "layer_lfu", "lfu_decay", "slru", "arc", "belady", "keep_last",
)  # fmt: skip
LRU, LFU, LAYER_LRU, LAYER_LFU, LFU_DECAY, SLRU, ARC, BELADY, KEEP_LAST = range(len(POLICIES))

ABSENT, FIRST, SECOND, FIRST_GHOST, SECOND_GHOST, NUM_LISTS = range(6)  # ghosts are absent, too
NONE = -1  # no expert

# A tier and its policy. Numbers are int64, and float64 in the last line.
TIER = fields(
    "policy capacity num_layers num_experts num_sparse num_slots largest_blob used now last_layer "
    "passed "  # layers of a prompt that is being computed
    # by expert:
    "lists ties uses wanted is_protected is_guess is_known ahead ahead_end nbytes "
    # by layer; `lowest` is who leaves first of FIRST and SECOND, found again if it is stale:
    "held lowest is_stale num_used "
    # by list: how many are in it; of two of them, who came to it, with their ties, in order
    "lengths queue queue_begin queue_end "
    "future "  # when each expert is demanded, one expert after the other: see ahead, ahead_end
    "ranks floors times target time share options"
)


def make_tier(
    policy: str,
    options: Sequence[float],
    capacity: int,
    nbytes: np.ndarray,
    num_experts: int,
    num_asked: int,
    future: np.ndarray,
    starts: np.ndarray,
) -> Record:
    """An empty tier of `capacity` bytes.

    `options` are those of the policy's constructor; `nbytes` (int64 [num_layers, num_experts]) the
    blobs' sizes, 0 in layers without experts; `num_asked` how often the trace names an expert.
    Expert `i` is demanded at the times `future[starts[i]:starts[i + 1]]` (int64), for belady.
    """
    num_layers, num = len(nbytes), nbytes.size
    num_sparse = int((nbytes > 0).any(axis=1).sum())
    ints = {name: np.zeros(num, np.int64) for name in (
        "lists", "ties", "uses", "wanted", "is_protected", "is_guess", "is_known",
    )}  # fmt: skip
    floats = {
        "ranks": np.zeros(num),
        "floors": np.zeros(num_layers),
        "times": np.zeros(num_layers),
        "target": np.zeros(1),
        "time": np.zeros(1),
        "share": np.array([capacity / num_sparse]),
        "options": np.array([*options, 0.0], np.float64),
    }
    return Record(
        TIER,
        policy=POLICIES.index(policy),
        capacity=capacity,
        num_layers=num_layers,
        num_experts=num_experts,
        num_sparse=num_sparse,
        num_slots=capacity // int(nbytes[nbytes > 0].min()),
        largest_blob=int(nbytes.max()),
        last_layer=-1,
        ahead=np.array(starts[:-1], np.int64),
        ahead_end=np.array(starts[1:], np.int64),
        nbytes=np.array(nbytes, np.int64).reshape(-1),
        held=np.zeros(num_layers, np.int64),
        lowest=np.full(2 * num_layers, NONE, np.int64),
        is_stale=np.ones(num_layers, np.int64),
        num_used=np.zeros(num_layers, np.int64),
        lengths=np.zeros(NUM_LISTS, np.int64),
        queue=np.zeros(4 * (num_asked + 1), np.int64),
        queue_begin=np.array([0, num_asked + 1]),
        queue_end=np.array([0, num_asked + 1]),
        future=np.array(future, np.int64),
        **ints,
        **floats,
    )


@emitted("i64", "i64 i64 i64")
def get(k, tier, field, index):
    array = k.load(tier + field * 8, i64(1))
    return k.load(array + index * 8, i64(1))


@emitted("void", "i64 i64 i64 i64")
def put(k, tier, field, index, value):
    array = k.load(tier + field * 8, i64(1))
    k.store(array + index * 8, value)


@emitted("f64", "i64 i64 i64")
def number(k, tier, field, index):
    array = k.load(tier + field * 8, i64(1))
    return k.load(array + index * 8, f64(1))


@emitted("void", "i64 i64 i64 f64")
def put_number(k, tier, field, index, value):
    array = k.load(tier + field * 8, i64(1))
    k.store(array + index * 8, value)


@inner
def layer_of(t, key):
    return key // word(t, TIER.num_experts)


@inner
def move(t, key, where):
    """To another list, or to the end of its own."""
    policy, now = word(t, TIER.policy), word(t, TIER.now) + 1
    before = get(t, TIER.lists, key)
    put(t, TIER.lengths, before, get(t, TIER.lengths, before) - 1)
    put(t, TIER.lengths, where, get(t, TIER.lengths, where) + 1)
    store_word(t, TIER.now, now)
    put(t, TIER.lists, key, where)
    put(t, TIER.ties, key, now)
    outdate(t, key)
    if policy == SLRU and where == SECOND:
        enqueue(t, 0, key, now)
    elif policy == ARC and where >= FIRST_GHOST:
        enqueue(t, where - FIRST_GHOST, key, now)


@inner
def outdate(t, key):
    """Its place has changed. (A protected key has none among those that may leave.)"""
    if not get(t, TIER.is_protected, key):
        put(t, TIER.is_stale, layer_of(t, key), 1)


@inner
def enqueue(t, queue, key, tie):
    end = get(t, TIER.queue_end, queue)
    put(t, TIER.queue, 2 * end, key)
    put(t, TIER.queue, 2 * end + 1, tie)
    put(t, TIER.queue_end, queue, end + 1)


@inner
def oldest(t, queue, where):
    """Who came to a list first, of those that are still there."""
    at = get(t, TIER.queue_begin, queue)
    key = get(t, TIER.queue, 2 * at)
    while get(t, TIER.lists, key) != where or get(t, TIER.ties, key) != get(
        t, TIER.queue, 2 * at + 1
    ):
        at += 1
        key = get(t, TIER.queue, 2 * at)
    put(t, TIER.queue_begin, queue, at)
    return key


@inner
def touch(t, key):
    """`key` was just used: it was resident, or has just been given room."""
    policy = word(t, TIER.policy)
    uses = get(t, TIER.uses, key) + 1
    put(t, TIER.uses, key, uses)
    if policy == SLRU:
        touch_slru(t, key)
    elif policy == ARC:
        touch_arc(t, key)
    elif policy == KEEP_LAST:
        touch_keep_last(t, key, uses)
    else:
        move(t, key, FIRST)
        if policy in (LFU, LAYER_LFU):
            put_number(t, TIER.ranks, key, float(uses))
        elif policy == LFU_DECAY:
            score(t, key)
        elif policy == BELADY:
            at = get(t, TIER.ahead, key)
            if at < get(t, TIER.ahead_end, key):
                put(t, TIER.ahead, key, at + 1)
            look_into_the_future(t, key)


@inner
def touch_slru(t, key):
    where = get(t, TIER.lists, key)
    move(t, key, FIRST if where == ABSENT else SECOND)
    room = int(number(t, TIER.options, 0) * word(t, TIER.num_slots))
    if get(t, TIER.lengths, SECOND) > room:
        move(t, oldest(t, 0, SECOND), FIRST)


@inner
def touch_arc(t, key):
    where, target = get(t, TIER.lists, key), number(t, TIER.target, 0)
    first, second = get(t, TIER.lengths, FIRST_GHOST), get(t, TIER.lengths, SECOND_GHOST)
    if where == FIRST_GHOST:
        target = min(float(word(t, TIER.num_slots)), target + max(1.0, second / first))
    elif where == SECOND_GHOST:
        target = max(0.0, target - max(1.0, first / second))
    put_number(t, TIER.target, 0, target)
    move(t, key, FIRST if where == ABSENT else SECOND)


@inner
def touch_keep_last(t, key, uses):
    layer = layer_of(t, key)
    if uses == 1:
        more = number(t, TIER.options, 1) * get(t, TIER.nbytes, key)
        floor = min(number(t, TIER.floors, layer) + more, number(t, TIER.share, 0))
        put_number(t, TIER.floors, layer, floor)
        put(t, TIER.num_used, layer, get(t, TIER.num_used, layer) + 1)
    if get(t, TIER.lists, key) != SECOND:
        move(t, key, SECOND)
    put_number(t, TIER.ranks, key, float(uses))
    outdate(t, key)


@inner
def score(t, key):
    """A use counts half as much a half-life later."""
    layer, now = layer_of(t, key), number(t, TIER.time, 0)
    if layer != word(t, TIER.last_layer):
        store_word(t, TIER.last_layer, layer)
        now += 1.0 / (number(t, TIER.options, 0) * word(t, TIER.num_sparse))
        put_number(t, TIER.time, 0, now)
    rank = now
    if get(t, TIER.is_known, key):
        rank += math.log2(1.0 + np.exp2(number(t, TIER.ranks, key) - now))
    put(t, TIER.is_known, key, 1)
    put_number(t, TIER.ranks, key, rank)
    put(t, TIER.ties, key, 0)


@inner
def look_into_the_future(t, key):
    at, rank = get(t, TIER.ahead, key), -np.inf
    if at < get(t, TIER.ahead_end, key):
        rank = -float(get(t, TIER.future, at))
    put_number(t, TIER.ranks, key, rank)
    put(t, TIER.ties, key, 0)


@inner
def insert(t, key):
    """`key` was loaded on a guess: nobody has used it yet."""
    policy, uses, tie = word(t, TIER.policy), get(t, TIER.uses, key), get(t, TIER.ties, key)
    move(t, key, FIRST)
    if policy == KEEP_LAST:
        put_number(t, TIER.ranks, key, uses + number(t, TIER.times, layer_of(t, key)))
    elif policy in (LFU, LAYER_LFU):
        put(t, TIER.ties, key, tie if uses else 0)
    elif policy == LFU_DECAY:
        if not get(t, TIER.is_known, key):
            put(t, TIER.is_known, key, 1)
            put_number(t, TIER.ranks, key, number(t, TIER.time, 0) - 1.0)
        put(t, TIER.ties, key, 0)
    elif policy == BELADY:
        look_into_the_future(t, key)


@inner
def forget(t, key):
    """`key` leaves the tier."""
    if word(t, TIER.policy) != ARC:
        tie = get(t, TIER.ties, key)
        move(t, key, ABSENT)
        put(t, TIER.ties, key, tie)
        return
    queue = get(t, TIER.lists, key) - FIRST
    move(t, key, FIRST_GHOST + queue)
    num_ghosts = get(t, TIER.lengths, FIRST_GHOST) + get(t, TIER.lengths, SECOND_GHOST)
    if num_ghosts > word(t, TIER.num_slots):
        move(t, oldest(t, queue, FIRST_GHOST + queue), ABSENT)


@inner
def begin_batch(t, keys, count):
    """A layer demands these; keep_last lets go of the layer's batch before, the oldest first."""
    if word(t, TIER.policy) != KEEP_LAST:
        return
    layer, size = layer_of(t, word(keys, 0)), word(t, TIER.num_experts)
    for i in range(count):
        put(t, TIER.wanted, word(keys, i), 1)
    time, key = number(t, TIER.times, layer), layer * size
    while key != NONE:
        key = NONE
        for other in range(layer * size, (layer + 1) * size):
            is_left = get(t, TIER.lists, other) == SECOND and not get(t, TIER.wanted, other)
            if is_left and (key == NONE or get(t, TIER.ties, other) < get(t, TIER.ties, key)):
                key = other
        if key != NONE:
            move(t, key, FIRST)
            put_number(t, TIER.ranks, key, get(t, TIER.uses, key) + time)
    for i in range(count):
        put(t, TIER.wanted, word(keys, i), 0)
    put_number(t, TIER.times, layer, time + 1.0 / number(t, TIER.options, 0))
    is_prompt = 2 * count > get(t, TIER.num_used, layer)
    store_word(t, TIER.passed, layer + 1 if is_prompt else 0)


@inner
def precedes(t, key, other):
    """Whether `key` leaves before `other` of the same list; NONE never does."""
    if key == NONE or other == NONE:
        return key != NONE
    rank, other_rank = number(t, TIER.ranks, key), number(t, TIER.ranks, other)
    if rank != other_rank:
        return rank < other_rank
    tie, other_tie = get(t, TIER.ties, key), get(t, TIER.ties, other)
    return key < other if tie == other_tie else tie < other_tie


@inner
def refresh(t):
    """Find again who leaves first of each layer's lists, where that may have changed."""
    size = word(t, TIER.num_experts)
    for layer in range(word(t, TIER.num_layers)):
        if get(t, TIER.is_stale, layer):
            first, second = NONE, NONE
            for key in range(layer * size, (layer + 1) * size):
                found = get(t, TIER.lists, key)
                if found < FIRST or found > SECOND or get(t, TIER.is_protected, key):
                    continue
                if found == FIRST:
                    first = key if precedes(t, key, first) else first
                else:
                    second = key if precedes(t, key, second) else second
            put(t, TIER.lowest, 2 * layer, first)
            put(t, TIER.lowest, 2 * layer + 1, second)
            put(t, TIER.is_stale, layer, 0)


@inner
def lowest(t, where, layer):
    """The first to leave of a layer's list; NONE: all of it are protected."""
    return get(t, TIER.lowest, 2 * layer + where - FIRST)


@inner
def lowest_of_all(t, where, above_floor):
    """... of all layers' lists; or of the layers only that hold more than their floor."""
    best = NONE
    for layer in range(word(t, TIER.num_layers)):
        held = get(t, TIER.held, layer)
        if held > (number(t, TIER.floors, layer) if above_floor else 0.0):
            key = lowest(t, where, layer)
            best = key if precedes(t, key, best) else best
    return best


@inner
def of_the_greediest(t, num_layers):
    """The first to leave of the one of the first layers that holds most, of those where one can,
    and of equals the first; whoever is in its first list before the second's."""
    best, most = NONE, 0
    for layer in range(num_layers):
        held, key = get(t, TIER.held, layer), lowest(t, FIRST, layer)
        if key == NONE:
            key = lowest(t, SECOND, layer)
        if held > most and key != NONE:
            best, most = key, held
    return best


@inner
def victim(t, layer, nbytes, is_surplus):
    """Who leaves so that an expert of `layer` can come; or, with 0 bytes, if the room has been
    exceeded already, who leaves after the layer's batch. NONE: all are protected, or nobody has
    to."""
    refresh(t)
    policy, key = word(t, TIER.policy), NONE
    first, last, above_floor = FIRST, SECOND, False
    if policy in (LAYER_LRU, LAYER_LFU):
        if get(t, TIER.held, layer) - number(t, TIER.share, 0) + nbytes > 0:
            key = lowest(t, FIRST, layer)
        if key == NONE and not is_surplus:
            key = of_the_greediest(t, word(t, TIER.num_layers))
        return key
    if is_surplus and word(t, TIER.used) <= word(t, TIER.capacity):
        return NONE
    if policy == KEEP_LAST and not is_surplus:
        key = of_the_greediest(t, word(t, TIER.passed))
        if key != NONE:
            return key
    if policy == ARC and get(t, TIER.lengths, FIRST) <= number(t, TIER.target, 0):
        first, last = SECOND, FIRST
    elif policy == KEEP_LAST:
        last, above_floor = FIRST, True
        put(t, TIER.held, layer, get(t, TIER.held, layer) + nbytes)
    key = lowest_of_all(t, first, above_floor)
    if key == NONE:
        key = lowest_of_all(t, last, False)
    if policy == KEEP_LAST:
        if key == NONE and not is_surplus:
            key = of_the_greediest(t, word(t, TIER.num_layers))
        put(t, TIER.held, layer, get(t, TIER.held, layer) - nbytes)
    return key

"""Residency: which experts are in a tier's slots. Bookkeeping only: no bytes move, no thread waits.

The same calls in the same order always give the same hits, misses and evictions, whatever the
speed of the disk. A live tier and a replayed trace share this class, so their counts are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, KeysView, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from tiered.experts import ExpertKey
from tiered.policies import Evictable, Policy, Space


@dataclass
class TierStats:
    """Counts since the tier was made. `a - b` is what happened between two copies."""

    hits: int = 0  # demanded, and there (or on its way already)
    misses: int = 0  # demanded, and not there
    evictions: int = 0
    prefetches: int = 0  # loads started on a guess
    prefetches_used: int = 0  # ... that a demand found
    prefetches_wasted: int = 0  # ... that were evicted, or given up, before any demand
    bytes_read: int = 0  # by demand: misses times blob size
    bytes_prefetched: int = 0
    late: int = 0  # hits that had to wait for a load under way (depends on timing)
    failures: int = 0  # reads that failed (depends on the disk)

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    def copy(self) -> TierStats:
        return TierStats(**vars(self))

    def __add__(self, other: TierStats) -> TierStats:
        names = (field.name for field in fields(self))
        return TierStats(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def __sub__(self, before: TierStats) -> TierStats:
        names = (field.name for field in fields(self))
        return TierStats(**{name: getattr(self, name) - getattr(before, name) for name in names})


class Above(NamedTuple):
    """A memory above another one: who is there, how popular an expert is there, and who of a prompt
    that is being computed will have left when it ends."""

    residency: Residency
    popularity: Callable[[ExpertKey], float]
    passing: Collection[ExpertKey] = ()


def check_capacity(space: Space) -> None:
    """MemoryError if not even one expert fits."""
    largest = max(space.blob_bytes)
    if space.capacity < largest:
        raise MemoryError(f"{space.capacity} bytes cannot hold one expert of {largest}")


class Residency:
    """At most `space.capacity` bytes of experts, each in a slot of its own.

    `protected` always means: keys that must not be evicted by this call.
    """

    def __init__(self, space: Space, policy: Policy) -> None:
        check_capacity(space)
        self.space = space
        self.largest_capacity = space.capacity  # what there are slots for
        self.policy = policy
        self.stats = TierStats()
        self.used = 0  # bytes
        self._nbytes = space.nbytes
        self._largest = max(space.blob_bytes)
        self._slots: dict[ExpertKey, int] = {}
        self.num_slots = space.num_slots  # in use: 0 ... num_slots - 1
        self._unused: list[int] = list(range(space.num_slots - 1, -1, -1))
        self.above: Sequence[Above] = ()  # what these have, too, goes first
        self.vacated: list[int] = []  # slots whose expert has left and that still hold its bytes
        self._guesses: set[ExpertKey] = set()  # prefetched, not yet demanded
        self._touch = policy.touch
        self._insert = getattr(policy, "insert", policy.touch)
        self._batch = getattr(policy, "batch", None)
        self._victim = policy.victim
        self._victim_for = getattr(policy, "victim_for", None)
        self._forget = policy.forget

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, key: ExpertKey) -> int:
        return self._slots[key]

    def resident(self) -> KeysView[ExpertKey]:
        """What is resident, as it changes."""
        return self._slots.keys()

    @property
    def keys(self) -> list[ExpertKey]:
        """What is resident."""
        return list(self._slots)

    def resize(self, capacity: int, evictable: Evictable) -> None:
        """Use `capacity` bytes from now on, at most what there is room for; evicts what is over."""
        if not self._largest <= capacity <= self.largest_capacity:
            raise ValueError(
                f"the expert budget can be {self._largest} ... {self.largest_capacity} bytes "
                f"while running, not {capacity}"
            )
        self.space = self.space._replace(capacity=capacity)
        while self.used > capacity:
            self.evict(next(iter(self._slots)), evictable)

    def use_slots(self, count: int) -> None:
        """Use slots 0 ... count - 1 from now on, which are all as large as the largest blob;
        whoever is in another is evicted."""
        for key in [key for key, slot in self._slots.items() if slot >= count]:
            self._leave(key)
            self.stats.evictions += 1
        added = range(self.num_slots, count)
        self._unused = [*reversed(added), *(slot for slot in self._unused if slot < count)]
        self.num_slots = count
        self.space = self.space._replace(capacity=count * self._largest)

    def fits(self, keys: Collection[ExpertKey]) -> bool:
        """Whether these (distinct) experts can be resident at the same time."""
        if len(keys) * self._largest <= self.space.capacity:
            return True
        return sum(map(self._nbytes, keys)) <= self.space.capacity

    def can_admit(self, keys: Sequence[ExpertKey], pinned: Collection[ExpertKey]) -> bool:
        """Whether `keys` can be looked up while `pinned` stay."""
        return all(key in self._slots for key in keys) or self.fits({*keys, *pinned})

    def chunks(self, keys: Sequence[ExpertKey]) -> list[list[int]]:
        """Positions in `keys`, in pieces that fit: all of them in one piece if that fits.

        Else pieces fill half the capacity, so that one loads while another is used; resident
        experts come first, so that they are used before they are evicted.
        """
        if self.fits(keys):
            return [list(range(len(keys)))]
        pieces: list[list[int]] = [[]]
        room = half = max(self.space.capacity // 2, self._largest)
        for position in sorted(range(len(keys)), key=lambda i: keys[i] not in self._slots):
            nbytes = self._nbytes(keys[position])
            if nbytes > room:
                pieces.append([])
                room = half
            pieces[-1].append(position)
            room -= nbytes
        return pieces

    def lookup(
        self, keys: Sequence[ExpertKey], also: Collection[ExpertKey] = ()
    ) -> tuple[list[int], list[int]]:
        """Demand distinct experts: their slots, and the positions of those that have to be loaded.

        `keys` and `also` are protected, and must fit together.
        """
        if self._batch is not None and keys:
            self._batch(keys)
        slots = list(map(self._slots.get, keys))
        touch, stats = self._touch, self.stats
        if None not in slots:
            for key in keys:
                touch(key)
            stats.hits += len(slots)
            if self._guesses:
                self._use_guesses(keys)
            return slots, []  # type: ignore[return-value]
        missing = [i for i, slot in enumerate(slots) if slot is None]
        protected = {*keys, *also}
        admit = self._admit
        for i, key in enumerate(keys):
            if slots[i] is None:
                slots[i] = admit(key, lambda key: key not in protected)
            touch(key)
        stats.hits += len(slots) - len(missing)
        stats.misses += len(missing)
        stats.bytes_read += sum([self._nbytes(keys[i]) for i in missing])
        if self._guesses:
            self._use_guesses(keys)
        return slots, missing  # type: ignore[return-value]

    def demand(self, keys: Sequence[ExpertKey], num_asked: int | None = None) -> None:
        """All that a fetch by the only thread does: piece by piece, the previous one protected.

        `num_asked`: it ended after the pieces that held so many keys.
        """
        if self.fits(keys):
            self.lookup(keys)
            return
        before: list[ExpertKey] = []
        remaining = len(keys) if num_asked is None else num_asked
        for positions in self.chunks(keys):
            if remaining <= 0:
                break
            piece = [keys[i] for i in positions]
            self.lookup(piece, before if self.can_admit(piece, before) else ())
            before = piece
            remaining -= len(piece)

    def guess(
        self, keys: Sequence[ExpertKey], limit: int, also: Collection[ExpertKey] = ()
    ) -> list[ExpertKey]:
        """Give slots to at most `limit` of `keys`, best first, as long as something is evictable.

        Returns those that have to be loaded. `keys` and `also` are protected.
        """
        protected = {*keys, *also}
        room = self.space.capacity - sum(
            self._nbytes(key) for key in protected if key in self._slots
        )
        issued: list[ExpertKey] = []
        for key in keys:
            if len(issued) >= limit:
                break
            nbytes = self._nbytes(key)
            if key in self._slots or nbytes > room:
                continue
            room -= nbytes
            self._admit(key, lambda key: key not in protected)
            self._insert(key)
            self._guesses.add(key)
            issued.append(key)
            self.stats.prefetches += 1
            self.stats.bytes_prefetched += nbytes
        return issued

    def drop(self, key: ExpertKey) -> None:
        """The expert's load was given up, or failed: its slot is free again."""
        if key in self._slots:
            self._leave(key)

    def cancel(self, key: ExpertKey) -> None:
        """A guess was given up before its load started: nothing was read."""
        if key in self._guesses:
            self.stats.bytes_prefetched -= self._nbytes(key)
            self._leave(key)

    def _admit(self, key: ExpertKey, evictable: Evictable) -> int:
        nbytes = self._nbytes(key)
        while self.used + nbytes > self.space.capacity:
            self.evict(key, evictable)
        # Room for the bytes means a free slot: no blob is smaller than capacity / num_slots.
        self._slots[key] = slot = (self.vacated or self._unused).pop()
        self.used += nbytes
        return slot

    def evict(self, incoming: ExpertKey, evictable: Evictable) -> None:
        """Evict one expert so that `incoming` may come."""
        victim = self._spare(evictable)
        if victim is None and any(above.passing for above in self.above):
            # What a prompt wants in later layers should not leave before they come.
            victim = self._chosen(incoming, lambda key: key[0] < incoming[0] and evictable(key))
        if victim is None:
            victim = self._chosen(incoming, evictable)
        if victim not in self._slots:
            raise RuntimeError(
                f"policy {type(self.policy).__module__} chose {victim} to evict, "
                "which is not resident"
            )
        self._leave(victim)
        self.stats.evictions += 1

    def _chosen(self, incoming: ExpertKey, evictable: Evictable) -> ExpertKey | None:
        """By the policy."""
        if self._victim_for is None:
            return self._victim(evictable)
        victim: ExpertKey | None = self._victim_for(incoming, evictable)
        return victim

    def _spare(self, evictable: Evictable) -> ExpertKey | None:
        """One that a memory above has, too, and not just on its way through: the most popular,
        which will be there longest. When the others leave it, they are still here, and need not be
        read again."""
        here = self._slots.keys()
        spares = [
            (above.popularity(key), key)
            for above in self.above
            for key in here & above.residency.resident()
            if key not in above.passing and evictable(key)
        ]
        return max(spares)[1] if spares else None

    def recycle(self) -> None:
        """The vacated slots hold nothing any more."""
        self._unused += [slot for slot in self.vacated if slot < self.num_slots]
        self.vacated.clear()

    def _leave(self, key: ExpertKey) -> None:
        self._forget(key)
        self.used -= self._nbytes(key)
        self.vacated.append(self._slots.pop(key))
        if self._guesses and key in self._guesses:
            self._guesses.discard(key)
            self.stats.prefetches_wasted += 1

    def _use_guesses(self, keys: Sequence[ExpertKey]) -> None:
        for key in keys:
            if key in self._guesses:
                self._guesses.discard(key)
                self.stats.prefetches_used += 1

"""Fetch: one demand for several experts, handed out as they become ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tiered.experts import ExpertKey
from tiered.loaders import Load, State

if TYPE_CHECKING:
    from tiered.tier import Tier

Group = list[tuple[int, Any]]  # (position in the keys, place of the blob)


class Pins:
    """Keys that must not be evicted: those of a fetch's current and next piece."""

    __slots__ = ("in_pieces", "keys")

    def __init__(self, keys: Sequence[ExpertKey], in_pieces: bool) -> None:
        self.keys = keys
        self.in_pieces = in_pieces


class Piece:
    """Experts that are resident together: those that are ready, and those under way."""

    __slots__ = ("keys", "ready", "waiting")

    def __init__(self, keys: Sequence[ExpertKey]) -> None:
        self.keys = keys
        self.ready: Group = []
        self.waiting: list[tuple[int, Load]] = []


class Fetch:
    """Iterates over groups of (position, place). Made by Tier.fetch; see there.

    While it holds one piece it never waits for room for another, so fetches of several threads
    cannot block each other for good.
    """

    __slots__ = ("_current", "_keys", "_next", "_pieces", "_pins", "_tier")

    def __init__(self, tier: Tier, keys: Sequence[ExpertKey]) -> None:
        self._pins: Pins | None = None
        self._tier = tier
        self._keys = keys
        self._current: Piece | None = None
        self._next: Piece | None = None
        self._pieces: list[list[int]] = []  # those not begun, last first
        with tier.lock:
            if tier.residency.fits(keys):
                self._current = self._open(range(len(keys)), keys)
                self._pins = Pins(keys, False)
                tier.active.append(self._pins)
            else:
                self._pieces = tier.residency.chunks(keys)[::-1]
                self._pins = Pins((), True)
                tier.active.append(self._pins)
                self._current = self._advance()

    def __iter__(self) -> Fetch:
        return self

    def __next__(self) -> Group:
        while self._pins is not None:
            piece = self._current
            if piece is not None and piece.ready:
                group, piece.ready = piece.ready, []
                return group
            if piece is not None and piece.waiting:
                return self._arrivals(piece)
            if self._next is None and not self._pieces:
                self.close()
                break
            with self._tier.lock:
                self._current = self._advance()
        raise StopIteration

    def close(self) -> None:
        """Release the pins. Loads under way go on."""
        pins, self._pins = self._pins, None
        if pins is not None:
            tier = self._tier
            with tier.lock:
                tier.active.remove(pins)
                tier.notify()
                if self._pieces and tier.journal is not None:
                    not_asked = sum(map(len, self._pieces))
                    tier.journal.cut_short(len(self._keys) - not_asked)

    def __enter__(self) -> Fetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        """Release the pins of a fetch that was abandoned; the collector may hold the lock."""
        pins = self._pins
        if pins is not None:
            pins.keys, pins.in_pieces = (), False
            if self._tier.lock.acquire(blocking=False):
                self._tier.active.remove(pins)
                self._tier.notify()
                self._tier.lock.release()

    def _advance(self) -> Piece | None:
        """Let go of the current piece, go on to the next, and start loading the one after."""
        pins = self._pins
        assert pins is not None
        piece, self._next = self._next, None
        pins.keys = piece.keys if piece else ()
        self._tier.notify()
        if piece is None and self._pieces:
            positions = self._pieces.pop()
            piece = self._open(positions, [self._keys[i] for i in positions])
            assert piece is not None
            pins.keys = piece.keys
        if piece is not None and self._pieces:
            positions = self._pieces[-1]
            self._next = self._open(positions, [self._keys[i] for i in positions], wait=False)
            if self._next is not None:
                self._pieces.pop()
                pins.keys = [*piece.keys, *self._next.keys]
        return piece

    def _open(
        self, positions: Sequence[int], keys: Sequence[ExpertKey], wait: bool = True
    ) -> Piece | None:
        """Look a piece up and start its loads; None: no room now."""
        tier = self._tier
        also = tier.pinned_keys() if tier.active else ()
        while also and not tier.residency.can_admit(keys, also):
            if not wait:
                return None
            tier.wait()
            also = tier.pinned_keys()
        if tier.closed:
            raise RuntimeError("the tier is closed")
        slots, missing = tier.residency.lookup(keys, also)
        piece, places, loads = Piece(keys), tier.places, tier.loads
        if not missing and not loads:
            piece.ready = list(zip(positions, map(places.__getitem__, slots), strict=True))
            return piece
        for index in missing:
            load = tier.start(keys[index], slots[index], demand=True)
            piece.waiting.append((positions[index], load))
        new = set(missing)
        for index, slot in enumerate(slots):
            if index in new:
                continue
            under_way = loads.get(slot)
            if under_way is None:
                piece.ready.append((positions[index], places[slot]))
            else:
                if under_way.state is State.FAILED:  # a guess's; now it matters, so try again
                    under_way = tier.start(keys[index], slot, demand=True)
                tier.loaders.promote(under_way)
                tier.residency.stats.late += 1
                piece.waiting.append((positions[index], under_way))
        tier.settle()
        return piece

    def _arrivals(self, piece: Piece) -> Group:
        """Wait until something has arrived; everything that has."""
        tier, failed = self._tier, None
        group: Group = []
        with tier.lock:
            while not group and failed is None:
                if tier.closed:
                    raise RuntimeError("the tier was closed while a fetch waited for it")
                rest = []
                for position, load in piece.waiting:
                    if load.state is State.DONE:
                        group.append((position, tier.places[load.slot]))
                    else:
                        rest.append((position, load))
                        if load.state is State.FAILED:
                            failed = load
                if not group and failed is None:
                    tier.wait()
            piece.waiting = rest
            if failed is not None:
                tier.drop(failed)
        if failed is not None:
            self.close()
            raise OSError(
                f"could not read expert {failed.key.expert} of layer {failed.key.layer}: "
                f"{failed.error}"
            ) from failed.error
        return group

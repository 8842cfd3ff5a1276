"""Admission: which experts are worth a copy to the GPU when another one must leave for it.

Two rules compete. *Recent*: what was just needed will be needed again soon, so it comes in.
*Popular*: it comes in only if it was chosen more often than what would leave. Models with many
small experts want the first, models with few large ones often the second. Both are followed in the
shadow on some of the layers, as processors' caches do (set dueling, Qureshi et al. 2007); the rule
that would have saved more time decides for all. Copies cost time, too: the processor is slower
while they read its memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from math import sqrt

from tiered.experts import ExpertKey
from tiered.governor import Governor
from tiered.planning.costs import Costs
from tiered.policies import Space

SAMPLED = 4  # every fourth layer is followed
_LARGE = 1e100


class Popularity:
    """Counts that fade: a use `memory` tokens ago weighs 1/e of one now."""

    def __init__(self, memory: float = 256.0) -> None:
        self._growth = 1 + 1 / memory
        self.weight = 1.0  # of a use now; grows instead of all counts shrinking
        self.counts: dict[ExpertKey, float] = {}

    def touch(self, keys: Iterable[ExpertKey]) -> None:
        counts, weight = self.counts, self.weight
        for key in keys:
            counts[key] = counts.get(key, 0.0) + weight

    def token_done(self) -> None:
        self.weight *= self._growth
        if self.weight > _LARGE:
            self.counts = {key: count / _LARGE for key, count in self.counts.items()}
            self.weight /= _LARGE

    def count(self, key: ExpertKey) -> float:
        return self.counts.get(key, 0.0)

    def prefers(self, key: ExpertKey, victim: ExpertKey) -> bool:
        """Whether `key` is more popular by more than one use."""
        return self.counts.get(key, 0.0) > self.counts.get(victim, 0.0) + self.weight

    def ranked(self, keys: Iterable[ExpertKey]) -> Sequence[ExpertKey]:
        """Most popular first; equals in the given order."""
        return sorted(keys, key=lambda key: -self.counts.get(key, 0.0))


class Shadow:
    """What one rule would hit and copy; older counts less."""

    def __init__(self) -> None:
        self.resident: dict[int, OrderedDict[ExpertKey, None]] = {}
        self.hits = self.copies = 0.0

    def layer(self, layer: int) -> OrderedDict[ExpertKey, None]:
        return self.resident.setdefault(layer, OrderedDict())

    def fade(self, keep: float) -> None:
        self.hits *= keep
        self.copies *= keep


class Admission:
    """Tell it what every layer chose (`touch`), and ask what is `worth` a copy."""

    def __init__(
        self, space: Space, costs: Costs, *, memory: float = 256.0, lead: float = 0.02
    ) -> None:
        self.popularity = Popularity(memory)
        self._latest = Popularity(memory / 16)
        self._costs = costs
        self._nbytes = max(space.blob_bytes)
        self._lead = lead  # of all demands, by which the other rule must be better: hysteresis
        sparse = [layer for layer, nbytes in enumerate(space.blob_bytes) if nbytes]
        share = space.capacity // max(1, len(sparse))
        self._room = {
            layer: room for layer in sparse[::SAMPLED] if (room := share // space.blob_bytes[layer])
        }
        # Which rule is used: copies counted, and by hits alone. Less than a slot per layer is too
        # little for what was used last.
        self.recent_wins = self.recent_hits = bool(self._room)
        self._recent, self._popular = Shadow(), Shadow()
        self._demands = 0.0
        self._wanted = 0.0  # share of layers that copy on demand
        self._now = self._per_token = 0.0  # hits of the sampled layers in a token

    def touch(self, keys: Sequence[ExpertKey]) -> None:
        """A layer needs these experts."""
        self.popularity.touch(keys)
        self._latest.touch(keys)
        if keys and (room := self._room.get(keys[0].layer)):
            self._demands += len(keys)
            self._follow_recent(keys, room)
            self._follow_popular(keys, room)

    def copying(self, on_demand: bool) -> None:
        """Whether a layer that missed something had it copied at once."""
        self._wanted += (on_demand - self._wanted) / 128

    def token_done(self, seconds: float) -> None:
        """A token took `seconds`. Also decides which rule is used."""
        self.popularity.token_done()
        self._latest.token_done()
        costs, nbytes = self._costs, self._nbytes
        gain = self._gain()
        flight = costs.link(nbytes)
        # Of a copy: what the processor loses, and demanded copies that wait for it.
        price = flight * (1 - 1 / costs.slowdown + self._wanted)
        if self._room:  # while it flies, its slot serves nobody
            slots = sum(self._room.values())
            price += gain * flight / max(seconds, flight / 100) * self._per_token / slots
        better = self._recent.hits - self._popular.hits
        worse = self._recent.copies - self._popular.copies
        lead = self._lead * self._demands
        self.recent_hits = _decide(self.recent_hits, better, lead)
        self.recent_wins = _decide(self.recent_wins, better * gain - worse * price, lead * gain)
        keep = 1 - 1 / 128
        self._per_token += (self._now - self._per_token) / 128
        self._now = 0.0
        self._recent.fade(keep)
        self._popular.fade(keep)
        self._demands *= keep

    def worth(self, key: ExpertKey, victim: ExpertKey) -> bool:
        """Whether `key` should take the place of `victim`."""
        return self.recent_wins or self.popularity.prefers(key, victim)

    def worth_a_read(self, key: ExpertKey, victim: ExpertKey) -> bool:
        """The same if `victim` is in no other memory: to need it again means to read it."""
        rule = self._latest if self.recent_hits else self.popularity
        wanted, left = (rule.counts.get(one, 0.0) / rule.weight for one in (key, victim))
        more = wanted - left - sqrt(wanted + left)  # uses, as far as it sees; not by mere chance
        return more * self._gain() > self._costs.disk(self._nbytes)

    def _gain(self) -> float:
        """What a hit saves."""
        return max(0.0, self._costs.cpu(self._nbytes) - self._costs.gpu(self._nbytes))

    def _follow_recent(self, keys: Sequence[ExpertKey], room: int) -> None:
        resident = self._recent.layer(keys[0].layer)
        for key in keys:
            if key in resident:
                self._recent.hits += 1
                resident.move_to_end(key)
            else:
                self._recent.copies += 1
                resident[key] = None
        while len(resident) > room:
            resident.popitem(last=False)

    def _follow_popular(self, keys: Sequence[ExpertKey], room: int) -> None:
        resident, counts = self._popular.layer(keys[0].layer), self.popularity.counts
        hits = sum(key in resident for key in keys)
        self._popular.hits += hits
        self._now += hits
        for key in keys:
            if key not in resident:
                if len(resident) == room:
                    victim = min(resident, key=lambda other: counts.get(other, 0.0))
                    if not self.popularity.prefers(key, victim):
                        continue
                    del resident[victim]
                resident[key] = None
                self._popular.copies += 1


def _decide(now: bool, difference: float, lead: float) -> bool:
    return now if abs(difference) <= lead else difference > 0


def promotion_governor() -> Governor:
    """Whether what is worth a copy is copied at all: 0 or 1, whichever makes tokens come faster."""
    return Governor((0, 1), "promotion", patience=4)

"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, wherever pieces are cut.

    Text that may be the start of a stop string is held back until it is known not to be.
    """

    def __init__(self, stop: Sequence[str] | str = ()) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in self._stop):
            raise ValueError(f"stop strings must be texts that are not empty, not {self._stop}")
        self._held = ""
        self.stopped = False
        self.matched: str | None = None  # the stop string that was found

    def push(self, piece: str) -> str:
        """The text that can be shown now; nothing after a stop string."""
        if self.stopped:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        match = self._first_match(text)
        if match is not None:
            self.stopped, self._held = True, ""
            self.matched = max((s for s in self._stop if text.startswith(s, match)), key=len)
            return text[:match]
        shown = len(text) - self._num_held(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> int | None:
        """Where the stop string that is complete first starts; of several, the longest."""
        found = [(text.find(stop), len(stop)) for stop in self._stop]
        ends = [(start + length, start) for start, length in found if start >= 0]
        return min(ends)[1] if ends else None

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that starts a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

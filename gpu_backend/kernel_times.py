"""What kernels took, known as soon as they have ended: nothing waits for that."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

PENDING = 256  # launches; older ones are forgotten when nobody asks


class KernelTimes:
    """Launches whose seconds are still to come, in the order in which they end."""

    def __init__(self) -> None:
        self._pending: deque[tuple[float, Callable[[], float | None]]] = deque(maxlen=PENDING)

    def add(self, nbytes: float, seconds: Callable[[], float | None]) -> None:
        """Something that reads `nbytes` of weights was launched; `seconds` is None until it has
        ended."""
        self._pending.append((nbytes, seconds))

    def take(self) -> list[tuple[float, float]]:
        """Bytes and seconds of those that have ended since the last call, the oldest first."""
        ended = []
        while self._pending:
            nbytes, seconds = self._pending[0]
            if (took := seconds()) is None:
                break
            self._pending.popleft()
            ended.append((nbytes, took))
        return ended

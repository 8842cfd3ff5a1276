"""Windows: how a text longer than a context is cut, so that each token is predicted once."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """Tokens [begin, end) are computed; [first, end) of them are predicted, each from those
    before it in the window."""

    begin: int
    end: int
    first: int

    @property
    def num_predicted(self) -> int:
        return self.end - self.first


def cut(num_tokens: int, size: int, stride: int) -> list[Window]:
    """Windows of `size` tokens, one every `stride` tokens: the usual sliding window.

    After the first window, every predicted token has at least `size - stride` tokens before it.
    With `stride == size` the first token of each window has none, and is not predicted.
    """
    if not 1 <= stride <= size:
        raise ValueError(f"the stride must lie in 1 ... {size} (the window), not be {stride}")
    windows, predicted = [], 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + size, num_tokens)
        first = max(predicted, begin + 1)
        if first < end:
            windows.append(Window(begin, end, first))
        predicted = end
        if end == num_tokens:
            break
    return windows

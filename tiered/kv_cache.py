"""Which page of the KV cache holds which tokens of which sequence. The pages lie in the backend."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Items
from operator import neg
from typing import Any, Protocol

import numpy as np

from tiered.backend import Backend, Batch
from tiered.config import ModelConfig
from tiered.experts import aligned

PAGE_SIZE = 64  # tokens
VECTOR = 16  # a head's values (not its keys) are padded to a multiple of this
BYTES_PER_VALUE = {"f32": 4.0, "f16": 2.0, "int8": 1.0}


def kv_bytes(config: ModelConfig, num_tokens: int, dtype: str, num_states: int = 1) -> int:
    """Bytes that the keys and values of `num_tokens` tokens take, in whole pages, and `num_states`
    of what recurrent layers remember of a text."""
    layers = range(config.num_layers)
    return sum(layer_bytes(config, layer, num_tokens, dtype, num_states) for layer in layers)


def layer_bytes(
    config: ModelConfig, layer: int, num_tokens: int, dtype: str, num_states: int = 1
) -> int:
    """The same for one layer."""
    if layer in config.recurrent_layers:
        return num_states * 4 * config.state_values
    shape = config.attention_shape(layer)
    padded = -(-shape.head_dim // VECTOR) * VECTOR
    per_head = (shape.head_dim + padded) * BYTES_PER_VALUE[dtype]
    per_head += 2 * 4 if dtype == "int8" else 0  # scales
    return int(-(-num_tokens // PAGE_SIZE) * PAGE_SIZE * shape.num_kv_heads * per_head)


def device_bytes(config: ModelConfig, layer: int, num_tokens: int, dtype: str) -> int:
    """Bytes that the keys and values of `num_tokens` tokens take on a GPU, in whole pages: nothing
    is padded, and a latent vector, of which values are a part, is there once."""
    if layer in config.recurrent_layers:
        return 0
    shape, num_kinds = config.attention_shape(layer), 1 if config.latent.kv_rank else 2
    per_head = num_kinds * (shape.head_dim * BYTES_PER_VALUE[dtype] + 4 * (dtype == "int8"))
    token = aligned(int(shape.num_kv_heads * per_head), 16)
    return -(-num_tokens // PAGE_SIZE) * PAGE_SIZE * token


def state_bytes(config: ModelConfig) -> int:
    """Bytes that recurrent layers remember of each text; 0 for a model without them."""
    return 4 * len(config.recurrent_layers) * config.state_values


class Sequence:
    """The tokens of one text so far, and the pages that hold their keys and values; `state` is
    what recurrent layers remember of it, in the backend's memory, and `marked` what they did when
    it had `mark` tokens."""

    def __init__(self, max_pages: int, state: Any = None) -> None:
        self.state = state
        self.marked: Any = None
        self.mark = 0
        self.unseen: Any = None  # by the layer that drafts tokens: see tiered.draft_layer.Unseen
        self.tokens: list[int] = []
        self.pages = np.full(max_pages, -1, np.int32)
        self.num_pages = 0


class Room(Protocol):
    """The memory that pages lie in, where they share it."""

    @property
    def is_wanted(self) -> bool:
        """Whether who else is there has less than it could use."""

    def hold(self, num_pages: int) -> None:
        """Pages 0 ... num_pages - 1 may be in use from now on, and no others."""


class KVCache:
    """A pool of pages with a free list, shared by all sequences. The lowest free one is used first.

    A full page never changes, so several texts that begin alike may hold the same one; it is free
    again when the last of them lets go of it.
    """

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        num_tokens: int,
        dtype: str = "f16",
        num_texts: int = 1,
        room: Room | None = None,
    ) -> None:
        self.num_pages = -(-num_tokens // PAGE_SIZE)
        self.pages: Any = backend.kv_pages(config, self.num_pages, PAGE_SIZE, dtype)
        # Recurrent layers remember a text as a whole: it cannot be cut, nor begin with pages of
        # another that went on. There is memory for so many of them.
        self.is_recurrent = bool(config.recurrent_layers)
        self.num_texts = num_texts
        self._backend, self._config = backend, config
        self._free = list(range(self.num_pages))[::-1]  # so that the next one is the lowest
        self._holders = [0] * self.num_pages  # by page
        self._room = room
        self._extent = 0  # no page from this one on is in use

    @property
    def free_tokens(self) -> int:
        """Tokens that fit in pages no sequence holds."""
        return len(self._free) * PAGE_SIZE

    @property
    def last_page(self) -> int | None:
        """The last page in use, whose room others want; None: nobody does."""
        wanted = self._extent and self._room is not None and self._room.is_wanted
        return self._extent - 1 if wanted else None

    def open(self, tokens: Items[int] = (), pages: Items[int] = ()) -> Sequence:
        """A new text. With `pages`, it begins with `tokens`, which fill these pages exactly."""
        assert len(tokens) == len(pages) * PAGE_SIZE
        assert not (pages and self.is_recurrent)
        sequence = Sequence(self.num_pages, self._new_state())
        sequence.tokens.extend(tokens)
        sequence.pages[: len(pages)] = pages
        sequence.num_pages = len(pages)
        for page in pages:
            self.hold(page)
        return sequence

    def _new_state(self) -> Any:
        return self._backend.recurrent_state(self._config) if self.is_recurrent else None

    def hold(self, page: int) -> None:
        """Keep a page that is in use, until as many calls of `release`."""
        assert self._holders[page]
        self._holders[page] += 1

    def release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            insort(self._free, page, key=neg)
            self._settle()

    def _settle(self) -> None:
        """Others may have the room of pages at the end, while nobody uses them."""
        if self._room is not None:
            extent = self._extent
            while extent and not self._holders[extent - 1]:
                extent -= 1
            self._hold(extent)

    def _hold(self, extent: int) -> None:
        if self._room is not None and extent != self._extent:
            self._room.hold(extent)
        self._extent = extent

    def is_shared(self, page: int) -> bool:
        """Whether more than one holds it."""
        return self._holders[page] > 1

    def truncate(self, sequence: Sequence, length: int) -> int:
        """Forget all but the first `length` tokens; of a recurrent model, all if it is not all that
        are kept. Returns how many are left."""
        if self.is_recurrent and length < len(sequence.tokens):
            length = 0
        self._cut(sequence, length)
        return len(sequence.tokens)

    def _cut(self, sequence: Sequence, length: int) -> None:
        keep = -(-length // PAGE_SIZE)
        if length % PAGE_SIZE and length < len(sequence.tokens):  # its last page changes again
            assert not self.is_shared(sequence.pages[keep - 1])
        for page in sequence.pages[keep : sequence.num_pages][::-1].tolist():
            self.release(page)
        sequence.pages[keep : sequence.num_pages] = -1
        sequence.num_pages = min(keep, sequence.num_pages)
        del sequence.tokens[length:]
        if sequence.unseen is not None:
            sequence.unseen.cut(length)

    def set_mark(self, sequence: Sequence) -> None:
        """Whatever is appended from now on can be taken back, whole or in part."""
        sequence.mark = len(sequence.tokens)
        if self.is_recurrent:
            if sequence.marked is None:
                sequence.marked = self._new_state()
            self._backend.copy_state(sequence.state, sequence.marked)

    def take_back(self, sequence: Sequence, length: int) -> list[int]:
        """Forget all but the first `length` tokens, which are at least those before the mark.

        Recurrent layers are as they were at the mark, so what was appended since and is to stay has
        to be appended again: these tokens are returned, and no longer the sequence's.
        """
        self._cut(sequence, length)
        if not self.is_recurrent:
            return []
        sequence.state, sequence.marked = sequence.marked, sequence.state
        again = sequence.tokens[sequence.mark :]
        del sequence.tokens[sequence.mark :]
        return again

    def close(self, sequence: Sequence) -> None:
        self.truncate(sequence, 0)
        sequence.state = sequence.marked = None

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Give a sequence pages for `length` tokens; False, and nothing, if there are too few."""
        needed = -(-length // PAGE_SIZE) - sequence.num_pages
        if needed > len(self._free):
            return False
        if needed > 0:
            self._hold(max(self._extent, self._free[-needed] + 1))
        for _ in range(needed):
            page = self._free.pop()
            self._holders[page] = 1
            sequence.pages[sequence.num_pages] = page
            sequence.num_pages += 1
        return True

    def batch(self, additions: Items[tuple[Sequence, Items[int]]]) -> Batch:
        """Append tokens to sequences, and say where each stands. MemoryError if pages run out."""
        for sequence, tokens in additions:
            if not self.grow(sequence, len(sequence.tokens) + len(tokens)):
                raise MemoryError(
                    f"the KV cache is full: {self.num_pages * PAGE_SIZE} tokens; "
                    "use a larger context, or a shorter text"
                )
        starts = [len(sequence.tokens) for sequence, _ in additions]
        counts = [len(tokens) for _, tokens in additions]
        for sequence, tokens in additions:
            sequence.tokens.extend(tokens)
        states = [sequence.state for sequence, _ in additions] if self.is_recurrent else None
        if len(additions) == 1:
            (sequence, tokens), start, count = additions[0], starts[0], counts[0]
            return Batch(
                np.array(tokens, np.int32),
                np.arange(start, start + count, dtype=np.int32),
                np.zeros(count, np.int32),
                sequence.pages[None],
                states,
            )
        return Batch(
            np.array([token for _, tokens in additions for token in tokens], np.int32),
            np.array(
                [p for s, n in zip(starts, counts, strict=True) for p in range(s, s + n)], np.int32
            ),
            np.repeat(np.arange(len(additions), dtype=np.int32), counts),
            np.stack([sequence.pages for sequence, _ in additions]),
            states,
        )

"""Multi-token prediction: a layer of the model's own that foresees the token after the next one.

It makes of a token's embedding and the hidden state before that token what would be the hidden
state after it: both normed, side by side, through a projection and one decoder layer. The hidden
state is the one after the last norm, for several tokens the layer's own after its own norm. As in
https://arxiv.org/abs/2412.19437, section 2.2, in the order that SGLang (deepseek_nextn.py), vLLM
(deepseek_mtp.py, qwen3_next_mtp.py) and llama.cpp (qwen35moe.cpp) compute: first the embedding,
then the hidden state.

Its keys and values lie in the pages of the text, as of one more layer. What it makes of a token
depends on that token and those before it alone, as in any layer, so that pages can be shared;
before a text's first token, hidden states are zero.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiered.backend import Array, Backend, Batch
from tiered.chunks import Chunks
from tiered.kv_cache import KVCache, Sequence
from tiered.model import Decoder, Layer

if TYPE_CHECKING:
    from tiered.store import ExpertStore
    from tiered.weights.loader import WeightLoader


class Unseen:
    """Hidden states that the layer has yet to see, those before the tokens from `start` on."""

    def __init__(self, hidden_size: int) -> None:
        self._zeros = np.zeros((1, hidden_size), np.float32)
        self._begin(0)

    def _begin(self, start: int) -> None:
        """What is before the token at `start` is not known (any more)."""
        self.start = start
        self._rows = [self._zeros]

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    @property
    def end(self) -> int:
        """Hidden states are known before the tokens up to here, this one excluded."""
        return self.start + len(self)

    def add(self, start: int, x: np.ndarray) -> None:
        """The hidden states of tokens from `start` on; those that are known stay as they are."""
        if start > self.end - 1:  # somebody else has computed the tokens before
            self._begin(start)
        self._rows.append(x[self.end - 1 - start :].copy())

    def cut(self, length: int) -> None:
        """The text has only `length` tokens any more."""
        if length < self.start:
            self._begin(length)
        elif length < self.end - 1:
            self._rows = [np.concatenate(self._rows)[: length - self.start + 1]]

    def take(self, count: int) -> np.ndarray:
        """The first `count`, which are seen now: float32 [count, hidden_size]."""
        rows = np.concatenate(self._rows)
        self.start += count
        self._rows = [rows[count:]]
        return rows[:count]


class Joins(NamedTuple):
    """What the layer begins with, from the hidden states of the model and from its own."""

    model: Any
    own: Any


class DraftLayer:
    """`decoder` has this one layer, at `index`, and the model's embedding, experts and head."""

    def __init__(
        self, decoder: Decoder, index: int, joins: Joins, kv: KVCache, most_rows: int
    ) -> None:
        self.decoder = decoder
        self.index = index
        self.joins = joins
        self.kv = kv
        self.most_rows = most_rows  # that are computed at once

    @property
    def _backend(self) -> Backend:
        return self.decoder.backend.of_layer(self.index)

    def watch(self, sequence: Sequence, start: int, x: Array) -> None:
        """What the model's layers made of a text's tokens from `start` on, the last it has.

        It is kept until drafts are asked for, or there is so much of it that it is seen now.
        """
        if sequence.unseen is None:
            sequence.unseen = Unseen(x.shape[1])
        sequence.unseen.add(start, self._backend.in_ram(x))
        while len(sequence.unseen) > self.most_rows:
            self._see(sequence, sequence.tokens, self.most_rows)

    def catch_up(self, sequence: Sequence) -> None:
        """See all hidden states after which the text goes on."""
        if sequence.unseen is not None and len(sequence.unseen) > 1:
            self._see(sequence, sequence.tokens, len(sequence.unseen) - 1)

    def draft(self, sequence: Sequence, tokens: Items[int], most: int) -> list[int]:
        """What is likely to follow `tokens`, of which `sequence` has all but the last to compute.
        Up to `most` tokens; none where there is no memory for their keys and values."""
        unseen = sequence.unseen
        if not most or unseen is None or unseen.end != len(tokens):
            return []
        if not self.kv.grow(sequence, len(tokens) + most - 1):
            return []
        x = self._see(sequence, tokens, len(unseen))
        draft: list[int] = []
        while True:
            logits = self.decoder.head(x, np.array([len(x) - 1]))[0]
            draft.append(int(logits.argmax()))
            if len(draft) == most:
                return draft
            place = len(tokens) + len(draft) - 1
            hidden = self._backend.in_ram(x[-1:]).copy()
            x = self._pass(sequence, draft[-1:], place, hidden, self.joins.own)

    def _see(self, sequence: Sequence, tokens: Items[int], count: int) -> Array:
        """Let the layer see `count` hidden states, together with the tokens after them."""
        unseen = sequence.unseen
        start = unseen.start
        hidden = unseen.take(count)
        return self._pass(sequence, tokens[start : start + count], start, hidden, self.joins.model)

    def _pass(
        self, sequence: Sequence, tokens: Items[int], start: int, hidden: np.ndarray, join: Any
    ) -> Array:
        places = np.arange(start, start + len(tokens), dtype=np.int32)
        batch = Batch(
            np.array(tokens, np.int32), places, np.zeros_like(places), sequence.pages[None]
        )
        d, b = self.decoder, self._backend
        d.clock.start()
        first = d.backend.of_layer(0)
        x = b.take(first.embed(d.embedding, batch.tokens, d.config.embedding_scale))
        b.join(x, hidden, join)
        d.layer(x, self.index, Chunks(batch), self.kv.pages)
        return x


def open_draft_layer(
    main: Decoder, loader: WeightLoader, store: ExpertStore | None, kv: KVCache, most_rows: int
) -> DraftLayer | None:
    """The layer of a checkpoint that was opened with it, beside the `main` decoder; `loader` is
    that of the last layer, which it is. Where there are several, the first one, which is then used
    for all tokens of a draft."""
    config, index = loader.config, main.config.num_layers
    if not config.num_draft_layers:
        return None
    layers = [*[Layer(None)] * index, loader.layer(index, store)]
    output = loader.draft_output(index)
    decoder = Decoder(config, main.backend, main.embedding, layers, output, main.source)
    decoder.clock = main.clock
    return DraftLayer(decoder, index, loader.joins(index), kv, most_rows)

"""What recurrent layers share: a text's state, runs of its tokens in a batch, convolutions, chunks
of tokens that are computed at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from gpu_backend.gating import silu

CHUNK = 64  # tokens that are computed at once


class RecurrentState:
    """What the recurrent layers remember of one text. Undefined until the text begins."""

    def __init__(self, config: Any, devices: Sequence[torch.device]) -> None:
        """`config` has the attributes of tiered.config.ModelConfig; `devices`: by layer."""
        self.values = [
            torch.empty(config.state_values, device=devices[layer])
            for layer in sorted(config.recurrent_layers)
        ]


def copy_state(source: RecurrentState, target: RecurrentState) -> None:
    """Make `target` remember what `source` does."""
    for values, copies in zip(source.values, target.values, strict=True):
        copies.copy_(values)


class Run(NamedTuple):
    """Rows that follow each other in one text, and that text's state."""

    rows: slice
    state: RecurrentState
    is_fresh: bool  # the text begins with them

    def of_layer(self, number: int) -> torch.Tensor:
        """What the model's `number`-th recurrent layer remembers of the text, to be changed."""
        values = self.state.values[number]
        return values.zero_() if self.is_fresh else values


def runs_of(batch: Any) -> list[Run]:
    """ValueError if a sequence's rows lie apart."""
    starts = np.flatnonzero(np.diff(batch.sequences, prepend=-1)).tolist()
    ends = [*starts[1:], len(batch.sequences)]
    owners = batch.sequences[starts].tolist()
    if batch.states is None or len(set(owners)) != len(owners):
        raise ValueError("recurrent layers need each sequence's rows in a run, and its state")
    return [
        Run(slice(start, end), batch.states[owner], bool(batch.positions[start] == 0))
        for start, end, owner in zip(starts, ends, owners, strict=True)
    ]


def convolve(
    x: torch.Tensor,
    history: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None = None,
    activated: bool = False,
) -> torch.Tensor:
    """Each of a run's rows and those before, weighted, plus `bias`; with SiLU if `activated`.

    x: float32 [num_rows, channels]; weights: [size, channels]; history: [size - 1, channels], the
    rows before the first, of which the last ones take their place.
    """
    rows, count = torch.cat([history, x]), len(x)
    total = rows[:count] * weights[0]
    for number in range(1, len(weights)):
        total += rows[number : number + count] * weights[number]
    history.copy_(rows[count:])
    if bias is not None:
        total += bias
    return silu(total) if activated else total


class Decays(NamedTuple):
    """How much of a state is left, for a chunk of tokens."""

    start: torch.Tensor  # float32 [heads, num_tokens, 1]: of the one before the chunk, at a token
    between: torch.Tensor  # float32 [heads, num_tokens, num_tokens]: of column's token at row's


def decays_of(logs: torch.Tensor) -> Decays:
    """`logs`: float64 [heads, num_tokens], the logarithms of what a token leaves of the state."""
    total = logs.cumsum(-1)
    between = (total[:, :, None] - total[:, None]).tril()  # what lies ahead might be infinite
    return Decays(torch.exp(total).float()[..., None], torch.exp(between).float().tril())


def write_and_read(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    written: torch.Tensor,
    decays: Decays,
) -> torch.Tensor:
    """A chunk of S = decay * S + k written;   out = q S, token by token: float32 [heads,
    num_tokens, value_dim]; `state` [heads, key_dim, value_dim] goes on.

    q, k: [heads, num_tokens, key_dim].
    """
    scores = torch.bmm(q, k.transpose(1, 2)) * decays.between
    out = torch.bmm(scores, written) + decays.start * torch.bmm(q, state)
    left = k * decays.between[:, -1, :, None]  # of each token, at the chunk's end
    state.mul_(decays.start[:, -1:]).add_(torch.bmm(left.transpose(1, 2), written))
    return out

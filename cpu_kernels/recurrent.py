"""What recurrent layers share: a text's state, runs of its tokens in a batch, how they are run,
convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpu_kernels.chain import OF_ATTENTION, Chain
from cpu_kernels.compiler import inner
from cpu_kernels.delta_rule import add_product, clear
from cpu_kernels.gating import silu
from cpu_kernels.memory import load_i32, word
from cpu_kernels.norm import add, scaled_copy
from cpu_kernels.record import Record, Scratch, fields
from cpu_kernels.team import share

# `runs` has int64 [count, 3]: the first of rows that follow each other in one text, how many, and
# the address of that text's state.
RUNS = fields("count runs positions")


class RecurrentState:
    """What the recurrent layers remember of one text. Undefined until the text begins."""

    def __init__(self, config: Any) -> None:
        """`config` has the attributes of tiered.config.ModelConfig."""
        self.values = np.empty(len(config.recurrent_layers) * config.state_values, np.float32)
        self.address: int = self.values.ctypes.data


class RecurrentLayers:
    """Runs the layers of one kind; one call at a time. They have an `op`, the `record` that it
    takes, a `hidden_size`, and `rooms`: bytes of memory, by the names that they have in the batch's
    record (its fields are `batch_fields`), for so many tokens."""

    def __init__(self, chain: Chain, batch_fields: Any) -> None:
        self._chain = chain
        self._scratch = Scratch()
        self._runs = Record(RUNS)
        self.batch = Record(batch_fields, runs=self._runs.address)  # what all layers are given

    def run(self, x: np.ndarray, layer: Any, batch: Any) -> None:
        """x += what the layer makes of norm(x): float32 [num_tokens, hidden_size]; `batch.states`
        (one of each sequence) go on by its tokens."""
        if not len(x):
            return
        if not self.batch.is_filled_for(x, batch):
            self._fill(x, layer, batch)
        self._chain.queue(layer.op.address, layer.record.address, OF_ATTENTION)

    def _fill(self, x: np.ndarray, layer: Any, batch: Any) -> None:
        self._chain.forget()  # layers that wait use the record
        self.batch.mark_filled_for()
        if x.dtype != np.float32 or x.shape != (len(x), layer.hidden_size):
            raise ValueError(f"x must be float32 [num_tokens, {layer.hidden_size}]")
        runs, room = runs_of(batch), self._scratch.room
        self._runs.set(count=len(runs), runs=runs, positions=batch.positions)
        rooms = {name: room(name, nbytes) for name, nbytes in layer.rooms(len(x)).items()}
        self.batch.set(x=x, num_rows=len(x), **rooms)
        self.batch.mark_filled_for(x, batch)


def runs_of(batch: Any) -> np.ndarray:
    """int64 [count, 3]; see RUNS. ValueError if a sequence's rows lie apart."""
    starts = np.flatnonzero(np.diff(batch.sequences, prepend=-1))
    counts = np.diff(np.append(starts, len(batch.sequences)))
    owners = batch.sequences[starts]
    if batch.states is None or len(set(owners.tolist())) != len(owners):
        raise ValueError("recurrent layers need each sequence's rows in a run, and its state")
    addresses = [batch.states[sequence].address for sequence in owners]
    return np.stack([starts, counts, addresses], 1).astype(np.int64)


@inner
def run_at(record, number):
    """First row, number of rows, state and whether it is the text's beginning."""
    runs = word(record, RUNS.runs)
    first, count = word(runs, 3 * number), word(runs, 3 * number + 1)
    fresh = load_i32(word(record, RUNS.positions), first) == 0
    return first, count, word(runs, 3 * number + 2), fresh


@inner
def convolve(
    runs, source, target, weights, bias, channels, size, past, activated, thread, num_threads
):
    """target = each token's `channels` and those of the tokens before, weighted, plus what is at
    `bias` (0: nothing), of this thread's channels; with SiLU if `activated`. The last size - 1
    tokens stay at `past` in each state."""
    row = 4 * channels
    lo, hi = share((channels + 15) // 16, thread, num_threads)
    lo, hi = 16 * lo, min(16 * hi, channels)
    if hi <= lo:
        return
    for number in range(word(runs, RUNS.count)):
        first, count, state, fresh = run_at(runs, number)
        history = state + past + 4 * lo
        if fresh:
            for i in range(size - 1):
                clear(history + i * row, hi - lo)
        for i in range(first, first + count):
            out = target + i * row + 4 * lo
            for j in range(size):
                before = i - first - (size - 1) + j  # the token, counted from the run's first
                at = source + (first + before) * row + 4 * lo
                if before < 0:
                    at = history + (before + size - 1) * row
                add_product(at, weights + j * row + 4 * lo, out, hi - lo, 1 if j == 0 else 0)
            if bias:
                add(out, bias + 4 * lo, hi - lo)
            if activated:
                silu(out, hi - lo)
        for i in range(size - 1):  # in order: what is read lies ahead of what is written
            before = count - (size - 1) + i
            at = source + (first + before) * row + 4 * lo
            if before < 0:
                at = history + (before + size - 1) * row
            scaled_copy(at, history + i * row, hi - lo, np.float32(1.0))

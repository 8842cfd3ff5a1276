"""Graphs: what a decode step does the same way each time, launched in one go.

A GPU computes a layer's attention in less time than it takes to launch its dozens of kernels one
after the other. So calls of few rows are recorded the first time (on a card, as a CUDA graph) and
replayed afterwards. A replay reads and writes the memory of the call that was recorded: what
differs from step to step is copied there, unless it lies in `Buffers` already. The numbers are
those of the call itself, which is done as usual where recording is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

log = logging.getLogger("tiered")

Tensors = tuple[torch.Tensor, ...]
Work = Callable[..., Tensors]
Record = Callable[[Callable[[], Tensors]], tuple[Tensors, Callable[[], None]]]
MOST_ROWS = 8  # of a call that is recorded; longer ones are no decode steps


class Buffers:
    """Tensors whose place in memory stays the same from step to step: one for each name and
    shape."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[Hashable, torch.Tensor] = {}
        self._ids: set[int] = set()

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._ids

    def keep(self, name: Hashable, values: torch.Tensor) -> torch.Tensor:
        """The buffer with new values; many rows stay where they are, on the device."""
        if len(values) > MOST_ROWS:
            return values.to(self._device)
        key = name, values.shape, values.dtype
        if key not in self._known:
            buffer = torch.empty(values.shape, dtype=values.dtype, device=self._device)
            self._known[key] = buffer
            self._ids.add(id(buffer))
        return self._known[key].copy_(values, non_blocking=True)

    def put(self, name: Hashable, values: np.ndarray) -> torch.Tensor:
        """The same with values of the host."""
        return self.keep(name, torch.from_numpy(values))


class Recorded(NamedTuple):
    inputs: Tensors  # in whose place a replay wants them; it may change the first
    outputs: Tensors
    replay: Callable[[], None]


class Graphs:
    """`record` runs a call and returns what it returned, in memory that `replay` fills again; None:
    everything is done as it is called."""

    def __init__(self, buffers: Buffers, record: Record | None = None) -> None:
        self.buffers, self.record = buffers, record
        self.problem = ""  # why calls are no longer recorded
        self._known: dict[Hashable, Recorded] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def state(self) -> str:
        """For people: whether calls are replayed."""
        if self.record is None:
            return f"not used: {self.problem}" if self.problem else "not used"
        return f"{len(self)} calls recorded"

    def run(self, key: Hashable, work: Work, *inputs: torch.Tensor) -> Tensors:
        """work(*inputs), which may change the first of them. What it returns is valid until the
        next call with this `key`."""
        if self.record is None or len(inputs[0]) > MOST_ROWS:
            return work(*inputs)
        place = key, tuple(each.shape for each in inputs)
        known = self._known.get(place)
        if known is None:
            return self._first(place, work, inputs)
        for own, given in zip(known.inputs, inputs, strict=True):
            if own is not given:
                own.copy_(given)
        known.replay()
        if known.inputs[0] is not inputs[0]:
            inputs[0].copy_(known.inputs[0])
        return _aliases(known.outputs)

    def clear(self) -> None:
        self._known.clear()

    def _first(self, place: Hashable, work: Work, inputs: Tensors) -> Tensors:
        """Call it, record it, and compare: a graph that computes anything else is not used."""
        before = inputs[0].clone()
        own = tuple(each if each in self.buffers else each.clone() for each in inputs)
        expected = tuple(each.clone() for each in (*work(*inputs), inputs[0]))
        try:
            assert self.record is not None
            own[0].copy_(before)
            outputs, replay = self.record(lambda: work(*own))
            own[0].copy_(before)
            replay()
            if not all(map(torch.equal, (*outputs, own[0]), expected)):
                raise RuntimeError("a replay has other numbers")
        except RuntimeError as error:
            self._give_up(error)
            inputs[0].copy_(expected[-1])
            return expected[:-1]
        inputs[0].copy_(own[0])
        self._known[place] = Recorded(own, outputs, replay)
        return _aliases(outputs)

    def _give_up(self, error: RuntimeError) -> None:
        self.record, self.problem = None, str(error)
        self._known.clear()
        log.warning("CUDA graphs are not used, decoding is slower: %s", error)


def _aliases(outputs: Tensors) -> Tensors:
    """The same memory as other objects: who remembers one knows that it is of another step."""
    return tuple(each.detach() for each in outputs)


class CudaRecorder:
    """Records CUDA graphs of one device. Their scratch lies in one pool, since they follow each
    other in the order in which they were recorded."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            # Of this thread only: others copy experts meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = work()
            except BaseException:  # what it says is worth more than that no graph came of it
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(self._stream)
        return outputs, graph.replay

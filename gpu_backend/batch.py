"""A batch's tokens: where their keys and values are, and what each attends to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gpu_backend.graphs import Buffers
from gpu_backend.kv import KVPages
from gpu_backend.rope import RopeTable


class SequencePlace:
    """One sequence's rows of a batch, and where its keys and values are."""

    def __init__(
        self, rows: np.ndarray, positions: np.ndarray, slots: np.ndarray, device: torch.device
    ) -> None:
        self.rows = torch.from_numpy(rows).to(device)
        self._positions, self._slots, self._device = positions, slots, device
        self._visible: dict[tuple[int, bool], tuple[torch.Tensor, torch.Tensor | None]] = {}

    def visible(
        self, window: int = 0, chunked: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where what the rows attend to is, in order of position (int64 [length]), and which of it
        each row does: bool [num_rows, length]; None: all.

        With a window, that are the last `window` positions or, `chunked`, those of a row's chunk.
        """
        key = window, chunked
        if key not in self._visible:
            self._visible[key] = self._find(window, chunked)
        return self._visible[key]

    def _find(self, window: int, chunked: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        last = self._positions
        first = np.zeros_like(last)
        if window:
            first = last // window * window if chunked else np.maximum(last + 1 - window, 0)
        slots = torch.from_numpy(self._slots[first.min() :]).to(self._device)
        if (first == first[0]).all() and (last == last[0]).all():
            return slots, None
        at = np.arange(first.min(), len(self._slots))
        mask = (at >= first[:, None]) & (at <= last[:, None])
        return slots, torch.from_numpy(mask).to(self._device)


class BatchPlace:
    """Where a batch's tokens are in the KV cache; the same for all layers of a forward pass."""

    def __init__(self, batch: Any, kv: KVPages, device: torch.device, buffers: Buffers) -> None:
        self.positions, page_size = batch.positions, kv.page_size
        self._buffers = buffers
        self._rotations: dict[RopeTable, torch.Tensor] = {}
        tables = batch.page_tables.astype(np.int64)
        pages = tables[batch.sequences, batch.positions // page_size]
        slots = kv.places(pages, batch.positions % page_size)
        self.slots = buffers.put("slots", slots)
        self.sequences = []
        for sequence in np.unique(batch.sequences):
            rows = np.flatnonzero(batch.sequences == sequence)
            positions = batch.positions[rows].astype(np.int64)
            at = np.arange(positions.max() + 1)
            known = kv.places(tables[sequence, at // page_size], at % page_size)
            self.sequences.append(SequencePlace(rows, positions, known, device))

    def rotation(self, rope: RopeTable) -> torch.Tensor:
        """See RopeTable; the same for all layers that share one."""
        if rope not in self._rotations:
            self._rotations[rope] = self._buffers.put(rope, rope.rotation(self.positions))
        return self._rotations[rope]

    def scales(self, name: Any, values: np.ndarray) -> torch.Tensor:
        """On the device: float32, one for each token."""
        return self._buffers.put(name, values.astype(np.float32))

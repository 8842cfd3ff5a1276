"""Experts in the whole blocks of the file that hold them, so that no byte is copied on the way.

Direct reads move whole blocks between multiples of 4096. A GGUF file's matrices begin anywhere, so
that read exactly into a slot they would have to go through a buffer, and copying costs a processor
core as much time as it costs the disk. Here a matrix lies in its slot as far from the beginning of
a block as it does in the file: blocks come straight from the disk, with what is beside the matrix.
"""

from __future__ import annotations

import numpy as np

from tiered.experts import ExpertKey, aligned
from tiered.policies import Space
from tiered.reader import BLOCK
from tiered.store import ExpertStore, Task

LARGEST_SHARE = 0.02  # of a slot that may be bytes which are not the expert's


class WholeBlocks:
    """A tier's source: a store's experts, each matrix where `offsets` says.

    `blob_bytes` (by layer) is the room that one takes, `offsets[layer]` is int64 [num_experts, 3].
    A mix by expert is read as the store reads it.
    """

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        config = store.checkpoint.config
        self.blob_bytes = [0] * config.num_layers
        self.offsets: dict[int, np.ndarray] = {}
        for layer in config.sparse_layers:
            table = np.empty((config.num_experts, 3), np.int64)
            for expert in range(config.num_experts):
                end = 0
                for part, tensor in enumerate(store.tensors(ExpertKey(layer, expert))):
                    start = end + tensor.offset % BLOCK
                    table[expert, part] = start
                    end = aligned(start + tensor.nbytes, BLOCK)
                self.blob_bytes[layer] = max(self.blob_bytes[layer], end)
            self.offsets[layer] = table

    @property
    def pays(self) -> bool:
        """Whether the file has the experts' own bytes, in matrices that are large beside a block,
        and not yet in blobs that begin at one."""
        store = self._store
        return (
            store.mappable
            and not store.is_mix
            and all(
                not store.is_blob(ExpertKey(layer, 0))
                and self.blob_bytes[layer] - store.layout(layer).nbytes
                <= LARGEST_SHARE * self.blob_bytes[layer]
                for layer in self.offsets
            )
        )

    @property
    def layer_bytes(self) -> list[int]:
        """Room that all experts take, by layer."""
        num_experts = self._store.checkpoint.config.num_experts
        return [num_experts * nbytes for nbytes in self.blob_bytes]

    def space(self, capacity: int) -> Space:
        """What a tier with so many bytes for these experts manages."""
        return Space(capacity, tuple(self.blob_bytes))

    def read_into(self, key: ExpertKey, slot: np.ndarray) -> None:
        """Fill `slot`, which begins at a multiple of 4096. Raises OSError naming the file."""
        store, nbytes = self._store, 0
        tasks: list[Task] = []
        offsets = self.offsets[key.layer][key.expert].tolist()
        for start, tensor in zip(offsets, store.tensors(key), strict=True):
            before = start % BLOCK
            first, size = tensor.offset - before, aligned(before + tensor.nbytes, BLOCK)
            size = min(size, store.file_bytes(tensor.file) - first)  # its last block may be shorter
            tasks += store.reads(tensor.file, first, slot[start - before :][:size])
            nbytes += tensor.nbytes
        store.run(tasks, nbytes)

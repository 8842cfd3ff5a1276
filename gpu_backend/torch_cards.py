"""Several of torch's devices: where the keys, values and states of their layers lie."""

from __future__ import annotations

from typing import Any

import torch

from gpu_backend.cards import Cards
from gpu_backend.device import allocating
from gpu_backend.kv import KVPages, kv_pages
from gpu_backend.recurrent import RecurrentState, copy_state


class TorchCards(Cards):
    def kv_pages(self, config: Any, num_pages: int, page_size: int, dtype: str) -> KVPages:
        return kv_pages(config, num_pages, page_size, dtype, self._owners)

    def recurrent_state(self, config: Any) -> RecurrentState:
        with allocating("what recurrent layers remember of a text", self.name):
            return RecurrentState(config, self._devices)

    def copy_state(self, source: RecurrentState, target: RecurrentState) -> None:
        copy_state(source, target)

    @property
    def _devices(self) -> list[torch.device]:
        return [card.device.torch_device for card in self._owners]

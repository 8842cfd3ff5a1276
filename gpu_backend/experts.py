"""A layer's experts: wherever a blob lies, there it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gpu_backend.formats import check_format
from gpu_backend.gating import check_activation
from gpu_backend.layouts import ExpertWeights


class ExpertLayer:
    """The sizes and number formats of a layer's experts, ready to run, on the device and on the
    host. `layout`, `config` and `biases` are tiered's, or like them; `host` is a CpuBackend. With
    `others`, expert e has the `kinds[e]`-th of `layout` and these."""

    def __init__(
        self,
        layout: Any,
        config: Any,
        biases: Any,
        device: torch.device,
        host: Any,
        others: Sequence[Any] = (),
        kinds: np.ndarray | None = None,
    ) -> None:
        layouts = [layout, *others]
        for tensor in (tensor for each in layouts for tensor in (each.gate, each.up, each.down)):
            check_format(tensor.format)
        check_activation(config.activation)
        self.hidden_size: int = config.hidden_size
        joined = None if biases is None else np.concatenate(biases, axis=1, dtype=np.float32)
        on_device = None if joined is None else torch.from_numpy(joined).to(device)
        self._weights = [
            ExpertWeights(each, config.activation, float(config.activation_limit), on_device)
            for each in layouts
        ]
        self._kinds = kinds
        mix = (others, kinds) if others else ()
        self.on_host = host and host.expert_layer(layout, config, biases, *mix)

    def alike(
        self, experts: np.ndarray
    ) -> Iterator[tuple[ExpertWeights, Sequence[int] | np.ndarray]]:
        """What experts of one layout are computed with, and their places in `experts`: mostly all
        of them."""
        if self._kinds is None:
            yield self._weights[0], range(len(experts))  # of which jobs know that it is all
            return
        kinds = self._kinds[experts]
        for kind in np.unique(kinds):
            yield self._weights[kind], np.flatnonzero(kinds == kind)


def weighted(h: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A row for each pair: weights[t, rank] * h[t], float32 [num_tokens * top_k, hidden_size]."""
    return (weights[..., None] * h[:, None]).flatten(0, 1)

"""A layer's experts: wherever a blob lies, there it is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gpu_backend.formats import check_format
from gpu_backend.gating import check_activation
from gpu_backend.layouts import ExpertWeights


class ExpertLayer:
    """The sizes and number formats of a layer's experts, ready to run, on the device and on the
    host. `layout`, `config` and `biases` are tiered's, or like them; `host` is a CpuBackend."""

    def __init__(
        self, layout: Any, config: Any, biases: Any, device: torch.device, host: Any
    ) -> None:
        for tensor in (layout.gate, layout.up, layout.down):
            check_format(tensor.format)
        check_activation(config.activation)
        self.hidden_size: int = config.hidden_size
        joined = None if biases is None else np.concatenate(biases, axis=1, dtype=np.float32)
        self.weights = ExpertWeights(
            layout,
            config.activation,
            float(config.activation_limit),
            None if joined is None else torch.from_numpy(joined).to(device),
        )
        self.on_host = host and host.expert_layer(layout, config, biases)


def weighted(h: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A row for each pair: weights[t, rank] * h[t], float32 [num_tokens * top_k, hidden_size]."""
    return (weights[..., None] * h[:, None]).flatten(0, 1)

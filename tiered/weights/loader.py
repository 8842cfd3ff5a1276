"""From a checkpoint's canonical tensors to a decoder's layers. Experts stay where they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiered.backend import AttentionWeights, Backend, ExpertBiases, FeedForwardWeights
from tiered.checkpoints.damage import damaged
from tiered.formats import Checkpoint
from tiered.model import Layer
from tiered.store import ExpertStore
from tiered.weights.dense import dense_matrix
from tiered.weights.dequantize import is_finite


class WeightLoader:
    """Reads one checkpoint's dense weights into one backend."""

    def __init__(self, checkpoint: Checkpoint, backend: Backend, quantize: str) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.backend = backend
        self.quantize = quantize

    def vector(self, name: str) -> np.ndarray | None:
        """A small tensor as float32, or None where the model has none of this name."""
        if name not in self.checkpoint.tensors:
            return None
        return np.ascontiguousarray(self.checkpoint.float32(name), np.float32)

    def matrix(self, name: str) -> Any:
        data, format, shape = dense_matrix(self.checkpoint, name, self.quantize)
        return self.backend.matrix(data, format, shape, self.vector(f"{name}_bias"))

    def steering(self, name: str) -> Any:
        """A matrix whose output goes into a softmax, where what is not a number would vanish.

        Elsewhere such a weight shows in the logits; here it must be looked for.
        """
        tensor = self.checkpoint.tensors[name]
        if not is_finite(self.checkpoint.data(name), tensor.format):
            raise damaged(tensor)
        return self.matrix(name)

    def embedding(self) -> Any:
        return self.matrix("embed")

    def output(self) -> Any:
        head = "head" if "head" in self.checkpoint.tensors else "embed"
        return self.backend.output_layer(self.required("norm"), self.matrix(head), self.config)

    def required(self, name: str) -> np.ndarray:
        vector = self.vector(name)
        if vector is None:
            raise ValueError(f"{self.checkpoint.path}: tensor {name!r} is missing")
        return vector

    def feed_forward(self, prefix: str) -> FeedForwardWeights:
        gate, up, down = (self.matrix(f"{prefix}.{name}") for name in ("gate", "up", "down"))
        scale = f"{prefix}.scale"
        return FeedForwardWeights(
            gate, up, down, self.matrix(scale) if scale in self.checkpoint.tensors else None
        )

    def expert_biases(self, index: int) -> ExpertBiases | None:
        if not self.config.expert_biases:
            return None
        prefix = f"layers.{index}.experts_bias."
        return ExpertBiases(*(self.required(prefix + name) for name in ("gate", "up", "down")))

    def layer(self, index: int, store: ExpertStore | None) -> Layer:
        config, prefix = self.config, f"layers.{index}."
        attention = self.backend.attention_layer(
            AttentionWeights(
                self.required(prefix + "attention_norm"),
                self.steering(prefix + "q"),
                self.steering(prefix + "k"),
                self.matrix(prefix + "v"),
                self.matrix(prefix + "o"),
                self.vector(prefix + "q_norm"),
                self.vector(prefix + "k_norm"),
                self.vector(prefix + "sinks"),
            ),
            config,
            index,
        )
        norm = self.required(prefix + "ffn_norm")
        if not config.is_sparse(index):
            weights = self.feed_forward(prefix + "ffn")
            return Layer(
                attention,
                feed_forward=self.backend.feed_forward_layer(weights, config, norm),
            )
        assert store is not None
        shared = None
        if config.shared_expert_size:
            shared = self.backend.feed_forward_layer(self.feed_forward(prefix + "shared"), config)
        return Layer(
            attention,
            self.backend.router_layer(
                norm,
                self.steering(prefix + "router"),
                config,
                self.vector(prefix + "router_correction"),
            ),
            self.backend.expert_layer(store.layout(index), config, self.expert_biases(index)),
            shared,
        )

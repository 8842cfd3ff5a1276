"""From a checkpoint's canonical tensors to a decoder's layers. Experts stay where they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiered.backend import (
    AttentionWeights,
    Backend,
    ConvWeights,
    DeltaWeights,
    ExpertBiases,
    FeedForwardWeights,
    JoinWeights,
    LatentWeights,
    Mamba2Weights,
    MergeWeights,
    RouterWeights,
)
from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.damage import damaged
from tiered.draft_layer import Joins
from tiered.experts import prepared
from tiered.formats import Checkpoint
from tiered.model import Layer
from tiered.store import ExpertStore
from tiered.weights.dense import dense_matrix
from tiered.weights.dequantize import is_finite
from tiered.weights.quantize import GROUP_SIZE, quantize_rows


def mixed_rows(num_heads: int, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Which rows of a matrix are whose, where each head has `sizes` rows of several matrices, one
    after the other: int64 [num_heads, size] of each."""
    rows = np.arange(num_heads * sum(sizes)).reshape(num_heads, sum(sizes))
    return np.split(rows, np.cumsum(sizes)[:-1], axis=1)


class WeightLoader:
    """Reads one checkpoint's dense weights into one backend."""

    def __init__(self, checkpoint: Checkpoint, backend: Backend, quantize: str) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.backend = backend
        self.quantize = quantize
        self._heads: dict[str, Any] = {}

    def for_layer(self, index: int) -> WeightLoader:
        """The same, into the backend that a layer lies on."""
        return WeightLoader(self.checkpoint, self.backend.of_layer(index), self.quantize)

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
        norm = self.norm("norm") * np.float32(self.config.logit_scale)
        return self.backend.output_layer(norm, self.head(), self.config)

    def head(self, own: str = "") -> Any:
        """The model's matrix that makes logits, or a layer's `own`, if it has one; made once, since
        a GPU would have it twice."""
        name = next(n for n in (own, "head", "embed") if n in self.checkpoint.tensors)
        if name not in self._heads:
            self._heads[name] = self.matrix(name)
        return self._heads[name]

    def joins(self, index: int) -> Joins:
        """How the layer that drafts tokens begins."""
        prefix = f"layers.{index}.mtp."
        norms = self.norm(prefix + "embedding_norm"), self.norm(prefix + "hidden_norm")
        projection = self.matrix(prefix + "projection")
        weights = JoinWeights(norms[0], self.norm("norm"), norms[1], projection)
        own = weights._replace(last_norm=self.draft_norm(index))
        return Joins(*(self.backend.join_layer(w, self.config) for w in (weights, own)))

    def draft_norm(self, index: int) -> Any:
        own = self.norm(f"layers.{index}.mtp.norm", required=False)
        return self.norm("norm") if own is None else own

    def draft_output(self, index: int) -> Any:
        """What makes tokens of the hidden states of the layer that drafts them."""
        norm = self.draft_norm(index) * np.float32(self.config.logit_scale)
        head = self.head(own=f"layers.{index}.mtp.head")
        return self.backend.output_layer(norm, head, self.config)

    def required(self, name: str) -> np.ndarray:
        self.required_tensor(name)
        vector = self.vector(name)
        assert vector is not None
        return vector

    def required_tensor(self, name: str) -> None:
        if name not in self.checkpoint.tensors:
            raise CheckpointError(f"{self.checkpoint.path}: tensor {name!r} is missing")

    def norm(self, name: str, required: bool = True) -> Any:
        """A norm's weights; None where one is missing that need not be there."""
        vector = self.required(name) if required else self.vector(name)
        if vector is not None and (bias := self.vector(f"{name}_bias")) is not None:
            return np.stack([vector, bias])
        offset = np.float32(self.config.norm_offset)
        return vector + offset if vector is not None and offset else vector

    def head_norm(self, index: int, name: str) -> Any:
        """Of queries or keys. A norm without weights may as well come before heads are rotated,
        which does not change their length."""
        if self.config.qk_norm == "unit":
            rotates = self.config.full_layers_rotate or index not in self.config.full_layers
            return np.ones(self.config.head_dim, np.float32) if rotates else None
        return self.norm(f"layers.{index}.{name}", required=False)

    def feed_forward(self, prefix: str) -> FeedForwardWeights:
        gate, up, down = (self.matrix(f"{prefix}.{name}") for name in ("gate", "up", "down"))
        scale = f"{prefix}.scale"
        return FeedForwardWeights(
            gate, up, down, self.matrix(scale) if scale in self.checkpoint.tensors else None
        )

    def attention(self, index: int) -> Any:
        """A layer's attention, or what the model has in its place."""
        if index in self.config.delta_layers:
            return self.delta(index)
        if index in self.config.conv_layers:
            return self.conv(index)
        if index in self.config.mamba2_layers:
            return self.mamba2(index)
        if self.config.latent.kv_rank:
            return self.latent(index)
        prefix = f"layers.{index}."
        q, gate = self.steering(prefix + "q"), None
        if self.config.gated_attention:  # head by head: queries, then gates
            heads, size = self.config.num_heads, self.config.head_dim
            rows = np.arange(2 * heads * size).reshape(heads, 2, size)
            q, gate = (self.some_rows(prefix + "q", rows[:, i].reshape(-1)) for i in (0, 1))
        weights = AttentionWeights(
            self.norm(prefix + "attention_norm"),
            q,
            self.steering(prefix + "k"),
            self.matrix(prefix + ("v" if prefix + "v" in self.checkpoint.tensors else "k")),
            self.matrix(prefix + "o"),
            self.head_norm(index, "q_norm"),
            self.head_norm(index, "k_norm"),
            self.vector(prefix + "sinks"),
            gate,
            self.norm(prefix + "attention_out_norm", required=False),
        )
        return self.backend.attention_layer(weights, self.config, index)

    def delta(self, index: int) -> Any:
        prefix, d = f"layers.{index}.", self.config.delta
        keys, shared = d.num_key_heads, d.num_value_heads // max(d.num_key_heads, 1)
        sizes = d.key_dim, d.key_dim, shared * d.value_dim, shared * d.value_dim
        q, k, v, z = (part.reshape(-1) for part in mixed_rows(keys, sizes))
        b, a = (part.reshape(-1) for part in mixed_rows(keys, (shared, shared)))
        weights = DeltaWeights(
            self.norm(prefix + "attention_norm"),
            self.part(prefix + "delta.qkv", prefix + "delta.qkvz", np.concatenate([q, k, v])),
            self.part(prefix + "delta.z", prefix + "delta.qkvz", z),
            self.part(prefix + "delta.b", prefix + "delta.ba", b),
            self.part(prefix + "delta.a", prefix + "delta.ba", a),
            np.ascontiguousarray(self.required(prefix + "delta.conv").T),
            self.required(prefix + "delta.dt_bias"),
            self.decay(prefix + "delta."),
            self.required(prefix + "delta.norm"),
            self.matrix(prefix + "delta.o"),
        )
        number = sorted(self.config.delta_layers).index(index)
        return self.backend.delta_layer(weights, self.config, number)

    def decay(self, prefix: str) -> np.ndarray:
        """A, of which most files have the logarithm of its opposite."""
        decay = self.vector(prefix + "decay")
        return -np.exp(self.required(prefix + "a_log")) if decay is None else decay

    def mamba2(self, index: int) -> Any:
        prefix, m = f"layers.{index}.mamba2.", self.config.mamba2
        ends = m.inner_size, m.inner_size + m.channels
        weights = Mamba2Weights(
            self.norm(f"layers.{index}.attention_norm"),
            self.some_rows(prefix + "in", slice(0, ends[0])),
            self.some_rows(prefix + "in", slice(*ends)),
            self.some_rows(prefix + "in", slice(ends[1], None)),
            np.ascontiguousarray(self.required(prefix + "conv").T),
            self.vector(prefix + "conv_bias"),
            self.required(prefix + "dt_bias"),
            self.decay(prefix),
            self.required(prefix + "skip"),
            self.required(prefix + "norm"),
            self.matrix(prefix + "o"),
        )
        number = sorted(self.config.mamba2_layers).index(index)
        return self.backend.mamba2_layer(weights, self.config, number)

    def conv(self, index: int) -> Any:
        prefix = f"layers.{index}."
        weights = ConvWeights(
            self.norm(prefix + "attention_norm"),
            self.matrix(prefix + "conv.gates"),
            np.ascontiguousarray(self.required(prefix + "conv.conv").T),
            self.matrix(prefix + "conv.o"),
        )
        number = sorted(self.config.conv_layers).index(index)
        return self.backend.conv_layer(weights, self.config, number)

    def part(self, name: str, whole: str, rows: np.ndarray) -> Any:
        """A matrix that some checkpoints have, and others as some rows of a larger one."""
        if name in self.checkpoint.tensors:
            return self.matrix(name)
        return self.some_rows(whole, rows)

    def some_rows(self, name: str, rows: np.ndarray | slice) -> Any:
        """A matrix of these rows of another, in this order; of a slice, nothing is copied."""
        self.required_tensor(name)
        data, format, shape = dense_matrix(self.checkpoint, name, self.quantize)
        data = np.ascontiguousarray(data.reshape(shape[0], -1)[rows])
        bias = self.vector(f"{name}_bias")
        bias = None if bias is None else np.ascontiguousarray(bias[rows])
        return self.backend.matrix(data.reshape(-1), format, (len(data), shape[1]), bias)

    def latent(self, index: int) -> Any:
        prefix = f"layers.{index}."
        k_b, v_b = self.latent_views(prefix)
        weights = LatentWeights(
            self.norm(prefix + "attention_norm"),
            self.steering(prefix + "q"),
            self.steering(prefix + "q_a") if self.config.latent.q_rank else None,
            self.vector(prefix + "q_a_norm"),
            self.steering(prefix + "kv_a"),
            self.required(prefix + "kv_a_norm"),
            k_b,
            v_b,
            self.matrix(prefix + "o"),
        )
        return self.backend.latent_attention_layer(weights, self.config, index)

    def latent_views(self, prefix: str) -> tuple[Any, Any]:
        """`k_b` and `v_b`, of which most checkpoints have one matrix: a head's keys, which want to
        be transposed, then its values."""
        c, heads = self.config.latent, self.config.num_heads
        if prefix + "kv_b" not in self.checkpoint.tensors:
            return self.steering(prefix + "k_b"), self.matrix(prefix + "v_b")
        tensor, both = self.checkpoint.tensors[prefix + "kv_b"], self.required(prefix + "kv_b")
        if not np.isfinite(both).all():
            raise damaged(tensor)
        both = both.reshape(heads, c.nope_dim + c.value_dim, c.kv_rank)
        k_b = both[:, : c.nope_dim].transpose(0, 2, 1).reshape(-1, c.nope_dim)
        v_b = both[:, c.nope_dim :].reshape(-1, c.kv_rank)
        return self.made(k_b, tensor), self.made(v_b, tensor)

    def made(self, values: np.ndarray, source: Tensor) -> Any:
        """A matrix of float32 [rows, columns] that were computed from a tensor."""
        data = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
        shape = values.shape[0], values.shape[1]
        format = "f32" if self.quantize == "none" or shape[1] % GROUP_SIZE else "q8_0"
        if format != "f32":
            tensor = source._replace(format="f32", shape=shape)
            data = quantize_rows(data, tensor, format).reshape(-1)
        return self.backend.matrix(data, format, shape)

    def expert_biases(self, index: int) -> ExpertBiases | None:
        if not self.config.expert_biases:
            return None
        prefix = f"layers.{index}.experts_bias."
        return ExpertBiases(*(self.required(prefix + name) for name in ("gate", "up", "down")))

    def experts(self, index: int, store: ExpertStore) -> Any:
        """What a layer's experts, as `store` has them, are computed with."""
        biases = self.expert_biases(index)
        return prepared(self.backend, store.layouts(index), self.config, biases)

    def layer(self, index: int, store: ExpertStore | None) -> Layer:
        config, prefix = self.config, f"layers.{index}."
        attention = self.attention(index)
        norm = self.norm(prefix + "ffn_norm")
        if not config.is_sparse(index):
            weights = self.feed_forward(prefix + "ffn")
            return Layer(
                attention,
                feed_forward=self.backend.feed_forward_layer(weights, config, norm),
            )
        assert store is not None
        shared = None
        if config.shared_expert_size:
            weights = self.feed_forward(prefix + "shared")
            own_norm = self.norm(prefix + "shared.norm") if config.output_norms else None
            shared = self.backend.feed_forward_layer(weights, config, own_norm)
        return Layer(
            attention,
            self.backend.router_layer(self.router(index, norm), config),
            self.experts(index, store),
            shared,
            merge=self.merge(prefix) if config.output_norms else None,
        )

    def router(self, index: int, norm: np.ndarray) -> RouterWeights:
        prefix = f"layers.{index}.router"
        own_norm = self.vector(f"{prefix}_norm")
        if own_norm is not None:
            own_norm = own_norm * np.float32(self.config.hidden_size**-0.5)
        return RouterWeights(
            norm,
            self.steering(prefix),
            self.vector(f"{prefix}_correction"),
            own_norm,
            self.vector(f"{prefix}_scales"),
        )

    def merge(self, prefix: str) -> Any:
        scale = self.vector(prefix + "scale")
        weights = MergeWeights(
            self.norm(prefix + "shared.out_norm"),
            self.norm(prefix + "experts_out_norm"),
            self.norm(prefix + "ffn_out_norm"),
            1.0 if scale is None else float(scale[0]),
        )
        return self.backend.merge_layer(weights, self.config)

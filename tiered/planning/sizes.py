"""Sizes: how many bytes a model has, by purpose and layer, and how many of them a token needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from tiered.checkpoints.checkpoint import Checkpoint
from tiered.kv_cache import kv_bytes, state_bytes
from tiered.planning.shapes import Shape
from tiered.policies import Space
from tiered.store import ExpertStore
from tiered.weights.dense import dense_format, dense_tensors, matrix_bytes


class Recipe(NamedTuple):
    """Bits per weight, scales included, by kind of matrix: what a quantized file is made of."""

    attention: float
    experts: float
    head: float
    embed: float


# llama.cpp's mixtures, on average over a file; "int4" is what this project makes of float files.
RECIPES = {
    "int4": Recipe(8.5, 4.5, 16.0, 16.0),
    "q4_0": Recipe(4.5, 4.5, 6.5625, 4.5),
    "q4_k_m": Recipe(4.9, 4.85, 6.5625, 4.5),
    "q5_k_m": Recipe(5.7, 5.68, 6.5625, 5.5),
    "q6_k": Recipe(6.5625, 6.5625, 6.5625, 6.5625),
    "q8_0": Recipe(8.5, 8.5, 8.5, 8.5),
    "mxfp4": Recipe(8.5, 4.25, 8.5, 8.5),
    "f16": Recipe(16.0, 16.0, 16.0, 16.0),
}
ROUTER_BITS = 32


@dataclass(frozen=True)
class ModelSizes:
    """Bytes by purpose. Tuples have one number per layer; a dense layer has experts of 0 bytes."""

    name: str
    num_experts: int
    top_k: int
    attention: tuple[int, ...]  # attention, norms and router: read once per token
    shared: tuple[int, ...]  # shared expert, or the feed-forward of a dense layer
    experts: tuple[int, ...]  # one expert's blob
    embed: int  # one row of it is read per token
    head: int  # all of it is read per token; what is tied counts as embed in memory
    tied: bool
    kv_per_token: int  # keys and values of one token, all layers
    state: int  # what recurrent layers remember of a text, however long it is
    dense_values: int  # weights outside experts and embeddings that a token is multiplied with
    expert_values: int  # weights of one expert
    head_values: int
    attention_width: int  # of all query heads together
    context_length: int
    approximate: bool = False
    # Of all experts' blobs, if experts of one layer differ; `experts` then has their averages.
    largest: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.experts)

    @property
    def dense(self) -> int:
        """Bytes of everything that is not an expert."""
        return sum(self.attention) + sum(self.shared) + self.embed + (0 if self.tied else self.head)

    @property
    def all_experts(self) -> int:
        return self.num_experts * sum(self.experts)

    @property
    def total(self) -> int:
        return self.dense + self.all_experts

    @property
    def active_experts(self) -> int:
        """Bytes of experts that one token needs."""
        return self.top_k * sum(self.experts)

    @property
    def floor(self) -> int:
        """Bytes of the experts that one layer needs at once: less memory cannot work."""
        return self.top_k * max(self.largest, *self.experts)

    def in_slots(self, nbytes: int) -> int:
        """What experts fill of so many bytes of a card, whose slots are as large as the largest."""
        return nbytes * max(self.experts) // max(self.largest, *self.experts) if self.floor else 0

    def staged(self, ram: int, lockable: int) -> float:
        """Share of copies to a GPU that pass a buffer, from so many bytes of slots in RAM, of which
        so many can be page-locked: none are, where experts differ in size."""
        is_locked = not self.largest and len({*self.experts} - {0}) == 1
        return 1 - min(1.0, lockable / max(1, ram)) if is_locked else 1.0

    def kv(self, context: int) -> int:
        """Bytes that are kept of a text of `context` tokens."""
        return self.kv_per_token * context + self.state

    def space(self, capacity: int) -> Space:
        """What an eviction policy manages with `capacity` bytes for experts."""
        return Space(min(capacity, self.all_experts), self.experts)

    def with_top_k(self, top_k: int) -> ModelSizes:
        if not 1 <= top_k <= self.num_experts:
            raise ValueError(f"top_k is {top_k}, but {self.name} has {self.num_experts} experts")
        return replace(self, top_k=top_k)


def of_shape(shape: Shape, quant: str = "q4_0", kv_dtype: str = "f16") -> ModelSizes:
    """Sizes of a known model in a file of the given mixture. Raises ValueError for unknown ones."""
    if quant not in RECIPES:
        raise ValueError(f"unknown --quant {quant!r}; choose one of {', '.join(RECIPES)}")
    recipe, hidden = RECIPES[quant], shape.hidden_size
    sparse = [shape.is_sparse(layer) for layer in range(shape.num_layers)]
    expert_values = 3 * hidden * shape.expert_size
    widths = [shape.shared_expert_size if yes else shape.ffn_size for yes in sparse]
    shared_values = [3 * hidden * width for width in widths]
    attention = _bytes(shape.attention_weights, recipe.attention) + 8 * hidden
    router = _bytes(shape.num_experts * hidden, ROUTER_BITS)
    head = recipe.embed if shape.tied_embeddings else recipe.head
    kv_value = {"f16": 2.0, "f32": 4.0, "int8": 1.0 + 4 / shape.head_dim}[kv_dtype]
    return ModelSizes(
        name=shape.name,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        attention=tuple(attention + (router if yes else 0) for yes in sparse),
        shared=tuple(_bytes(values, recipe.attention) for values in shared_values),
        experts=tuple(_bytes(expert_values, recipe.experts) if yes else 0 for yes in sparse),
        embed=_bytes(shape.vocab_size * hidden, recipe.embed),
        head=_bytes(shape.vocab_size * hidden, head),
        tied=shape.tied_embeddings,
        kv_per_token=int(shape.kv_values_per_token * kv_value),
        state=4 * shape.state_values,
        dense_values=shape.num_layers * shape.attention_weights + sum(shared_values),
        expert_values=expert_values,
        head_values=shape.vocab_size * hidden,
        attention_width=shape.num_heads * shape.head_dim,
        context_length=shape.context_length,
        approximate=shape.approximate,
    )


def of_checkpoint(
    checkpoint: Checkpoint, quantize: str = "int4", kv_dtype: str = "f16"
) -> ModelSizes:
    """Sizes of a model on disk, from its headers, as the engine would hold it in memory."""
    config = checkpoint.config
    attention, shared = [0] * config.num_layers, [0] * config.num_layers
    dense_values = embed = head = 0
    for tensor in dense_tensors(checkpoint):
        nbytes = matrix_bytes(dense_format(tensor, quantize), tensor.shape)
        if tensor.name.startswith("layers."):
            layer, part = tensor.name.split(".", 2)[1:]
            is_feed_forward = part.startswith(("shared.", "ffn."))
            (shared if is_feed_forward else attention)[int(layer)] += nbytes
            dense_values += tensor.shape[0] * tensor.shape[-1] if len(tensor.shape) > 1 else 0
        elif tensor.name == "embed":
            embed = nbytes
        else:
            head += nbytes
    tied = "head" not in checkpoint.tensors
    with ExpertStore(checkpoint, quantize, readers=1) as store:
        # Of a mix by expert, the average: forecasts take a layer's experts to be alike.
        blobs = [nbytes // max(1, config.num_experts) for nbytes in store.layer_bytes]
        largest = max(store.blob_bytes) if store.is_mix else 0
    return ModelSizes(
        name=checkpoint.path.name,
        num_experts=config.num_experts,
        top_k=config.top_k,
        attention=tuple(attention),
        shared=tuple(shared),
        experts=tuple(blobs),
        largest=largest,
        embed=embed,
        head=embed if tied else head,
        tied=tied,
        kv_per_token=kv_bytes(config, 64, kv_dtype, num_states=0) // 64,
        state=state_bytes(config),
        dense_values=dense_values,
        expert_values=3 * config.hidden_size * config.expert_size,
        head_values=config.vocab_size * config.hidden_size,
        attention_width=config.num_heads * config.head_dim,
        context_length=config.context_length,
    )


def _bytes(num_values: int, bits: float) -> int:
    return int(num_values * bits / 8)

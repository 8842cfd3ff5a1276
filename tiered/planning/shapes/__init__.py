"""Shapes of known models: facts of their public config.json, for forecasts before a download.

A file may say `approximate = true`: its facts are good for a forecast, but not checked one by one.
"""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What decides how many bytes a model has, and how many a token needs."""

    name: str
    label: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_size: int
    ffn_size: int = 0  # of dense layers
    num_dense_layers: int = 0  # the first ones
    expert_layer_step: int = 1  # 2: every second layer has experts
    shared_expert_size: int = 0
    tied_embeddings: bool = False
    attention_values: int = 0  # weights of one layer's attention, on average; 0: from the heads
    kv_values: int = 0  # values that a token adds to the KV cache, all layers; 0: from the heads
    state_values: int = 0  # float32 values that recurrent layers remember of a text, all layers
    approximate: bool = False
    also: tuple[str, ...] = ()  # other models of this shape, but perhaps for the context

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention."""
        heads = self.num_heads + self.num_kv_heads  # q and o; k and v
        return self.attention_values or 2 * heads * self.head_dim * self.hidden_size

    @property
    def kv_values_per_token(self) -> int:
        return self.kv_values or 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def is_sparse(self, layer: int) -> bool:
        after = layer - self.num_dense_layers
        return after >= 0 and (after + 1) % self.expert_layer_step == 0


def names() -> list[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob("*.toml"))


def find(name: str) -> Shape:
    """A known model's shape. Raises ValueError that lists the known ones."""
    shapes = {known: _read(known) for known in ([name] if name in names() else names())}
    for known, shape in shapes.items():
        if name in (known, *shape.also):
            return shape
    listed = sorted({n for known, shape in shapes.items() for n in (known, *shape.also)})
    raise ValueError(f"no file and no known model {name!r}; known: {', '.join(listed)}")


def _read(name: str) -> Shape:
    path = Path(__file__).parent / f"{name}.toml"
    return from_dict(name, tomllib.loads(path.read_text(encoding="utf-8")))


def from_dict(name: str, values: dict[str, Any]) -> Shape:
    known = {field.name: field for field in fields(Shape) if field.name != "name"}
    if unknown := set(values) - set(known):
        raise ValueError(f"shape {name}: unknown key {min(unknown)!r}; known: {', '.join(known)}")
    for key, field in known.items():
        if key not in values and field.default is MISSING:
            raise ValueError(f"shape {name}: {key!r} is missing")
    return Shape(name, **values | {"also": tuple(values.get("also", ()))})

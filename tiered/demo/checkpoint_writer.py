"""Writing a Hugging Face folder whose tensors come one after the other: matrices in BF16, the few
vectors in F32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tiered.weights.dequantize import float32_to_bf16

Shapes = Mapping[str, tuple[int, ...]]


class SafetensorsWriter:
    """Writes `file` with tensors of the given shapes, in that order. Layout:
    https://huggingface.co/docs/safetensors."""

    def __init__(self, file: Path, shapes: Shapes) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shapes.items():
            dtype, value_bytes = ("BF16", 2) if len(shape) > 1 else ("F32", 4)
            end = offset + value_bytes * int(np.prod(shape))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 64)
        self._left = list(shapes.items())[::-1]
        self._out = file.open("wb")
        self._out.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, values: np.ndarray) -> None:
        """The next tensor, float32."""
        expected = self._left.pop()
        if (name, values.shape) != expected:
            raise AssertionError(f"{name} {values.shape} comes where {expected} should")
        self._out.write((float32_to_bf16(values) if values.ndim > 1 else values).data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._out.close()
        if kind is None and self._left:
            raise AssertionError(f"{len(self._left)} tensors were not written")


def mixtral_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """All tensors of a mixtral model with this config.json, with their Hugging Face names."""
    hidden, size = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q_size = head_dim * config["num_attention_heads"]
    kv_size = head_dim * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (q_size, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv_size, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv_size, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q_size)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes[f"{name}.w1.weight"] = (size, hidden)
            shapes[f"{name}.w3.weight"] = (size, hidden)
            shapes[f"{name}.w2.weight"] = (hidden, size)
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def mixtral_config(**facts: Any) -> dict[str, Any]:
    """config.json of a mixtral model; its embedding table is its output matrix, too."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        **facts,
    }

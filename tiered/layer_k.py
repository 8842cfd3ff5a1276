"""Tables of experts per token, layer by layer: small JSON files, for one shape of model.

    {"of": {"hidden_size": 576, "num_experts": 8, "top_k": 2}, "layer_k": {"0": 1, "1": 2}}

`layer_k` has every sparse layer; what else there is says how the table came about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiered.checkpoints.json_file import read_json
from tiered.config import ModelConfig
from tiered.weights.resume import write_whole

OF = "hidden_size", "num_experts", "top_k"  # facts that a model and its table have in common


def write_layer_k(
    path: Path, layer_k: Mapping[int, int], config: ModelConfig, about: Mapping[str, Any]
) -> None:
    """Write a table, which has its name only when it is complete. `about` is kept beside it."""
    of = {name: getattr(config, name) for name in OF}
    table = {"of": of, **about, "layer_k": {str(layer): k for layer, k in layer_k.items()}}
    write_whole(path, (json.dumps(table, indent=1) + "\n").encode())


def read_layer_k(path: Path, config: ModelConfig) -> dict[int, int]:
    """Experts per token by layer. ValueError if it is no table, or one of another model."""
    table = read_json(path)
    of, layer_k = table.get("of"), table.get("layer_k")
    if not isinstance(of, dict) or not isinstance(layer_k, dict):
        raise ValueError(f"{path} is no table of `tiered layer-k`")
    for name in OF:
        if of.get(name) != getattr(config, name):
            raise ValueError(
                f"{path} belongs to another model: its {name} is {of.get(name)}, and this model's "
                f"is {getattr(config, name)}; make one with `tiered layer-k`"
            )
    layers = [str(layer) for layer in config.sparse_layers]
    if sorted(layer_k) != sorted(layers):
        raise ValueError(
            f"{path} belongs to another model: it has {len(layer_k)} layers, and this model has "
            f"{len(layers)} with experts, or others"
        )
    for layer, k in layer_k.items():
        if type(k) is not int or not 1 <= k <= config.top_k:
            raise ValueError(f"{path}: layer {layer} has {k!r}, not 1 to {config.top_k} experts")
    return {int(layer): k for layer, k in layer_k.items()}

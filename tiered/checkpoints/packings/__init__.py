"""Quantized forms of Hugging Face checkpoints: one file each, named after `quant_method`.

A file has `join(stored, settings)`: the stored tensors, with those that together are one weight
replaced by it. `settings` is config.json's `quantization_config`.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.facts import Facts


def join(stored: list[Tensor], facts: Facts) -> list[Tensor]:
    """The weights of a checkpoint, quantized or not. CheckpointError for an unknown form."""
    if "quantization_config" not in facts:
        return stored
    settings = Facts(facts.mapping("quantization_config"), facts.source)
    method = settings.text("quant_method").replace("-", "_")
    known = [module.name for module in iter_modules(__path__)]
    if method not in known:
        raise CheckpointError(
            f"{facts.source}: the weights are quantized by {method!r}, which is not supported "
            f"(supported: {', '.join(known)}); take a GGUF file of this model, or its BF16 or "
            "F16 checkpoint"
        )
    joined: list[Tensor] = import_module(f"{__name__}.{method}").join(stored, settings)
    return joined

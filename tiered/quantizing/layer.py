"""The experts of one layer to fewer bits, by the method of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tiered.checkpoints.checkpoint import Checkpoint
from tiered.config import ModelConfig
from tiered.experts import LayerLayouts
from tiered.quantizing.inputs import Inputs, activated, expert_inputs
from tiered.quantizing.rewritten import ExpertFiles, Formats, Rewritten
from tiered.quantizing.rounding import round_gptq, round_nearest
from tiered.quantizing.scaling import (
    Pair,
    best_scale,
    divide_inputs,
    scales_inputs,
    scales_inside,
)
from tiered.quantizing.threads import expert_threads
from tiered.quantizing.walk import Given
from tiered.store import PROJECTIONS
from tiered.weights.dequantize import dequantize

SCALED_TOGETHER = 8  # experts that a layer's scale is chosen for: the ones used most


class Method(NamedTuple):
    """How a matrix (float32 [rows, columns]) becomes bytes of a format, with what went into it;
    `scaled`: after activation-aware scaling."""

    round: Callable[[np.ndarray, str, Inputs], np.ndarray]
    scaled: bool = False


def _weighted(values: np.ndarray, format: str, inputs: Inputs) -> np.ndarray:
    return round_nearest(values, format, inputs.importance)


def _gptq(values: np.ndarray, format: str, inputs: Inputs) -> np.ndarray:
    return round_gptq(values, format, inputs.hessian)


METHODS: Mapping[str, Method] = {
    "gptq": Method(_gptq),
    "awq": Method(_weighted, scaled=True),
    "awq+gptq": Method(_gptq, scaled=True),
    "weighted": Method(_weighted),
}


class Expert(NamedTuple):
    """float32 matrices of one expert, and the biases of gate and up (0 without)."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray | float
    up_bias: np.ndarray | float


def read_expert(checkpoint: Checkpoint, layer: int, expert: int) -> Expert:
    prefix = f"layers.{layer}.experts.{expert}."
    biases: list[np.ndarray | float] = [0.0, 0.0]
    if checkpoint.config.expert_biases:
        names = (f"layers.{layer}.experts_bias.{name}" for name in ("gate", "up"))
        biases = [checkpoint.float32(name)[expert] for name in names]
    return Expert(*(checkpoint.float32(prefix + name) for name in PROJECTIONS), *biases)


def round_layer(
    checkpoint: Rewritten,
    layer: int,
    files: ExpertFiles,
    given: Given,
    method: Method,
    fewest: int,
    num_threads: int,
) -> np.ndarray:
    """Fill `files` with the layer's experts. Returns how many tokens each was routed (int64
    [num_experts]). With a scaled method, norm, router and shared expert change, too."""
    config, source = checkpoint.config, checkpoint.original
    scale = np.ones(config.hidden_size, np.float32)
    if method.scaled and scales_inputs(config):
        scale = layer_scale(source, layer, given, files.layouts, fewest)
        divide_inputs(checkpoint, layer, scale)

    def quantize(number: int) -> int:
        inputs, num_own = expert_inputs(given, number, fewest)
        expert = read_expert(source, layer, number)
        expert = expert._replace(gate=expert.gate * scale, up=expert.up * scale)
        gate, up, down = (tensor.format for tensor in files.layouts.layout(number))
        formats, scaled = (gate, up, down), inputs.divided(scale)
        files.write(number, round_expert(config, expert, formats, scaled, method))
        return num_own

    with expert_threads(num_threads) as pool:
        return np.array(list(pool.map(quantize, range(config.num_experts))))


def round_layer_plainly(
    checkpoint: Rewritten, layer: int, files: ExpertFiles, num_threads: int
) -> None:
    """Fill `files` without any inputs: all columns are alike."""

    def quantize(number: int) -> None:
        gate, up, down, *_ = read_expert(checkpoint.original, layer, number)
        targets = zip((gate, up, down), files.layouts.layout(number), strict=True)
        data = [
            round_nearest(values, target.format, np.ones(values.shape[1], np.float32))
            for values, target in targets
        ]
        files.write(number, data)

    with expert_threads(num_threads) as pool:
        list(pool.map(quantize, range(checkpoint.config.num_experts)))


def round_expert(
    config: ModelConfig, expert: Expert, formats: Formats, inputs: Inputs, method: Method
) -> list[np.ndarray]:
    """Bytes of gate, up and down. `down` is rounded for what the rounded others make of the
    inputs."""
    up, down = expert.up, expert.down
    if method.scaled and scales_inside(config):
        exact = inside(config, expert, expert.gate, up, inputs)
        scale = best_scale([(down, exact)], formats[2])
        up, down = up / scale[:, None], down * scale
    data = [
        method.round(values, format, inputs)
        for values, format in ((expert.gate, formats[0]), (up, formats[1]))
    ]
    gate, up = (
        dequantize(part.reshape(-1), format, up.shape)
        for part, format in zip(data, formats, strict=False)
    )
    data.append(method.round(down, formats[2], inside(config, expert, gate, up, inputs)))
    return data


def inside(
    config: ModelConfig, expert: Expert, gate: np.ndarray, up: np.ndarray, inputs: Inputs
) -> Inputs:
    """What goes into `down`, with these matrices in the place of the expert's own."""
    gates, ups = inputs.rows @ gate.T + expert.gate_bias, inputs.rows @ up.T + expert.up_bias
    return Inputs(activated(config, gates, ups), inputs.weights)


def layer_scale(
    checkpoint: Checkpoint, layer: int, given: Given, layouts: LayerLayouts, fewest: int
) -> np.ndarray:
    """What the inputs of a layer's experts are best divided by, if all had the format of the one
    that is used most: float32 [hidden_size]."""
    counts = np.bincount(given.experts, minlength=checkpoint.config.num_experts)
    most_used = np.argsort(-counts, kind="stable")[:SCALED_TOGETHER].tolist()
    format = layouts.layout(most_used[0]).gate.format
    pairs: list[Pair] = []
    for number in most_used:
        expert, (inputs, _) = (
            read_expert(checkpoint, layer, number),
            expert_inputs(given, number, fewest),
        )
        pairs += [(expert.gate, inputs), (expert.up, inputs)]
    return best_scale(pairs, format)

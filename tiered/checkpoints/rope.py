"""Rotary embedding facts: what a checkpoint says, as factors per frequency.

Linear scaling divides all positions; llama-3 (arXiv 2407.21783) only those of long wavelengths;
YaRN (arXiv 2309.00071) blends by wavelength and scales the magnitude. LongRoPE (arXiv 2402.13753)
has a list of divisors for short contexts and one for long ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tiered.checkpoints.checkpoint import CheckpointError
from tiered.checkpoints.facts import Facts
from tiered.config import NO_ROTATION, RopeConfig

MOST_SCALE = 2 * NO_ROTATION


def rope_from_hf(facts: Facts, head_dim: int, context_length: int, theta: float) -> RopeConfig:
    """From config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` of older files."""
    values: Mapping[str, Any] = facts.find("rope_parameters", "rope_scaling", default={})
    if not isinstance(values, Mapping):
        raise facts.error("rope_parameters", values, "an object")
    inner = Facts(values, facts.source)
    theta = inner.number("rope_theta", default=facts.number("rope_theta", default=theta))
    fraction = facts.number("partial_rotary_factor", default=1.0)
    fraction = inner.number("partial_rotary_factor", default=fraction)
    dim = _checked_dim(facts, theta, int(head_dim * fraction), head_dim)
    kind = inner.text("rope_type", "type", default="default")
    if kind in ("default", "dynamic"):  # dynamic only differs beyond the trained context
        return RopeConfig(theta, dim)
    if kind == "proportional":  # of the whole head, some pairs rotate as if all did
        rotating = np.arange(head_dim // 2) < int(fraction * head_dim // 2)
        scale = np.where(rotating, inner.number("factor", default=1.0), NO_ROTATION)
        return RopeConfig(theta, head_dim, "half", _floats(scale))
    if kind in ("longrope", "su"):
        return _longrope_from_hf(facts, inner, theta, dim, context_length)
    factor = inner.number("factor")
    original = inner.number("original_max_position_embeddings", default=context_length)
    if kind == "linear":
        return RopeConfig(theta, dim, "half", _floats(np.full(dim // 2, factor)))
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        scale = _llama3(_frequencies(theta, dim), factor, low, high, original)
        return RopeConfig(theta, dim, "half", _floats(scale))
    if kind == "yarn":
        fast = inner.number("beta_fast", default=32.0)
        slow = inner.number("beta_slow", default=1.0)
        scale = _yarn(
            theta, dim, factor, fast, slow, original, inner.flag("truncate", default=True)
        )
        mscale = inner.number("mscale", default=0.0), inner.number("mscale_all_dim", default=0.0)
        magnitude = _magnitude(factor)
        if all(mscale):
            magnitude = _magnitude(factor, mscale[0]) / _magnitude(factor, mscale[1])
        magnitude = inner.number("attention_factor", default=magnitude)
        return RopeConfig(theta, dim, "half", _floats(scale), magnitude)
    known = "default, linear, dynamic, llama3, yarn, longrope or proportional"
    raise facts.error("rope_type", kind, known)


def _longrope_from_hf(
    facts: Facts, inner: Facts, theta: float, dim: int, context_length: int
) -> RopeConfig:
    """Older files have the context that was trained first outside of `rope_scaling`."""
    name = "original_max_position_embeddings"
    original = inner.integer(name, default=facts.integer(name, default=context_length))
    if original < 2:
        raise inner.error(name, original, "at least 2")
    short, long = inner.numbers("short_factor"), inner.numbers("long_factor")
    for name, factors in ("short_factor", short), ("long_factor", long):
        if len(factors) != dim // 2:
            raise inner.error(name, list(factors), f"{dim // 2} numbers")
    factor = inner.number("factor", default=context_length / original)
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    magnitude = inner.number("attention_factor", default=magnitude)
    return RopeConfig(
        theta,
        dim,
        "half",
        _floats(np.array(short)),
        inner.number("short_mscale", default=magnitude),
        original,
        _floats(np.array(long)),
        inner.number("long_mscale", default=magnitude),
    )


def score_magnitude_from_hf(facts: Facts) -> float:
    """DeepSeek's YaRN also scales what does not rotate: queries and keys by this, each."""
    values: Mapping[str, Any] = facts.find("rope_parameters", "rope_scaling", default={})
    inner = Facts(values if isinstance(values, Mapping) else {}, facts.source)
    if inner.text("rope_type", "type", default="default") == "default":
        return 1.0
    slope = inner.number("mscale_all_dim", default=0.0)
    return _magnitude(inner.number("factor", default=1.0), slope) if slope else 1.0


def rope_from_gguf(
    facts: Facts, head_dim: int, context_length: int, pairs: str, truncate: bool = True
) -> RopeConfig:
    """From GGUF's `rope.*` keys. Llama-3 factors are a tensor there, applied by the format."""
    theta = facts.number("rope.freq_base", default=10_000.0)
    dim = facts.integer("rope.dimension_count", default=head_dim, maximum=2**16)
    dim = _checked_dim(facts, theta, dim, head_dim)
    kind = facts.text("rope.scaling.type", default="linear")
    factor = facts.number("rope.scaling.factor", "rope.scale_linear", default=1.0)
    if kind == "none" or factor in (0.0, 1.0):
        return RopeConfig(theta, dim, pairs)
    if kind == "linear":
        return RopeConfig(theta, dim, pairs, _floats(np.full(dim // 2, factor)))
    if kind == "yarn":
        fast = facts.number("rope.scaling.yarn_beta_fast", default=32.0)
        slow = facts.number("rope.scaling.yarn_beta_slow", default=1.0)
        original = facts.number("rope.scaling.original_context_length", default=context_length)
        scale = _yarn(theta, dim, factor, fast, slow, original, truncate)
        magnitude = _magnitude(factor)
        magnitude *= facts.number("rope.scaling.attn_factor", default=1.0)
        return RopeConfig(theta, dim, pairs, _floats(scale), magnitude)
    raise facts.error("rope.scaling.type", kind, "none, linear or yarn")


def _checked_dim(facts: Facts, theta: float, dim: int, head_dim: int) -> int:
    if theta <= 0 or dim % 2 or not 0 < dim <= head_dim:
        raise CheckpointError(
            f"{facts.source}: rotary embedding of {dim} values with theta {theta} does not suit "
            f"heads of {head_dim}"
        )
    return dim


def _floats(values: np.ndarray) -> tuple[float, ...]:
    if not ((values > 0) & (values <= MOST_SCALE)).all():
        raise ValueError("the scaling of the rotary embedding must be positive")
    return tuple(float(value) for value in values)


def _frequencies(theta: float, dim: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, dim, 2) / dim)


def _llama3(
    frequencies: np.ndarray, factor: float, low: float, high: float, original: float
) -> np.ndarray:
    """1 for wavelengths that fit `high` times into the old context, `factor` for long ones."""
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / max(high - low, 1e-6), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _yarn(
    theta: float,
    dim: int,
    factor: float,
    fast: float,
    slow: float,
    original: float,
    truncate: bool,
) -> np.ndarray:
    def dimension(rotations: float) -> float:
        """The (fractional) pair that turns so many times over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    scale: np.ndarray = 1 / (ramp / factor + (1 - ramp))
    return scale


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

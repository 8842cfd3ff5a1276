"""Float values to the bytes of every number format, plainly: for writing small GGUF files."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from cpu_kernels.groups import TABLES


def pack(values: np.ndarray, format: str) -> np.ndarray:
    """uint8 [rows, row_bytes] from float32 [rows, columns]."""
    if format == "f32":
        data = values.astype(np.float32)
    elif format == "f16":
        data = values.astype(np.float16)
    elif format == "bf16":
        data = bf16(values)
    elif format == "iq4_nl":
        data = _iq4_nl(values)
    elif format in _SUPER_BLOCKS:
        data = _SUPER_BLOCKS[format](values.reshape(-1, 256))
    else:
        data = quantize(values, GGMLQuantizationType[format.upper()])
    return np.ascontiguousarray(data).view(np.uint8).reshape(len(values), -1)


def bf16(values: np.ndarray) -> np.ndarray:
    """uint16: the upper half of a float32, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _scales(groups: np.ndarray, largest_code: float, largest_scale: int):
    """d [n, 1], integer scales [n, groups] and codes about zero [n, groups, size]."""
    step = np.abs(groups).max(axis=2) / largest_code
    d = np.maximum(step.max(axis=1, keepdims=True), 1e-8) / largest_scale
    scale = np.clip(np.ceil(step / d), 1, largest_scale)
    return d, scale.astype(np.uint8), np.rint(groups / (d * scale)[:, :, None])


def _six_bits(scale: np.ndarray) -> np.ndarray:
    """The 12 bytes of eight scales and eight equal minimums."""
    low, high = scale[:, :4], scale[:, 4:]
    first = (low & 63) | (high >> 4 << 6)
    return np.concatenate([first, first, (high & 15) | (high & 15) << 4], axis=1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, 128] from codes [n, 8, 32]: groups 2i and 2i + 1 share the bytes of a run."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(-1, 128)


def _q4_k(values: np.ndarray) -> np.ndarray:
    d, scale, codes = _scales(values.reshape(-1, 8, 32), 7.0, 63)
    codes = np.clip(codes + 8, 0, 15).astype(np.uint8)
    return np.concatenate([_half(d), _half(8 * d), _six_bits(scale), _nibbles(codes)], axis=1)


def _q5_k(values: np.ndarray) -> np.ndarray:
    d, scale, codes = _scales(values.reshape(-1, 8, 32), 15.0, 63)
    codes = np.clip(codes + 16, 0, 31).astype(np.uint8)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce((codes >> 4) << shifts, axis=1)
    parts = [_half(d), _half(16 * d), _six_bits(scale), high, _nibbles(codes & 15)]
    return np.concatenate(parts, axis=1)


def _q6_k(values: np.ndarray) -> np.ndarray:
    d, scale, codes = _scales(values.reshape(-1, 16, 16), 31.0, 127)
    codes = np.clip(codes + 32, 0, 63).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = codes & 15
    low = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = np.bitwise_or.reduce((codes >> 4) << shifts, axis=2).reshape(-1, 64)
    return np.concatenate([low, high, scale, _half(d)], axis=1)


def _iq4_nl(values: np.ndarray) -> np.ndarray:
    groups = values.reshape(-1, 32)
    d = np.maximum(np.abs(groups).max(axis=1, keepdims=True), 1e-8) / 113
    distances = np.abs((groups / d)[:, :, None] - np.array(TABLES["iq4_nl"]))
    codes = distances.argmin(axis=2).astype(np.uint8)
    return np.concatenate([_half(d), codes[:, :16] | codes[:, 16:] << 4], axis=1)


_SUPER_BLOCKS = {"q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}

"""Float values to the bytes of every number format, plainly: for writing small GGUF files."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from cpu_kernels.groups import LAYOUTS


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
    elif format == "nf4":
        data = _nf4(values)
    elif format == "int4_g128":
        data = _int4_g128(values)
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


def _quarters(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, 64] of codes [n, 8, 32] of two bits: four groups share the bytes of a run."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << shifts, axis=2).reshape(-1, 64)


def _q2_k(values: np.ndarray) -> np.ndarray:
    groups = values.reshape(-1, 16, 16)
    minimum = np.maximum(-groups.min(axis=2), 1e-8)
    step = np.maximum((groups.max(axis=2) + minimum) / 3, 1e-8)
    d, d_min = [x.max(axis=1, keepdims=True) / 15 for x in (step, minimum)]
    scale = np.clip(np.ceil(step / d), 1, 15).astype(np.uint8)
    offset = np.rint(minimum / d_min).astype(np.uint8)
    codes = (groups + (d_min * offset)[:, :, None]) / (d * scale)[:, :, None]
    codes = np.clip(np.rint(codes), 0, 3).astype(np.uint8)
    return np.concatenate([scale | offset << 4, _quarters(codes), _half(d), _half(d_min)], axis=1)


def _q3_k(values: np.ndarray) -> np.ndarray:
    d, scale, codes = _scales(values.reshape(-1, 16, 16), 3.0, 31)
    codes = np.clip(codes + 4, 0, 7).astype(np.uint8).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce((codes >> 2) << shifts, axis=1)
    scale = scale + 32
    low = (scale[:, :8] & 15) | (scale[:, 8:] & 15) << 4
    upper = (scale >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    upper = np.bitwise_or.reduce(upper, axis=1)
    return np.concatenate([high, _quarters(codes & 3), low, upper, _half(d)], axis=1)


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


def _nearest(scaled: np.ndarray, table: str = "iq4_nl") -> np.ndarray:
    """uint8 [n, 16] of values [n, 32] in units of a format's table."""
    distances = np.abs(scaled[:, :, None] - np.array(LAYOUTS[table].table))
    codes = distances.argmin(axis=2).astype(np.uint8)
    return codes[:, :16] | codes[:, 16:] << 4


def _nf4(values: np.ndarray) -> np.ndarray:
    blocks = values.reshape(-1, 64)
    d = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), 1e-8) / 112
    codes = _nearest((blocks / d).reshape(-1, 32), "nf4")
    return np.concatenate([_half(d), codes.reshape(-1, 32)], axis=1)


def _int4_g128(values: np.ndarray) -> np.ndarray:
    blocks = values.reshape(-1, 128)
    low = np.minimum(blocks.min(axis=1, keepdims=True), 0)
    d = np.maximum(blocks.max(axis=1, keepdims=True) - low, 1e-8) / 15
    zero = np.rint(-low / d)
    codes = np.clip(np.rint(blocks / d) + zero, 0, 15).astype(np.uint8).reshape(-1, 32)
    codes = (codes[:, :16] | codes[:, 16:] << 4).reshape(-1, 64)
    return np.concatenate([_half(d), _half(zero), codes], axis=1)


def _iq4_nl(values: np.ndarray) -> np.ndarray:
    groups = values.reshape(-1, 32)
    d = np.maximum(np.abs(groups).max(axis=1, keepdims=True), 1e-8) / 113
    return np.concatenate([_half(d), _nearest(groups / d)], axis=1)


def _iq4_xs(values: np.ndarray) -> np.ndarray:
    groups = values.reshape(-1, 8, 32)
    d, scale, _ = _scales(groups, 113.0, 31)
    codes = _nearest((groups / (d * scale)[:, :, None]).reshape(-1, 32)).reshape(-1, 128)
    scale = scale + 32
    low = (scale[:, 0::2] & 15) | (scale[:, 1::2] & 15) << 4
    high = np.bitwise_or.reduce(
        (scale >> 4).astype(np.uint16) << 2 * np.arange(8, dtype=np.uint16), axis=1
    )
    return np.concatenate([_half(d), high.view(np.uint8).reshape(-1, 2), low, codes], axis=1)


_SUPER_BLOCKS = {
    "iq4_xs": _iq4_xs,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}

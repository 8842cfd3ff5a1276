"""Weights of every number format as float32, in NumPy: for small tensors and for checks.

The blocks are ggml's (ggml-quants.c), and those that cpu_kernels.formats describes; cpu_kernels
computes with them directly.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.formats import FORMATS, NF4


def dequantize(data: np.ndarray, format: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 [*shape] from uint8 `data`; always a copy."""
    if format == "f32":
        return data.view(np.float32).reshape(shape).copy()
    if format == "f16":
        return data.view(np.float16).astype(np.float32).reshape(shape)
    if format == "bf16":
        return bf16_to_float32(data.view(np.uint16)).reshape(shape)
    values: np.ndarray = _BLOCKS[format](data.reshape(-1, FORMATS[format].block_bytes))
    return values.reshape(shape)


def bf16_to_float32(values: np.ndarray) -> np.ndarray:
    """float32 with the same bits in its upper half; `values` is uint16."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to the nearest, ties to even: uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def scales(data: np.ndarray, format: str) -> np.ndarray:
    """The scales of all blocks, float16 [num_blocks, 1 or 2], their zeros with them; of floats, the
    values. (mxfp4's are powers of two, as float32.)"""
    if FORMATS[format].is_float:
        return dequantize(data, format, (-1, 1))
    blocks = data.reshape(-1, FORMATS[format].block_bytes)
    if format == "mxfp4":
        return _mxfp4_scales(blocks[:, :1])
    start, stop = _SCALES[format]
    return np.ascontiguousarray(blocks[:, start:stop]).view(np.float16)


def is_finite(data: np.ndarray, format: str) -> bool:
    """Whether no weight is NaN or infinite: a damaged file shows itself in its scales first."""
    return bool(np.isfinite(scales(data, format)).all())


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of every block, as float32 [num_blocks, 1]."""
    column = np.ascontiguousarray(blocks[:, start : start + 2])
    return column.view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low halves of all bytes of a row, then the high halves: uint8 [..., 2 * num_bytes]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    codes: np.ndarray = np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    values: np.ndarray = codes * _half(blocks, 0)
    return values


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    values: np.ndarray = _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)
    return values


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """Bits 0 to 31 of the four bytes at `start`, each as the fifth bit of a byte."""
    bits = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    return bits << 4


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    values: np.ndarray = _half(blocks, 0) * (codes.astype(np.float32) - 16)
    return values


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    values: np.ndarray = _half(blocks, 0) * codes + _half(blocks, 2)
    return values


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    values: np.ndarray = _half(blocks, 0) * IQ4_NL[_nibbles(blocks[:, 2:])]
    return values


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    group = np.arange(8, dtype=np.uint16)
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> (2 * group) & 3
    low = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    scale = (low.reshape(-1, 8) | high << 4).astype(np.float32) - 32
    codes = _nibbles(blocks[:, 8:].reshape(-1, 8, 16))
    values: np.ndarray = (_half(blocks, 0) * scale)[:, :, None] * IQ4_NL[codes]
    return values


def _mxfp4_scales(exponents: np.ndarray) -> np.ndarray:
    """2^(exponent - 127), float32; 255 is not a number (OCP Microscaling Formats, 1.0)."""
    values = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    return np.where(exponents == 255, np.float32(np.nan), values)


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    values: np.ndarray = _mxfp4_scales(blocks[:, :1]) * E2M1[_nibbles(blocks[:, 1:])]
    return values


def _groups(packed: np.ndarray) -> np.ndarray:
    """Codes [num_blocks, block_size] of blocks of several groups, 16 bytes each."""
    return _nibbles(packed.reshape(len(packed), -1, 16)).reshape(len(packed), -1)


def _int4_g128(blocks: np.ndarray) -> np.ndarray:
    values: np.ndarray = _half(blocks, 0) * (_groups(blocks[:, 4:]) - _half(blocks, 2))
    return values


def _nf4(blocks: np.ndarray) -> np.ndarray:
    values: np.ndarray = _half(blocks, 0) * np.array(NF4, np.float32)[_groups(blocks[:, 2:])]
    return values


def _k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and minimums in the 12 bytes of q4_k and q5_k: float32 [n, 8, 1]."""
    low, high, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minimum = np.concatenate([high & 63, (rest >> 4) | (high >> 6 << 4)], axis=1)
    return scale.astype(np.float32)[:, :, None], minimum.astype(np.float32)[:, :, None]


def _k_values(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """d * scale * code - d_min * minimum for `codes` [n, 8, 32]."""
    scale, minimum = _k_scales(blocks[:, 4:16])
    d, d_min = _half(blocks, 0)[:, :, None], _half(blocks, 2)[:, :, None]
    values: np.ndarray = d * scale * codes - d_min * minimum
    return values


def _two_bits(packed: np.ndarray) -> np.ndarray:
    """Codes [n, 8, 32] of 64 bytes: each 32 of them hold four groups."""
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes: np.ndarray = packed.reshape(-1, 2, 1, 32) >> shift & 3
    return codes.reshape(-1, 8, 32)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    codes = _two_bits(blocks[:, 16:80]).reshape(-1, 16, 16)
    scale, minimum = blocks[:, :16] & 15, blocks[:, :16] >> 4
    d, d_min = _half(blocks, 80), _half(blocks, 82)
    values: np.ndarray = (d * scale)[:, :, None] * codes - (d_min * minimum)[:, :, None]
    return values


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    bit = np.arange(8, dtype=np.uint8)[:, None]
    high = (blocks[:, None, :32] >> bit & 1) << 2
    codes = (_two_bits(blocks[:, 32:96]) | high).reshape(-1, 16, 16).astype(np.float32) - 4
    low, rest = _nibbles(blocks[:, 96:104]), blocks[:, 104:108]
    upper = np.concatenate([rest >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = (low | upper << 4).astype(np.float32) - 32
    values: np.ndarray = (_half(blocks, 108) * scale)[:, :, None] * codes
    return values


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _k_values(blocks, codes)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    bit = np.arange(8, dtype=np.uint8)[:, None]
    high = (blocks[:, None, 16:48] >> bit) & 1  # bit j of byte i belongs to value i of group j
    return _k_values(blocks, low | (high << 4))


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift) & 3
    codes = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - 32
    scale = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    values: np.ndarray = (_half(blocks, 208) * scale)[:, :, None] * codes
    return values


IQ4_NL = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

_BLOCKS = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "iq4_nl": _iq4_nl,
    "mxfp4": _mxfp4,
    "iq4_xs": _iq4_xs,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "int4_g128": _int4_g128,
    "nf4": _nf4,
}

# Bytes [start, stop) of a block that hold its float16 scales.
_SCALES = {
    "q8_0": (0, 2),
    "q4_0": (0, 2),
    "q4_1": (0, 4),
    "q5_0": (0, 2),
    "q5_1": (0, 4),
    "iq4_nl": (0, 2),
    "iq4_xs": (0, 2),
    "q2_k": (80, 84),
    "q3_k": (108, 110),
    "q4_k": (0, 4),
    "q5_k": (0, 4),
    "q6_k": (208, 210),
    "int4_g128": (0, 4),
    "nf4": (0, 2),
}

"""Number formats, slow and obviously right: random blocks, and what they mean in float64."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from cpu_kernels.formats import FORMATS
from cpu_kernels.linear import FEW_ROWS

# Byte offsets of the float16 scales in a block.
HALVES = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "iq4_nl": [0],
    "iq4_xs": [0],
    "mxfp4": [],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
    "int4_g128": [0],
    "nf4": [0],
}


def random_matrix(rng, format, shape, scale=0.01):
    """uint8 [rows, row_bytes]: random bits, with scales of either sign around `scale`."""
    rows, columns = shape
    if FORMATS[format].is_float:
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        if format == "f16":
            values = values.astype(np.float16)
        elif format == "bf16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.view(np.uint8).reshape(rows, -1)
    blocks = columns // FORMATS[format].block_size
    data = rng.integers(0, 256, (rows, blocks, FORMATS[format].block_bytes), np.uint8)
    for offset in HALVES[format]:
        halves = rng.uniform(0.5, 1.5, (rows, blocks)) * scale
        halves = (halves * rng.choice([-1, 1], (rows, blocks))).astype(np.float16)
        data[:, :, offset : offset + 2] = halves.view(np.uint8).reshape(rows, blocks, 2)
    if format == "mxfp4":
        exponents = np.floor(np.log2(scale)) + rng.integers(0, 2, (rows, blocks)) + 127
        data[:, :, 0] = np.clip(exponents, 0, 254)
    elif format == "int4_g128":
        zeros = rng.integers(0, 17, (rows, blocks)).astype(np.float16)
        data[:, :, 2:4] = zeros.view(np.uint8).reshape(rows, blocks, 2)
    return data.reshape(rows, -1)


def to_float64(data, format, shape):
    """The weights [rows, columns] that rows of blocks stand for."""
    data = np.ascontiguousarray(data).reshape(shape[0], -1)
    if format == "bf16":
        values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif FORMATS[format].is_float:
        values = data.view({"f32": np.float32, "f16": np.float16}[format])
    elif format in _OURS:
        blocks = data.reshape(-1, FORMATS[format].block_bytes)
        values = np.array([_OURS[format](block) for block in blocks])
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            values = dequantize(data, GGMLQuantizationType[format.upper()])
    return values.reshape(shape).astype(np.float64)


def _codes(packed):
    """Of each 16 bytes, the lower halves, then the upper ones."""
    codes = []
    for start in range(0, len(packed), 16):
        codes += [byte & 15 for byte in packed[start : start + 16]]
        codes += [byte >> 4 for byte in packed[start : start + 16]]
    return np.array(codes)


def _int4_g128(block):
    scale, zero = block[:4].view(np.float16).astype(np.float64)
    return scale * (_codes(block[4:]) - zero)


# bitsandbytes' create_normal_map, to four digits: rounded to integers, they are the format's.
_NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
_NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]


def _nf4(block):
    return (
        block[:2].view(np.float16).astype(np.float64)
        * np.rint(112 * np.array(_NF4))[_codes(block[2:])]
    )


_OURS = {"int4_g128": _int4_g128, "nf4": _nf4}


def to_bfloat16(values):
    """The nearest bfloat16, of two that are as near the larger, as float64."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).view(np.float32).astype(np.float64)


def factors(data, format, shape, x, isa, exact=False):
    """float64 activations and weights as kernels multiply them, with the instructions `isa`."""
    weights = to_float64(data, format, shape)
    if exact or FORMATS[format].is_float:
        return x.astype(np.float64), weights
    if isa.has_tiles and len(x) > FEW_ROWS:
        return to_bfloat16(x), to_bfloat16(weights)
    return quantized_activations(x).astype(np.float64), weights


def quantized_activations(x):
    """float64 [n, k]: x as int8 groups of 32 with a scale each, as exact as a float16."""
    n, k = x.shape
    padded = np.zeros((n, -(-k // 32) * 32), np.float32)
    padded[:, :k] = x
    groups = padded.reshape(n, -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(
        np.float32(127), largest, out=np.zeros_like(largest), where=largest >= np.float32(1e-35)
    )
    integers = np.clip(np.rint(groups * inverse), -127, 127).astype(np.float64)
    fractions, exponents = np.frexp(largest / np.float32(127))
    scales = np.ldexp(np.rint(fractions.astype(np.float64) * 2048) / 2048, exponents)
    scales[largest < np.float32(1e-35)] = 0
    return (integers * scales).reshape(n, -1)[:, :k]


def quantize(values, format):
    """uint8 [num_blocks, block_bytes] of float32 values, as ggml-quants.c, QLoRA and GPTQ do it."""
    size = FORMATS[format].block_size
    blocks = np.empty((values.size // size, FORMATS[format].block_bytes), np.uint8)
    for block, group in zip(blocks, values.reshape(-1, size), strict=True):
        if format in _QUANTIZE:
            scales, codes = _QUANTIZE[format](group)
            halves = np.array(scales, np.float16).view(np.uint8)
            codes = codes.astype(np.uint8).reshape(-1, 2, 16)
            block[:] = np.concatenate([halves, (codes[:, 0] | codes[:, 1] << 4).reshape(-1)])
            continue
        peak = group[np.abs(group).argmax()]
        scale = peak / np.float32(-8) if format == "q4_0" else np.abs(peak) / np.float32(127)
        inverse = np.float32(0) if abs(scale) <= 1e-30 else np.float32(1) / scale
        scaled = group * inverse
        block[:2] = np.array([scale], np.float16).view(np.uint8)
        if format == "q4_0":
            codes = np.minimum(scaled + np.float32(8.5), 15).astype(np.uint8)
            block[2:] = codes[:16] | codes[16:] << 4
        else:
            codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
            block[2:] = codes.view(np.uint8)
    return blocks


def _inverse(scale):
    return np.float32(0) if scale <= np.float32(1e-30) else np.float32(1) / scale


def _quantize_nf4(group):
    scale = np.abs(group).max() / np.float32(112)
    table = np.rint(112 * np.array(_NF4)).astype(np.float32)
    return [scale], np.searchsorted((table[1:] + table[:-1]) / 2, group * _inverse(scale))


def _quantize_int4_g128(group):
    above, below = max(np.float32(0), group.max()), max(np.float32(0), (-group).max())
    scale = (above + below) / np.float32(15)
    zero = np.rint(below * _inverse(scale))
    return [scale, zero], np.minimum(group * _inverse(scale) + (zero + np.float32(0.5)), 15)


_QUANTIZE = {"nf4": _quantize_nf4, "int4_g128": _quantize_int4_g128}


def _e4m3(byte):
    """https://arxiv.org/abs/2209.05433, table 1."""
    sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
    if (exponent, fraction) == (15, 7):
        return float("nan")
    value = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


E4M3 = np.array([_e4m3(byte) for byte in range(256)])

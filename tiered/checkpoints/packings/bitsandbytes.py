"""bitsandbytes' NF4: X.weight, uint8 [rows * columns / 2, 1], the first of two values in the upper
half; X.weight.absmax [blocks of 64], float32, or codes of 8 bits in blocks of their own, with
X.weight.nested_absmax and nested_quant_map; X.weight.quant_map, the values of NF4; and
X.weight.quant_state.bitsandbytes__nf4, JSON in uint8: the shape, the sizes of blocks, and what was
taken off absmax before it was quantized.

Its values become those of our table, at most 0.0039 of a block's largest away.
https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py, QuantState.as_dict).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from cpu_kernels.formats import FORMATS, NF4
from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.json_file import parse_json
from tiered.checkpoints.quantized import Parts, check, floats, join_parts, nibbles, packed, take

PARTS = "quant_state", "weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map"
BLOCK = FORMATS["nf4"].block_size


class Nested(NamedTuple):
    """How absmax is quantized: quant_map[code] * absmax of its block + offset."""

    block: int
    offset: float


def join(stored: list[Tensor], settings: Facts) -> list[Tensor]:
    if not settings.flag("load_in_4bit", default=False):
        raise settings.error("load_in_4bit", False, "true: NF4 is what is read")
    if (kind := settings.text("bnb_4bit_quant_type", default="fp4")) != "nf4":
        raise settings.error("bnb_4bit_quant_type", kind, "'nf4'")
    return join_parts([_beside(tensor) for tensor in stored], PARTS, _weight)


def _beside(tensor: Tensor) -> Tensor:
    """X.weight.part as X.part."""
    module, found, part = tensor.name.partition(".weight.")
    return tensor._replace(name=f"{module}.{part.partition('.')[0]}") if found else tensor


def _weight(name: str, parts: Parts) -> Tensor:
    codes, absmax, stored_state = take(parts, "quant_state", "weight", "absmax", "quant_state")
    state = _read_state(stored_state)
    rows, columns = _shape(state)
    num_blocks, nbytes = rows * columns // BLOCK, rows * columns // 2
    check(codes, ("U8",), [(nbytes, 1), (1, nbytes)])
    pieces, nested = [codes, absmax], None
    if "nested_absmax" in parts:
        scales, table = take(parts, "quant_state", "nested_absmax", "nested_quant_map")
        nested = Nested(state.integer("nested_blocksize"), _offset(state))
        if not nested.block:
            raise state.error("nested_blocksize", 0, "at least 1")
        check(absmax, ("U8",), [(num_blocks,)])
        check(scales, ("f32",), [(-(-num_blocks // nested.block),)])
        check(table, ("f32",), [(256,)])
        pieces += [scales, table]
    else:
        check(absmax, ("f32",), [(num_blocks,)])
    unpack = partial(_unpack, nested)
    return packed(name, "nf4", (rows, columns), tuple(pieces), unpack)


def _read_state(tensor: Tensor) -> Facts:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        text = file.read(tensor.nbytes)
    if not any(text):  # as before a download
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} is empty: the weights are not all there, and "
            "shapes are among them"
        )
    return Facts(parse_json(text, tensor.file), tensor.file)


def _shape(state: Facts) -> tuple[int, int]:
    if (kind := state.text("quant_type")) != "nf4":
        raise state.error("quant_type", kind, "'nf4'")
    if (size := state.integer("blocksize")) != BLOCK:
        raise state.error("blocksize", size, f"{BLOCK}")
    shape = state.integers("shape")
    if len(shape) != 2 or min(shape) < 1 or shape[1] % BLOCK:
        raise state.error("shape", list(shape), f"rows and columns, these a multiple of {BLOCK}")
    return shape[0], shape[1]


def _offset(state: Facts) -> float:
    value = state.find("nested_offset")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise state.error("nested_offset", value, "a number")
    return float(value)


def _unpack(
    nested: Nested | None, data: np.ndarray, absmax: np.ndarray, *tables: np.ndarray
) -> np.ndarray:
    if nested is None:
        largest = floats(absmax, "f32", (-1,))
    else:
        scales, table = [floats(values, "f32", (-1,)) for values in tables]
        scale = np.repeat(scales, nested.block)[: len(absmax)]
        largest = table[absmax] * scale + np.float32(nested.offset)
    codes = np.stack([data >> 4, data & 15], axis=-1).reshape(-1, BLOCK)
    scale = (largest / NF4[-1]).astype(np.float16).reshape(-1, 1).view(np.uint8)
    return np.concatenate([scale, nibbles(codes).reshape(len(codes), -1)], axis=1).reshape(-1)

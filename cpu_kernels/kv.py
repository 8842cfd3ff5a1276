"""The memory of the KV cache: pages of keys and values, written and read by attention.

A page holds `page_size` tokens of one layer. Both products of attention read a head's memory in
order: it lies in panels of 16 columns (see cpu_kernels.tile), of 16 tokens' keys, [page_size / 16,
head_dim, 16], and of 16 of all tokens' values, [head_dim padded / 16, page_size, 16]. int8 has one
scale per token and head.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cpu_kernels.compiler import inner
from cpu_kernels.lanes import ELEMENT_BYTES, LANES, larger, store_value
from cpu_kernels.memory import store_f32, word
from cpu_kernels.record import Record, fields
from cpu_kernels.simd import emitted, f32
from cpu_kernels.tile import multiply_kernel

CHUNK = 256  # positions whose softmax is computed at once; pages divide it
DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
KINDS = tuple(DTYPES)  # a kind's number in records is its place here

KV = fields(
    "kind element_bytes keys values scales num_pages page_size num_heads head_dim padded_dim "
    "key_page value_page multiply"
)


def padded(head_dim: int) -> int:
    return -(-head_dim // LANES) * LANES


class KVPages:
    """Keys and values of `num_pages` pages in each layer; `shapes` has the number of heads, and of
    values in one, by layer.

    `dtype` is "f32", "f16" or "int8"; `page_size` must be a multiple of 16 that divides 256.
    """

    def __init__(
        self, shapes: Mapping[int, tuple[int, int]], num_pages: int, page_size: int, dtype: str
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"the KV cache is kept as f32, f16 or int8, not {dtype!r}")
        if page_size < LANES or CHUNK % page_size:
            raise ValueError(
                f"page_size must be {LANES} times a power of two, at most {CHUNK}, not {page_size}"
            )
        self.shapes = dict(shapes)
        self.num_pages, self.page_size, self.dtype = num_pages, page_size, dtype
        self.arrays = {layer: self._arrays(*shape) for layer, shape in self.shapes.items()}
        self.records = {layer: self._record(layer) for layer in self.shapes}

    def _arrays(self, num_heads: int, head_dim: int) -> dict[str, np.ndarray]:
        kind, page_size, blocks = self.dtype, self.page_size, (self.num_pages, num_heads)
        # Zeroed memory is not touched before it is used: a large context costs what is in it.
        return {
            "keys": np.zeros((*blocks, page_size * head_dim), DTYPES[kind]),
            "values": np.zeros((*blocks, page_size * padded(head_dim)), DTYPES[kind]),
            "scales": np.zeros((*blocks, 2, page_size) if kind == "int8" else 0, np.float32),
        }

    def _record(self, layer: int) -> Record:
        kind, size, page_size = self.dtype, ELEMENT_BYTES[self.dtype], self.page_size
        num_heads, head_dim = self.shapes[layer]
        return Record(
            KV,
            **self.arrays[layer],
            kind=KINDS.index(kind),
            element_bytes=size,
            num_pages=self.num_pages,
            page_size=page_size,
            num_heads=num_heads,
            head_dim=head_dim,
            padded_dim=padded(head_dim),
            key_page=head_dim * page_size * size,
            value_page=padded(head_dim) * page_size * size,
            multiply=multiply_kernel(kind),
        )

    @property
    def any_record(self) -> Record:
        """One that tells the sizes that all have."""
        return next(iter(self.records.values()))


@emitted("f32", "i64 i64")
def _largest(k, x, count):
    most = k.variable(k.constant(f32(1), 0.0))
    with k.loop(count) as i:
        most.set(larger(k, k.absolute(k.load(x + i * 4, f32(1))), most.get()))
    return most.get()


@emitted("void", "i64 i64 i64 i64 i64 f32")
def _store_head(k, kind, x, count, out, step, panel, factor):
    """Store `count` float32, times `factor`, as `kind`: `step` elements apart, and each 16 of them
    `panel` elements after those before."""
    with k.loop(count) as i:
        value = k.load(x + i * 4, f32(1)) * factor
        place = (i >> 4) * panel + (i & (LANES - 1)) * step
        store_value(k, kind, out + place * ELEMENT_BYTES[kind], value)


@inner
def _append_one(kv, x, out, step, panel, scale_at):
    """Write one token's head of keys or values where _store_head says."""
    kind, head_dim = word(kv, KV.kind), word(kv, KV.head_dim)
    if kind == 0:
        _store_head("f32", x, head_dim, out, step, panel, np.float32(1.0))
    elif kind == 1:
        _store_head("f16", x, head_dim, out, step, panel, np.float32(1.0))
    else:
        largest = _largest(x, head_dim)
        factor = np.float32(127.0) / largest if largest > np.float32(1e-30) else np.float32(0.0)
        store_f32(scale_at, 0, largest / np.float32(127.0))
        _store_head("int8", x, head_dim, out, step, panel, factor)


@inner
def append(kv, is_value, x, page, slot, head):
    """Keep the float32 [head_dim] at x as a token's key, or value, in a slot of a page."""
    page_size, num_heads = word(kv, KV.page_size), word(kv, KV.num_heads)
    size = word(kv, KV.element_bytes)
    block = page * num_heads + head
    scale_at = word(kv, KV.scales) + 4 * ((block * 2 + is_value) * page_size + slot)
    if is_value:
        out = word(kv, KV.values) + block * word(kv, KV.value_page)
        _append_one(kv, x, out + slot * LANES * size, 1, page_size * LANES, scale_at)
    else:
        out = word(kv, KV.keys) + block * word(kv, KV.key_page)
        place = slot // LANES * LANES * word(kv, KV.head_dim) + slot % LANES
        _append_one(kv, x, out + place * size, LANES, LANES * LANES, scale_at)

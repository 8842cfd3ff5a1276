"""Numbers in memory by address, for njit code: ops and kernels know arrays only by address."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cpu_kernels.simd import emitted, f32, i32, i64

_WORD = ir.IntType(64)
NUM_KERNEL_ARGUMENTS = 12


@emitted("i64", "i64 i64")
def word(k, address, index):
    """int64 number `index` of the record at `address`."""
    return k.load(address + index * 8, i64(1))


@emitted("i32", "i64 i64")
def load_i32(k, address, index):
    return k.load(address + index * 4, i32(1))


@emitted("f32", "i64 i64")
def load_f32(k, address, index):
    return k.load(address + index * 4, f32(1))


@emitted("void", "i64 i64 i64")
def store_word(k, address, index, value):
    k.store(address + index * 8, value)


@emitted("void", "i64 i64 f32")
def store_f32(k, address, index, value):
    k.store(address + index * 4, value)


@emitted("i64", "")
def stack(k, nbytes):
    """Address of room on the stack, aligned to 64 and not zeroed; `nbytes` as a literal string."""
    return k.stack(int(nbytes))


@intrinsic
def call_kernel(typingctx, function, arguments):
    """Call the kernel (see cpu_kernels.products) at address `function` with a tuple of int64."""

    def generate(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [_WORD] * NUM_KERNEL_ARGUMENTS)
        pointer = builder.inttoptr(values[0], kind.as_pointer())
        rest = [builder.extract_value(values[1], i) for i in range(NUM_KERNEL_ARGUMENTS)]
        builder.call(pointer, rest)
        return context.get_dummy_value()

    tuple_type = types.UniTuple(types.int64, NUM_KERNEL_ARGUMENTS)
    return types.void(types.int64, tuple_type), generate


def aligned_bytes(nbytes: int, alignment: int = 64) -> np.ndarray:
    """Zeroed uint8 [nbytes] that starts at a multiple of `alignment`."""
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]


def address_of(array: np.ndarray | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


def record(*words: Any) -> np.ndarray:
    """An int64 struct; whoever gets its address must keep it."""
    return np.array([int(w) for w in words], np.int64)

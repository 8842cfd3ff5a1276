"""Atomic int64 words in memory, reached by address, for the threads of a team."""

from __future__ import annotations

import os
import time

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.isa import is_arm

_WORD = ir.IntType(64)


def _pointer(builder, address):
    return builder.inttoptr(address, _WORD.as_pointer())


@intrinsic
def atomic_load(typingctx, address):
    """The word at `address`; later reads are not moved before it."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def atomic_store(typingctx, address, value):
    """Set the word at `address`; earlier writes are seen by whoever reads it."""

    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to the word at `address`; returns what it was before."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(builder, arguments[0])
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_exchange(typingctx, address, value):
    """Set the word at `address`; returns what it was before."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(builder, arguments[0])
        return builder.atomic_rmw("xchg", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a spin loop (nothing where it has no such hint)."""

    def generate(context, builder, signature, arguments):
        triple = builder.module.triple
        if triple.startswith(("x86_64", "i386", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
            builder.call(hint, [])
        elif is_arm(triple):
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint")
            builder.call(hint, [ir.Constant(ir.IntType(32), 1)])  # 1: yield
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_processor(typingctx):
    """Let another thread have this core (nothing on systems without sched_yield)."""

    def generate(context, builder, signature, arguments):
        if hasattr(os, "sched_yield"):
            kind = ir.FunctionType(ir.IntType(32), [])
            function = cgutils.get_or_insert_function(builder.module, kind, "sched_yield")
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def nanoseconds(typingctx):
    """A clock that goes on (0 on systems without clock_gettime)."""

    def generate(context, builder, signature, arguments):
        if not hasattr(time, "CLOCK_MONOTONIC"):
            return ir.Constant(_WORD, 0)
        place = cgutils.alloca_once(builder, ir.ArrayType(_WORD, 2))
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), place.type])
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(function, [ir.Constant(ir.IntType(32), time.CLOCK_MONOTONIC), place])
        seconds, rest = (builder.extract_value(builder.load(place), i) for i in range(2))
        return builder.add(builder.mul(seconds, ir.Constant(_WORD, 10**9)), rest)

    return types.int64(), generate


@intrinsic
def call_op(typingctx, function, record, thread, num_threads, team):
    """Call the op (see cpu_kernels.team) whose machine code is at address `function`."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [_WORD] * 4)
        pointer = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(pointer, arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate

"""Vector code inside Numba functions.

`@emitted` turns a Python function that writes LLVM instructions into something that njit code can
call. It runs while Numba compiles: Python loops unroll, Python lists hold registers, and arguments
that are literal strings in the caller choose the code that is written:

    @emitted("f32", "f32 i64")
    def add_first_two(k, format, scale, address):      # `format`: a str, when compiling
        pair = k.load(address, f32(2))                 # `scale`, `address`: values, when running
        return k.sum(pair * k.splat(scale, 2))

Floating-point operations happen in the order written (no fast-math), so results are reproducible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.isa import has_quick_streams

Type = ir.Type
I32, I64 = ir.IntType(32), ir.IntType(64)
SCALARS = {
    "i8": (types.int8, ir.IntType(8)),
    "i16": (types.int16, ir.IntType(16)),
    "i32": (types.int32, I32),
    "i64": (types.int64, I64),
    "f32": (types.float32, ir.FloatType()),
    "f64": (types.float64, ir.DoubleType()),
}


def _vector(scalar: Type) -> Callable[[int], Type]:
    return lambda lanes: scalar if lanes == 1 else ir.VectorType(scalar, lanes)


i1, i8, i16, i32, i64 = (_vector(ir.IntType(bits)) for bits in (1, 8, 16, 32, 64))
f16, f32, f64 = map(_vector, (ir.HalfType(), ir.FloatType(), ir.DoubleType()))


def _lanes(type: Type) -> int:
    return type.count if isinstance(type, ir.VectorType) else 1


def _element(type: Type) -> Type:
    return type.element if isinstance(type, ir.VectorType) else type


def _with_element(element: Type, like: Type) -> Type:
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


class Value:
    """A number or a vector of them in a register, with Python's operators.

    `>>` shifts zeros in; plain numbers on the right become constants of the left side's type.
    """

    def __init__(self, emitter: Emitter, value: ir.Value) -> None:
        self.k, self.ir = emitter, value

    @property
    def type(self) -> Type:
        return self.ir.type

    @property
    def lanes(self) -> int:
        return _lanes(self.type)

    @property
    def is_float(self) -> bool:
        return not isinstance(_element(self.type), ir.IntType)

    def _operate(self, name: str, other: Any) -> Value:
        right = other.ir if isinstance(other, Value) else self.k.constant(self.type, other).ir
        operation = ("f" + name) if self.is_float else name
        return Value(self.k, getattr(self.k.builder, operation)(self.ir, right))

    def __add__(self, other: Any) -> Value:
        return self._operate("add", other)

    def __sub__(self, other: Any) -> Value:
        return self._operate("sub", other)

    def __mul__(self, other: Any) -> Value:
        return self._operate("mul", other)

    def __truediv__(self, other: Any) -> Value:
        return self._operate("div", other)

    def __floordiv__(self, other: Any) -> Value:
        """Of integers that are not negative."""
        return self._operate("udiv", other)

    def __and__(self, other: Any) -> Value:
        return self._operate("and_", other)

    def __or__(self, other: Any) -> Value:
        return self._operate("or_", other)

    def __xor__(self, other: Any) -> Value:
        return self._operate("xor", other)

    def __lshift__(self, other: Any) -> Value:
        return self._operate("shl", other)

    def __rshift__(self, other: Any) -> Value:
        return self._operate("lshr", other)

    def compare(self, operator: str, other: Any) -> Value:
        """Signed or ordered comparison, e.g. `a.compare(">", 0)`: a mask for `Emitter.select`."""
        right = other.ir if isinstance(other, Value) else self.k.constant(self.type, other).ir
        compare = self.k.builder.fcmp_ordered if self.is_float else self.k.builder.icmp_signed
        return Value(self.k, compare(operator, self.ir, right))

    def cast(self, kind: str, element: Callable[[int], Type]) -> Value:
        """zext, sext, trunc, sitofp, uitofp, fptosi, fpext or fptrunc of every lane."""
        target = _with_element(element(1), self.type)
        return Value(self.k, getattr(self.k.builder, kind)(self.ir, target))

    def view(self, type: Type) -> Value:
        """The same bits as another type of the same size."""
        return Value(self.k, self.k.builder.bitcast(self.ir, type))

    def lane(self, index: int) -> Value:
        return Value(self.k, self.k.builder.extract_element(self.ir, I32(index)))


class Variable:
    """A value that changes in a loop; LLVM keeps it in a register."""

    def __init__(self, emitter: Emitter, initial: Value) -> None:
        self.k = emitter
        self.slot = cgutils.alloca_once(emitter.builder, initial.type)
        self.set(initial)

    def get(self) -> Value:
        return Value(self.k, self.k.builder.load(self.slot))

    def set(self, value: Value) -> None:
        self.k.builder.store(value.ir, self.slot)


class Emitter:
    """Writes instructions at the current place of the function that Numba is compiling."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    # -- memory: addresses are int64 values, of any alignment unless stated --

    def _pointer(self, address: Value, type: Type) -> ir.Value:
        return self.builder.inttoptr(address.ir, type.as_pointer())

    def pointer(self, address: Value) -> Value:
        """An address as LLVM's instructions want it."""
        return Value(self, self._pointer(address, ir.IntType(8)))

    def load(self, address: Value, type: Type, align: int = 1) -> Value:
        return Value(self, self.builder.load(self._pointer(address, type), align=align))

    def store(self, address: Value, value: Value, align: int = 1) -> None:
        self.builder.store(value.ir, self._pointer(address, value.type), align=align)

    def stack(self, nbytes: int) -> Value:
        """Address of `nbytes` bytes on the stack, aligned to 64; not zeroed."""
        # Not cgutils.alloca_once, which writes zeros: LLVM takes minutes for a large array of them.
        with self.builder.goto_entry_block():
            slot = self.builder.alloca(ir.ArrayType(ir.IntType(8), nbytes))
        slot.align = 64
        return Value(self, self.builder.ptrtoint(slot, I64))

    def prefetch(self, address: Value, keep: bool = True, level: int = 1) -> None:
        """Into the caches, from this level on. `keep=False`: used once, so that it should not push
        anything out of the outer ones, if the processor has such a way that is as quick."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        name = "llvm.prefetch.p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        pointer = self.builder.inttoptr(address.ir, byte)
        locality = 4 - level if keep or not has_quick_streams() else 0
        self.builder.call(function, [pointer, I32(0), I32(locality), I32(1)])  # read, data

    # -- vectors --

    def constant(self, type: Type, value: Any) -> Value:
        """One number for all lanes, or one for each."""
        if not isinstance(type, ir.VectorType):
            return Value(self, ir.Constant(type, value))
        values = list(value) if isinstance(value, Sequence) else [value] * type.count
        return Value(self, ir.Constant(type, [ir.Constant(type.element, v) for v in values]))

    def splat(self, scalar: Value, lanes: int) -> Value:
        if lanes == 1:
            return scalar
        type = ir.VectorType(scalar.type, lanes)
        one = self.builder.insert_element(ir.Constant(type, ir.Undefined), scalar.ir, I32(0))
        return self.shuffle(Value(self, one), mask=[0] * lanes)

    def shuffle(self, a: Value, b: Value | None = None, mask: Sequence[int] = ()) -> Value:
        """Lane i of the result is lane mask[i] of a followed by b."""
        second = ir.Constant(a.type, ir.Undefined) if b is None else b.ir
        lanes = ir.Constant(ir.VectorType(I32, len(mask)), [I32(m) for m in mask])
        return Value(self, self.builder.shuffle_vector(a.ir, second, lanes))

    def concatenate(self, parts: Sequence[Value]) -> Value:
        """Vectors of the same type, a power of two of them, one after the other."""
        parts = list(parts)
        while len(parts) > 1:
            mask = range(2 * parts[0].lanes)
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self.shuffle(a, b, mask) for a, b in pairs]
        return parts[0]

    def gather(self, scalars: Sequence[Value]) -> Value:
        value = ir.Constant(ir.VectorType(scalars[0].type, len(scalars)), ir.Undefined)
        for index, scalar in enumerate(scalars):
            value = self.builder.insert_element(value, scalar.ir, I32(index))
        return Value(self, value)

    def transpose(self, vectors: Sequence[Value]) -> list[Value]:
        """Four vectors of words, transposed in each four of their lanes."""
        a, b, c, d = vectors
        starts = range(0, a.lanes, 4)

        def interleave(low: Value, high: Value, chosen: Sequence[int]) -> Value:
            lanes = [i if i < 4 else low.lanes + i - 4 for i in chosen]
            return self.shuffle(low, high, [start + lane for start in starts for lane in lanes])

        pairs = [
            (interleave(a, b, chosen), interleave(c, d, chosen))
            for chosen in ((0, 4, 1, 5), (2, 6, 3, 7))
        ]
        return [
            interleave(*pair, chosen) for pair in pairs for chosen in ((0, 1, 4, 5), (2, 3, 6, 7))
        ]

    def transpose_square(self, vectors: Sequence[Value]) -> list[Value]:
        """Sixteen vectors of 16 words, transposed."""

        def quarters(a: Value, b: Value, chosen: Sequence[int]) -> Value:
            """Two quarters of a, then two of b."""
            starts = [4 * chosen[0], 4 * chosen[1], 16 + 4 * chosen[0], 16 + 4 * chosen[1]]
            return self.shuffle(a, b, [start + lane for start in starts for lane in range(4)])

        fours = [self.transpose(vectors[start : start + 4]) for start in range(0, 16, 4)]
        result = {}
        for column, (a, b, c, d) in enumerate(zip(*fours, strict=True)):
            for upper in (0, 1):
                chosen = (2 * upper, 2 * upper + 1)
                first, second = quarters(a, b, chosen), quarters(c, d, chosen)
                for odd in (0, 1):
                    row = 4 * (2 * upper + odd) + column
                    result[row] = quarters(first, second, (odd, 2 + odd))
        return [result[row] for row in range(16)]

    def select(self, mask: Value, a: Value, b: Value) -> Value:
        return Value(self, self.builder.select(mask.ir, a.ir, b.ir))

    def call(self, name: str, returns: Type, *arguments: Value) -> Value:
        """Call an LLVM intrinsic, or a function of the C library, by its full name."""
        kind = ir.FunctionType(returns, [a.type for a in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return Value(self, self.builder.call(function, [a.ir for a in arguments]))

    def keep_order(self, values: Sequence[Value]) -> list[Value]:
        """The same vectors, for x86: those of one call are computed before those of the next, as
        written. Nothing but an empty line of assembly, which LLVM does not look into."""
        types = [value.type for value in values]
        kind = ir.FunctionType(ir.LiteralStructType(types), types)
        constraints = ["=v"] * len(values) + [str(index) for index in range(len(values))]
        empty = ir.InlineAsm(kind, "", ",".join(constraints), side_effect=True)
        same = self.builder.call(empty, [value.ir for value in values])
        return [
            Value(self, self.builder.extract_value(same, index)) for index in range(len(values))
        ]

    def opaque(self, value: Value) -> Value:
        """The same integer, in a register: LLVM does not know what it was computed from."""
        kind = ir.FunctionType(value.type, [value.type])
        empty = ir.InlineAsm(kind, "", "=r,0")
        return Value(self, self.builder.call(empty, [value.ir]))

    def _overloaded(self, name: str, *arguments: Value) -> Value:
        type = arguments[0].type
        element = {"float": "f32", "half": "f16"}.get(str(_element(type)), str(_element(type)))
        suffix = f"v{type.count}{element}" if isinstance(type, ir.VectorType) else element
        return self.call(f"llvm.{name}.{suffix}", type, *arguments)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the processor has such an instruction."""
        return self._overloaded("fmuladd", a, b, c)

    def maximum(self, a: Value, b: Value) -> Value:
        """Of floats and signed integers; NaN if either is."""
        return self._overloaded("maximum" if a.is_float else "smax", a, b)

    def minimum(self, a: Value, b: Value) -> Value:
        return self._overloaded("minimum" if a.is_float else "smin", a, b)

    def absolute(self, a: Value) -> Value:
        return self._overloaded("fabs", a)

    def round(self, a: Value) -> Value:
        """To the nearest integer, halves to even."""
        return self._overloaded("roundeven", a)

    def _halve(self, a: Value, lanes: int, combine: Callable[[Value, Value], Value]) -> Value:
        while a.lanes > lanes:
            half = a.lanes // 2
            if half == 1:
                low, high = a.lane(0), a.lane(1)
            else:
                low = self.shuffle(a, mask=range(half))
                high = self.shuffle(a, mask=range(half, a.lanes))
            a = combine(low, high)
        return a

    def parts(self, a: Value, lanes: int) -> list[Value]:
        """The vector in pieces of so many lanes."""
        starts = range(0, a.lanes, lanes)
        return [self.shuffle(a, mask=range(start, start + lanes)) for start in starts]

    def sum(self, a: Value, lanes: int = 1) -> Value:
        """Upper half of the lanes added to lower half, until so many are left."""
        return self._halve(a, lanes, lambda low, high: low + high)

    def sums(self, vectors: Sequence[Value]) -> Value:
        """`sum` of each of as many vectors as they have lanes, with the same bits."""
        vectors, lanes = list(vectors), vectors[0].lanes
        while len(vectors) > 1:
            size = len(vectors)  # lanes of each sum; there are several in a vector
            low = [i for i in range(2 * lanes) if i % size < size // 2]
            high = [i + size // 2 for i in low]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.shuffle(a, b, low) + self.shuffle(a, b, high) for a, b in pairs]
        return vectors[0]

    def largest(self, a: Value, lanes: int = 1) -> Value:
        """The larger of each two in upper and lower half, until so many lanes are left."""
        return self._halve(a, lanes, self.maximum)

    # -- control --

    def function(self, name: str, write: Callable[..., None]) -> Callable[..., None]:
        """What `write(k, *values)` writes, int64 values, as a function of its own: LLVM spills what
        is needed around a loop rather than in it only if a function has little else."""
        count, module = write.__code__.co_argcount - 1, self.builder.module
        kind = ir.FunctionType(ir.VoidType(), [I64] * count)
        function = ir.Function(module, kind, module.get_unique_name(name))
        function.linkage = "internal"
        function.attributes.add("noinline")
        inner = Emitter(ir.IRBuilder(function.append_basic_block("entry")))
        write(inner, *[Value(inner, argument) for argument in function.args])
        inner.builder.ret_void()

        def call(*values: Value) -> None:
            self.builder.call(function, [value.ir for value in values])

        return call

    def variable(self, initial: Value) -> Variable:
        return Variable(self, initial)

    def integer(self, value: int) -> Value:
        return Value(self, I64(value))

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """`with k.loop(count) as i:` repeats what is written inside for i = 0 .. count - 1."""
        with cgutils.for_range(self.builder, count.ir, intp=I64) as loop:
            yield Value(self, loop.index)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.ir):
            yield


def emitted(returns: str, arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate `f(k, *strings, *values)`: see the head of this file.

    `returns` is "void" or one of SCALARS; `arguments` names the types of the values, in order.
    The caller passes literal strings (or strings of an enclosing function) and then the values.
    """
    kinds = [SCALARS[name][0] for name in arguments.split()]
    result = types.void if returns == "void" else SCALARS[returns][0]

    def decorate(function: Callable[..., Any]) -> Any:
        num_strings = function.__code__.co_argcount - 1 - len(kinds)

        def typing(typingctx: Any, *given: Any) -> Any:
            strings = given[:num_strings]
            if not all(isinstance(s, types.StringLiteral) for s in strings):
                return None

            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                emitter = Emitter(builder)
                values = [Value(emitter, v) for v in values[num_strings:]]
                answer = function(emitter, *[s.literal_value for s in strings], *values)
                return context.get_dummy_value() if returns == "void" else answer.ir

            return result(*strings, *kinds), generate

        # Numba asks a typing function for its parameters by name.
        names = ", ".join(function.__code__.co_varnames[1 : function.__code__.co_argcount])
        scope: dict[str, Any] = {"typing": typing}
        call = f"{function.__name__}(typingctx, {names}): return typing(typingctx, {names})"
        exec(f"def {call}", scope)
        named = scope[function.__name__]
        named.__doc__, named.__module__ = function.__doc__, function.__module__
        made = intrinsic(prefer_literal=True)(named)
        made.write = function  # as it is, for code that is written without Numba
        return made

    return decorate

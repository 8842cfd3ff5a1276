"""What instructions of other processors do, in plain vector code: kernels written with them then
run on any machine, slowly. Intel's manual (volume 2) says what each one does.

    with plain_instructions():
        code = cfunc(signature)(make_amx_gemm("amx_bf16", "q4_0"))

Never with `cache=True`: the true instructions would be looked for under the same name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from cpu_kernels.simd import Emitter, Value, f32, i8, i16, i32, i64

TILES, TILE_BYTES, LINE = 8, 1024, 64


def _dpbusd(k: Emitter, total: Value, weights: Value, x: Value) -> Value:
    """Unsigned times signed bytes, four of them added to each lane of 32 bits."""
    products = weights.cast("zext", i16) * x.cast("sext", i16)
    for byte in range(4):
        lanes = k.shuffle(products, mask=range(byte, products.lanes, 4))
        total = total + lanes.cast("sext", i32)
    return total


def _pshufb(k: Emitter, values: Value, codes: Value) -> Value:
    """Inside each 16 bytes: values[code & 15], or 0 where a code's highest bit is set."""
    result = k.constant(codes.type, 0)
    for code in range(16):
        mask = [lane // 16 * 16 + code for lane in range(values.lanes)]
        chosen = (codes & 0x8F).compare("==", code)
        result = k.select(chosen, k.shuffle(values, mask=mask), result)
    return result


def _permute(k: Emitter, values: Value, index: Value) -> Value:
    """The chosen lane of `values` for each of 32."""
    memory = k.stack(2 * values.lanes)
    k.store(memory, values)
    lanes = [(index.lane(i) & 31).cast("zext", i64) for i in range(index.lanes)]
    return k.gather([k.load(memory + lane * 2, i16(1)) for lane in lanes])


def _address(k: Emitter, pointer: Value) -> Value:
    return Value(k, k.builder.ptrtoint(pointer.ir, ir.IntType(64)))


class _Tile:
    """`memory` has 64 bytes of shapes, then the tiles."""

    def __init__(self, k: Emitter, memory: Value, number: Value) -> None:
        index = number.cast("zext", i64)
        self.start = memory + index * TILE_BYTES + LINE
        self.row_bytes = k.load(memory + index * 2 + 16, i16(1)).cast("zext", i64)
        self.rows = k.load(memory + index + 48, i8(1)).cast("zext", i64)

    def row(self, row: Value) -> Value:
        return self.start + row * LINE


def _copy(k: Emitter, source: Value, target: Value, count: Value) -> None:
    with k.loop(count) as i:
        k.store(target + i, k.load(source + i, i8(1)))


def _load_shapes(k: Emitter, memory: Value, pointer: Value) -> None:
    _copy(k, _address(k, pointer), memory, k.integer(LINE))


def _release(k: Emitter, memory: Value) -> None:
    """Shapes of no rows: what uses tiles after this does nothing."""
    k.store(memory, k.constant(i8(LINE), 0))


def _zero(k: Emitter, memory: Value, number: Value) -> None:
    tile = _Tile(k, memory, number)
    with k.loop(k.integer(TILE_BYTES // LINE)) as row:
        k.store(tile.row(row), k.constant(i8(LINE), 0))


def _load(k: Emitter, memory: Value, number: Value, pointer: Value, stride: Value) -> None:
    tile, address = _Tile(k, memory, number), _address(k, pointer)
    _zero(k, memory, number)
    with k.loop(tile.rows) as row:
        _copy(k, address + row * stride, tile.row(row), tile.row_bytes)


def _store(k: Emitter, memory: Value, number: Value, pointer: Value, stride: Value) -> None:
    tile, address = _Tile(k, memory, number), _address(k, pointer)
    with k.loop(tile.rows) as row:
        _copy(k, tile.row(row), address + row * stride, tile.row_bytes)


def _tdpbf16ps(k: Emitter, memory: Value, sums: Value, left: Value, right: Value) -> None:
    """bfloat16 of the left tile's rows times those of the right tile's columns: products of the
    first of each pair added in float32, those of the second, and both to the sums."""
    c, a, b = (_Tile(k, memory, number) for number in (sums, left, right))
    lanes = TILE_BYTES // LINE

    def halves(pairs: Value) -> list[Value]:
        words = [pairs << 16, pairs & -0x10000]
        return [word.view(f32(lanes)) for word in words]

    with k.loop(c.rows) as row:
        totals = [k.variable(k.constant(f32(lanes), 0.0)) for _ in range(2)]
        with k.loop(a.row_bytes >> 2) as step:
            x = halves(k.splat(k.load(a.row(row) + step * 4, i32(1)), lanes))
            w = halves(k.load(b.row(step), i32(lanes)))
            for total, x_half, w_half in zip(totals, x, w, strict=True):
                total.set(_fused(k, x_half, w_half, total.get()))
        added = totals[0].get() + totals[1].get()
        k.store(c.row(row), k.load(c.row(row), f32(lanes)) + added)


def _fused(k: Emitter, a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once."""
    return k.call(f"llvm.fma.v{a.lanes}f32", a.type, a, b, c)


_VECTORS = {
    "llvm.x86.avx512.vpdpbusd.512": _dpbusd,
    "llvm.x86.avx512.vpdpbusd.256": _dpbusd,
    "llvm.x86.avx512.pshuf.b.512": _pshufb,
    "llvm.x86.avx2.pshuf.b": _pshufb,
    "llvm.x86.avx512.permvar.hi.512": _permute,
}
_TILES = {
    "llvm.x86.ldtilecfg": _load_shapes,
    "llvm.x86.tilerelease": _release,
    "llvm.x86.tilezero": _zero,
    "llvm.x86.tileloadd64": _load,
    "llvm.x86.tilestored64": _store,
    "llvm.x86.tdpbf16ps": _tdpbf16ps,
}


def _call(k: Emitter, name: str, returns: ir.Type, arguments: list[Value]) -> Value:
    """Call a function that does what an instruction does. It is written once for a module: small
    code is quicker compiled."""
    module, plain_name = k.builder.module, "plain." + name
    if plain_name not in module.globals:
        kind = ir.FunctionType(returns, [argument.type for argument in arguments])
        function = ir.Function(module, kind, plain_name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inside = Emitter(ir.IRBuilder(function.append_basic_block("entry")))
        result = (_VECTORS | _TILES)[name](inside, *[Value(inside, a) for a in function.args])
        inside.builder.ret_void() if result is None else inside.builder.ret(result.ir)
    return Value(k, k.builder.call(module.globals[plain_name], [a.ir for a in arguments]))


def _tile_memory(k: Emitter) -> Value:
    """On the stack of the function that is being written."""
    function = k.builder.function
    if not hasattr(function, "tile_memory"):
        function.tile_memory = k.stack(LINE + TILES * TILE_BYTES)
    return function.tile_memory


@contextmanager
def plain_instructions() -> Iterator[None]:
    """Within, kernels are written without the instructions of the tables above."""
    call = Emitter.call

    def plainly(k: Emitter, name: str, returns: ir.Type, *arguments: Value) -> Value:
        if name in _TILES:
            return _call(k, name, returns, [_tile_memory(k), *arguments])
        if name in _VECTORS:
            return _call(k, name, returns, [*arguments])
        return call(k, name, returns, *arguments)

    Emitter.call = plainly
    try:
        yield
    finally:
        Emitter.call = call

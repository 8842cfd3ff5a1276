"""llama.cpp's own products: ggml, through ctypes, from the libraries that llama-cpp-python brings.

Runs as a process of its own (`python -m tiered.measuring.ggml_rates THREADS`), which prints a row
of JSON per rate: what ggml does not like ends the process that called it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.gguf_header import TENSOR_TYPES
from tiered.measuring.timing import NUM_ROWS, best_seconds, rate

TYPE_NUMBERS = {name: number for number, name in TENSOR_TYPES.items()}


class InitParams(ctypes.Structure):
    """ggml_init_params: bytes for the descriptions of tensors, where, and whether data is apart."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )  # fmt: skip


# ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h: what is returned, and what is taken.
POINTER, SIZE, INT, LONG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (POINTER, (InitParams,)),
    "ggml_free": (None, (POINTER,)),
    "ggml_tensor_overhead": (SIZE, ()),
    "ggml_graph_overhead_custom": (SIZE, (SIZE, ctypes.c_bool)),
    "ggml_type_name": (ctypes.c_char_p, (INT,)),
    "ggml_row_size": (SIZE, (INT, LONG)),
    "ggml_new_tensor_2d": (POINTER, (POINTER, INT, LONG, LONG)),
    "ggml_mul_mat": (POINTER, (POINTER, POINTER, POINTER)),
    "ggml_new_graph_custom": (POINTER, (POINTER, SIZE, ctypes.c_bool)),
    "ggml_build_forward_expand": (None, (POINTER, POINTER)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, (POINTER, POINTER)),
    "ggml_backend_buffer_free": (None, (POINTER,)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (POINTER,)),
    "ggml_backend_tensor_set": (None, (POINTER, POINTER, SIZE, SIZE)),
    "ggml_backend_tensor_get": (None, (POINTER, POINTER, SIZE, SIZE)),
    "ggml_backend_graph_compute": (INT, (POINTER, POINTER)),
    "ggml_backend_free": (None, (POINTER,)),
    "ggml_backend_get_device": (POINTER, (POINTER,)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (POINTER, POINTER)),
    "ggml_backend_reg_get_proc_address": (POINTER, (POINTER, ctypes.c_char_p)),
    "ggml_backend_cpu_buffer_type": (POINTER, ()),
    "ggml_backend_cpu_reg": (POINTER, ()),
    "ggml_backend_cpu_init": (POINTER, ()),
    "ggml_backend_cpu_set_n_threads": (None, (POINTER, INT)),
}


def library_folder() -> Path:
    """Where llama-cpp-python has its libraries. Raises RuntimeError if it is not installed."""
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("llama-cpp-python is not installed")
    return Path(spec.submodule_search_locations[0]) / "lib"


class Ggml:
    """ggml's functions, and a backend of so many threads. Raises RuntimeError that says what the
    libraries in `folder` lack."""

    def __init__(self, folder: Path, threads: int) -> None:
        libraries = [_load(folder, name) for name in ("ggml-base", "ggml-cpu")]
        for name, (result, arguments) in FUNCTIONS.items():
            function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if function is None:
                raise RuntimeError(f"the libraries in {folder} have no {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.backend = self.call("backend_cpu_init")
        self.call("backend_cpu_set_n_threads", self.backend, threads)

    def __enter__(self) -> Ggml:
        return self

    def __exit__(self, *_: object) -> None:
        self.call("backend_free", self.backend)

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self, f"ggml_{name}")(*arguments)

    def has(self, format: str) -> bool:
        """Whether this version has the format, under its number and with rows of the same size."""
        number, columns = TYPE_NUMBERS[format], 10 * FORMATS[format].block_size
        if (self.call("type_name", number) or b"").decode().lower() != format:
            return False
        size = self.call("row_size", number, columns)
        return bool(size == FORMATS[format].row_bytes(columns))

    def buffer_types(self) -> list[int]:
        """Where weights may lie: as they are; then where they are rearranged for this processor, as
        llama.cpp does when it loads a model, the best first."""
        plain = self.call("backend_cpu_buffer_type")
        address = self.call(
            "backend_reg_get_proc_address", self.call("backend_cpu_reg"),
            b"ggml_backend_dev_get_extra_bufts",
        )  # fmt: skip
        if not address:
            return [plain]
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)
        others = listed(self.call("backend_get_device", self.backend))
        found = [plain]
        while others and others[len(found) - 1]:
            found.append(others[len(found) - 1])
        return found


class Products:
    """`count` matrices [features, columns] of one format, and a graph of x times each of them.

    `weights` are the bytes of one matrix, `x` is float32 [num_rows, columns]. `is_possible` says
    whether ggml computes with the format in memory of this type; only then `fill` and `run`.
    """

    def __init__(
        self, ggml: Ggml, format: str, shape: tuple[int, int], count: int, num_rows: int,
        buffer_type: int,
    ) -> None:  # fmt: skip
        self.ggml, self.shape, self.num_rows = ggml, shape, num_rows
        features, columns = shape
        nbytes = (2 * count + 1) * ggml.call("tensor_overhead")
        nbytes += ggml.call("graph_overhead_custom", 2 * count + 1, False)
        self.context = context = ggml.call("init", InitParams(nbytes, None, True))
        number, f32 = TYPE_NUMBERS[format], TYPE_NUMBERS["f32"]
        self.matrices = [
            ggml.call("new_tensor_2d", context, number, columns, features) for _ in range(count)
        ]
        self.buffers = [ggml.call("backend_alloc_ctx_tensors_from_buft", context, buffer_type)]
        self.x = ggml.call("new_tensor_2d", context, f32, columns, num_rows)
        self.results = [ggml.call("mul_mat", context, matrix, self.x) for matrix in self.matrices]
        plain = ggml.call("backend_cpu_buffer_type")
        self.buffers.append(ggml.call("backend_alloc_ctx_tensors_from_buft", context, plain))
        self.graph = ggml.call("new_graph_custom", context, 2 * count + 1, False)
        for result in self.results:
            ggml.call("build_forward_expand", self.graph, result)
        device = ggml.call("backend_get_device", ggml.backend)
        self.is_possible = all(self.buffers) and ggml.call(
            "backend_dev_supports_op", device, self.results[0]
        )

    def __enter__(self) -> Products:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in filter(None, self.buffers):
            self.ggml.call("backend_buffer_free", buffer)
        self.ggml.call("free", self.context)

    def fill(self, weights: np.ndarray, x: np.ndarray) -> None:
        for tensor, values in (*((matrix, weights) for matrix in self.matrices), (self.x, x)):
            self.ggml.call("backend_tensor_set", tensor, values.ctypes.data, 0, values.nbytes)

    def run(self) -> None:
        if status := self.ggml.call("backend_graph_compute", self.ggml.backend, self.graph):
            raise RuntimeError(f"ggml could not compute: status {status}")

    def result(self, index: int) -> np.ndarray:
        """x times a matrix: float32 [num_rows, features]."""
        out = np.empty((self.num_rows, self.shape[0]), np.float32)
        self.ggml.call(
            "backend_tensor_get", self.results[index], out.ctypes.data, 0, out.nbytes
        )  # fmt: skip
        return out


def ggml_rates(folder: Path, threads: int) -> Iterator[dict[str, Any]]:
    """Rates of all formats that ggml has, at the shapes of `kernel_rates`: a row each; and a note
    for each that it lacks. Raises RuntimeError like Ggml."""
    with Ggml(folder, threads) as ggml:
        from cpu_kernels.bench import SHAPES  # compiles: not before it is known that ggml is there

        formats = [format for format in FORMATS.values() if format.is_ggmls]
        for format in formats:
            if not ggml.has(format.name):
                yield {"note": f"this version has no {format.name}"}
        for format, shape, buffer_type, num_rows in product(
            [format for format in formats if ggml.has(format.name)],
            *(SHAPES, ggml.buffer_types(), NUM_ROWS),
        ):
            size = shape[0] * format.row_bytes(shape[1])
            seconds = product_seconds(ggml, format.name, shape, size, num_rows, buffer_type)
            if seconds is not None:
                where = ggml.call("backend_buft_name", buffer_type).decode()
                name = f"ggml {format.name}" + (f" {where}" if where != "CPU" else "")
                yield rate(name, format.name, shape, threads, num_rows, size, seconds)


def product_seconds(
    ggml: Ggml, format: str, shape: tuple[int, int], size: int, num_rows: int, buffer_type: int
) -> float | None:
    """Best time of one product; None where ggml does not compute with such memory."""
    from cpu_kernels.bench import DECODE_BYTES, PREFILL_BYTES, random_weights

    count = max(1, (DECODE_BYTES if num_rows == 1 else PREFILL_BYTES) // size)
    with Products(ggml, format, shape, count, num_rows, buffer_type) as products:
        if not products.is_possible:
            return None
        x = np.random.default_rng(1).standard_normal((num_rows, shape[1]), np.float32)
        products.fill(random_weights(format, size), x)
        products.run()  # warms up
        return float(best_seconds([products.run]) / count)


def _load(folder: Path, name: str) -> ctypes.CDLL:
    file = next(iter(sorted(folder.glob(f"*{name}.*"))), None)
    if file is None:
        raise RuntimeError(f"{folder} has no library {name}")
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise RuntimeError(f"{file} cannot be loaded: {error}") from error


if __name__ == "__main__":
    try:
        for row in ggml_rates(library_folder(), int(sys.argv[1])):
            print("\n" + json.dumps(row), flush=True)  # on a line of its own: ggml writes, too
    except RuntimeError as error:
        sys.exit(str(error))

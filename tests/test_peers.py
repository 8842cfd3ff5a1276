"""Other libraries beside our kernels: what is measured is the product; what fails is left out."""

import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from naive import silu
from naive_formats import random_matrix, to_float64
from numpy.random import _common as some_library

from cpu_kernels.formats import FORMATS
from tiered.measuring.ggml_rates import TYPE_NUMBERS, Ggml, Products, library_folder
from tiered.measuring.kernel_report import side_by_side
from tiered.measuring.peers import rates_apart
from tiered.measuring.timing import rate

SHAPE = 24, 512
needs_ggml = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


def rounded_inputs(x, matrix):
    """How far results may be apart where each value of x was rounded to a step of 8 bits."""
    return np.abs(x).max(axis=1)[:, None] / 127 * np.abs(matrix).sum(axis=1)


@needs_ggml
@pytest.mark.parametrize("format", [name for name in FORMATS if FORMATS[name].is_ggmls])
def test_what_ggml_is_measured_with(format):
    rng = np.random.default_rng(0)
    weights, x = random_matrix(rng, format, SHAPE), rng.standard_normal((3, 512), np.float32)
    matrix = to_float64(weights, format, SHAPE)
    with Ggml(library_folder(), 2) as ggml:
        computed = 0
        for buffer_type in ggml.buffer_types():
            with Products(ggml, format, SHAPE, 2, 3, buffer_type) as products:
                if products.is_possible:
                    products.fill(weights, x)
                    products.run()
                    error = np.abs(products.result(1) - x @ matrix.T)
                    assert (error <= rounded_inputs(x, matrix)).all()
                    computed += 1
        assert computed


@needs_ggml
def test_a_format_that_another_version_has_otherwise(monkeypatch):
    with Ggml(library_folder(), 1) as ggml:
        assert ggml.has("q4_0")
        monkeypatch.setitem(FORMATS, "q4_0", FORMATS["q4_1"])
        assert not ggml.has("q4_0")
        monkeypatch.setitem(TYPE_NUMBERS, "q4_1", 4)  # was q4_2
        assert not ggml.has("q4_1")


@pytest.mark.skipif(find_spec("kt_kernel") is None, reason="kt-kernel is not installed")
def test_what_kt_kernel_is_measured_with():
    import kt_kernel

    from tiered.measuring.kt_rates import Experts, open_pool

    rng, count, size, hidden = np.random.default_rng(0), 2, 256, 512
    shapes = (count * size, hidden), (count * size, hidden), (count * hidden, size)
    weights = tuple(random_matrix(rng, "q8_0", shape).reshape(-1) for shape in shapes)
    x = rng.standard_normal((3, hidden), np.float32)
    pool = open_pool(kt_kernel.kt_kernel_ext, 2)
    experts = Experts(
        kt_kernel.kt_kernel_ext, pool, TYPE_NUMBERS["q8_0"], count, (size, hidden), weights, x
    )  # fmt: skip
    experts.run()
    gate, up, down = (
        to_float64(data, "q8_0", shape).reshape(count, -1, shape[1])
        for data, shape in zip(weights, shapes, strict=True)
    )
    expected = sum(
        silu(x @ gate[i].T) * (x @ up[i].T) @ down[i].T for i in range(count)
    )  # fmt: skip
    error = np.abs(experts.y - expected / count)
    assert error.max() < 0.02 * np.abs(expected).max()  # three products of 8-bit inputs


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder that libraries are imported from, also by processes that this one starts."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def measure(measured):
    return rates_apart(1, lambda doing, done, total: None, measured)


def test_libraries_that_lack_a_function(library):
    (library / "llama_cpp" / "lib").mkdir(parents=True)
    (library / "llama_cpp" / "__init__.py").touch()
    for name in ("libggml-base.so", "libggml-cpu.so"):
        shutil.copy(some_library.__file__, library / "llama_cpp" / "lib" / name)
    sys.modules.pop("llama_cpp", None)
    rows, notes = measure({"llama_cpp": "tiered.measuring.ggml_rates"})
    assert rows == []
    assert len(notes) == 1 and "left out" in notes[0] and "have no ggml_init" in notes[0]


@pytest.mark.parametrize("files", [[], ["libggml-base.so"], ["libggml-base.so", "libggml-cpu.so"]])
def test_libraries_that_are_none(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("no library")
    with pytest.raises(RuntimeError, match=r"has no library ggml-base|cannot be loaded"):
        Ggml(tmp_path, 1)


def test_what_was_measured_before_a_library_dies_is_kept(library):
    (library / "some_peer.py").touch()
    (library / "peer_rates.py").write_text(
        "import os\n"
        "print('hello')\n"
        'print(\'{"note": "no q8_0"}\\n{"format": "peer q4_0"}\', flush=True)\n'
        "os.write(2, b'assertion failed')\n"
        "os.abort()\n"
    )
    rows, notes = measure({"some_peer": "peer_rates"})
    assert rows == [{"format": "peer q4_0"}]
    assert notes == [
        "some_peer: no q8_0", "some_peer: left out from here on, code -6: assertion failed"
    ]  # fmt: skip


def test_libraries_that_are_not_there_are_not_spoken_of():
    assert measure({"no_such_library": "no_such_module"}) == ([], [])


def test_peers_stand_beside_our_format():
    def row(name, threads, num_rows):
        return rate(name, name.split()[-1], (768, 2048), threads, num_rows, 1000, 1.0)

    ours = [row(f, threads, n) for threads in (1, 2) for f in ("q4_0", "f32") for n in (1, 128)]
    peers = [row("ggml q4_0", 2, 1), row("ggml q4_0", 2, 128), row("numpy f32", "all", 1)]
    shown = side_by_side({"kernels": ours, "peers": peers})
    assert [(r["format"], r["rows"]) for r in shown[4:]] == [
        ("q4_0", 1), ("ggml q4_0", 1), ("q4_0", 128), ("ggml q4_0", 128), ("f32", 1),
        ("numpy f32", 1), ("f32", 128),
    ]  # fmt: skip
    assert shown[:4] == ours[:4]

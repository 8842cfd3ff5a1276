"""The cache of compiled kernels: where it is, two processes at once, nowhere to write."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPILE_TWO_VARIANTS = """
import sys
import numpy as np
from cpu_kernels import cache
from cpu_kernels.quantize import quantize_blocks
values = np.arange(32, dtype=np.float32)
for format in {formats}:
    quantize_blocks(values, "f32", format)
# Variants share a file name prefix: what was loaded must be what was asked for.
assert quantize_blocks(values, "f32", "q8_0")[0].shape == (1, 34)
assert quantize_blocks(values, "f32", "q4_0")[0][0, 2] & 15 == 8
print(cache.FOLDER)
print("numba.np.arraymath" in sys.modules)  # which Numba needs only to compile
"""


def start(cache_dir, formats):
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE_TWO_VARIANTS.format(formats=formats)],
        env=os.environ | {"TIERED_CACHE_DIR": str(cache_dir)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def result(process):
    """The cache's folder, and whether Numba got ready to compile."""
    folder, ready = process.communicate()[0].splitlines()
    assert process.returncode == 0
    return folder, ready == "True"


def test_two_processes_at_once(tmp_path):
    processes = [start(tmp_path, formats) for formats in (["q4_0", "q8_0"], ["q8_0", "q4_0"])]
    folders = {result(process)[0] for process in processes}
    (folder,) = folders
    assert Path(folder).parent == tmp_path
    assert list(Path(folder).rglob("*.nbc"))


def test_what_is_compiled_is_only_loaded(tmp_path):
    assert [result(start(tmp_path, ["q4_0"]))[1] for _ in range(2)] == [True, False]


def test_nowhere_to_write(tmp_path):
    file = tmp_path / "file"
    file.touch()  # not a folder, and cannot become one
    folder, _ = result(start(file, ["q4_0"]))
    assert Path(folder).is_dir()
    shutil.rmtree(folder)

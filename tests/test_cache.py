"""The cache of compiled kernels: where it is, two processes at once, nowhere to write."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPILE_TWO_VARIANTS = """
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
"""


def start(cache_dir, formats):
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE_TWO_VARIANTS.format(formats=formats)],
        env=os.environ | {"TIERED_CACHE_DIR": str(cache_dir)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once(tmp_path):
    processes = [start(tmp_path, formats) for formats in (["q4_0", "q8_0"], ["q8_0", "q4_0"])]
    folders = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (folder,) = folders
    assert Path(folder).parent == tmp_path
    assert list(Path(folder).rglob("*.nbc"))


def test_nowhere_to_write(tmp_path):
    file = tmp_path / "file"
    file.touch()  # not a folder, and cannot become one
    process = start(file, ["q4_0"])
    folder = process.communicate()[0].strip()
    assert process.returncode == 0
    assert Path(folder).is_dir()
    shutil.rmtree(folder)

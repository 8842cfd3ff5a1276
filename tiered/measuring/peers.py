"""What other libraries make of the same products on this machine, where they are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from tiered.measuring.timing import best_seconds, rate

Progress = Callable[[str, int, int], None]

# library: what measures it, in a process of its own: a library of another version may end it.
MEASURED_APART = {
    "llama_cpp": "tiered.measuring.ggml_rates",
    "kt_kernel": "tiered.measuring.kt_rates",
}


def rates_apart(
    threads: int, progress: Progress, measured: dict[str, str] = MEASURED_APART
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rates of the libraries that are installed, and what is to be said of what they lack."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for library, module in measured.items():
        for row in _rows_of(module, threads) if find_spec(library) else ():
            if "note" in row:
                notes.append(f"{library}: {row['note']}")
            else:
                rows.append(row)
                progress(row["format"], 1, 1)
    return rows, notes


def _rows_of(module: str, threads: int) -> Iterator[dict[str, Any]]:
    """What `module` prints, a row of JSON a line; and a note, if it did not come to its end."""
    said = "no reason given"
    with subprocess.Popen(
        [sys.executable, "-m", module, str(threads)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
                else:
                    said = line.strip() or said
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        yield {"note": f"left out from here on, code {process.returncode}: {said}"}


def dense_rates(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """float32 (and torch's bfloat16) products of the same shape, with the library's own threads."""
    rows = []
    for num_rows in (1, 128):
        x = np.ones((num_rows, shape[1]), np.float32)
        weights = [
            np.ones(shape, np.float32)
            for _ in range(max(1, (256 << 20) // (4 * shape[0] * shape[1])))
        ]
        size, dense = 4 * shape[0] * shape[1], (shape, "all", num_rows)
        seconds = best_seconds([partial(np.matmul, x, w.T) for w in weights]) / len(weights)
        rows.append(rate("numpy f32", "f32", *dense, size, seconds))
        if find_spec("torch") is None:
            continue
        torch = import_module("torch")  # control has no need of it: it is only measured here
        for name, beside, dtype in (
            ("torch float32", "f32", torch.float32),
            ("torch bfloat16", "bf16", torch.bfloat16),
        ):
            tensor = torch.from_numpy(x).to(dtype)
            many = [torch.from_numpy(w).to(dtype) for w in weights]
            with torch.inference_mode():
                seconds = best_seconds([partial(torch.matmul, tensor, w.T) for w in many])
            nbytes = size * dtype.itemsize // 4
            rows.append(rate(name, beside, *dense, nbytes, seconds / len(many)))
    return rows

"""Routing traces in CSV, as the public project BigMoeOnEdge writes them.

Columns: turn,phase,step,layer,slot,expert,weight,residency,expert_bytes; a row is one routed
expert. Prefill (phase 0) is one batch per layer, all tokens of the prompt together; decode
(phase 1) one batch per layer and token. `# layer=N expert_bytes=B` gives one expert's size.
"""

from __future__ import annotations

import gzip
import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tiered.experts import Routing
from tiered.tracing.trace import (
    LONG,
    PREFILL,
    Event,
    Fetched,
    KeyTable,
    LongTrace,
    Pass,
    Routed,
    Trace,
    TraceInfo,
)

if TYPE_CHECKING:
    from tiered.tracing.compiled import Records

FIRST = b"# route_trace"


def is_csv(path: Path) -> bool:
    try:
        return _read(path).startswith(FIRST)
    except (gzip.BadGzipFile, EOFError):
        return False


def read_csv(path: Path) -> Trace:
    """Raises ValueError if the file has no sizes, or a row that is not all numbers."""
    data = _read(path)
    first_row = re.search(rb"(?m)^\d", data)
    header = data[: first_row.start()].decode().splitlines() if first_row else []
    facts = dict(pair.split("=", 1) for line in header[1:2] for pair in line[2:].split())
    sizes = {}
    for line in header:
        if line.startswith("# layer="):
            fields = dict(pair.split("=", 1) for pair in line[2:].split())
            sizes[int(fields["layer"])] = int(fields["expert_bytes"])
    if not sizes:
        raise ValueError(f"{path} has no routed experts, or no `# layer=N expert_bytes=B` lines")
    is_long = len(data) >= LONG and {"n_expert", "n_expert_used"} <= facts.keys()
    rows = np.zeros((1, 7)) if is_long else _rows(path, data)
    info = TraceInfo(
        model=facts.get("model", path.name),
        num_experts=int(facts.get("n_expert", 1 + rows[:, 5].max())),
        top_k=int(facts.get("n_expert_used", 1 + rows[:, 4].max())),
        blob_bytes=tuple(sizes.get(layer, 0) for layer in range(max(sizes) + 1)),
    )
    if is_long:
        return LongTrace(
            info, lambda: _events(_rows(path, data), info), lambda: _records(path, data, info)
        )
    return Trace(info, _events(rows, info))


def _rows(path: Path, data: bytes) -> np.ndarray:
    """The numbers of each row, up to the weight: float64 [number of rows, 7]."""
    rows = [line.split(",") for line in data.decode().splitlines() if line[:1].isdigit()]
    try:
        return np.array([row[:7] for row in rows], np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: a row is not all numbers: {error}") from error


def _records(path: Path, data: bytes, info: TraceInfo) -> Records:
    """All rows at once, as integers."""
    from cpu_kernels import traces
    from tiered.tracing.compiled import Records

    parsed = traces.parse_csv(data, len(info.blob_bytes), info.num_experts, info.top_k)
    wrong = {
        traces.NO_NUMBER: "a row is not all numbers",
        traces.UNKNOWN_EXPERT: "a row names an expert that the model does not have",
        traces.NO_BATCH: f"a layer's rows are no multiple of {info.top_k} before this one",
    }.get(parsed.status)
    if wrong:
        row = data[parsed.at : parsed.at + 80].partition(b"\n")[0].decode(errors="replace")
        raise ValueError(f"{path}: {wrong}: {row}")
    return Records(info, parsed)


def _events(numbers: np.ndarray, info: TraceInfo) -> list[Event]:
    keys = KeyTable(len(info.blob_bytes), info.num_experts)
    routed = numbers[:, :6].astype(int).tolist()
    events: list[Event] = []
    at, last_pass = 0, None
    for (turn, phase, step, layer), batch in groupby(routed, _batch):
        if (turn, phase, step) != last_pass:
            last_pass = turn, phase, step
            events.append(Pass(phase))
        experts = [row[5] for row in batch]
        # A batch asks for each expert once; one that is routed again counts as used then.
        distinct = list(dict.fromkeys(reversed(experts)))[::-1]
        events.append(Fetched([keys(layer, expert) for expert in distinct], []))
        chosen = np.array(experts, np.int32).reshape(-1, info.top_k)
        weights = numbers[at : at + len(experts), 6].astype(np.float32)
        events.append(Routed(layer, Routing(chosen, weights.reshape(-1, info.top_k))))
        at += len(experts)
    return events


def _batch(row: list[int]) -> tuple[int, int, int, int]:
    """All tokens of a prompt are one batch, whatever their step."""
    turn, phase, step, layer = row[:4]
    return turn, phase, 0 if phase == PREFILL else step, layer


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data

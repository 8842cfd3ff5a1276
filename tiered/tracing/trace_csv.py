"""Routing traces in CSV, as the public project BigMoeOnEdge writes them.

Columns: turn,phase,step,layer,slot,expert,weight,residency,expert_bytes; a row is one routed
expert. Prefill (phase 0) is one batch per layer, all tokens of the prompt together; decode
(phase 1) one batch per layer and token. `# layer=N expert_bytes=B` gives one expert's size.
"""

from __future__ import annotations

import gzip
from itertools import groupby
from pathlib import Path

import numpy as np

from tiered.experts import Routing
from tiered.tracing.trace import PREFILL, Event, Fetched, KeyTable, Pass, Routed, Trace, TraceInfo

FIRST = b"# route_trace"


def is_csv(path: Path) -> bool:
    try:
        return _read(path).startswith(FIRST)
    except (gzip.BadGzipFile, EOFError):
        return False


def read_csv(path: Path) -> Trace:
    """Raises ValueError if the file has no sizes, or a row that is not all numbers."""
    lines = _read(path).decode().splitlines()
    facts = dict(pair.split("=", 1) for line in lines[1:2] for pair in line[2:].split())
    sizes = {}
    for line in lines:
        if line.startswith("# layer="):
            fields = dict(pair.split("=", 1) for pair in line[2:].split())
            sizes[int(fields["layer"])] = int(fields["expert_bytes"])
    rows = [line.split(",") for line in lines if line[:1].isdigit()]
    if not sizes or not rows:
        raise ValueError(f"{path} has no routed experts, or no `# layer=N expert_bytes=B` lines")
    try:
        numbers = np.array([row[:7] for row in rows], np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: a row is not all numbers: {error}") from error
    info = TraceInfo(
        model=facts.get("model", path.name),
        num_experts=int(facts.get("n_expert", 1 + numbers[:, 5].max())),
        top_k=int(facts.get("n_expert_used", 1 + numbers[:, 4].max())),
        blob_bytes=tuple(sizes.get(layer, 0) for layer in range(max(sizes) + 1)),
    )
    return Trace(info, _events(numbers, info))


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

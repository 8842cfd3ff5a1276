"""Traces: what the router chose and what the tier did about it, recorded while a model runs.

A trace file is a line `tiered-trace 1`, a line of JSON (`TraceInfo`), and records. A record is a
letter and little-endian numbers; "keys" are (layer u16, expert u16) each, a "routing" is
num_tokens u16, top_k u8, then experts u16 and weights f16, token by token.

    P  a forward pass begins       phase u8 (0 prefill, 1 decode)
    R  the router chose            layer u16, routing
    G  a guess for a later layer   layer u16, distance u8, routing
    F  a layer asked the tier      count u16, keys, then for each key u8: 1 if it was resident
    A  look-ahead asked the tier   limit u32, count u16, keys, count u16, keys given up unread
    D  a demanded read failed      1 key
    C  the fetch ended early       u16: only so many keys were looked up (a batch in pieces)

F, A, D and C in their order determine hits and misses: replaying them is exact. A record cut short
by a crash ends the trace.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiered.experts import ExpertKey, Routing
from tiered.policies import Space

if TYPE_CHECKING:
    from tiered.tracing.compiled import Records

MAGIC = b"tiered-trace 1\n"
LONG = 8 << 20  # bytes of a file: more are read by a compiled kernel, which takes a second to load
PREFILL, DECODE = 0, 1


@dataclass(frozen=True)
class TraceInfo:
    """What a trace was recorded from. `blob_bytes` and `mixes` as a Space has them."""

    model: str
    num_experts: int
    top_k: int
    blob_bytes: tuple[int, ...]
    policy: str = ""  # of the tier that was there; "": none
    capacity: int = 0  # bytes of that tier
    mixes: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def space(self, capacity: int) -> Space:
        """What a tier with so many bytes for these experts manages."""
        return Space(capacity, self.blob_bytes, self.mixes)


class Pass(NamedTuple):
    phase: int


class Routed(NamedTuple):
    layer: int
    routing: Routing


class Guessed(NamedTuple):
    layer: int
    distance: int
    routing: Routing


class Fetched(NamedTuple):
    keys: list[ExpertKey]
    resident: list[bool]
    num_asked: int | None = None  # it ended after so many keys; None: all


class Prefetched(NamedTuple):
    keys: list[ExpertKey]
    limit: int
    given_up: list[ExpertKey]


class Dropped(NamedTuple):
    key: ExpertKey


Event = Pass | Routed | Guessed | Fetched | Prefetched | Dropped


class Trace:
    """What was recorded, event by event."""

    def __init__(self, info: TraceInfo, events: list[Event]) -> None:
        self.info = info
        self.events = events

    @property
    def is_live(self) -> bool:
        """Recorded from a tier of ours, so that its hits can be reproduced exactly."""
        return self.info.capacity > 0

    @property
    def num_routed(self) -> int:
        """Routed experts: tokens times layers times top_k."""
        return sum(e.routing.experts.size for e in self.events if isinstance(e, Routed))

    @cached_property
    def records(self) -> Records:
        """The same as integers, for the compiled twin of a tier."""
        from tiered.tracing.compiled import records_of

        return records_of(self)


class LongTrace(Trace):
    """One whose events would take long to make: they are made only if somebody asks for them.

    So what is wrong with the file is found out when it is used.
    """

    def __init__(
        self,
        info: TraceInfo,
        read_events: Callable[[], list[Event]],
        read_records: Callable[[], Records],
    ) -> None:
        self.info = info
        self._read_events, self._read_records = read_events, read_records

    @cached_property
    def events(self) -> list[Event]:  # type: ignore[override]
        return self._read_events()

    @cached_property
    def records(self) -> Records:
        return self._read_records()

    @property
    def num_routed(self) -> int:
        num_routed: int = self.records.num_routed
        return num_routed


class TraceWriter:
    """Writes a trace: a tier's journal (`fetched`, `prefetched`, `dropped`, `cut_short`), and what
    the decoder says (`begin`, `record`, `guess`)."""

    def __init__(self, path: str | Path, info: TraceInfo) -> None:
        self._file = Path(path).open("wb", buffering=1 << 16)  # noqa: SIM115
        self._file.write(MAGIC + json.dumps(asdict(info)).encode() + b"\n")

    def begin(self, phase: int) -> None:
        """A forward pass begins: PREFILL or DECODE."""
        self._file.write(b"P" + bytes([phase]))

    def record(self, layer: int, positions: np.ndarray, routing: Routing) -> None:
        """What a layer's router chose for the tokens at `positions`."""
        self._file.write(b"R" + struct.pack("<H", layer) + _packed(routing))

    def guess(self, layer: int, distance: int, routing: Routing) -> None:
        """What `layer`'s router made of the hidden state `distance` layers before it."""
        self._file.write(b"G" + struct.pack("<HB", layer, distance) + _packed(routing))

    def fetched(self, keys: Sequence[ExpertKey], resident: Sequence[bool]) -> None:
        self._file.write(b"F" + _packed_keys(keys) + bytes(resident))

    def prefetched(
        self, keys: Sequence[ExpertKey], limit: int, given_up: Sequence[ExpertKey]
    ) -> None:
        limit = min(limit, 0xFFFFFFFF)
        self._file.write(
            b"A" + struct.pack("<I", limit) + _packed_keys(keys) + _packed_keys(given_up)
        )

    def dropped(self, key: ExpertKey) -> None:
        self._file.write(b"D" + struct.pack("<HH", *key))

    def cut_short(self, num_asked: int) -> None:
        self._file.write(b"C" + struct.pack("<H", num_asked))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_trace(path: str | Path) -> Trace:
    """A trace file of ours, or one in the CSV form of BigMoeOnEdge (see trace_csv.py)."""
    from tiered.tracing.trace_csv import is_csv, read_csv  # it builds on this module

    path = Path(path)
    if is_csv(path):
        return read_csv(path)
    data = path.read_bytes()
    header, _, _ = data.removeprefix(MAGIC).partition(b"\n")
    if not data.startswith(MAGIC):
        raise ValueError(f"{path} is no routing trace: it begins neither as ours nor as CSV do")
    try:
        fields = json.loads(header)
        blobs, mixes = tuple(fields["blob_bytes"]), _mixes(fields)
        info = TraceInfo(**{**fields, "blob_bytes": blobs, "mixes": mixes})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is a damaged trace: its second line is no header") from error
    reader = _Reader(path, info, data, len(MAGIC) + len(header) + 1)
    if len(data) >= LONG:
        return LongTrace(info, reader.events, reader.records)
    return Trace(info, reader.events())


def _mixes(fields: dict[str, Any]) -> dict[int, tuple[int, ...]]:
    """Of a trace's header. ValueError for sizes that no layer of the model can have."""
    mixes = {int(layer): tuple(sizes) for layer, sizes in fields.get("mixes", {}).items()}
    for layer, sizes in mixes.items():
        if not 0 <= layer < len(fields["blob_bytes"]) or len(sizes) != fields["num_experts"]:
            raise ValueError("a mix of another model")
        if min(sizes) < 1 or max(sizes) != fields["blob_bytes"][layer]:
            raise ValueError("sizes that do not fit together")
    return mixes


class KeyTable:
    """One ExpertKey object per expert: equal keys of a trace are the same object, to be quick."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.rows = [[ExpertKey(la, e) for e in range(num_experts)] for la in range(num_layers)]

    def __call__(self, layer: int, expert: int) -> ExpertKey:
        return self.rows[layer][expert]


COUNT, KEY, LIMIT = struct.Struct("<H"), struct.Struct("<HH"), struct.Struct("<I")
ROUTED, GUESSED = struct.Struct("<HHB"), struct.Struct("<HBHB")


class _Reader:
    """Goes through the records, which begin at a byte of `data`. The methods are few and flat."""

    def __init__(self, path: Path, info: TraceInfo, data: bytes, begin: int) -> None:
        self._path = path
        self._info = info
        self._data = data
        self._at = self._begin = begin
        self._key = KeyTable(len(info.blob_bytes), info.num_experts)

    def records(self) -> Records:
        """All at once, as integers."""
        from cpu_kernels import traces
        from tiered.tracing.compiled import Records

        info, data = self._info, self._data
        parsed = traces.parse(data, self._begin, len(info.blob_bytes), info.num_experts)
        if parsed.status == traces.UNKNOWN_RECORD:
            raise ValueError(unknown_record(self._path, data[parsed.at]))
        if parsed.status == traces.UNKNOWN_EXPERT:
            raise ValueError(unknown_expert(self._path))
        return Records(info, parsed)

    def events(self) -> list[Event]:
        self._at = self._begin
        events: list[Event] = []
        read: dict[int, Callable[[], Event]] = {
            ord("P"): self._pass,
            ord("R"): self._routed,
            ord("G"): self._guessed,
            ord("F"): self._fetched,
            ord("A"): self._prefetched,
            ord("D"): self._dropped,
        }
        data = self._data
        try:
            while self._at < len(data):
                letter = data[self._at]
                self._at += 1
                if letter in read:
                    events.append(read[letter]())
                elif letter == ord("C"):
                    _cut_short(events, *self._take(COUNT))
                else:
                    raise ValueError(unknown_record(self._path, letter))
        except struct.error:
            pass  # cut short by a crash
        except IndexError as error:
            raise ValueError(unknown_expert(self._path)) from error
        return events

    def _pass(self) -> Pass:
        return Pass(self._bytes(1)[0])

    def _routed(self) -> Routed:
        layer, num_tokens, top_k = self._take(ROUTED)
        return Routed(layer, self._routing(num_tokens, top_k))

    def _guessed(self) -> Guessed:
        layer, distance, num_tokens, top_k = self._take(GUESSED)
        return Guessed(layer, distance, self._routing(num_tokens, top_k))

    def _fetched(self) -> Fetched:
        keys = self._keys()
        return Fetched(keys, list(map(bool, self._bytes(len(keys)))))

    def _prefetched(self) -> Prefetched:
        (limit,) = self._take(LIMIT)
        return Prefetched(self._keys(), limit, self._keys())

    def _dropped(self) -> Dropped:
        return Dropped(self._key(*self._take(KEY)))

    def _take(self, layout: struct.Struct) -> tuple[int, ...]:
        numbers = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return numbers

    def _bytes(self, count: int) -> bytes:
        begin = self._at
        self._at = end = begin + count
        if end > len(self._data):
            raise struct.error("the file ends early")
        return self._data[begin:end]

    def _keys(self) -> list[ExpertKey]:
        rows = self._key.rows
        pairs = KEY.iter_unpack(self._bytes(4 * self._take(COUNT)[0]))
        return [rows[layer][expert] for layer, expert in pairs]

    def _routing(self, num_tokens: int, top_k: int) -> Routing:
        count = num_tokens * top_k
        experts = np.frombuffer(self._bytes(2 * count), "<u2").astype(np.int32)
        weights = np.frombuffer(self._bytes(2 * count), "<f2").astype(np.float32)
        experts.shape = weights.shape = num_tokens, top_k
        return Routing(experts, weights)


def unknown_record(path: Path, letter: int) -> str:
    return f"{path} is damaged: {chr(letter)!r} begins no record"


def unknown_expert(path: Path) -> str:
    return f"{path} is damaged: it names an expert that is not"


def _cut_short(events: list[Event], num_asked: int) -> None:
    for index in range(len(events) - 1, -1, -1):
        event = events[index]
        if isinstance(event, Fetched):
            events[index] = event._replace(num_asked=num_asked)
            return


def _packed(routing: Routing) -> bytes:
    num_tokens, top_k = routing.experts.shape
    return b"".join(
        (
            struct.pack("<HB", num_tokens, top_k),
            routing.experts.astype("<u2").tobytes(),
            routing.weights.astype("<f2").tobytes(),
        )
    )


def _packed_keys(keys: Sequence[ExpertKey]) -> bytes:
    flat = [number for key in keys for number in key]
    return struct.pack(f"<H{len(flat)}H", len(keys), *flat)

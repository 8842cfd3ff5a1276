import gzip
from pathlib import Path

import numpy as np
import pytest

from tiered.experts import ExpertKey, Routing
from tiered.tracing import trace as trace_module
from tiered.tracing import trace_csv
from tiered.tracing.trace import (
    DECODE,
    PREFILL,
    Dropped,
    Fetched,
    Guessed,
    Pass,
    Prefetched,
    Routed,
    TraceInfo,
    TraceWriter,
    read_trace,
)

DATA = Path(__file__).parent / "data"
INFO = TraceInfo("tiny", num_experts=8, top_k=2, blob_bytes=(0, 100, 120), policy="lru", capacity=9)


def keys(layer, *experts):
    return [ExpertKey(layer, expert) for expert in experts]


ROUTING = Routing(np.array([[3, 1], [7, 3]], np.int32), np.array([[0.75, 0.25], [0.5, 0.5]], "f4"))


def write(path):
    with TraceWriter(path, INFO) as writer:
        writer.begin(PREFILL)
        writer.fetched(keys(1, 1, 3, 7), [True, False, False])
        writer.record(1, np.arange(2), ROUTING)
        writer.guess(2, 1, ROUTING)
        writer.prefetched(keys(2, 3, 7), 1 << 40, keys(1, 0))
        writer.begin(DECODE)
        writer.dropped(ExpertKey(2, 7))
        writer.cut_short(2)
        writer.prefetched([], 0, [])


def same(a, b):
    return a.layer == b.layer and all(map(np.array_equal, a.routing, b.routing))


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "trace")
    trace = read_trace(tmp_path / "trace")
    assert trace.info == INFO
    assert trace.is_live
    assert trace.num_routed == 4
    events = trace.events
    assert events[:2] == [Pass(PREFILL), Fetched(keys(1, 1, 3, 7), [True, False, False], 2)]
    assert same(events[2], Routed(1, ROUTING))
    assert same(events[3], Guessed(2, 1, ROUTING))
    assert events[4:] == [
        Prefetched(keys(2, 3, 7), 0xFFFFFFFF, keys(1, 0)),
        Pass(DECODE),
        Dropped(ExpertKey(2, 7)),
        Prefetched([], 0, []),
    ]


def test_equal_keys_are_one_object(tmp_path):
    write(tmp_path / "trace")
    events = read_trace(tmp_path / "trace").events
    assert events[4].keys[1] is events[6].key


def test_it_is_compact(tmp_path):
    """A token of Qwen3-30B-A3B, 48 layers of 8 experts, takes less than 4 KB."""
    info = TraceInfo("qwen", 128, 8, (1,) * 48)
    routing = Routing(np.arange(8, dtype=np.int32)[None], np.ones((1, 8), np.float32))
    with TraceWriter(tmp_path / "trace", info) as writer:
        for layer in range(48):
            writer.fetched(keys(layer, *range(8)), [True] * 8)
            writer.record(layer, np.zeros(1), routing)
    data = (tmp_path / "trace").read_bytes()
    assert len(data) - data.index(b"\n", 20) - 1 < 4096


def test_every_shortened_file_is_read_up_to_there(tmp_path):
    write(tmp_path / "trace")
    data = (tmp_path / "trace").read_bytes()
    whole = read_trace(tmp_path / "trace").events
    body = data.index(b"\n", 20) + 1
    for end in range(body, len(data)):
        (tmp_path / "cut").write_bytes(data[:end])
        events = read_trace(tmp_path / "cut").events
        assert len(events) <= len(whole)
        assert list(map(type, events)) == list(map(type, whole[: len(events)]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no routing trace"),
        (b"GGUF....", "no routing trace"),
        (b"\x1f\x8bnot really gzip", "no routing trace"),
        (b"tiered-trace 1\n{broken\n", "no header"),
        (b'tiered-trace 1\n{"model": "m"}\n', "no header"),
        (b"# route_trace v1\n", "no routed experts"),
        (b"# route_trace v1\n#\n# layer=0 expert_bytes=5\n0,0,0,0,0,x,1,0\n", "not all numbers"),
    ],
)
def test_files_that_are_no_traces(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / "file")


@pytest.mark.parametrize(
    ("record", "message"), [(b"Z", "begins no record"), (b"D\x01\x00\x63\x00", "names an expert")]
)
def test_damaged_records(tmp_path, record, message):
    write(tmp_path / "trace")
    with (tmp_path / "trace").open("ab") as file:
        file.write(record)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / "trace")


CSV = """# route_trace v1
# model=tiny.gguf n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=10
# layer=1 expert_bytes=20
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,3,0.5,0,10
0,0,0,0,1,1,0.5,0,10
0,0,1,0,0,3,0.75,0,0
0,0,1,0,1,2,0.25,0,10
0,0,0,1,0,0,0.5,0,20
0,0,0,1,1,1,0.5,0,20
0,1,0,0,0,1,0.5,0,0
0,1,0,0,1,2,0.5,0,0
0,1,1,0,0,1,0.5,0,0
0,1,1,0,1,0,0.5,0,10
"""


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_csv(tmp_path, compress):
    (tmp_path / "trace").write_bytes(compress(CSV.encode()))
    trace = read_trace(tmp_path / "trace")
    assert trace.info == TraceInfo("tiny.gguf", 4, 2, (10, 20))
    assert not trace.is_live
    batches = [event.keys for event in trace.events if isinstance(event, Fetched)]
    # All tokens of the prompt are one batch; what is routed again counts as used then.
    assert batches == [keys(0, 1, 3, 2), keys(1, 0, 1), keys(0, 1, 2), keys(0, 1, 0)]
    assert [e.phase for e in trace.events if isinstance(e, Pass)] == [PREFILL, DECODE, DECODE]
    first = next(event for event in trace.events if isinstance(event, Routed))
    assert first.routing.experts.tolist() == [[3, 1], [3, 2]]
    assert first.routing.weights.tolist() == [[0.5, 0.5], [0.75, 0.25]]


def test_a_real_csv_trace():
    trace = read_trace(DATA / "gemma-4-26b-a4b.route.csv.gz")
    assert trace.info.model == "google_gemma-4-26B-A4B-it-Q4_K_M.gguf"
    assert (trace.info.num_experts, trace.info.top_k) == (128, 6)
    assert set(trace.info.blob_bytes) == {4336640, 3593216}
    assert trace.num_routed == 28260


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gemma-4-26b-a4b"])
@pytest.mark.parametrize("kind", ["csv", "ours"])
def test_a_long_trace_is_read_as_the_same_integers(tmp_path, monkeypatch, name, kind):
    """By a kernel, as its events would give."""
    path = DATA / f"{name}.route.csv.gz"
    events = read_trace(path).events
    if kind == "ours":
        path, info = tmp_path / "trace", read_trace(path).info
        rewrite(path, info, events)
    short = read_trace(path)
    monkeypatch.setattr(trace_module, "LONG", 1)
    monkeypatch.setattr(trace_csv, "LONG", 1)
    long = read_trace(path)
    assert type(long) is not type(short)
    assert long.info == short.info
    assert long.num_routed == short.num_routed
    same_records(long.records, short.records)
    assert len(long.events) == len(short.events)


def rewrite(path, info, events):
    """The same in our format, with records of other kinds in between."""
    with TraceWriter(path, info) as writer:
        for index, event in enumerate(events):
            if isinstance(event, Pass):
                writer.begin(event.phase)
            elif isinstance(event, Routed):
                writer.record(event.layer, np.zeros(1), event.routing)
            else:
                writer.fetched(event.keys, [False] * len(event.keys))
                if index % 5 == 0:
                    writer.prefetched(event.keys[:2], 1 << 40, event.keys[2:3])
                if index % 7 == 0:
                    writer.cut_short(1)
                if index % 11 == 0:
                    writer.dropped(event.keys[0])
                    writer.guess(event.keys[0].layer, 1, ROUTING)


def same_records(a, b):
    assert np.array_equal(a.array, b.array)
    assert (a.num_asked, a.num_routed) == (b.num_asked, b.num_routed)
    assert a.all_have_sizes == b.all_have_sizes
    assert all(map(np.array_equal, a.future, b.future))


def test_when_experts_are_demanded(tmp_path):
    write(tmp_path / "trace")
    times, first = read_trace(tmp_path / "trace").records.future
    demands = [e.keys for e in read_trace(tmp_path / "trace").events if isinstance(e, Fetched)]
    for key in {key for keys in demands for key in keys}:
        number = key.layer * INFO.num_experts + key.expert
        expected = [time for time, keys in enumerate(demands) if key in keys]
        assert times[first[number] : first[number + 1]].tolist() == expected
    assert first[-1] == sum(map(len, demands))


def test_every_shortened_long_trace_is_read_up_to_there(tmp_path, monkeypatch):
    write(tmp_path / "trace")
    data = (tmp_path / "trace").read_bytes()
    for end in range(data.index(b"\n", 20) + 1, len(data)):
        (tmp_path / "cut").write_bytes(data[:end])
        monkeypatch.setattr(trace_module, "LONG", 1 << 30)
        short = read_trace(tmp_path / "cut").records
        monkeypatch.setattr(trace_module, "LONG", 1)
        same_records(read_trace(tmp_path / "cut").records, short)


@pytest.mark.parametrize(
    ("record", "message"), [(b"Z", "begins no record"), (b"D\x01\x00\x63\x00", "names an expert")]
)
def test_a_damaged_long_trace_is_refused(tmp_path, monkeypatch, record, message):
    write(tmp_path / "trace")
    with (tmp_path / "trace").open("ab") as file:
        file.write(record)
    monkeypatch.setattr(trace_module, "LONG", 1)
    with pytest.raises(ValueError, match=message):
        _ = read_trace(tmp_path / "trace").records


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,1,1,0,0,x,0.5,0,0", "not all numbers: 0,1,1,0,0,x"),
        ("0,1,1,0", "not all numbers"),
        ("0,1,2,0,0,4,0.5,0,0", "names an expert"),
        ("0,1,2,2,0,0,0.5,0,0", "names an expert"),
        ("0,1,2,0,0,1,0.5,0,0", "no multiple of 2"),
    ],
)
def test_a_damaged_long_csv_is_refused(tmp_path, monkeypatch, row, message):
    monkeypatch.setattr(trace_csv, "LONG", 1)
    (tmp_path / "trace").write_text(CSV + row)
    with pytest.raises(ValueError, match=message):
        _ = read_trace(tmp_path / "trace").records

"""The store of experts: blobs are the file's bytes, whichever way they are read."""

import errno
import mmap
import os
import threading

import numpy as np
import pytest
import tiny
from pack import pack

from tiered.checkpoints.damage import find_damage
from tiered.experts import ExpertKey
from tiered.formats import CheckpointError, open_checkpoint
from tiered.reader import BLOCK, FileReader
from tiered.store import PIECE, ExpertStore
from tiered.weights.convert import convert
from tiered.weights.dense import dense_bytes, dense_matrix
from tiered.weights.dequantize import dequantize

MIXED = dict(format="q4_k", formats={"blk.1.ffn_down": "q6_k"})


def gguf(folder, **options):
    return tiny.gguf_checkpoint(folder / "tiny.gguf", **{"model_type": "olmoe", **options})


SOURCES = {
    "q4_0": gguf,
    "mixed": lambda folder: gguf(folder, **MIXED),
    "bf16": lambda folder: tiny.hf_checkpoint(folder / "hf", "olmoe"),
    "f32 in parts": lambda folder: tiny.hf_checkpoint(folder / "hf", "olmoe", "f32", num_files=2),
    "store": lambda folder: convert(gguf(folder, **MIXED), folder / "store"),
}


@pytest.fixture(scope="module", params=SOURCES)
def model(request, tmp_path_factory):
    return SOURCES[request.param](tmp_path_factory.mktemp("model"))


def page_aligned(nbytes, shift=0):
    return np.frombuffer(mmap.mmap(-1, nbytes + 2 * BLOCK), np.uint8)[shift:]


def expected_blobs(checkpoint, store, key):
    """(layout, bytes) of gate, up and down."""
    for part, layout in store.layout(key.layer)._asdict().items():
        data = checkpoint.data(f"layers.{key.layer}.experts.{key.expert}.{part}")
        stored = checkpoint.tensors[f"layers.{key.layer}.experts.{key.expert}.{part}"].format
        if stored != layout.format:
            data = pack(dequantize(data, stored, layout.shape), "q4_0").reshape(-1)
        yield layout, data


@pytest.mark.parametrize("quantize", ["int4", "none"])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("readers, shift", [(1, 0), (3, 64)])
def test_blobs_are_the_files_bytes(model, quantize, direct, readers, shift):
    with (
        open_checkpoint(model) as checkpoint,
        ExpertStore(checkpoint, quantize, readers, direct) as store,
    ):
        total = 0
        for layer in checkpoint.config.sparse_layers:
            slot = page_aligned(store.layout(layer).nbytes, shift)
            for expert in (0, 3, 7):
                key = ExpertKey(layer, expert)
                store.read_into(key, slot)
                for layout, data in expected_blobs(checkpoint, store, key):
                    part = slot[layout.offset : layout.offset + layout.nbytes]
                    assert np.array_equal(part, data)
                total += sum(t.nbytes for t in store.tensors(key))
            assert store.blob_bytes[layer] == store.layout(layer).nbytes
        assert store.bytes_read == total


def test_addresses_point_into_the_memory_map(model):
    with open_checkpoint(model) as checkpoint, ExpertStore(checkpoint, "none") as store:
        assert store.mappable
        key = ExpertKey(1, 5)
        for part, address in zip(("gate", "up", "down"), store.addresses(key), strict=True):
            data = checkpoint.data(f"layers.1.experts.5.{part}")
            assert address == data.__array_interface__["data"][0]
        assert store.address_table(1).shape == (8, 3)
        store.advise([key])


def test_what_must_be_quantized_cannot_be_mapped(tmp_path):
    with (
        open_checkpoint(tiny.hf_checkpoint(tmp_path, "mixtral")) as checkpoint,
        ExpertStore(checkpoint, "int4") as store,
    ):
        assert not store.mappable
        assert [tensor.format for tensor in store.layout(0)] == ["q4_0"] * 3
        with pytest.raises(ValueError, match="must be read, not mapped"):
            store.addresses(ExpertKey(0, 0))


def test_float_matrices_at_odd_places_cannot_be_mapped(tmp_path):
    """A safetensors header may have any length; float32 loads want multiples of 4."""
    file = tiny.hf_checkpoint(tmp_path, "mixtral", "f32") / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little") + 1
    file.write_bytes(
        length.to_bytes(8, "little") + data[8 : 7 + length] + b" " + data[7 + length :]
    )
    with (
        open_checkpoint(tmp_path) as checkpoint,
        ExpertStore(checkpoint, "none") as store,
    ):
        assert not store.mappable
        copy, format, shape = dense_matrix(checkpoint, "embed", "none")
        assert (format, shape) == ("f32", (320, 64)) and copy.flags.owndata
        assert np.array_equal(copy.view(np.float32).reshape(shape), checkpoint.float32("embed"))


def test_large_experts_are_read_in_pieces(tmp_path):
    sizes = dict(hidden=1024, expert_size=2048, experts=2, layers=1, head_dim=256)
    model = tiny.hf_checkpoint(tmp_path, "mixtral", **sizes)
    results = []
    for quantize in ("int4", "none"):
        for readers in (1, 3):
            with (
                open_checkpoint(model) as checkpoint,
                ExpertStore(checkpoint, quantize, readers) as store,
            ):
                slot = page_aligned(store.layout(0).nbytes)[: store.layout(0).nbytes]
                assert len(list(store._tasks(ExpertKey(0, 1), slot))) >= 3
                store.read_into(ExpertKey(0, 1), slot)
                results.append(slot.copy())
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[2], results[3])
    assert results[2].nbytes > PIECE


def test_several_threads(model):
    with open_checkpoint(model) as checkpoint, ExpertStore(checkpoint, readers=2) as store:
        keys = [ExpertKey(layer, expert) for layer in (0, 1) for expert in range(8)]
        slots = [page_aligned(store.layout(key.layer).nbytes) for key in keys]

        def work(start):
            for index in range(start, len(keys), 4):
                store.read_into(keys[index], slots[index])

        threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for key, slot in zip(keys, slots, strict=True):
            for layout, data in expected_blobs(checkpoint, store, key):
                assert np.array_equal(slot[layout.offset : layout.offset + layout.nbytes], data)


def test_threads_and_files_are_gone_after_close(model):
    threads = threading.active_count()
    descriptors = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    with open_checkpoint(model) as checkpoint, ExpertStore(checkpoint, readers=3) as store:
        store.read_into(ExpertKey(0, 0), page_aligned(store.layout(0).nbytes))
    assert threading.active_count() == threads
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == len(descriptors)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("readers", [1, 3])
def test_a_file_that_shrinks_is_a_disk_error(tmp_path, direct, readers):
    model = gguf(tmp_path)
    with (
        open_checkpoint(model) as checkpoint,
        ExpertStore(checkpoint, readers=readers, direct=direct) as store,
    ):
        slot = page_aligned(store.layout(1).nbytes)
        end = checkpoint.tensors["layers.1.experts.7.up"].offset + 10
        os.truncate(model, end)
        with pytest.raises(OSError, match="ends at or before byte") as raised:
            store.read_into(ExpertKey(1, 7), slot)
        assert raised.value.errno == errno.EIO and raised.value.filename == str(model)
        store.read_into(ExpertKey(0, 0), slot)  # others are still there


def test_a_file_that_vanishes_is_a_disk_error(tmp_path):
    model = gguf(tmp_path)
    with open_checkpoint(model) as checkpoint, ExpertStore(checkpoint) as store:
        model.unlink()
        with pytest.raises(FileNotFoundError, match=r"tiny\.gguf"):
            store.read_into(ExpertKey(0, 0), page_aligned(store.layout(0).nbytes))


def test_wrong_use_is_refused(model):
    with open_checkpoint(model) as checkpoint:
        with pytest.raises(ValueError, match=r"quantize must be int4, .*, none, not 'int5'"):
            ExpertStore(checkpoint, "int5")
        slot = np.empty(64, np.uint8)
        with ExpertStore(checkpoint) as store, pytest.raises(ValueError, match="the slot has 64"):
            store.read_into(ExpertKey(0, 0), slot)


def test_rows_that_are_no_whole_groups(tmp_path):
    with open_checkpoint(tiny.hf_checkpoint(tmp_path, "olmoe", expert_size=40)) as checkpoint:
        with pytest.raises(CheckpointError, match=r"rows of 40 values .* use --quantize none"):
            ExpertStore(checkpoint, "int4")
        with ExpertStore(checkpoint, "none") as store:
            assert store.mappable


@pytest.mark.parametrize("format", ["f32", "q8_0", "q4_1", "q6_k"])
def test_damage_is_found(tmp_path, format):
    file = gguf(tmp_path, format=format)
    with open_checkpoint(file) as checkpoint:
        assert str(find_damage(checkpoint)).endswith("output is not a number")  # nobody's fault
        tensor = checkpoint.tensors["layers.1.experts.2.up"]
    scale = dict(f32=2, q8_0=0, q4_1=2, q6_k=208)[format]  # the upper half of a float32 will do
    with file.open("rb+") as opened:
        opened.seek(tensor.offset + scale)
        opened.write(np.uint16(0x7FC0).tobytes())
    with open_checkpoint(file) as checkpoint:
        assert f"tensor {tensor.name} is damaged" in str(find_damage(checkpoint))


def test_damaged_weights_are_named(tmp_path):
    folder = tiny.hf_checkpoint(tmp_path, "olmoe", "f32")
    with open_checkpoint(folder) as checkpoint:
        tensors = [checkpoint.tensors[f"layers.1.{name}"] for name in ("experts.2.up", "q")]
    with (folder / "model.safetensors").open("rb+") as file:
        for tensor in tensors:
            file.seek(tensor.offset + 400)
            file.write(np.float32(np.nan).tobytes())
    with open_checkpoint(folder) as checkpoint, ExpertStore(checkpoint) as store:
        with pytest.raises(CheckpointError, match=r"'layers\.1\.experts\.2\.up' is damaged"):
            store.read_into(ExpertKey(1, 2), page_aligned(store.layout(1).nbytes))
        with pytest.raises(CheckpointError, match=r"'layers\.1\.q' is damaged"):
            dense_matrix(checkpoint, "layers.1.q", "int4")


# --- reading files ---


@pytest.mark.parametrize("direct", [True, False])
def test_any_part_of_a_file(tmp_path, direct):
    data = np.random.default_rng(0).integers(0, 256, 5_000_001, dtype=np.uint8)
    file = tmp_path / "data"
    file.write_bytes(data.tobytes())
    reader = FileReader(file, direct)
    for offset, size, shift in [
        (0, 4096, 0), (0, 5_000_001, 0), (4096, 3_000_000, 0), (4096, 8192, 64), (1, 1, 0),
        (4095, 2, 1), (100, 4_999_901, 0), (4_999_999, 2, 0), (8192, 0, 0),
    ]:  # fmt: skip
        out = page_aligned(size, shift)[:size]
        reader.read_into(offset, out)
        assert np.array_equal(out, data[offset : offset + size]), (offset, size)
    with pytest.raises(OSError, match="while reading 10 bytes at 4999995"):
        reader.read_into(4_999_995, np.empty(10, np.uint8))
    reader.close()


def test_a_file_system_without_direct_reads(tmp_path, monkeypatch):
    """Some accept the flag and refuse the read."""
    file = tmp_path / "data"
    file.write_bytes(bytes(range(256)) * 64)
    reader = FileReader(file)
    if not reader.is_direct:
        pytest.skip("no direct reads here")
    real, refused = os.preadv, []

    def preadv(descriptor, buffers, offset):
        if descriptor == reader._direct:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    out = np.empty(1000, np.uint8)
    reader.read_into(300, out)
    assert refused and out.tobytes() == (bytes(range(256)) * 64)[300:1300]
    reader.close()


def test_a_system_without_preadv(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    file = tmp_path / "data"
    file.write_bytes(bytes(range(256)) * 64)
    reader = FileReader(file)
    out = np.empty(1000, np.uint8)
    reader.read_into(300, out)
    assert not reader.is_direct and out.tobytes() == (bytes(range(256)) * 64)[300:1300]
    reader.close()


# --- dense weights ---


def test_dense_weights(tmp_path):
    folder = tiny.hf_checkpoint(tmp_path, "qwen2_moe")
    with open_checkpoint(folder) as checkpoint:
        for name in ("layers.0.q", "layers.1.shared.down"):
            data, format, shape = dense_matrix(checkpoint, name, "int4")
            values = checkpoint.float32(name)
            assert format == "q8_0" and shape == values.shape
            error = np.abs(dequantize(data, format, shape) - values).max()
            assert error <= np.abs(values).max() / 200
        for name in ("embed", "head", "layers.0.router", "layers.0.shared.scale"):
            data, format, _ = dense_matrix(checkpoint, name, "int4")
            assert format == "bf16" and np.array_equal(data, checkpoint.data(name))
        stored = sum(t.nbytes for n, t in checkpoint.tensors.items() if ".experts." not in n)
        assert dense_bytes(checkpoint, "none") == stored > dense_bytes(checkpoint, "int4")

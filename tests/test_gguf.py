"""GGUF files: what is read is what was written, and damage is an error that names the file."""

import errno
import os
import struct

import gguf
import numpy as np
import pytest
import tiny
from pack import pack
from tiny_gguf import write_metadata

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.gguf_header import Metadata, read_header
from tiered.formats import CheckpointError, open_checkpoint
from tiered.weights.dequantize import dequantize, is_finite

MIXED = dict(format="q4_k", formats={"down": "q6_k", "attn_v": "q5_k", "token_embd": "q8_0"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.gguf_checkpoint(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "qwen3_moe")


@pytest.mark.parametrize("format", [name for name in FORMATS if FORMATS[name].is_ggmls])
def test_formats_agree_with_the_gguf_package(format):
    rng = np.random.default_rng(0)
    data = pack(rng.standard_normal((6, 512), np.float32), format)
    typed = data.view({"f32": np.float32, "f16": np.float16}.get(format, np.uint8))
    expected = gguf.quants.dequantize(typed, gguf.GGMLQuantizationType[format.upper()])
    got = dequantize(data.reshape(-1), format, (6, 512))
    assert np.array_equal(got, expected)
    assert is_finite(data.reshape(-1), format)


@pytest.mark.parametrize("model_type", tiny.ARCHITECTURES)
@pytest.mark.parametrize("options", [dict(format="f32"), MIXED], ids=["f32", "mixed"])
def test_tensors_are_those_of_the_gguf_package(tmp_path, model_type, options):
    file = tiny.gguf_checkpoint(tmp_path / "tiny.gguf", model_type, **options)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    kind = tiny.KINDS[model_type]
    with open_checkpoint(file) as checkpoint:
        layer = "layers.1.experts.5." if model_type != "llama" else "layers.1.ffn."
        exps = "_exps" if model_type != "llama" else ""
        for name, stored in (
            ("embed", "token_embd.weight"),
            ("layers.1.o", "blk.1.attn_output.weight"),
            (tiny.after_attention(model_type, 0), f"blk.0.{kind.ffn_norm}.weight"),
            *([] if "gemma" in model_type else [(layer + "gate", f"blk.1.ffn_gate{exps}.weight")]),
            (layer + "down", f"blk.1.ffn_down{exps}.weight"),
        ):
            expected = reader[stored].data
            expected = expected[5] if "experts" in name else expected
            data = checkpoint.data(name)
            assert np.array_equal(data, np.ascontiguousarray(expected).view(np.uint8).reshape(-1))
            assert checkpoint.tensors[name].format == reader[stored].tensor_type.name.lower()
    del expected, reader  # the package's reader holds a memory map


def test_the_same_model_in_parts(tmp_path):
    whole = tiny.gguf_checkpoint(tmp_path / "whole.gguf", "olmoe")
    first = tiny.gguf_checkpoint(tmp_path / "split.gguf", "olmoe", parts=3)
    parts = sorted(tmp_path.glob("split-*"))
    assert len(parts) == 3 and first == parts[0]
    for part in parts:
        with open_checkpoint(whole) as a, open_checkpoint(part) as b:
            assert a.config == b.config and a.tensors.keys() == b.tensors.keys()
            assert all(np.array_equal(a.data(name), b.data(name)) for name in a.tensors)
            assert dict(a.tokenizer_source) == dict(b.tokenizer_source)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf is missing"):
        open_checkpoint(first)


def test_a_folder_with_one_model(tmp_path):
    tiny.gguf_checkpoint(tmp_path / "split.gguf", "olmoe", parts=2)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.model_type == "olmoe"
    tiny.gguf_checkpoint(tmp_path / "other.gguf", "olmoe")
    with pytest.raises(CheckpointError, match=r"must hold one GGUF model, not other\.gguf, split"):
        open_checkpoint(tmp_path)


def test_one_tensor_per_expert(tmp_path):
    """As files were written before experts were fused."""
    sizes = tiny.SIZES | dict(layers=1, experts=2, top_k=1)
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    write_metadata(writer, "mixtral", sizes, {})
    for weight in tiny.weights("mixtral", layers=1, experts=2):
        name = weight.gguf
        if not name:
            *_, expert, part, _ = weight.hf.split(".")
            name = f"blk.0.ffn_{dict(w1='gate', w3='up', w2='down')[part]}.{expert}.weight"
        writer.add_tensor(name, weight.values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "old.gguf") as checkpoint:
        assert checkpoint.tensors["layers.0.experts.1.down"].shape == (64, 64)


def test_metadata_is_read_when_asked_for(model):
    values = read_header(model).values
    assert len(values["tokenizer.ggml.tokens"]) == 5  # a StoredArray: where it lies, not what
    metadata = Metadata(values)
    assert metadata["tokenizer.ggml.tokens"] == tiny.vocabulary(320)[0]
    assert metadata["tokenizer.ggml.token_type"][-1] == 3
    assert metadata["qwen3moe.rope.freq_base"] == 10_000.0


def test_nothing_stays_open(model):
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    with open_checkpoint(model) as checkpoint:
        total = int(checkpoint.data("embed").sum())
        assert total > 0 and checkpoint.float32("norm").shape == (64,)
        checkpoint.advise(checkpoint.tensors["embed"])
    if before:
        assert len(os.listdir("/proc/self/fd")) == len(before)
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.data("embed")


# --- damage ---


def damaged(model, tmp_path, change):
    data = bytearray(model.read_bytes())
    changed = change(data)
    file = tmp_path / "damaged.gguf"
    file.write_bytes(data if changed is None else changed)
    return file


def put(position, letter, value):
    return lambda data: struct.pack_into("<" + letter, data, position, value)


def after(text, shift, letter, value):
    """Overwrite what stands `shift` bytes behind `text`."""

    def change(data):
        struct.pack_into("<" + letter, data, data.index(text) + len(text) + shift, value)

    return change


DAMAGE = {
    "empty": (lambda data: bytearray(b""), "too short"),
    "magic": (put(0, "I", 0x12345678), "no GGUF file"),
    "version": (put(4, "I", 7), "version 7 is not supported"),
    "big-endian": (put(4, "I", 3 << 24), "big-endian"),
    "num_tensors": (put(8, "Q", 2**63), "claims 9223372036854775808 tensors"),
    "num_values": (put(16, "Q", 2**63), r"damaged\.gguf: "),
    "key length": (put(24, "Q", 2**63), "more than the file can hold"),
    "array length": (
        after(b"tokenizer.ggml.tokens", 8, "Q", 2**63), "claims 9223372036854775808 strings"),
    "string length": (after(b"tokenizer.ggml.tokens", 16, "Q", 2**63), "beyond the end"),
    "value type": (after(b"qwen3moe.context_length", 0, "I", 99), "unknown type 99"),
    "tensor type": (
        after(b"blk.0.attn_q.weight", 20, "I", 77),
        r"tensor 'blk.0.attn_q.weight' has type 77 \(unknown\), which is not supported"),
    "old type": (after(b"blk.0.attn_q.weight", 20, "I", 16), r"type 16 \(IQ2_XXS\)"),
    "dimensions": (after(b"blk.0.attn_q.weight", 0, "I", 9), "9 dimensions"),
    "huge shape": (after(b"blk.0.attn_q.weight", 4, "Q", 2**62), "truncated or damaged"),
    "odd shape": (after(b"blk.0.attn_q.weight", 4, "Q", 65), "no whole number of q4_0 blocks"),
    "empty shape": (after(b"blk.0.attn_q.weight", 4, "Q", 0), r"shape \[64, 0\]"),
    "wrong shape": (after(b"blk.0.attn_q.weight", 4, "Q", 32), r"configuration says \[64, 64\]"),
    "offset past the end": (after(b"blk.0.attn_q.weight", 24, "Q", 2**40), "truncated"),
    "odd offset": (after(b"blk.0.attn_q.weight", 24, "Q", 3), "must be a multiple of 32"),
    "truncated": (lambda data: data[:-100], "it is truncated or damaged"),
    "truncated header": (lambda data: data[:2000], "damaged.gguf: "),
    "architecture": (
        lambda data: data.replace(b"qwen3moe", b"martian8"),
        "unknown architecture 'martian8' with experts; known: .*qwen3moe"),
    "missing tensor": (
        lambda data: data.replace(b"blk.1.attn_k.weight", b"blk.1.attn_z.weight"),
        "tensor 'layers.1.k' is missing"),
    "twice": (
        lambda data: data.replace(b"blk.1.attn_k.weight", b"blk.1.attn_q.weight"), "there twice"),
    "missing key": (
        lambda data: data.replace(b"qwen3moe.block_count", b"qwen3moe.clock_count"),
        "'qwen3moe.block_count' is missing"),
    "too many layers": (after(b"qwen3moe.block_count", 4, "I", 60_000), "layers.2.* is missing"),
    "absurd layers": (after(b"qwen3moe.block_count", 4, "I", 2**31), "whole number from 0 to"),
    "top_k": (after(b"expert_used_count", 4, "I", 9), "top_k is 9"),
    "no heads": (after(b"attention.head_count", 4, "I", 0), r"damaged\.gguf: num_heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(model, tmp_path, name):
    change, message = DAMAGE[name]
    file = damaged(model, tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(file)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


def test_random_damage_never_ends_in_another_error(model, tmp_path):
    rng = np.random.default_rng(0)
    original = model.read_bytes()
    header = original.index(b"blk.1.ffn_up_exps") + 60
    file = tmp_path / "fuzz.gguf"
    opened = 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(0, header)] = rng.integers(0, 256)
        if rng.random() < 0.2:
            data = data[: rng.integers(0, len(data))]
        file.write_bytes(data)
        try:
            with open_checkpoint(file) as checkpoint:
                opened += 1
                list(checkpoint.metadata.values())
        except (CheckpointError, OSError):
            pass
    assert opened  # a changed byte of a token, say, does no harm


def test_rope_factors(tmp_path):
    factors = [1.0, 1.0, 2.0, 2.5, 3.0, 4.0, 8.0, 8.0]
    file = tiny.gguf_checkpoint(tmp_path / "tiny.gguf", "llama", rope_factors=factors)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.config.rope.inv_freq_scale == tuple(factors)
        assert checkpoint.config.rope.pairs == "adjacent"
    file = tiny.gguf_checkpoint(tmp_path / "wrong.gguf", "llama", rope_factors=factors[1:])
    with pytest.raises(CheckpointError, match="must be F32 with 8 values"):
        open_checkpoint(file)
    file = tiny.gguf_checkpoint(tmp_path / "nan.gguf", "llama", rope_factors=[np.nan] * 8)
    with pytest.raises(CheckpointError, match=r"'rope_factors' is damaged"):
        open_checkpoint(file)


def test_what_cannot_be_read_says_so(tmp_path, monkeypatch):
    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        open_checkpoint(tmp_path)


def test_no_model_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"notes\.txt is no model"):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="is no model: expected a GGUF file"):
        open_checkpoint(tmp_path)

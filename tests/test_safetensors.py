"""Hugging Face folders: one or many files, three number formats, damage."""

import contextlib
import json
import math

import numpy as np
import pytest
import tiny

from tiered.formats import CheckpointError, open_checkpoint
from tiered.formats.safetensors import INDEX


def values_of(model_type, **options):
    return {w.hf: w.values for w in tiny.weights(model_type, **options) if w.hf}


@pytest.mark.parametrize("dtype, tolerance", [("f32", 0), ("f16", 1e-3), ("bf16", 8e-3)])
@pytest.mark.parametrize("model_type", tiny.ARCHITECTURES)
def test_what_was_written_is_read(tmp_path, model_type, dtype, tolerance):
    expected = values_of(model_type)
    with open_checkpoint(tiny.hf_checkpoint(tmp_path, model_type, dtype)) as checkpoint:
        assert sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()) == sum(
            values.size for values in expected.values()
        )
        assert {tensor.format for tensor in checkpoint.tensors.values()} == {dtype}
        prefix = tiny.KINDS[model_type].prefix
        layer = prefix + "layers.1."
        names = [
            ("embed", prefix + "embed_tokens.weight"),
            ("norm", prefix + "norm.weight"),
            ("layers.1.o", layer + "self_attn.o_proj.weight"),
            (tiny.after_attention(model_type, 1), layer + "post_attention_layernorm.weight"),
        ]
        if model_type == "lfm2_moe":
            names[1:] = [
                ("norm", prefix + "embedding_norm.weight"),
                ("layers.1.o", layer + "self_attn.out_proj.weight"),
                ("layers.1.attention_norm", layer + "operator_norm.weight"),
                ("layers.0.conv.gates", prefix + "layers.0.conv.in_proj.weight"),
            ]
        for name, stored in names:
            got = checkpoint.float32(name)
            assert got.shape == expected[stored].shape
            assert np.allclose(got, expected[stored], rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("model_type", tiny.ARCHITECTURES)
def test_every_tensor_has_its_place(tmp_path, model_type):
    """Matrix by matrix: gate, up and down (w1, w3, w2) are not mixed up."""
    words = dict(w1="gate", w3="up", w2="down", gate_proj="gate", up_proj="up", down_proj="down")
    expected = values_of(model_type)
    with open_checkpoint(tiny.hf_checkpoint(tmp_path, model_type, "f32")) as checkpoint:
        for stored, values in expected.items():
            parts = stored.replace("language_model.", "").split(".")
            if parts[-2] in words and parts[-1] == "weight":
                kind = ("experts." + parts[-3] if "experts" in parts else
                        "shared" if "shared_" in stored or "gemma" in model_type else
                        "ffn")  # fmt: skip
                name = f"layers.{parts[2]}.{kind}.{words[parts[-2]]}"
                assert np.array_equal(checkpoint.float32(name), values)


def test_transposed_and_alternating_matrices(tmp_path):
    """gpt-oss: all experts of a layer in one tensor, transposed, gate and up column by column."""
    stored = values_of("gpt_oss")
    prefix = "model.layers.1.mlp.experts."
    with open_checkpoint(tiny.hf_checkpoint(tmp_path, "gpt_oss", "f32")) as checkpoint:
        both, down = stored[prefix + "gate_up_proj"][5].T, stored[prefix + "down_proj"][5].T
        for name, values in ("gate", both[::2]), ("up", both[1::2]), ("down", down):
            assert np.array_equal(checkpoint.float32(f"layers.1.experts.5.{name}"), values)
        biases = stored[prefix + "gate_up_proj_bias"]
        assert np.array_equal(checkpoint.float32("layers.1.experts_bias.up"), biases[:, 1::2])


def test_many_files(tmp_path):
    one = tiny.hf_checkpoint(tmp_path / "one", "qwen3_moe")
    many = tiny.hf_checkpoint(tmp_path / "many", "qwen3_moe", num_files=3)
    bare = tiny.hf_checkpoint(tmp_path / "bare", "qwen3_moe", num_files=3)
    (bare / INDEX).unlink()
    for other in (many, bare):
        with open_checkpoint(one) as a, open_checkpoint(other) as b:
            assert a.tensors.keys() == b.tensors.keys()
            assert all(np.array_equal(a.data(name), b.data(name)) for name in a.tensors)
    (many / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 'model-00002-of-00003\.safetensors', which"):
        open_checkpoint(many)
    (bare / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tensor '.*' is missing"):
        open_checkpoint(bare)


def test_fused_experts(tmp_path):
    """gate and up in one tensor [experts, 2 * size, hidden], as transformers has them in memory."""
    tensors = values_of("qwen3_moe")
    experts = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        part = {
            kind: np.stack([experts[f"{prefix}{e}.{kind}_proj.weight"] for e in range(8)])
            for kind in ("gate", "up", "down")
        }
        tensors[prefix + "gate_up_proj"] = np.concatenate([part["gate"], part["up"]], axis=1)
        tensors[prefix + "down_proj"] = part["down"]
    folder = tiny.hf_checkpoint(tmp_path, "qwen3_moe")
    tiny.write_safetensors(folder / "model.safetensors", tensors, "f32")
    with open_checkpoint(folder) as checkpoint:
        for name, values in experts.items():
            _, _, layer, _, _, expert, part, _ = name.split(".")
            canonical = f"layers.{layer}.experts.{expert}.{part.removesuffix('_proj')}"
            assert np.array_equal(checkpoint.float32(canonical), values)


def test_tied_embeddings(tmp_path):
    tied = tiny.hf_checkpoint(tmp_path / "tied", "llama", config={"tie_word_embeddings": True})
    with open_checkpoint(tied) as checkpoint:
        assert "head" not in checkpoint.tensors
    values = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tied / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight' is missing"):
        open_checkpoint(tied)


def test_more_tokens_that_end_a_text(tmp_path):
    folder = tiny.hf_checkpoint(tmp_path, "llama", config={"eos_token_id": 5})
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.eos_ids == (5, 7)


# --- damage ---


def rewrite_header(file, change):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.norm.weight"
HEADERS = {
    "past the end": (
        lambda h: h[NORM].update(data_offsets=[0, 2**63]), f"'{NORM}' ends at byte .* truncated"),
    "backwards": (lambda h: h[NORM].update(data_offsets=[128, 0]), "truncated or damaged"),
    "negative": (lambda h: h[NORM].update(data_offsets=[-128, 0]), "is damaged"),
    "shape": (lambda h: h[NORM].update(shape=[2**40, 2**40]), "cannot have 128 bytes"),
    "shape of words": (lambda h: h[NORM].update(shape=["a"]), "is damaged"),
    "type": (lambda h: h[NORM].update(dtype="F4", shape=[256]), "has type F4, which is not"),
    "no offsets": (lambda h: h[NORM].pop("data_offsets"), "is damaged"),
    "no object": (lambda h: h.update({NORM: 3}), "is damaged"),
    "missing": (lambda h: h.pop(NORM), "tensor 'norm' is missing"),
    "other shape": (lambda h: h[NORM].update(shape=[8, 8]), r"configuration says \[64\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers(tmp_path, name):
    change, message = HEADERS[name]
    folder = tiny.hf_checkpoint(tmp_path, "olmoe")
    rewrite_header(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


FILES = {
    "empty": (lambda data: b"", "claims 0 bytes, but the file has 0"),
    "length of 2^63": (lambda data: (2**63).to_bytes(8, "little") + data[8:], "no safetensors"),
    "no JSON": (lambda data: data[:8] + b"x" + data[9:], "damaged JSON"),
    "a list": (lambda data: (2).to_bytes(8, "little") + b"[]", "expected a JSON object"),
    "deep": (lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5, "nested too deeply"),
    "a huge number": (
        lambda data: (10**4).to_bytes(8, "little") + b'{"a":' + b"1" * (10**4 - 6) + b"}",
        "damaged JSON"),
    "no text": (lambda data: data[:10] + b"\xff\xfe" + data[12:], "damaged JSON"),
    "truncated": (lambda data: data[:-50], "truncated or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(tmp_path, name):
    change, message = FILES[name]
    file = tiny.hf_checkpoint(tmp_path, "olmoe") / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(tmp_path)
    assert str(file) in str(raised.value) and "\n" not in str(raised.value)


CONFIGS = {
    "no JSON": ("{", "damaged JSON"),
    "no object": ("3", "expected a JSON object"),
    "no type": ("{}", "'model_type' is missing"),
    "unknown type": ({"model_type": "martian"}, "unknown model_type 'martian'; known: .*mixtral"),
    "path as type": ({"model_type": "../os"}, "unknown model_type"),
    "text for a number": ({"hidden_size": "big"}, "'hidden_size' is 'big', but must be a whole"),
    "null": ({"hidden_size": None}, "'hidden_size' is missing"),
    "negative": ({"num_hidden_layers": -1}, "must be a whole number"),
    "no layers": ({"num_hidden_layers": 0}, "num_layers must be at least 1"),
    "heads": ({"num_key_value_heads": 3}, "must be a multiple of num_kv_heads"),
    "many layers": ({"num_hidden_layers": 3}, r"tensor 'layers\.2\.attention_norm' is missing"),
    "infinite": ({"rms_norm_eps": float("inf")}, "must be a finite number"),
    "quantized": ({"quantization_config": {"quant_method": "hqq"}}, "quantized by 'hqq'"),
    "activation": ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', but must be silu"),
    "rope": ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
    "rope kind": ({"rope_scaling": {"type": "spiral", "factor": 2}}, "must be default, linear"),
    "rope factors": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0] * 8}},
        r"'short_factor' is \[1\.0\], but must be 8 numbers"),
    "rope theta": ({"rope_theta": 0}, "rotary embedding"),
    "rope original": (
        {"rope_scaling": {"type": "yarn", "factor": 2,
                          "original_max_position_embeddings": 0}}, r"config\.json: "),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_configurations(tmp_path, name):
    change, message = CONFIGS[name]
    folder = tiny.hf_checkpoint(
        tmp_path, "mixtral", config=change if isinstance(change, dict) and change else None
    )
    if isinstance(change, str):
        (folder / "config.json").write_text(change)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_no_weights(tmp_path):
    folder = tiny.hf_checkpoint(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has a config\.json, but no \*\.safetensors"):
        open_checkpoint(folder)
    (folder / INDEX).write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(CheckpointError, match="which is missing"):
        open_checkpoint(folder)
    (folder / INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="'weight_map' is damaged"):
        open_checkpoint(folder)


def test_random_damage_never_ends_in_another_error(tmp_path):
    rng = np.random.default_rng(0)
    file = tiny.hf_checkpoint(tmp_path, "mixtral", layers=1, experts=2) / "model.safetensors"
    original = file.read_bytes()
    length = int.from_bytes(original[:8], "little")
    for _ in range(200):
        data = bytearray(original)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(0, 8 + length)] = rng.integers(0, 256)
        file.write_bytes(data)
        with contextlib.suppress(CheckpointError, OSError):
            open_checkpoint(tmp_path).close()

"""Quantized checkpoints as the hub has them, against their formulas: one weight after another."""

import json
import re

import numpy as np
import pytest
import tiny
from naive_formats import E4M3

from tiered import Engine
from tiered.formats import CheckpointError, open_checkpoint
from tiered.quantizing.quantize import Recipe, quantize

GROUP = 32
LINEAR = re.compile(r".*\.(\w+_proj\w*|w[123])")


class Integers:
    """A matrix [rows, columns] as scale * (code - zero), with a scale and zero per group."""

    def __init__(self, values, bits=4, symmetric=True, group=GROUP, order=None):
        rows, columns = values.shape
        self.order = np.arange(columns) // group if order is None else order
        num_groups = columns // group
        self.scales = np.zeros((rows, num_groups), np.float32)
        self.zeros = np.full((rows, num_groups), 1 << (bits - 1))
        for g in range(num_groups):
            chosen = values[:, self.order == g]
            largest = np.abs(chosen).max(axis=1) / ((1 << (bits - 1)) - 1)
            self.scales[:, g] = largest.astype(np.float16)
            if not symmetric:
                self.zeros[:, g] += np.arange(rows) % 5 - 2
        scale, zero = self.scales[:, self.order], self.zeros[:, self.order]
        self.codes = np.clip(np.rint(values / scale) + zero, 0, (1 << bits) - 1).astype(np.int64)
        self.values = scale.astype(float) * (self.codes - zero)
        self.bits = bits

    def words(self, codes, axis):
        """int32, the first of the codes along `axis` in the lowest bits."""
        codes = np.moveaxis(codes, axis, -1)
        per_word = 32 // self.bits
        out = np.zeros((*codes.shape[:-1], codes.shape[-1] // per_word), np.int64)
        for index in range(codes.shape[-1]):
            out[..., index // per_word] |= codes[..., index] << (self.bits * (index % per_word))
        return np.moveaxis(out.astype(np.uint32).view(np.int32), -1, axis)


def gptq(values, bits=4, symmetric=True, any_order=False, version="gptq", group=GROUP):
    columns = values.shape[1]
    order = np.random.default_rng(3).permutation(columns) // GROUP if any_order else None
    w = Integers(values, bits, symmetric, group, order)
    stored_zeros = w.zeros - (version == "gptq")
    return w.values, {
        "qweight": w.words(w.codes.T, 0),
        "qzeros": w.words(stored_zeros.T, 1),
        "scales": w.scales.T,
        "g_idx": w.order.astype(np.int32),
    }


def awq(values, group=GROUP):
    w = Integers(values, symmetric=False, group=group)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])

    def words(codes):  # [columns, rows]
        eights = codes.reshape(len(codes), -1, 8)[:, :, order]
        return w.words(eights.reshape(codes.shape), 1)

    return w.values, {
        "qweight": words(w.codes.T), "qzeros": words(w.zeros.T), "scales": w.scales.T
    }  # fmt: skip


def compressed(values, bits=4, symmetric=True, any_order=False, group=GROUP):
    columns = values.shape[1]
    group = columns if group is None else group
    order = np.random.default_rng(4).permutation(columns) // group if any_order else None
    w = Integers(values, bits, symmetric, group, order)
    parts = {
        "weight_packed": w.words(w.codes, 1),
        "weight_scale": w.scales,
        "weight_shape": np.array(values.shape, np.int64),
    }
    if not symmetric:
        parts["weight_zero_point"] = w.words(w.zeros, 0)
    if any_order:
        parts["weight_g_idx"] = w.order.astype(np.int32)
    return w.values, parts


# bitsandbytes' create_normal_map.
NF4 = np.array([-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0,
                0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684,
                1])  # fmt: skip


def nf4(values, nested=False):
    blocks = values.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": values.shape}
    parts = {"weight.quant_map": NF4.astype(np.float32)}
    if nested:  # 8 bits in blocks of 8, though bitsandbytes makes blocks of 256
        offset = absmax.mean()
        table = np.linspace(-1, 1, 256).astype(np.float32)
        less = np.pad(absmax - offset, (0, -len(absmax) % 8)).reshape(-1, 8)
        scales = np.abs(less).max(axis=1)
        codes = np.abs((less / scales[:, None])[:, :, None] - table).argmin(axis=2)
        codes = codes.reshape(-1)[: len(absmax)].astype(np.uint8)
        absmax = table[codes] * np.repeat(scales, 8)[: len(absmax)] + offset
        parts |= {"weight.nested_absmax": scales, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": float(offset)}
    parts["weight.absmax"] = codes if nested else absmax
    found = np.abs((blocks / absmax[:, None])[:, :, None] - NF4).argmin(axis=2).reshape(-1)
    parts["weight"] = (found[0::2] << 4 | found[1::2]).astype(np.uint8).reshape(-1, 1)
    parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(
        json.dumps(state).encode(), np.uint8
    )
    return (NF4[found].reshape(-1, 64) * absmax[:, None]).reshape(values.shape), parts


def int8(values):
    scale = (np.abs(values).max(axis=1, keepdims=True) / 127).astype(np.float16)
    codes = np.rint(values / scale).astype(np.int8)
    return codes * scale.astype(float), {"weight": codes, "weight_scale": scale}


def float8(values, size=None, part="weight_scale_inv"):
    """With a scale for each square of `size`, for each row (None), or for all (0)."""
    rows, columns = values.shape
    if size:
        scale = np.zeros((-(-rows // size), -(-columns // size)), np.float32)
        for i, j in np.ndindex(scale.shape):
            square = values[i * size : (i + 1) * size, j * size : (j + 1) * size]
            scale[i, j] = np.abs(square).max() / 448
        spread = scale[np.arange(rows) // size][:, np.arange(columns) // size]
    else:
        largest = (
            np.abs(values).max(axis=1, keepdims=True) if size is None else np.abs(values).max()
        )
        scale = spread = np.float32(largest / 448).reshape(-1, *[1] * (size is None))
    table = np.where(np.isnan(E4M3), np.inf, E4M3)
    codes = np.abs((values / spread)[:, :, None] - table).argmin(axis=2).astype(np.uint8)
    return E4M3[codes] * spread, {"weight as F8_E4M3": codes, part: scale}


def _nf4_settings(**more):
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **more
    }  # fmt: skip


def _gptq_settings(**more):
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, **more}


def _compressed_settings(kind="int", bits=4, symmetric=True, **more):
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, **more}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }


FORMS = {
    "gptq": (gptq, {}, _gptq_settings()),
    "gptq-zeros": (
        gptq, dict(symmetric=False, version="gptq_v2"),
        _gptq_settings(sym=False, checkpoint_format="gptq_v2"),
    ),
    "gptq-order": (gptq, dict(any_order=True), _gptq_settings(desc_act=True)),
    "gptq-128": (gptq, dict(group=128), _gptq_settings(group_size=128)),
    "gptq-zeros-128": (
        gptq, dict(symmetric=False, group=128), _gptq_settings(sym=False, group_size=128)
    ),
    "gptq-8": (gptq, dict(bits=8), _gptq_settings(bits=8)),
    "awq": (awq, {}, {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}),
    "awq-128": (awq, dict(group=128), {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "int4": (compressed, {}, _compressed_settings()),
    "int4-256": (compressed, dict(group=256), _compressed_settings()),
    "int4-zeros-128": (
        compressed, dict(symmetric=False, group=128), _compressed_settings(symmetric=False)
    ),
    "int4-rows": (compressed, dict(group=None), _compressed_settings()),
    "int4-zeros": (compressed, dict(symmetric=False), _compressed_settings(symmetric=False)),
    "int4-order": (
        compressed, dict(symmetric=False, any_order=True), _compressed_settings(symmetric=False)
    ),
    "nf4": (nf4, {}, _nf4_settings()),
    "nf4-nested": (nf4, dict(nested=True), _nf4_settings(bnb_4bit_use_double_quant=True)),
    "int8-packed": (compressed, dict(bits=8), _compressed_settings(bits=8)),
    "int8": (int8, {}, _compressed_settings(bits=8)),
    "float8-rows": (float8, dict(part="weight_scale"), _compressed_settings("float", 8)),
    "float8-one": (
        float8, dict(size=0, part="weight_scale"), {"quant_method": "fp8"},
    ),
    "fp8": (float8, dict(size=48), {"quant_method": "fp8", "weight_block_size": [48, 48]}),
}  # fmt: skip
# How far a weight may be off: of the largest in its matrix. Blocks with a minimum round it to a
# float16, and FP8's products are rounded to BF16.
TOLERANCE = {"q4_1": 2**-10, "bf16": 2**-8, "f16": 2**-11, "q4_0": 1e-7, "q8_0": 1e-7}
TOLERANCE["int4_g128"] = 0  # products of a float16 with a small integer are exact
TOLERANCE["nf4"] = 0.0039 + 2**-11  # NF4 as integers, and their scale as a float16
# Rows of 384 values are three blocks of 128: the last is half a chunk of the kernels.
WIDE = dict(hidden=384, head_dim=64, heads=4, expert_size=128, ffn_size=256)
WIDE_GROUPS = {"int4-256": dict(WIDE, hidden=512, expert_size=256)}


def sizes_of(form):
    return WIDE_GROUPS.get(form, WIDE if form.endswith("128") else {})


def checkpoint(folder, form, change=None, model_type="qwen3_moe"):
    """(quantized folder, folder with the same weights as float32)."""
    quantize, options, settings = FORMS[form]
    sizes = sizes_of(form)
    config = tiny.hf_config(model_type, **sizes)
    weights = {w.hf: w.values for w in tiny.weights(model_type, 0, False, **sizes) if w.hf}
    plain, stored = dict(weights), {}
    for name, values in weights.items():
        module, _, last = name.rpartition(".")
        if last == "weight" and LINEAR.fullmatch(module):
            plain[name], parts = quantize(values.astype(np.float32), **options)
            stored |= {f"{module}.{part}": value for part, value in parts.items()}
        else:
            stored[name] = values
    if change:
        change(stored)
    for path, tensors, more in (
        (folder / "quantized", stored, {"quantization_config": settings}),
        (folder / "plain", plain, {}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | more))
        tiny.write_safetensors(path / "model.safetensors", tensors, "f32")
    return folder / "quantized", folder / "plain"


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_what_the_formula_says(form, tmp_path):
    quantized, plain = checkpoint(tmp_path, form)
    with open_checkpoint(quantized) as ours, open_checkpoint(plain) as expected:
        assert ours.tensors.keys() == expected.tensors.keys()
        formats = set()
        for name in ours.tensors:
            a, b = ours.float32(name), expected.float32(name)
            format = ours.tensors[name].format
            formats.add(format)
            assert np.abs(a - b).max() <= TOLERANCE.get(format, 0) * np.abs(b).max(), name
        assert len(formats) == 2 and "f32" in formats
        assert ("int4_g128" in formats) == bool(sizes_of(form))


@pytest.mark.parametrize("form", FORMS)
def test_the_engine_computes_with_them(form, tmp_path):
    quantized, plain = checkpoint(tmp_path, form)
    ids = list(range(1, 20))
    with Engine(plain, quantize="none", kv_dtype="f32", threads=2) as engine:
        expected = engine.logits(ids)
    results = []
    for options in ({"quantize": "none"}, {"quantize": "none", "expert_ram": 500_000}):
        with Engine(quantized, kv_dtype="f32", threads=2, **options) as engine:
            results.append(engine.logits(ids))
    assert (results[0] == results[1]).all()
    assert np.abs(results[0] - expected).max() <= 0.02 * np.ptp(expected)


@pytest.mark.parametrize("model_type", tiny.ARCHITECTURES)
def test_every_architecture_has_them(model_type, tmp_path):
    """Their names and layouts do not matter: what rows are of, and what is fused or shared."""
    quantized, plain = checkpoint(tmp_path, "int4", model_type=model_type)
    with open_checkpoint(quantized) as ours, open_checkpoint(plain) as expected:
        assert ours.tensors.keys() == expected.tensors.keys()
        assert "q4_0" in {tensor.format for tensor in ours.tensors.values()}
        for name in ours.tensors:
            a, b = ours.float32(name), expected.float32(name)
            assert np.abs(a - b).max() <= TOLERANCE["q4_0"] * np.abs(b).max(), name


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_attention_of_other_kinds_computes_with_them(model_type, tmp_path):
    logits = []
    for path in checkpoint(tmp_path, "int4", model_type=model_type):
        with Engine(path, quantize="none", kv_dtype="f32", threads=2) as engine:
            logits.append(engine.logits(list(range(1, 20))))
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.ptp(logits[1])


def test_gguf_gets_dense_weights_in_8_bits_where_it_lacks_their_format(tmp_path):
    quantized, _ = checkpoint(tmp_path, "gptq-128")
    tiny.write_tokenizer(quantized, tiny.SIZES["vocab"])
    quantize(quantized, tmp_path / "after.gguf", Recipe(method="rtn"))
    with open_checkpoint(quantized) as before, open_checkpoint(tmp_path / "after.gguf") as after:
        assert before.tensors["layers.1.o"].format == "int4_g128"
        assert after.tensors["layers.1.o"].format == "q8_0"
        a, b = before.float32("layers.1.o"), after.float32("layers.1.o")
    assert np.abs(a - b).max() <= np.abs(a).max() / 127


def _first(stored, part):
    return next(name for name in stored if name.endswith(part))


def without(part):
    return lambda stored: stored.pop(_first(stored, part))


def replaced(part, new):
    def change(stored):
        name = _first(stored, part)
        stored[name] = new(stored[name])

    return change


def _state(stored, **changes):
    text = json.dumps(json.loads(stored.tobytes()) | changes)
    return np.frombuffer(text.encode(), np.uint8)


BROKEN = {
    "no scales": ("gptq", without(".scales"), "'.*qweight' has no 'scales' beside it"),
    "no zeros": ("int4-zeros", without(".weight_zero_point"), "has no 'weight_zero_point'"),
    "short": ("gptq", replaced(".qzeros", lambda z: z[:, 1:]), r"qzeros' is I32 .* must be I32"),
    "other type": ("awq", replaced(".qweight", lambda w: w.astype(np.int64)), "is I64"),
    "small groups": (
        "awq", lambda s: [s.update({n: np.repeat(s[n], 2, axis=0)}) for n in list(s)
                          if n.endswith(("scales", "qzeros"))], "multiples of 32"),
    "squares": ("fp8", replaced(".weight_scale_inv", lambda s: s[:, :1]), "is F32|is f32"),
    "no absmax": ("nf4", without(".absmax"), "has no 'absmax' beside it"),
    "other blocks": ("nf4", replaced("__nf4", lambda s: _state(s, blocksize=128)), "'blocksize'"),
    "other shape": ("nf4", replaced("__nf4", lambda s: _state(s, shape=[2, 3])), "'shape' is"),
    "other sizes": ("nf4", replaced("__nf4", lambda s: _state(s, shape=[2, 64])), "must be U8"),
    "no offset": (
        "nf4-nested", replaced("__nf4", lambda s: _state(s, nested_offset="x")), "a number"
    ),
    "holes": ("nf4", replaced("__nf4", np.zeros_like), "the weights are not all there"),
    "flat": ("fp8", replaced(".weight as F8_E4M3", lambda w: w.reshape(-1)), "must be F8_E4M3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pieces_are_named(name, tmp_path):
    form, change, message = BROKEN[name]
    quantized, _ = checkpoint(tmp_path, form, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(quantized)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("gptq", replaced(".qzeros", lambda z: z + 1), "says that weights are symmetric"),
        ("gptq-order", replaced(".g_idx", lambda g: g + 1), "names a group that is not there"),
    ],
)
def test_what_only_the_values_tell_is_named_when_they_are_read(form, change, message, tmp_path):
    quantized, _ = checkpoint(tmp_path, form, change)
    with open_checkpoint(quantized) as opened, pytest.raises(CheckpointError, match=message):
        for name in opened.tensors:
            opened.data(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (_gptq_settings(bits=3), "'bits' is 3, but must be 4 or 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'version' is 'gemv'"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "two whole numbers"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": 1}}, "an object with"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "several kinds"),
        (_nf4_settings(load_in_4bit=False, load_in_8bit=True), "NF4 is what is read"),
        (_nf4_settings(bnb_4bit_quant_type="fp4"), "'bnb_4bit_quant_type' is 'fp4'"),
        ({"quant_method": "quanto"}, "supported: awq, bitsandbytes, compressed_tensors, fp8, gptq"),
    ],
)
def test_settings_that_are_not_supported(settings, message, tmp_path):
    folder = tiny.hf_checkpoint(tmp_path, config={"quantization_config": settings})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)

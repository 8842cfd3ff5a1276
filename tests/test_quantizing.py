"""Quantizing: blocks that lose little, GPTQ by the book, formats by need, and whole files."""

import itertools
import json
import shutil

import numpy as np
import pytest
import tiny
from naive_formats import to_float64
from pack import pack as plain_pack

from cpu_kernels.formats import FORMATS
from cpu_kernels.rounding import nearest_codes
from tiered import Engine
from tiered.formats import CheckpointError, open_checkpoint
from tiered.quantizing.allocation import Option, Unit, allocate, lower_hull
from tiered.quantizing.grids import GRIDS, fit, fitting_formats, round_to
from tiered.quantizing.inputs import Inputs, activated, expert_inputs
from tiered.quantizing.layer import METHODS
from tiered.quantizing.quantize import Recipe, quantize
from tiered.quantizing.rewritten import Rewritten
from tiered.quantizing.rounding import Hessian, damped, inverse, round_gptq, round_nearest
from tiered.quantizing.scaling import best_scale, divide_inputs, scaled_error
from tiered.quantizing.walk import Given
from tiered.source import MappedExperts
from tiered.store import ExpertStore
from tiered.weights.dequantize import dequantize
from tiered.weights.loader import WeightLoader

IDS = np.random.default_rng(0).integers(3, 300, 600).tolist()
SPARSE = [name for name in tiny.ARCHITECTURES if name != "llama"]
HF_TO_GGUF = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
FAST = dict(window=64, threads=2)


def weights(rows, columns, seed=0):
    """Normal values, a few of them large."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, columns)) * 0.05
    values[random.random(values.shape) < 0.01] *= 6
    return values.astype(np.float32)


def inputs(num_tokens, columns, seed=1):
    """Correlated, and larger in some columns than in others."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((num_tokens, columns // 4)) @ random.standard_normal(
        (columns // 4, columns)
    )
    rows = mixed + 0.5 * random.standard_normal((num_tokens, columns))
    return Inputs(
        (rows * np.exp(random.standard_normal(columns))).astype(np.float32),
        np.ones(num_tokens, np.float32),
    )


def values_of(data, format, shape):
    return dequantize(np.ascontiguousarray(data).reshape(-1), format, shape)


# --- number formats ---


@pytest.mark.parametrize("format", GRIDS)
def test_no_more_is_lost_than_by_the_plain_way(format):
    values = weights(24, 512)
    data = round_nearest(values, format, np.ones(512, np.float32))
    assert data.shape == (24, FORMATS[format].row_bytes(512)) and data.dtype == np.uint8
    lost, plain = (
        np.square(values_of(d, format, values.shape) - values).sum()
        for d in (data, plain_pack(values, format))
    )
    assert 0 < lost <= plain


@pytest.mark.parametrize("format", [name for name in GRIDS if name != "iq4_nl"])
def test_the_bytes_are_what_was_chosen(format):
    """gguf's own decoder, or the slow one of what is not ggml's, reads what ours reads."""
    values = weights(8, 256)
    data = round_nearest(values, format, np.ones(256, np.float32))
    theirs = to_float64(data, format, values.shape)
    scales = fit(format, values, np.ones(256, np.float32))
    chosen = values.copy()
    round_to(format, scales, chosen)
    assert np.allclose(theirs, chosen, rtol=1e-6, atol=1e-8)
    assert np.allclose(values_of(data, format, values.shape), chosen, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("format", GRIDS)
def test_each_value_gets_its_nearest_code(format):
    values = weights(8, 256, seed=3)
    scales = fit(format, values, np.ones(256, np.float32))
    chosen, groups = values.copy(), scales.scale.shape[1]
    codes = round_to(format, scales, chosen)
    levels = np.array(GRIDS[format].levels, np.float32)
    scale, minimum = (np.repeat(s, 256 // groups, axis=1) for s in (scales.scale, scales.minimum))
    all_values = levels * scale[:, :, None] + minimum[:, :, None]
    assert np.array_equal(chosen, np.take_along_axis(all_values, codes[:, :, None], 2)[:, :, 0])
    distances = np.abs(all_values - values[:, :, None]).min(axis=2)
    assert np.all(np.abs(chosen - values) <= distances * (1 + 1e-4) + 1e-7)


@pytest.mark.parametrize("format", GRIDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e3])
def test_extreme_scales_and_zeros(format, scale):
    values = weights(4, 256) * np.float32(scale)
    values[1] = 0
    values[2, 17:] = 0
    got = values_of(round_nearest(values, format, np.ones(256, np.float32)), format, values.shape)
    assert np.isfinite(got).all() and not got[1].any()
    # Float16 has no scales below 6e-8, and a block's are up to 127 times that.
    assert np.abs(got - values).max() <= np.abs(values).max() + 6e-8 * 127


def test_zeros_of_values_that_lie_together():
    """Far from 0, where a zero as float16 would be wrong by many steps, or infinite."""
    values = weights(6, 128) * np.float32(1e-3)
    values[0], values[1], values[2] = 0.5, -0.5, 0
    values[3:] += np.array([[5], [-5], [0.01]], np.float32)
    data = round_nearest(values, "int4_g128", np.ones(128, np.float32))
    got = values_of(data, "int4_g128", values.shape)
    assert np.array_equal(got[:3], values[:3])
    spread = np.abs(values - values.mean(axis=1, keepdims=True)).max(axis=1)
    assert np.all(np.abs(got - values).max(axis=1) <= 2 * spread + np.abs(values[:, 0]) * 2**-10)


@pytest.mark.parametrize("format", GRIDS)
def test_the_table_of_the_nearest(format):
    levels = np.array(GRIDS[format].levels)
    table = nearest_codes(levels)
    values = levels[0] + (np.arange(len(table)) + 0.5) / 4
    assert np.array_equal(table, np.abs(values[:, None] - levels).argmin(axis=1))


def test_importance_moves_the_error():
    values, importance = weights(64, 32), np.ones(32, np.float32)
    importance[:4] = 1000
    even, uneven = (
        values_of(round_nearest(values, "q4_0", i), "q4_0", values.shape) - values
        for i in (np.ones(32, np.float32), importance)
    )
    assert np.square(uneven[:, :4]).sum() < 0.7 * np.square(even[:, :4]).sum()
    assert np.square(uneven).sum() > np.square(even).sum()


def test_formats_that_fit():
    assert {f.name for f in fitting_formats(64)} == {
        n for n in GRIDS if FORMATS[n].block_size <= 64
    }
    assert {f.name for f in fitting_formats(256)} == set(GRIDS)
    bits = [f.bits for f in fitting_formats(256)]
    assert bits == sorted(bits)


# --- GPTQ ---


@pytest.mark.parametrize("size", [1, 5, 64, 65, 200])
def test_inverse_of_a_triangle(size):
    random = np.random.default_rng(size)
    lower = np.tril(random.standard_normal((size, size)) * 0.1) + np.eye(size)
    assert np.allclose(inverse(lower) @ lower, np.eye(size), atol=1e-9)


def plain_gptq(values, format, given):
    """The paper's loop in float64: a column, and all later ones at once."""
    block = FORMATS[format].block_size
    hessian = Hessian(given.rows, given.weights)
    order = hessian.ordered(block)[0]
    matrix = hessian.matrix.astype(np.float64)
    matrix += 0.01 * matrix.diagonal().mean() * np.eye(len(matrix))
    factor = np.linalg.cholesky(np.linalg.inv(matrix[np.ix_(order, order)])).T
    left, result = values[:, order].astype(np.float64), np.empty_like(values, np.float64)
    for start in range(0, len(order), block):
        own = slice(start, start + block)
        scales = fit(format, left[:, own].astype(np.float32), hessian.diagonal[order][own])
        group = block // scales.scale.shape[1]
        for column in range(start, start + block):
            at = (column - start) // group
            scale, minimum = scales.scale[:, at], scales.minimum[:, at]
            steps = np.array(GRIDS[format].levels) * scale[:, None] + minimum[:, None]
            nearest = np.abs(steps - left[:, column, None]).argmin(axis=1)
            chosen = steps[np.arange(len(steps)), nearest]
            error = (left[:, column] - chosen) / factor[column, column]
            result[:, column] = chosen
            left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return result[:, np.argsort(order)]


@pytest.mark.parametrize(
    "format, columns",
    [("q4_0", 320), ("mxfp4", 64), ("nf4", 192), ("int4_g128", 384), ("q4_k", 768)],
)
def test_gptq_is_the_papers(format, columns):
    values, given = weights(16, columns), inputs(2 * columns, columns)
    got = values_of(round_gptq(values, format, given.hessian), format, values.shape)
    expected = plain_gptq(values, format, given)
    # A value half-way between two codes may go either way, and later ones follow it.
    same = np.abs(got - expected) <= 1e-5 + 1e-3 * np.abs(expected)
    assert same.mean() > 0.9
    errors = [np.square(given.rows @ (e - values).T).sum() for e in (got, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize(
    "format", ["q4_0", "iq4_nl", "q4_1", "mxfp4", "nf4", "int4_g128", "q2_k", "q6_k"]
)
def test_gptq_keeps_the_product(format):
    values, given = weights(64, 512), inputs(700, 512)
    nearest, gptq = (
        np.square(given.rows @ (values_of(data, format, values.shape) - values).T).sum()
        for data in (
            round_nearest(values, format, given.importance),
            round_gptq(values, format, given.hessian),
        )
    )
    assert gptq < 0.6 * nearest


def test_gptq_of_inputs_that_are_alike_rounds_to_the_nearest():
    given = Inputs(np.eye(128, dtype=np.float32), np.ones(128, np.float32))
    values = weights(8, 128)
    data = round_gptq(values, "q4_0", given.hessian)
    assert np.array_equal(data, round_nearest(values, "q4_0", given.importance))


def test_gptq_of_inputs_that_say_nothing():
    values = weights(8, 128)
    for rows in (np.zeros((3, 128)), np.ones((1, 128))):
        given = Inputs(rows.astype(np.float32), np.ones(len(rows), np.float32))
        got = values_of(round_gptq(values, "q8_0", given.hessian), "q8_0", values.shape)
        assert np.abs(got - values).max() < 0.1


# --- what goes into experts ---


def test_rare_experts_get_other_tokens_too():
    random = np.random.default_rng(0)
    given = Given(
        random.standard_normal((10, 4)).astype(np.float32),
        np.arange(20) // 2,
        np.array([0, 1] * 9 + [0, 2], np.int32),
        np.linspace(0.9, 0.1, 20, dtype=np.float32),
    )
    got, count = expert_inputs(given, 2, 0)
    assert count == 1 and np.array_equal(got.rows, given.inputs[9:])
    got, count = expert_inputs(given, 2, 8)
    assert count == 1 and got.rows.shape == (8, 4)
    assert np.array_equal(got.rows[0], given.inputs[9])
    assert got.weights[0] == given.weights[19] and np.all(got.weights[1:] == given.weights.min())
    got, count = expert_inputs(given, 0, 8)
    assert count == 10 and len(got.rows) == 10


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "gemma4"])
def test_activations_are_the_models(model_type, tmp_path):
    from naive import gated

    with open_checkpoint(tiny.hf_checkpoint(tmp_path / "m", model_type)) as checkpoint:
        config = checkpoint.config
    gate, up = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32) * 5
    assert np.allclose(activated(config, gate, up), gated(gate, up, config), atol=1e-5)


def test_scaling_helps_columns_with_large_inputs():
    values, given = weights(64, 128), inputs(300, 128)
    scale = best_scale([(values, given)], "q4_0")
    plain = scaled_error(values, given, "q4_0", np.ones(128, np.float32))
    assert scaled_error(values, given, "q4_0", scale) < plain
    size = np.sqrt(given.importance)
    assert np.corrcoef(np.log(scale), np.log(size))[0, 1] > 0.9


def test_scaled_columns_are_rounded_by_gptq():
    """Scales first, then GPTQ on the scaled columns: better than either alone."""
    values, given = weights(64, 256), inputs(600, 256)
    scale = best_scale([(values, given)], "q4_0")
    errors = {}
    for name, by in (("awq", scale), ("gptq", np.ones(256, np.float32)), ("awq+gptq", scale)):
        data = METHODS[name].round(values * by, "q4_0", given.divided(by))
        lost = values_of(data, "q4_0", values.shape) / by - values
        errors[name] = float(np.square(given.rows @ lost.T).sum())
    assert errors["awq+gptq"] < min(errors["awq"], errors["gptq"])


def test_importance_is_never_nothing():
    assert damped(np.array([0.0, 1.0], np.float32)).min() > 0
    assert damped(np.zeros(3, np.float32)).min() > 0


# --- which part gets how many bits ---


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_of_the_same_size_is_better(seed):
    random = np.random.default_rng(seed)
    options = {
        Unit(i, "down"): [
            Option(f"f{j}", nbytes, float(loss))
            for j, (nbytes, loss) in enumerate(
                zip(random.integers(1, 30, 4).tolist(), random.random(4), strict=True)
            )
        ]
        for i in range(4)
    }
    least = sum(min(o.nbytes for o in choices) for choices in options.values())
    budget = least + int(random.integers(0, 60))
    chosen = allocate(options, budget)
    picked = [next(o for o in options[u] if o.format == chosen[u]) for u in options]
    size, loss = sum(o.nbytes for o in picked), sum(o.loss for o in picked)
    assert size <= budget
    others = [c for c in itertools.product(*options.values()) if sum(o.nbytes for o in c) <= budget]
    best = min(sum(o.loss for o in c) for c in others)
    # Greedy steps leave a gap of at most one step's gain.
    gaps = [a.loss - b.loss for c in options.values() for a, b in itertools.pairwise(lower_hull(c))]
    assert best - 1e-12 <= loss <= best + max(gaps, default=0)


def test_a_size_that_cannot_be():
    with pytest.raises(ValueError, match="smallest choice takes 10 bytes, more than 9"):
        allocate({Unit(0, "down"): [Option("a", 10, 1.0), Option("b", 20, 0.5)]}, 9)


def test_the_hull():
    options = [Option("a", 4, 1.0), Option("b", 5, 0.9), Option("c", 6, 0.2), Option("d", 8, 0.3)]
    assert [o.format for o in lower_hull(options)] == ["a", "c"]


# --- whole models ---


def source(folder, model_type="mixtral", **options):
    return tiny.hf_checkpoint(folder / "source", model_type, tokenizer=True, **options)


def check_rest(before, after, changed=()):
    """Routers, norms and embeddings as they were; large matrices in 8 bits."""
    with open_checkpoint(before) as old, open_checkpoint(after) as new:
        for name, tensor in old.tensors.items():
            if ".experts." in name or name.endswith(changed):
                continue
            if new.tensors[name].format != tensor.format:
                assert new.tensors[name].format == "q8_0"
            else:
                assert np.array_equal(new.data(name), old.data(name))


@pytest.mark.parametrize("method", ["rtn", "weighted", "gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("format", ["int4_g128", "nf4"])
def test_formats_that_gguf_lacks(format, method, tmp_path):
    sizes = dict(hidden=384, head_dim=64, expert_size=128, experts=4)
    before, after = source(tmp_path, "mixtral", **sizes), tmp_path / "after"
    result = quantize(before, after, Recipe(method=method, format=format, **FAST), IDS)
    assert result.bits == 4.25
    with Engine(before, quantize="none", threads=1) as exact, Engine(after, threads=1) as other:
        assert other.store.layout(0).down.format == format
        expected, got = exact.logits(IDS[:8]), other.logits(IDS[:8])
    assert 0 < np.median(np.abs(got - expected)) <= 0.05 * np.ptp(expected)


@pytest.mark.parametrize("format", ["int4_g128", "nf4"])
def test_gguf_is_told_apart(format, tmp_path):
    before = source(tmp_path, "mixtral", hidden=128, head_dim=32, expert_size=128)
    for recipe in (Recipe(method="rtn", format=format), Recipe(bits=4.3, formats=(format, "q4_0"))):
        with pytest.raises(ValueError, match=f"GGUF has no {format}; write a store instead"):
            quantize(before, tmp_path / "after.gguf", recipe, IDS)
    assert set(tmp_path.iterdir()) == {before}
    recipe = Recipe(method="weighted", bits=4.3, sensitivity_tokens=64, **FAST)
    for name, own in (("after.gguf", set()), ("after", {"int4_g128", "nf4"})):
        result = quantize(before, tmp_path / name, recipe, IDS)
        candidates = {option.format for options in result.options.values() for option in options}
        assert candidates & {"int4_g128", "nf4"} == own


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
@pytest.mark.parametrize("model_type", SPARSE)
def test_eight_bits_say_nearly_the_same(model_type, method, tmp_path):
    before, after = source(tmp_path, model_type), tmp_path / "after"
    result = quantize(before, after, Recipe(method=method, format="q8_0", **FAST), IDS)
    assert result.bits == 8.5 and set(tmp_path.iterdir()) == {before, after}
    if method != "awq":
        check_rest(before, after)
    with open_checkpoint(after) as checkpoint:
        layer = checkpoint.config.sparse_layers[0]
        assert checkpoint.tensors[f"layers.{layer}.experts.1.down"].format == "q8_0"
    with Engine(before, quantize="none", threads=1) as exact, Engine(after, threads=1) as other:
        expected, got = exact.logits(IDS[:8]), other.logits(IDS[:8])
    # Where two experts are equally good, a token may go the other way.
    assert np.median(np.abs(got - expected)) <= 0.02 * np.ptp(expected)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "granitemoehybrid"])
def test_scaling_alone_changes_nothing(model_type, tmp_path):
    """Norm, router and shared expert make good for it: the rest of the arithmetic is the same."""
    before = source(tmp_path, model_type, dtype="f32")
    scale = np.exp(np.random.default_rng(0).standard_normal(64)).astype(np.float32)
    with Engine(before, quantize="none", threads=1) as engine:
        expected = engine.logits(IDS[:20])
    (tmp_path / "scratch").mkdir()
    with Engine(before, quantize="none", threads=1) as engine:
        changed = Rewritten(engine.checkpoint, tmp_path / "scratch")
        for layer in engine.config.sparse_layers:
            divide_inputs(changed, layer, scale)
            for expert in range(engine.config.num_experts):
                for part in ("gate", "up"):
                    name = f"layers.{layer}.experts.{expert}.{part}"
                    changed.rewrite(name, changed.float32(name) * scale)
        store = ExpertStore(changed, "none")
        loader = WeightLoader(changed, engine.backend, "none")
        engine.decoder.layers = [loader.layer(i, store) for i in range(engine.config.num_layers)]
        engine.decoder.source = MappedExperts(store)
        got = engine.logits(IDS[:20])
        store.close()
        changed.close()
    assert np.abs(got - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("model_type", SPARSE)
def test_of_gguf_everything_else_stays(model_type, tmp_path):
    before = tiny.gguf_checkpoint(tmp_path / "before.gguf", model_type, "bf16")
    after = tmp_path / "after.gguf"
    quantize(before, after, Recipe(format="iq4_nl", **FAST), IDS)
    check_rest(before, after)
    with open_checkpoint(before) as old, open_checkpoint(after) as new:
        assert new.config == old.config
        assert {k for k in old.metadata if k not in new.metadata} <= {"general.file_type"}
        assert dict(new.tokenizer_source) == dict(old.tokenizer_source)
    with Engine(after, threads=1) as engine:
        assert engine.store.layout(engine.config.sparse_layers[0]).up.format == "iq4_nl"
        assert np.isfinite(engine.logits(IDS[:8])).all()


@pytest.mark.parametrize("model_type", HF_TO_GGUF)
def test_gguf_of_a_folder_is_the_same_model_as_its_store(model_type, tmp_path):
    before = source(tmp_path, model_type)
    for name in ("store", "model.gguf"):
        quantize(before, tmp_path / name, Recipe(format="q5_1", **FAST), IDS)
    text = "the rain 123 don't  \n 你好"
    with (
        Engine(tmp_path / "store", threads=1) as store,
        Engine(tmp_path / "model.gguf", threads=1) as file,
    ):
        ids = store.tokenizer.encode(text)
        assert file.tokenizer.encode(text) == ids and file.eos_ids == store.eos_ids
        expected, got = store.logits(IDS[:30]), file.logits(IDS[:30])
        assert np.abs(got - expected).max() <= 0.02 * np.ptp(expected)


def test_quantized_files_can_be_quantized_again(tmp_path):
    before = tiny.gguf_checkpoint(tmp_path / "before.gguf", "qwen3_moe", "q8_0")
    quantize(before, tmp_path / "after.gguf", Recipe(**FAST), IDS)
    with open_checkpoint(tmp_path / "after.gguf") as checkpoint:
        assert checkpoint.tensors["layers.0.experts.0.up"].format == "q4_0"
        assert checkpoint.tensors["layers.0.q"].format == "q8_0"


@pytest.mark.parametrize("bits", [4.5, 5.2, 7.0])
def test_a_size_is_kept(bits, tmp_path):
    before, after = source(tmp_path, "olmoe"), tmp_path / "after"
    recipe = Recipe(method="weighted", bits=bits, sensitivity_tokens=128, **FAST)
    result = quantize(before, after, recipe, IDS)
    assert bits - 0.9 < result.bits <= bits
    with open_checkpoint(after) as checkpoint:
        sizes = [t.nbytes for n, t in checkpoint.tensors.items() if ".experts." in n]
    assert 8 * sum(sizes) / (2 * 8 * 3 * 64 * 64) == pytest.approx(result.bits)
    # More bits never cost more.
    for options in result.options.values():
        by_bits = sorted(options, key=lambda o: FORMATS[o.format].bits)
        assert by_bits[0].loss > by_bits[-1].loss >= 0


def test_the_same_again(tmp_path):
    before = source(tmp_path)
    for name, threads in (("a.gguf", 1), ("b.gguf", 2)):
        quantize(before, tmp_path / name, Recipe(window=64, threads=threads), IDS)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# --- refusals, and nothing half-written ---


class Stop:
    """Interrupts at the `number`-th report of `what`; counts the layers that were begun."""

    def __init__(self, what="", number=0):
        self.what, self.number, self.layers = what, number, []

    def __call__(self, what, done, total):
        if what == "rounding" and done < total:
            self.layers.append(done)
        if what == self.what and done >= self.number:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "name, method, what, number",
    [
        ("after", "gptq", "sensitivity", 1),
        ("after.gguf", "awq", "rounding", 2),
        ("after", "rtn", "rounding", 2),
        ("after.gguf", "gptq", "writing", 1),
        ("after", "gptq", "writing", 1),
    ],
)
def test_what_was_interrupted_goes_on(tmp_path, name, method, what, number):
    before, recipe = source(tmp_path, layers=3), Recipe(method=method, bits=5.5, **FAST)
    with pytest.raises(KeyboardInterrupt):
        quantize(before, tmp_path / name, recipe, IDS, Stop(what, number))
    assert {path.name for path in tmp_path.iterdir()} == {before.name, f".{name}.quantizing"}
    for file in (tmp_path / f".{name}.quantizing").glob("*.gguf"):
        with pytest.raises((CheckpointError, OSError)):
            open_checkpoint(file)
    rest = Stop()
    again = quantize(before, tmp_path / name, recipe, IDS, rest)
    assert rest.layers == {"sensitivity": [0, 1, 2], "rounding": [2], "writing": []}[what]
    whole = quantize(before, tmp_path / f"whole-{name}", recipe, IDS)
    assert set(path.name for path in tmp_path.iterdir()) == {before.name, name, f"whole-{name}"}
    assert again == whole
    with (
        open_checkpoint(tmp_path / name) as one,
        open_checkpoint(tmp_path / f"whole-{name}") as other,
    ):
        for tensor in one.tensors:
            assert np.array_equal(one.data(tensor), other.data(tensor)), tensor


def test_what_something_else_left_is_kept(tmp_path):
    before, after = source(tmp_path), tmp_path / "after"
    with pytest.raises(KeyboardInterrupt):
        quantize(before, after, Recipe(method="rtn"), IDS, Stop("rounding", 1))
    with pytest.raises(ValueError, match="begun with another format: give the same command"):
        quantize(before, after, Recipe(method="rtn", format="q5_0"), IDS)
    with pytest.raises(ValueError, match="begun with another text"):
        quantize(before, after, Recipe(method="rtn"), IDS[::-1])
    rest = Stop()
    quantize(before, after, Recipe(method="rtn", threads=2), IDS, rest)
    assert rest.layers == [1]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the rain in Spain stays mainly in the plain, 1234. " * 40, encoding="utf-8")
    return file


def test_the_command(tmp_path, text, tiered):
    before, report = source(tmp_path), tmp_path / "report.json"
    options = "--text", text, "--window", 64, "--json", report
    status, _, err = tiered("quantize", before, tmp_path / "after", *options)
    assert status == 0 and "4.5 bits per weight" in err, err
    facts = json.loads(report.read_text())
    assert facts["formats"]["0"] == ["q4_0"] * 3 and facts["tokens"] > 100
    assert facts["bytes"] == sum(
        f.stat().st_size for f in (tmp_path / "after").rglob("*") if f.is_file()
    )
    assert facts["few"] == 0 or "saw fewer than 128 tokens" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--method gptq needs a --text"),
        (["--method", "rtn", "--bits", "5"], "--bits needs a --text"),
        (["--method", "rtn", "--format", "q9_9"], "experts can become q2_k"),
        (["--method", "rtn", "--format", "q4_k"], "no whole number of q4_k blocks"),
        (["--text", "TEXT", "--bits", "2"], "--bits 2 cannot be reached"),
        (["--text", "TEXT", "--bits", "6", "--formats", "q4_0"], "have 4.5 to 4.5 bits"),
        (["--text", "TEXT", "--max-tokens", "20"], "has 20 tokens; for 8 experts"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, tmp_path, text, tiered):
    before = source(tmp_path)
    arguments = [text if argument == "TEXT" else argument for argument in arguments]
    status, _, err = tiered("quantize", before, tmp_path / "after", *arguments)
    assert status != 0 and message in err and "Traceback" not in err, err
    assert not (tmp_path / "after").exists() and not list(tmp_path.glob(".after*"))


def test_other_refusals(tmp_path, monkeypatch):
    before = source(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        quantize(before, tmp_path / "there", Recipe(method="rtn"))
    dense = tiny.hf_checkpoint(tmp_path / "dense", "llama")
    with pytest.raises(ValueError, match="dense model"):
        quantize(dense, tmp_path / "after", Recipe(method="rtn"))
    other = tiny.hf_checkpoint(tmp_path / "other", "lfm2_moe")
    with pytest.raises(ValueError, match="write a store instead"):
        quantize(other, tmp_path / "after.gguf", Recipe(method="rtn"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="only 1000 are free"):
        quantize(before, tmp_path / "after", Recipe(method="rtn"))
    assert not list(tmp_path.glob(".after*"))


def test_what_gguf_cannot_say_is_refused(tmp_path):
    before = source(tmp_path, "qwen3_moe")
    config = json.loads((before / "config.json").read_text())
    (before / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    with pytest.raises(ValueError, match="no way to say this model's normalize_top_k"):
        quantize(before, tmp_path / "after.gguf", Recipe(method="rtn"))
    assert not (tmp_path / "after.gguf").exists()

"""Quantizing: blocks that lose little, GPTQ by the book, formats by need."""

import itertools

import numpy as np
import pytest
import tiny
from naive_formats import to_float64
from pack import pack as plain_pack

from cpu_kernels.formats import FORMATS
from cpu_kernels.rounding import nearest_codes
from tiered.formats import open_checkpoint
from tiered.quantizing.allocation import Option, Unit, allocate, lower_hull
from tiered.quantizing.grids import GRIDS, fit, fitting_formats, round_to
from tiered.quantizing.inputs import Inputs, activated, expert_inputs
from tiered.quantizing.layer import METHODS
from tiered.quantizing.rounding import Hessian, damped, inverse, round_gptq, round_nearest
from tiered.quantizing.scaling import best_scale, scaled_error
from tiered.quantizing.walk import Given
from tiered.weights.dequantize import dequantize


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

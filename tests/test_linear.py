"""Products of quantized matrices against float64, on every instruction set that runs here."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_formats import factors, random_matrix, to_float64

from cpu_kernels.activations import HAS_TILES, IN_BLOCKS, UNROUNDED, prepare_rows
from cpu_kernels.formats import FORMATS
from cpu_kernels.isa import ISAS, available
from cpu_kernels.linear import (
    FEW_ROWS,
    Matrix,
    gather_rows,
    multiply,
    prepared_bytes,
)
from cpu_kernels.memory import address_of, aligned_bytes, record, word
from cpu_kernels.team import Team, barrier, op

ISA_NAMES = available()


@op
def product(arguments, thread, num_threads, team):
    """matrix, x, n, k, prepared, y, rows, how x is rounded"""
    x, n, k = word(arguments, 1), word(arguments, 2), word(arguments, 3)
    prepared = word(arguments, 4)
    prepare_rows(x, k, n, k, prepared, thread, num_threads, word(arguments, 7))
    barrier(team)
    rows = word(arguments, 6)
    multiply(word(arguments, 0), prepared, n, word(arguments, 5), rows, team, 0)


@op
def gather(arguments, thread, num_threads, team):
    """matrix, ids, n, y, k"""
    k = word(arguments, 4)
    matrix, ids, n, y = (
        word(arguments, 0),
        word(arguments, 1),
        word(arguments, 2),
        word(arguments, 3),
    )
    gather_rows(matrix, ids, n, y, k, thread, num_threads)


@pytest.fixture(scope="module")
def teams():
    with Team(1) as one, Team(2) as two:
        yield {1: one, 2: two}


def run_product(team, matrix, x, rounds=IN_BLOCKS if HAS_TILES else UNROUNDED):
    x = np.ascontiguousarray(x, np.float32)
    n, k = x.shape
    y = np.full((n, matrix.shape[0]), np.nan, np.float32)
    prepared = aligned_bytes(prepared_bytes(n, k, rounds != UNROUNDED))
    words = record(
        matrix.address,
        address_of(x),
        n,
        k,
        address_of(prepared),
        address_of(y),
        y.shape[1],
        rounds,
    )
    team.run(product.address, address_of(words))
    return y


def assert_close(got, data, format, shape, x, bias=None, isa=ISA_NAMES[0], exact=False):
    """Sums of float32 products: the error is bounded by that of the sum of their magnitudes.

    Formats with an offset add and subtract more than the weight itself (at most 17 times as much:
    a q4_0 weight of 1 is 9 - 8), which is the rest of the tolerance.
    """
    x, weights = factors(data, format, shape, x, ISAS[isa], exact)
    want, magnitude = x @ weights.T, np.abs(x) @ np.abs(weights).T
    if bias is not None:
        want, magnitude = want + bias, magnitude + np.abs(bias)
    tolerance = 1e-5 * magnitude + 1e-5 * magnitude.mean() + 1e-30
    assert (np.abs(got - want) <= tolerance).all(), np.abs(got - want).max()


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("format", FORMATS)
def test_product(format, isa, teams):
    rng = np.random.default_rng(1)
    shape = 40, 768
    data = random_matrix(rng, format, shape)
    bias = rng.standard_normal(shape[0]).astype(np.float32)
    matrix = Matrix(data.reshape(-1), format, shape, ISAS[isa], bias)
    for n in (1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 70):
        x = rng.standard_normal((n, shape[1])).astype(np.float32)
        one, two = (run_product(teams[threads], matrix, x) for threads in (1, 2))
        assert_close(one, data, format, shape, x, bias, isa)
        assert (one == two).all()


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("format", FORMATS)
def test_few_rows_are_as_one_row(format, isa, teams):
    rng = np.random.default_rng(2)
    block = FORMATS[format].block_size
    # Whole chunks; a small or a large part of one at the end; less than one. 43 rows leave some to
    # the last panel. Of floats, also more than is converted at once, and less than a step.
    lengths = (512, 576, 640, 64) if block < 256 else (512, 256)
    if FORMATS[format].is_float:
        lengths = (*lengths, 2080, 32)
    for shape in [(43, length) for length in lengths]:
        if shape[1] % block:
            continue
        bias = rng.standard_normal(shape[0]).astype(np.float32)
        data = random_matrix(rng, format, shape).reshape(-1)
        matrix = Matrix(data, format, shape, ISAS[isa], bias)
        x = rng.standard_normal((FEW_ROWS, shape[1])).astype(np.float32)
        single = [run_product(teams[1], matrix, x[i : i + 1]) for i in range(FEW_ROWS)]
        panels_from = ISAS[isa].panels_from
        for n in (2, 3, 4, 5, panels_from - 1, panels_from, FEW_ROWS):
            got = run_product(teams[2], matrix, x[:n])
            np.testing.assert_array_equal(got, np.concatenate(single[:n]))


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize("format", ["q4_k", "q8_0", "q6_k", "bf16"])
def test_rows_are_the_same_among_any_number_of_others(format, isa, teams):
    """From FEW_ROWS + 1 on, and however many fit at once: a long row is cut where many are."""
    rng = np.random.default_rng(7)
    for shape, most in (((40, 2560), 300), ((33, 256), 40)):
        data = random_matrix(rng, format, shape).reshape(-1)
        bias = rng.standard_normal(shape[0]).astype(np.float32)
        matrix = Matrix(data, format, shape, ISAS[isa], bias)
        x = rng.standard_normal((most, shape[1])).astype(np.float32)
        all_rows = run_product(teams[2], matrix, x)
        for n in (FEW_ROWS + 1, 33, most - 1):
            np.testing.assert_array_equal(run_product(teams[1], matrix, x[-n:]), all_rows[-n:])


@pytest.mark.parametrize("format", [f for f in FORMATS if not FORMATS[f].is_float])
def test_exact_product_uses_float_activations(format, teams):
    rng = np.random.default_rng(3)
    shape = 24, 512
    data = random_matrix(rng, format, shape)
    matrix = Matrix(data.reshape(-1), format, shape, ISAS[ISA_NAMES[0]], exact=True)
    for n in (1, 3, 20):
        x = rng.standard_normal((n, shape[1])).astype(np.float32)
        assert_close(run_product(teams[2], matrix, x), data, format, shape, x, exact=True)


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS)),
    isa=st.sampled_from(ISA_NAMES),
    rows=st.integers(1, 45),
    groups=st.integers(1, 24),
    n=st.integers(1, 40),
    exact=st.booleans(),
    offset=st.integers(0, 3),
    scale=st.sampled_from([1e-7, 1e-3, 1.0, 60.0]),
    x_scale=st.sampled_from([1e-20, 1e-6, 1.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_any_shape(format, isa, rows, groups, n, exact, offset, scale, x_scale, seed):
    rng = np.random.default_rng(seed)
    block = FORMATS[format].block_size
    columns = groups * max(block, 32)
    if block == 1:
        columns = max(1, columns - seed % 31)
    shape = rows, columns
    data = random_matrix(rng, format, shape, scale)
    moved = np.zeros(data.size + offset, np.uint8)  # ends where the weights end, starts anywhere
    moved[offset:] = data.reshape(-1)
    matrix = Matrix(moved[offset:], format, shape, ISAS[isa], exact=exact)
    x = (rng.standard_normal((n, columns)) * x_scale).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0
    x[:, :32] *= rng.choice([0, 1e-3, 1])
    with Team(1) as team:
        got = run_product(team, matrix, x)
        assert_close(got, data, format, shape, x, isa=isa, exact=exact)


@pytest.mark.parametrize("isa", ISA_NAMES)
@pytest.mark.parametrize(
    ("format", "integers"), [("q6_k", (0, 192)), ("q5_0", (2, 22)), ("mxfp4", (1, 17))]
)
def test_sums_as_large_as_they_get(format, integers, isa, teams):
    """Many rows of formats whose sums of 16 bits overflow on the way (see dot.is_centred): all
    integers the least or the largest, all activations alike."""
    shape = 16, 512
    data = random_matrix(np.random.default_rng(9), format, shape)
    blocks = data.reshape(shape[0], -1, FORMATS[format].block_bytes)
    blocks[:8, :, slice(*integers)] = 0
    blocks[8:, :, slice(*integers)] = 0x77 if format == "mxfp4" else 0xFF
    matrix = Matrix(data.reshape(-1), format, shape, ISAS[isa])
    x = np.ones((FEW_ROWS + 2, shape[1]), np.float32)
    x[1::2] = -1
    x[2] = np.where(np.arange(shape[1]) % 4 < 2, 1, -1)
    assert_close(run_product(teams[1], matrix, x), data, format, shape, x, isa=isa)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_as_floats(format, teams):
    rng = np.random.default_rng(4)
    shape = 30, 768
    data = random_matrix(rng, format, shape)
    matrix = Matrix(data.reshape(-1), format, shape, ISAS[ISA_NAMES[0]])
    ids = np.array([3, 0, 29, 3, 17], np.int32)
    y = np.full((len(ids), shape[1]), np.nan, np.float32)
    words = record(matrix.address, address_of(ids), len(ids), address_of(y), shape[1])
    teams[2].run(gather.address, address_of(words))
    assert (y == to_float64(data, format, shape).astype(np.float32)[ids]).all()


def test_zeros_and_tiny_activations(teams):
    rng = np.random.default_rng(5)
    shape = 8, 96
    data = random_matrix(rng, "q4_0", shape)
    matrix = Matrix(data.reshape(-1), "q4_0", shape, ISAS[ISA_NAMES[0]])
    assert (run_product(teams[1], matrix, np.zeros((1, 96))) == 0).all()
    assert (run_product(teams[1], matrix, np.full((1, 96), 1e-40)) == 0).all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_not_a_number_stays_one(bits, teams):
    rng = np.random.default_rng(6)
    shape = 8, 64
    data = random_matrix(rng, "q4_0", shape)
    x = np.ones((1, 64), np.float32)
    x.view(np.uint32)[0, 5] = bits
    matrix = Matrix(data.reshape(-1), "q4_0", shape, ISAS[ISA_NAMES[0]])
    many = np.ones((FEW_ROWS + 1, 64), np.float32)
    assert np.isnan(run_product(teams[1], matrix, x)).all()
    rows = run_product(teams[1], matrix, np.concatenate([many, x]))
    assert np.isnan(rows[-1]).all() and not np.isnan(rows[:-1]).any()
    data[2, :2] = np.array([bits >> 16], np.uint16).view(np.uint8)
    for ones in (many, many[:1]):
        y = run_product(teams[1], matrix, ones)
        assert (np.isnan(y) == (np.arange(8) == 2)).all()


def test_wrong_matrices_are_refused():
    data, isa = np.zeros(100, np.uint8), ISAS[ISA_NAMES[0]]
    with pytest.raises(ValueError, match="only 100 are there"):
        Matrix(data, "q4_0", (8, 64), isa)
    with pytest.raises(ValueError, match="unknown number format"):
        Matrix(data, "q3_x", (8, 64), isa)
    with pytest.raises(ValueError, match="no whole number"):
        Matrix(data, "q4_0", (1, 63), isa)
    with pytest.raises(ValueError, match="bias"):
        Matrix(data, "q4_0", (1, 64), isa, np.zeros(2, np.float32))

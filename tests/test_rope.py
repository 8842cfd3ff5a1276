import numpy as np
import pytest
from naive_attention import rope as naive_rope
from numba import njit

from cpu_kernels.memory import aligned_bytes
from cpu_kernels.rope import RopeTable, rotate_adjacent, rotate_half, rotation
from tiered.config import RopeConfig


@njit
def rotate(table_coarse, table_fine, half, adjacent, position, angles, x):
    rotation(table_coarse, table_fine, half, position, angles)
    if adjacent:
        rotate_adjacent(x, angles, half)
    else:
        rotate_half(x, angles, half)


def rotated(x, position, table):
    x, angles = x.copy(), aligned_bytes(8 * (len(x) + 16))
    rotate(
        table.coarse.ctypes.data,
        table.fine.ctypes.data,
        table.half,
        table.pairs == "adjacent",
        position,
        angles.ctypes.data,
        x.ctypes.data,
    )
    return x


@pytest.mark.parametrize("pairs", ["half", "adjacent"])
@pytest.mark.parametrize(
    ("head_dim", "dim"),
    [(2, 0), (16, 0), (64, 0), (80, 0), (80, 20), (128, 0), (128, 64), (96, 38)],
)
def test_rotation(pairs, head_dim, dim):
    random = np.random.default_rng(head_dim)
    half = (dim or head_dim) // 2
    plain = RopeConfig(dim=dim, pairs=pairs)
    scaled = RopeConfig(
        theta=500_000.0,
        dim=dim,
        pairs=pairs,
        inv_freq_scale=tuple(random.uniform(1, 8, half)),
        magnitude=1.2,
    )
    for config in (plain, scaled):
        table = RopeTable(config, head_dim, 100)
        table.reserve(40_000)
        for position in (0, 1, 255, 256, 511, 39_999):
            x = random.standard_normal(head_dim).astype(np.float32)
            reference = naive_rope(x, position, config)
            # Cosines and sines are products of rounded ones: a few units in the last place.
            np.testing.assert_allclose(rotated(x, position, table), reference, atol=3e-6)


def test_the_table_grows():
    table = RopeTable(RopeConfig(), 64, 1)
    assert table.num_positions == 256
    before = table.coarse
    table.reserve(256)
    assert table.coarse is before
    table.reserve(257)
    assert table.num_positions >= 257
    assert (table.coarse[:1] == before).all()


@pytest.mark.parametrize(
    ("config", "head_dim"),
    [(RopeConfig(dim=7), 16), (RopeConfig(dim=32), 16), (RopeConfig(pairs="odd"), 16)],
)
def test_impossible_rotations_are_refused(config, head_dim):
    with pytest.raises(ValueError, match="rope"):
        RopeTable(config, head_dim, 10)

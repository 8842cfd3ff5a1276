import itertools

import numpy as np
import pytest
from numba import njit

from cpu_kernels.softmax import limit_row, weigh_row


@njit
def run(scores, first, last, lo, hi, partial):
    limit_row(scores, first, last, lo, hi, partial)
    weigh_row(scores, first, last, lo, hi, partial)


BORDERS = 0, 1, 15, 16, 17, 31, 32, 33, 40, 48, 63, 64, 80, 95, 96


@pytest.mark.parametrize(("lo", "hi"), list(itertools.combinations(BORDERS, 2)))
def test_weights_of_what_is_seen(lo, hi):
    first, last = lo // 16, -(-hi // 16) + (hi <= 80)  # a vector that is not seen at all, too
    given = np.random.default_rng(lo + hi).standard_normal(128).astype(np.float32) * 5
    seen = slice(lo, hi)
    outside = np.ones(128, bool)
    outside[seen] = False
    given[outside] = np.nan
    scores, partial = given.copy(), np.zeros(16, np.float32)
    run(scores.ctypes.data, first, last, lo, hi, partial.ctypes.data)
    largest = given[seen].max()
    exact = np.exp((given[seen] - largest).astype(np.float64))
    assert partial[0] == largest
    # The exponential is exact to 2e-7; sums of at most 96 weights are rounded as often in 16 lanes.
    np.testing.assert_allclose(scores[seen], exact, rtol=3e-7)
    np.testing.assert_allclose(partial[1], exact.sum(), rtol=2e-6)
    done = np.zeros(128, bool)
    done[16 * first : 16 * last] = True
    assert (scores[outside & done] == 0).all()
    assert np.isnan(scores[~done]).all()

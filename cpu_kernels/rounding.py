"""Values to the codes of a number format, so that little is lost: scales by search, and codes one
column after the other, each making good for what the ones before it lost (GPTQ).

A group of values shares a scale (and a minimum); a code stands for levels[code] * scale + minimum.
These are plain loops for offline work; they let go of Python's lock, so that threads share them.
"""

from __future__ import annotations

import numpy as np

from cpu_kernels.compiler import called, inner

NUM_SCALES = 9  # tried for each group, from 0.76 to 1.08 of what its largest value would take
_INFINITY = np.float32(np.inf)


CELLS = 4  # of a table of the nearest codes, for each step of 1


def nearest_codes(levels: np.ndarray) -> np.ndarray:
    """uint8: the nearest code for each quarter between the first and the last of `levels`, which
    ascend and have nothing but quarters half-way between them."""
    middles = levels[0] + (np.arange(round((levels[-1] - levels[0]) * CELLS)) + 0.5) / CELLS
    between = (levels[1:] + levels[:-1]) / 2
    return np.searchsorted(between, middles).astype(np.uint8)


@inner
def _nearest(value, first, cells):
    """The code whose level is nearest to `value`; `first` is the lowest level."""
    cell = (value - first) * np.float32(CELLS)
    return cells[int(max(np.float32(0), min(cell, np.float32(len(cells) - 1))))]


@called(nogil=True)
def fit_scales(groups, importance, levels, cells, scales):
    """Scales of least error, sum(importance * (value - scale * level)^2).

    `groups` is float32 [n, size]; `importance` float32 [m, size], where m divides n and group i has
    the row i % m; `cells` are the levels' nearest_codes; `scales` is float32 [n], to be filled.
    """
    for n in range(len(groups)):
        values, weights = groups[n], importance[n % len(importance)]
        largest = np.float32(0)
        for value in values:
            if abs(value) > abs(largest):
                largest = value
        best, scales[n] = np.float32(-1), np.float32(0)
        if largest == 0:
            continue
        for end in (levels[0], levels[-1]):
            for step in range(NUM_SCALES):
                inverse = end / (largest * np.float32(0.76 + 0.04 * step))
                product, square = np.float32(0), np.float32(0)
                for i in range(len(values)):
                    level = levels[_nearest(values[i] * inverse, levels[0], cells)]
                    product += weights[i] * values[i] * level
                    square += weights[i] * level * level
                # With the best scale for these codes, this is how much of the error goes.
                gain = product * product / square if square > 0 else np.float32(0)
                if gain > best:
                    best = gain
                    scales[n] = product / square if square > 0 else np.float32(1) / inverse


@called(nogil=True)
def fit_powers(groups, importance, levels, cells, exponents, lowest, highest):
    """The same with scales that are powers of two: int32 [n] of their exponents, to be filled."""
    for n in range(len(groups)):
        values, weights = groups[n], importance[n % len(importance)]
        largest = np.float32(0)
        for value in values:
            largest = max(largest, abs(value))
        exponents[n] = lowest
        if largest == 0:
            continue
        first = int(np.floor(np.log2(largest / levels[-1])))
        best = _INFINITY
        for exponent in range(first - 1, first + 3):
            if exponent < lowest or exponent > highest:
                continue
            scale, error = np.float32(2.0) ** np.float32(exponent), np.float32(0)
            for i in range(len(values)):
                rest = values[i] - scale * levels[_nearest(values[i] / scale, levels[0], cells)]
                error += weights[i] * rest * rest
            if error < best:
                best, exponents[n] = error, exponent


@called(nogil=True)
def fit_ranges(groups, importance, num_levels, below_zero, scales, minimums):
    """Scales and minimums of least error for the levels 0, 1, ... num_levels - 1; with
    `below_zero`, minimums are 0 or less."""
    for n in range(len(groups)):
        values, weights = groups[n], importance[n % len(importance)]
        low, high = values.min(), values.max()
        if below_zero:
            low = min(low, np.float32(0))
        scales[n], minimums[n] = np.float32(0), low
        if high <= low:
            continue
        best = _INFINITY
        for step in range(NUM_SCALES):
            inverse = np.float32(num_levels - 1.8 + 0.2 * step) / (high - low)
            # Weighted sums, and from them the straight line of least error through these codes.
            w, x, q, qq, xq, xx = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for i in range(len(values)):
                code = np.rint((values[i] - low) * inverse)
                code = max(np.float32(0), min(code, np.float32(num_levels - 1)))
                w += weights[i]
                x += weights[i] * values[i]
                q += weights[i] * code
                qq += weights[i] * code * code
                xq += weights[i] * values[i] * code
                xx += weights[i] * values[i] * values[i]
            determinant = w * qq - q * q
            if determinant <= 1e-12 * w * qq:
                continue
            scale, minimum = (w * xq - x * q) / determinant, (qq * x - q * xq) / determinant
            if below_zero and minimum > 0:
                scale, minimum = xq / qq, 0.0
            error = (
                xx + scale * (scale * qq + 2 * (minimum * q - xq)) + minimum * (minimum * w - 2 * x)
            )
            if error < best:
                best = np.float32(error)
                scales[n], minimums[n] = np.float32(scale), np.float32(minimum)
        if best == _INFINITY:  # all importance lies on values that get one code
            scales[n] = (high - low) / np.float32(num_levels - 1)


@called(nogil=True)
def round_columns(values, scales, minimums, levels, cells, factor, codes, errors):
    """Codes of `values`, column by column; what a column loses goes to those after it.

    `values` is float32 [rows, columns], and becomes what the codes stand for; `scales` and
    `minimums` are float32 [rows, groups] of equally many columns. `factor` is float32
    [columns, columns], upper triangular: of the Cholesky factor of the inverse Hessian (Frantar et
    al., https://arxiv.org/abs/2210.17323); empty, each column is rounded for itself. `codes`
    (uint8) and `errors` (float32, each column's loss by its diagonal value) have the same shape.
    """
    num_rows, num_columns = values.shape
    size = num_columns // scales.shape[1]
    for row in range(num_rows):
        for column in range(num_columns):
            scale, minimum = scales[row, column // size], minimums[row, column // size]
            value = values[row, column]
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            code = _nearest((value - minimum) * inverse, levels[0], cells)
            rounded = scale * levels[code] + minimum
            codes[row, column], values[row, column] = code, rounded
            if len(factor):
                error = (value - rounded) / factor[column, column]
                errors[row, column] = error
                for later in range(column + 1, num_columns):
                    values[row, later] -= error * factor[column, later]

"""One matrix to fewer bits: each value to the nearest, or GPTQ."""

from __future__ import annotations

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.quantizing.grids import fit, pack, round_to

DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it
COLUMNS = 256  # whose losses are handed on to the later ones at once
SMALLEST = 64  # triangles that are inverted as they are


def round_nearest(values: np.ndarray, format: str, importance: np.ndarray) -> np.ndarray:
    """uint8 [rows, row_bytes] of float32 [rows, columns]. Scales are those of least squared error,
    where a column's counts `importance` (float32 [columns]) times."""
    values = np.array(values, np.float32, order="C")
    scales = fit(format, values, importance)
    return pack(format, scales, round_to(format, scales, values))


def round_gptq(values: np.ndarray, format: str, hessian: Hessian) -> np.ndarray:
    """The same by GPTQ: what rounding a column loses, later columns make good for, as far as the
    inputs that the Hessian was made of allow. https://arxiv.org/abs/2210.17323

    Blocks of columns are taken by falling importance; a block's scales are chosen when it is
    reached, for the values that it has then.
    """
    block = FORMATS[format].block_size
    order, factor = hessian.ordered(block)
    values = np.ascontiguousarray(values[:, order], np.float32)
    rows, columns = values.shape
    importance = hessian.diagonal[order]
    packed = []
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        errors = np.empty((rows, stop - start), np.float32)
        for first in range(start, stop, block):
            own, lost = slice(first, first + block), slice(first - start, first - start + block)
            part, losses = np.ascontiguousarray(values[:, own]), np.empty_like(errors[:, lost])
            scales = fit(format, part, importance[own])
            codes = round_to(format, scales, part, np.ascontiguousarray(factor[own, own]), losses)
            packed.append(pack(format, scales, codes))
            errors[:, lost] = losses
            values[:, first + block : stop] -= losses @ factor[own, first + block : stop]
        values[:, stop:] -= errors @ factor[start:stop, stop:]
    in_order = np.argsort(order[::block] // block)
    return np.concatenate([packed[position] for position in in_order], axis=1)


class Hessian:
    """Of the squared error of a matrix' product with its inputs: the inputs' second moments.

    `inputs` is float32 [num_tokens, columns], `weights` float32 [num_tokens]: how much a token's
    error counts (by its root).
    """

    def __init__(self, inputs: np.ndarray, weights: np.ndarray) -> None:
        scaled = inputs * (weights / max(float(np.linalg.norm(weights)), 1e-30))[:, None]
        self.matrix: np.ndarray = scaled.T @ scaled
        self.diagonal = damped(self.matrix.diagonal())
        self._ordered: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def ordered(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of the columns, by falling importance of their blocks; and the upper Cholesky
        factor of the inverse of the matrix in that order, float32 [columns, columns])."""
        if block not in self._ordered:
            blocks = np.argsort(-self.diagonal.reshape(-1, block).mean(axis=1), kind="stable")
            order = (blocks[:, None] * block + np.arange(block)).reshape(-1)
            self._ordered[block] = order, self._factor(order)
        return self._ordered[block]

    def _factor(self, order: np.ndarray) -> np.ndarray:
        # With J, which reverses an order, and L L^T = J H J: the factor of H^-1 is J L^-1 J.
        backward = order[::-1]
        reversed_matrix = self.matrix[np.ix_(backward, backward)]
        mean = max(float(reversed_matrix.diagonal().mean()), 1e-30)
        damping = DAMPING
        while True:
            try:
                np.fill_diagonal(reversed_matrix, self.matrix.diagonal()[backward] + damping * mean)
                lower = np.linalg.cholesky(reversed_matrix)
                break
            except np.linalg.LinAlgError:
                damping *= 10
        factor: np.ndarray = np.ascontiguousarray(inverse(lower)[::-1, ::-1], np.float32)
        return factor


def damped(importance: np.ndarray) -> np.ndarray:
    """float32; no column counts nothing, because other texts may use it."""
    values = importance + np.float32(DAMPING) * max(float(importance.mean()), 1e-30)
    return np.ascontiguousarray(values, np.float32)


def inverse(lower: np.ndarray) -> np.ndarray:
    """Of a lower triangular matrix, by halves."""
    size = len(lower)
    if size <= SMALLEST:
        return np.linalg.inv(lower)
    half = size // 2
    result = np.zeros_like(lower)
    result[:half, :half] = inverse(lower[:half, :half])
    result[half:, half:] = inverse(lower[half:, half:])
    result[half:, :half] = -result[half:, half:] @ (lower[half:, :half] @ result[:half, :half])
    return result

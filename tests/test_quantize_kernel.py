"""Quantizers against the same arithmetic in NumPy, bit for bit."""

import numpy as np
import pytest
from naive_formats import quantize

from cpu_kernels.quantize import quantize_blocks

FORMATS = ["q4_0", "q8_0", "nf4", "int4_g128"]


def weights(seed):
    """Random ones of all sizes, groups of zeros, of equal sizes, of tiny values."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((64, 32)) * np.exp(rng.uniform(-12, 8, (64, 1)))
    values[3] = 0
    values[4] = rng.choice([-1, 1], 32) * 0.375
    values[5] = 1e-40
    values[6] = -1e-7
    values[8:12] = np.abs(values[8:12])  # of one sign
    values[12:16] = 0.25
    values[16:20] = 0
    return values.astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
def test_as_the_formula_says(source, format):
    values = weights(1)
    stored = values
    if source == "f16":
        stored = np.clip(values, -6e4, 6e4).astype(np.float16)
        values = stored.astype(np.float32)
    elif source == "bf16":
        stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (stored.astype(np.uint32) << 16).view(np.float32)
    blocks, largest = quantize_blocks(stored, source, format)
    assert largest == np.abs(values).max()
    assert (blocks == quantize(values, format)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_not_a_number_is_reported(format):
    values = weights(2)
    values[7, 9] = -np.nan
    assert np.isnan(quantize_blocks(values, "f32", format)[1])
    values[7, 9] = -np.inf
    assert quantize_blocks(values, "f32", format)[1] == np.inf


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_blocks(np.zeros(33, np.float32), "f32", "q4_0")
    with pytest.raises(ValueError, match="multiple of 128"):
        quantize_blocks(np.zeros(192, np.float32), "f32", "int4_g128")

"""The bench of kernels: its peak counts what it says, and its report makes a picture."""

import pytest
from numba import njit
from plain_instructions import plain_instructions

from cpu_kernels import isa
from cpu_kernels.peak import COLUMNS, PAIRS, _multiply, product_peak, products_per_step
from tiered.measuring import layer_rates
from tiered.measuring.plot import plot_kernels


@pytest.mark.parametrize("name", isa.available())
def test_the_peak_is_of_products_that_were_made(name):
    @njit
    def multiply(steps, seed):
        return _multiply(name, steps, seed)

    assert multiply(100, 3) == sum_of_products(name)


def test_the_peak_of_tiles():
    with plain_instructions():

        @njit
        def multiply(steps, seed):
            return _multiply("amx_bf16", steps, seed)

        assert multiply(100, 3) == sum_of_products("amx_bf16")


def sum_of_products(name):
    if isa.ISAS[name].has_tiles:
        return 100 * products_per_step(name) * 3 * 3
    lanes = 4 * isa.ISAS[name].panel_rows
    weights = sum(
        (3 + pair + COLUMNS * column) & 15 for pair in range(PAIRS) for column in range(COLUMNS)
    )
    return lanes * weights * sum(step & 63 for step in range(100))


def test_the_peak_is_a_rate():
    assert product_peak(1) > 1e8


def report():
    common = {"shape": [768, 2048], "threads": 2, "row_bytes": 1152}
    rows = []
    for name, gb_s in (("q4_0", 15.0), ("q8_0", 19.0)):
        rows.append({**common, "format": name, "rows": 1, "gb_s": gb_s, "bandwidth_gb_s": 20.0})
        rows.append({**common, "format": name, "rows": 128, "gops": 80.0, "peak_gops": 120.0})
    rows.append({**rows[0], "threads": 1, "bandwidth_gb_s": 12.0})
    return {"kernels": rows, "isa": "avx2"}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_roofline(tmp_path, suffix):
    path = tmp_path / f"kernels{suffix}"
    plot_kernels(report(), path)
    assert path.stat().st_size > 10_000
    if suffix == ".svg":
        assert path.read_text().count("<use") > 4  # one mark for each rate, and the ticks


def test_a_plot_is_of_kernels(tiered, tmp_path):
    pytest.importorskip("matplotlib")
    status, _, err = tiered("bench", "model", "--plot", tmp_path / "x.png")
    assert status != 0 and "--kernels" in err


def test_rates_of_layers(monkeypatch):
    """Small ones: what counts is that bytes are those of the experts, keys and values."""
    experts, heads = layer_rates.Experts("some", 256, 256, 2), layer_rates.Heads("some", 4, 2, 32)
    for name, value in dict(EXPERTS=[experts], HEADS=[heads], CONTEXTS=[100], REPEATS=3).items():
        monkeypatch.setattr(layer_rates, name, value)
    monkeypatch.setattr(layer_rates, "LARGER_THAN_CACHES", 1 << 16)
    steps = []
    rows = list(layer_rates.layer_rates(2, 1e9, lambda *step: steps.append(step)))
    assert [(row["kernel"], row["format"], row.get("context")) for row in rows] == [
        ("experts", "q4_0", None), ("experts", "q4_k", None),
        ("attention", "f16", 100), ("attention", "int8", 100),
    ]  # fmt: skip
    assert [done for _, done, total in steps] == list(range(4)) and steps[0][2] == 4
    for row in rows:
        assert row["threads"] == 2 and row["gb_s"] > 0
        assert row["of_bandwidth"] == pytest.approx(row["gb_s"])

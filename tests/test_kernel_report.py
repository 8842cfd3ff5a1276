"""The bench of kernels: its peak counts what it says, and its report makes a picture."""

import pytest
from numba import njit
from plain_instructions import plain_instructions

from cpu_kernels import isa
from cpu_kernels.peak import COLUMNS, PAIRS, _multiply, integer_peak, products_per_step
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
            return _multiply("amx_int8", steps, seed)

        assert multiply(100, 3) == sum_of_products("amx_int8")


def sum_of_products(name):
    if isa.ISAS[name].has_tiles:
        return 100 * products_per_step(name) * 3 * 3
    lanes = 4 * isa.ISAS[name].panel_rows
    weights = sum(
        (3 + pair + COLUMNS * column) & 15 for pair in range(PAIRS) for column in range(COLUMNS)
    )
    return lanes * weights * sum(step & 63 for step in range(100))


def test_the_peak_is_a_rate():
    assert integer_peak(1) > 1e8


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
    status, _, err = tiered("bench", "model", "--plot", tmp_path / "x.png")
    assert status != 0 and "--kernels" in err

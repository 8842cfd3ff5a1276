"""The bench of a card's kernels: every format at every shape, beside the device's own rates."""

import json

import pytest

pytest.importorskip("torch")

from gpu_backend import bench
from gpu_backend.formats import QUANTIZED
from tiered import backend
from tiered.measuring.kernel_report import side_by_side
from tiered.measuring.plot import plot_kernels

SMALL = dict(
    shapes=((32, 256), (16, 512)), prefill_rows=(8,), decode_bytes=20_000, prefill_bytes=1,
    peak_size=64,
)  # fmt: skip


def small_report(device="cpu", progress=lambda *_: None):
    return bench.kernel_report(device, None, progress, **SMALL)


def test_rates_are_of_the_bytes_and_products_that_were_made(monkeypatch):
    calls = []

    def seconds(_, work):
        calls.append(work())
        return 1e-3

    monkeypatch.setattr(bench, "_seconds", seconds)
    told = []
    report = small_report(progress=lambda *step: told.append(step))
    rows, total = report["kernels"], 2 * len(QUANTIZED)
    assert [step[1:] for step in told] == [(number, total) for number in range(total)]
    assert {(row["format"], row["rows"], *row["shape"]) for row in rows} == {
        (name, num_rows, *shape)
        for name in QUANTIZED for num_rows in (1, 8) for shape in SMALL["shapes"]
    }  # fmt: skip
    for row, outputs in zip(rows, calls[2:], strict=True):
        nbytes, products = row["shape"][0] * row["row_bytes"], len(outputs)
        assert all(y.shape == (row["rows"], row["shape"][0]) for y in outputs)
        assert all(y.isfinite().all() for y in outputs)
        if row["rows"] == 1:
            assert products == max(1, 20_000 // nbytes)
            assert row["gb_s"] == pytest.approx(products * nbytes / 1e-3 / 1e9)
            assert row["of_bandwidth"] == pytest.approx(products * nbytes / 20_000)
        else:
            assert row["gops"] == pytest.approx(
                2 * 8 * row["shape"][0] * row["shape"][1] * 1e3 / 1e9
            )
            assert row["of_peak"] == pytest.approx(row["gops"] / row["peak_gops"])


def test_the_command(tiered, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "bench_gpu", lambda _, progress: small_report(progress=progress))
    monkeypatch.setattr("tiered.measuring.kernel_report.bench_gpu", backend.bench_gpu)
    picture = tmp_path / "card.svg"
    status, out, err = tiered("bench", "--kernels", "--device", "sim", "--json", "--plot", picture)
    assert status == 0, err
    report = json.loads(out)
    assert report["card"] == "cpu" and len(report["kernels"]) == 4 * len(QUANTIZED)
    assert side_by_side(report) == report["kernels"]
    assert picture.read_text().count("<use") > 4 * len(QUANTIZED)  # a mark for each rate
    plot_kernels(report, tmp_path / "card.png")
    status, out, err = tiered("bench", "--kernels", "--device", "sim")
    assert status == 0 and "mxfp4" in out and "device" in out, err


@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "cuda:all", "sim:rtx4090"])
def test_one_real_device_is_measured(tiered, device):
    status, _, err = tiered("bench", "--kernels", "--device", device)
    assert status != 0 and "one real device" in err


def test_a_card_that_is_not_there(tiered):
    status, _, err = tiered("bench", "--kernels", "--device", "cuda:77")
    assert status == 1 and "cuda" in err.lower() and "Traceback" not in err

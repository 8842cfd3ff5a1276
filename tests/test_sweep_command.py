"""`tiered sweep`: grids, resuming, traces, live runs, and the picture."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from tiered.demo import random_tiny_model
from tiered.measuring import sweep
from tiered.measuring.results import ResultFile
from tiered.planning import hardware, shapes, sizes

GRID = ("olmoe-1b-7b", "--gpu", "laptop", "--ram", "3G,6G", "--policy", "lru,layer_lfu")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_in_csv_json_and_a_table(tiered, tmp_path):
    out = tmp_path / "sweep.csv"
    status, text, err = tiered("sweep", *GRID, "--out", out, "--json")
    assert status == 0, err
    got = json.loads(text)
    assert got["simulated"] is True and got["rows"] == rows_of(out)
    assert len(got["rows"]) == 4
    assert all(row["simulated"] == "True" for row in got["rows"])
    by = {(row["policy"], row["ram"]): float(row["tok_s"]) for row in got["rows"]}
    assert by["lru", str(6 << 30)] > by["lru", str(3 << 30)]
    status, text, _ = tiered("sweep", *GRID, "--out", out)
    assert status == 0 and "simulated, not measured" in text and "layer_lfu" in text


def test_what_is_done_is_not_done_again(tiered, tmp_path, monkeypatch):
    out = tmp_path / "sweep.csv"
    assert tiered("sweep", *GRID, "--out", out)[0] == 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:20])  # stopped while it wrote the third row
    calls = []
    simulate = sweep.simulate

    def counting(*arguments, **options):
        calls.append(arguments)
        return simulate(*arguments, **options)

    monkeypatch.setattr(sweep, "simulate", counting)
    assert tiered("sweep", *GRID, "--out", out)[0] == 0
    assert len(calls) == 2
    assert out.read_text() == "".join(lines)


def test_a_file_of_another_sweep_is_refused(tiered, tmp_path):
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n")
    status, _, err = tiered("sweep", *GRID, "--out", out)
    assert status == 1 and "other columns" in err
    assert out.read_text() == "a,b\n1,2\n"


def test_points_that_do_not_run_say_why(tiered):
    status, text, _ = tiered(
        "sweep", "mixtral-8x7b", "--gpu", "laptop", "--ram", "1G,64G", "--json"
    )
    rows = json.loads(text)["rows"]
    assert status == 0 and "too little" in rows[0]["problem"] and rows[0]["tok_s"] == ""
    assert float(rows[1]["tok_s"]) > 1
    assert "does not run" in tiered("sweep", "mixtral-8x7b", "--gpu", "laptop", "--ram", "1G")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--strategy", "magic"), "on-demand"),
        (("--look-ahead", "x"), "whole numbers"),
        (("--live", "--ram", "8G"), "--expert-ram"),
        (("--top-k", "99"), "experts"),
    ],
)
def test_mistakes_get_one_line(tiered, arguments, message):
    status, _, err = tiered("sweep", "olmoe-1b-7b", "--gpu", "laptop", *arguments)
    assert status != 0 and message in err and "Traceback" not in err


def test_live_and_from_a_trace_of_the_same_model(tiered, tmp_path):
    pytest.importorskip("numba")
    from tiered import Engine

    model = random_tiny_model(tmp_path / "model")
    status, text, err = tiered(
        "sweep", model, "--live", "--expert-ram", "100%,50%", "--context", "64", "--tokens", "6",
        "--json",
    )  # fmt: skip
    assert status == 0, err
    rows = json.loads(text)["rows"]
    assert [row["simulated"] for row in rows] == ["False"] * 2
    assert float(rows[1]["read_mb_per_token"]) > 0
    trace = tmp_path / "routing.trace"
    with Engine(model, threads=1, look_ahead=0) as engine, engine.record(trace):
        list(engine.generate_tokens([5, 6, 7], 6))
    status, text, err = tiered(
        "sweep", model, "--gpu", "laptop", "--trace", trace, "--context", "64", "--json"
    )
    assert status == 0, err
    assert json.loads(text)["rows"][0]["routing"] == "routing.trace"
    status, _, err = tiered("sweep", "olmoe-1b-7b", "--gpu", "laptop", "--trace", trace)
    assert status == 1 and "layers" in err


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture(tiered, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"sweep{suffix}"
    status, _, err = tiered("sweep", *GRID, "--plot", path)
    assert status == 0, err
    assert path.stat().st_size > 5000
    if suffix == ".svg":
        assert "SIMULATED" in path.read_text()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--look-ahead", "1,9"), ("--context", "0"), ("--top-k", "-1"), ("--expert-ram", "2G")],
)
def test_values_that_mean_nothing_are_refused(tiered, option, value):
    status, _, err = tiered("sweep", *GRID, option, value)
    assert status == 2 and option in err


def test_a_picture_of_another_kind_is_refused_before_anything_is_computed(tiered, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "sweep.csv"
    status, _, err = tiered("sweep", *GRID, "--out", out, "--plot", tmp_path / "sweep.doc")
    assert status == 1 and ".png, .svg or .pdf" in err and not out.exists()


def test_without_matplotlib_it_says_what_to_install(tiered, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    status, _, err = tiered("sweep", *GRID, "--plot", tmp_path / "sweep.png")
    assert status == 1 and "tiered[plot]" in err


def test_roofs_are_in_the_order_of_bandwidths():
    model, machine = sizes.of_shape(shapes.find("mixtral-8x7b")), hardware.find("rtx4090")
    roofs = sweep.roofs(model, machine)
    assert list(roofs) == ["GPU memory", "GPU link", "RAM", "disk"]
    assert roofs["GPU memory"] > roofs["RAM"] > roofs["GPU link"] > roofs["disk"]


def test_results_without_a_file():
    results = ResultFile(None, ["a", "b"], 1)
    results.append({"a": 1, "b": 2.5})
    assert {"a": 1} in results and {"a": 2} not in results
    assert results.find({"a": "1"}) == {"a": "1", "b": "2.5"}


def example_of(name):
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_example_of_static_plans(tmp_path, capsys):
    example = example_of("hybrid_against_static")
    (ratio,) = example.main(tmp_path, {"mixtral-8x7b": [8]}, ["rtx3060-12gb"])
    assert 0.99 <= ratio < 1.5
    out = capsys.readouterr().out
    assert "8 GiB:" in out and "SIMULATED, not measured" in out
    assert {row["simulated"] for row in rows_of(tmp_path / "mixtral-8x7b.csv")} == {"True"}


def test_the_example_of_three_cards(tmp_path, capsys):
    example = example_of("sweep_8x7b_16gb")
    rows = example.main(tmp_path, vram=[8 << 30, 16 << 30], cards=example.CARDS[:2], num_tokens=80)
    assert len(rows) == 4 and all(row["simulated"] == "True" for row in rows)
    assert float(rows[1]["tok_s"]) > float(rows[0]["tok_s"])
    assert "tokens/s" in capsys.readouterr().out

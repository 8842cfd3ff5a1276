"""`tiered pareto`: grids, frontiers, going on, points that cannot run, and the picture."""

import csv
import json

import numpy as np
import pytest
import tiny

from tiered.measuring import frontier_plot, pareto
from tiered.measuring.pareto import Lab, frontier, frontiers

TEXT = "the rain in the north, and then the heat " * 8
GRID = (
    "--window", 32, "--max-tokens", 90, "--prefill", 8, "--decode", 4, "--runs", 1, "--threads", 2,
    "--quantize", "none,int4", "--top-k", "2,1",
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
    return tiny.hf_checkpoint(tmp_path / "model", "mixtral", "f32", tokenizer=True, top_k=2)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- frontiers ---


def row(kl, tok_s, ram=0, problem=""):
    return {"kl": str(kl), "decode_tok_s": str(tok_s), "expert_ram": str(ram), "problem": problem}


def test_a_frontier_is_what_no_other_beats():
    random = np.random.default_rng(0)
    rows = [row(*values) for values in random.integers(0, 6, (40, 2)).tolist()]
    points = [(float(r["kl"]), float(r["decode_tok_s"])) for r in rows]
    found = [points[i] for i in frontier(rows)]
    expected = {
        (a, b) for a, b in points
        if not any(x <= a and y >= b and (x, y) != (a, b) for x, y in points) and b > 0
    }  # fmt: skip
    assert set(found) == expected and len(found) == len(set(found))
    assert found == sorted(found)


def test_each_budget_has_its_own_frontier():
    rows = [row(0, 5), row(0, 2, 100), row(1, 3, 100), row(2, 1, 100), row(9, 9, 100, "too small")]
    assert frontiers(rows) == {"0": [0], "100": [1, 2]}


# --- the command ---


def test_a_grid_has_prices_and_speeds(tiered, model, text, tmp_path):
    out = tmp_path / "grid.csv"
    status, printed, err = tiered("pareto", model, "--text", text, *GRID, "--out", out, "--json")
    assert status == 0, err
    report = json.loads(printed)
    assert report["points"] == rows_of(out) and len(report["points"]) == 4
    by = {(r["quantize"], r["top_k"]): r for r in report["points"]}
    exact = by["none", "2"]
    assert float(exact["kl"]) < 1e-5 and float(exact["ratio"]) == pytest.approx(1, abs=1e-5)
    assert float(by["none", "1"]["kl"]) > 1e-3 and float(by["int4", "2"]["kl"]) > 1e-5
    assert float(by["int4", "1"]["experts_per_token"]) == 1
    assert all(float(r["decode_tok_s"]) > 0 and not r["problem"] for r in report["points"])
    assert exact in report["frontiers"]["0"]
    # What compare says of the same settings.
    status, printed, err = tiered(
        "compare", model, "--a", "quantize=none", "--b", "quantize=none", "--b", "top-k=1",
        "--text", text, "--max-tokens", 90, "--window", 32, "--generate", 0, "--threads", 2,
        "--json",
    )  # fmt: skip
    assert status == 0, err
    price = json.loads(printed)
    assert float(by["none", "1"]["kl"]) == pytest.approx(price["kl_mean"], rel=0.02, abs=1e-5)
    assert float(by["none", "1"]["ratio"]) == pytest.approx(price["perplexity_ratio"], rel=1e-4)


def test_what_is_done_is_not_done_again(tiered, model, text, tmp_path, monkeypatch):
    out = tmp_path / "grid.csv"
    asked = ("pareto", model, "--text", text, *GRID, "--out", out)
    assert tiered(*asked)[0] == 0
    lines = out.read_text().splitlines(keepends=True)
    reference = (tmp_path / "grid.logits").read_bytes()
    out.write_text("".join(lines[:4]) + lines[4][:30])  # stopped while it wrote the fourth row
    calls = []
    for name in "quality", "speed":
        whole = getattr(Lab, name)

        def counted(lab, path, point, *more, whole=whole, name=name):
            calls.append((name, point.quantize, point.top_k, point.expert_ram))
            return whole(lab, path, point, *more)

        monkeypatch.setattr(Lab, name, counted)
    status, printed, err = tiered(*asked)
    assert status == 0 and "tokens/s" in printed, err
    assert calls == [("quality", "int4", 1, 0), ("speed", "int4", 1, 0)]
    assert len(rows_of(out)) == 4 and out.read_text().startswith("".join(lines[:4]))
    assert (tmp_path / "grid.logits").read_bytes() == reference
    # Another budget: its quality is known. Another text: nothing is.
    calls.clear()
    assert tiered(*asked, "--expert-ram", "all,50%")[0] == 0
    assert {name for name, *_ in calls} == {"speed"} and len(calls) == 4
    calls.clear()
    text.write_text(TEXT[5:])
    assert tiered(*asked)[0] == 0 and len(calls) == 8
    calls.clear()
    tiny.hf_checkpoint(model, "mixtral", "f32", seed=5, tokenizer=True, top_k=2)
    assert tiered(*asked)[0] == 0 and len(calls) == 8  # nor of another model of that name


def test_an_interrupted_run_keeps_what_it_has(tiered, model, text, tmp_path, monkeypatch):
    out, whole, calls = tmp_path / "grid.csv", Lab.speed, []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(Lab, "speed", stop)
    asked = ("pareto", model, "--text", text, *GRID, "--out", out)
    assert tiered(*asked)[0] != 0
    assert len(rows_of(out)) == 2
    assert tiered(*asked)[0] == 0 and len(rows_of(out)) == 4 and len(calls) == 5


def test_pruned_and_other_files_and_budgets(tiered, model, text, tmp_path):
    out, calibration = tmp_path / "grid.csv", tmp_path / "calibration.txt"
    calibration.write_text("and then the rain in the heat " * 8)
    other = tiny.hf_checkpoint(tmp_path / "other", "mixtral", "f16", tokenizer=True, top_k=2)
    asked = (
        "pareto", model, "--text", text, *GRID[:-4], "--experts", "8,4", "--calibration",
        calibration, "--also", other, "--expert-ram", "100%,60%", "--decode", 60, "--out", out,
    )  # fmt: skip
    status, printed, err = tiered(*asked, "--json")
    assert status == 0, err
    rows = json.loads(printed)["points"]
    assert len(rows) == 6 and not any(r["problem"] for r in rows), rows
    whole, less = dict.fromkeys(r["expert_ram"] for r in rows)
    assert int(less) == pytest.approx(0.6 * int(whole), abs=1)
    by = {(r["model"], r["experts"], r["expert_ram"]): r for r in rows}
    full, tight = by[str(model), "8", whole], by[str(model), "8", less]
    assert full["kl"] == tight["kl"]  # what is cached changes nothing
    assert float(full["hit_rate"]) > 0.95 > float(tight["hit_rate"])
    assert float(by[str(model), "4", less]["kl"]) > float(full["kl"])
    # The same weights as float16: some values are rounded to another of 4 bits.
    assert float(by[str(other), "8", whole]["kl"]) == pytest.approx(float(full["kl"]), rel=0.3)
    pruned = [path.name for path in (tmp_path / "grid.pruned").iterdir()]
    assert len(pruned) == 1 and pruned[0].startswith("4-reap-")
    status, printed, err = tiered(*asked)
    assert status == 0 and "*" in printed and "4 experts" in printed, err


@pytest.mark.parametrize("kind", ["dense", "gguf"])
def test_other_files(tiered, text, tmp_path, kind):
    """A dense model has precisions alone; a GGUF file cannot be pruned, but all else."""
    if kind == "dense":
        model, more = tiny.hf_checkpoint(tmp_path / "dense", "llama", "f32", tokenizer=True), ()
    else:
        model = tiny.gguf_checkpoint(tmp_path / "tiny.gguf")
        more = "--experts", "8,4", "--calibration", text
    status, printed, err = tiered(
        "pareto", model, "--text", text, *GRID[:-2], *more, "--expert-ram", "100%", "--out",
        tmp_path / "grid.csv", "--json",
    )  # fmt: skip
    assert status == 0, err
    rows = json.loads(printed)["points"]
    problems = [r["problem"] for r in rows if r["problem"]]
    assert len(rows) - len(problems) == 2
    assert all("no Hugging Face folder" in problem for problem in problems)
    assert len(problems) == (2 if kind == "gguf" else 0)


def test_points_that_cannot_run_say_why_and_end_nothing(tiered, model, text, tmp_path):
    stranger = tiny.hf_checkpoint(
        tmp_path / "stranger", "mixtral", "f32", tokenizer=True, vocab=400
    )
    out = tmp_path / "grid.csv"
    status, printed, err = tiered(
        "pareto", model, "--text", text, *GRID[:-4], "--experts", "9,1,8", "--calibration", text,
        "--top-k", "2,3", "--expert-ram", "all,1K", "--also", stranger, "--out", out,
    )  # fmt: skip
    assert status == 0, err
    rows = rows_of(out)
    assert len(rows) == 16
    for r in rows:
        if r["experts"] != "8":
            assert "must be 2 to 7" in r["problem"]
        elif r["top_k"] == "3":
            assert "routers choose 2" in r["problem"]
        elif r["model"] == str(stranger):
            assert "tokens" in r["problem"]
        elif r["expert_ram"] != "0":
            assert "too small" in r["problem"]
        else:
            assert not r["problem"] and float(r["decode_tok_s"]) > 0
    assert "does not run" in printed and "routers choose 2" in printed
    status, printed, err = tiered(
        "pareto", model, "--text", text, *GRID[:-4], "--top-k", "3", "--out", tmp_path / "b.csv",
        "--plot", tmp_path / "b.png",
    )  # fmt: skip
    assert status == 1 and "nothing to plot" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantize", "int3"), "--quantize takes int4, int4_g128, nf4, none"),
        (("--quantize", ","), "--quantize takes int4, int4_g128, nf4, none"),
        (("--experts", "4"), "--calibration"),
        (("--experts", "four"), "whole numbers"),
        (("--top-p", "much"), "--top-p takes numbers"),
        (("--expert-ram", "x%"), "a budget takes numbers"),
        (("--expert-ram", "lots"), "lots"),
        (("--layer-k", "/no/such/table"), "/no/such/table"),
        (("--also", "/no/such/model"), "/no/such/model"),
        (("--decode", "900"), "more tokens"),
        (("--drop-cold", "0.5"), "--drop-cold"),
        (("--window", "9000"), "a window of 9000 tokens"),
        (("--text", "/no/such/text"), "/no/such/text"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(tiered, model, text, tmp_path, arguments, message):
    out = tmp_path / "grid.csv"
    status, _, err = tiered(
        "pareto", model, "--text", text, "--max-tokens", 90, "--prefill", 8, "--decode", 4, "--out",
        out, *arguments,
    )  # fmt: skip
    assert status != 0 and message in err and "Traceback" not in err
    assert not out.exists() and not (tmp_path / "grid.logits").exists()


def test_a_file_of_something_else_is_refused(tiered, model, text, tmp_path):
    out = tmp_path / "other.csv"
    out.write_text("a,b\n1,2\n")
    status, _, err = tiered("pareto", model, "--text", text, *GRID, "--out", out)
    assert status == 1 and "other columns" in err and out.read_text() == "a,b\n1,2\n"


# --- the picture ---


def many_rows():
    """A frontier of many near points under two budgets, and points that are beaten."""
    base = dict.fromkeys((*pareto.POINT, *pareto.QUALITY, *pareto.SPEED, "problem"), "")
    base |= {"model": "m", "experts": "8", "top_p": "1", "min_weight": "0"}
    rows = []
    for budget in ("0", str(1 << 30)):
        for i, quantize in enumerate(("none", "int4")):
            for top_k in "210":
                for experts in ("8", "6", "4"):
                    kl = 0.0 if not (i or top_k != "0" or experts != "8") else 0.01 * (
                        1 + 3 * i + int(top_k) + (8 - int(experts)))  # fmt: skip
                    speed = 5 + 40 * kl + (3 if budget == "0" else 0)
                    rows.append(base | {
                        "quantize": quantize, "top_k": top_k, "experts": experts, "kl": str(kl),
                        "decode_tok_s": str(speed), "expert_ram": budget,
                    })  # fmt: skip
    return rows


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_names_in_the_picture_cover_nothing(tmp_path, monkeypatch, suffix):
    pytest.importorskip("matplotlib")
    from matplotlib.text import Annotation, Text

    figures = []
    new_figure = frontier_plot.new_figure
    monkeypatch.setattr(
        frontier_plot, "new_figure", lambda: figures.append(new_figure()) or figures[-1]
    )
    rows, path = many_rows(), tmp_path / f"frontier{suffix}"
    best = frontiers(rows)
    frontier_plot.plot_frontiers(rows, best, path, "a model", "a note")
    assert path.stat().st_size > 5000
    ((_, axes),) = figures
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert len(labels) >= 8
    for label in labels:
        label.update_positions(axes.figure.canvas.get_renderer())
    boxes = [Text.get_window_extent(label) for label in labels]
    points = [axes.transData.transform((float(r["kl"]), float(r["decode_tok_s"]))) for r in rows]
    room = axes.figure.bbox
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.contains(*point) for point in points)
        assert room.contains(box.x0, box.y0) and room.contains(box.x1, box.y1)
        assert not box.overlaps(axes.get_legend().get_window_extent())


def test_without_matplotlib_it_says_what_to_install(tiered, model, text, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    status, _, err = tiered("pareto", model, "--text", text, *GRID[:-4], "--out",
                            tmp_path / "a.csv", "--plot", tmp_path / "a.png")  # fmt: skip
    assert status == 1 and "tiered[plot]" in err
    assert not (tmp_path / "a.csv").exists()  # before anything was measured

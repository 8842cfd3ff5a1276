"""`tiered plan`: from a name or headers to an answer."""

import json
from pathlib import Path

import pytest
import tiny

from tiered.demo import random_tiny_model
from tiered.formats import open_checkpoint
from tiered.kv_cache import kv_bytes, state_bytes
from tiered.planning import hardware, shapes, sizes
from tiered.planning.forecast import share_out
from tiered.planning.hardware import GB
from tiered.planning.plan import make_plan


def planned(tiered, *arguments):
    status, out, err = tiered("plan", *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_known_model_on_a_described_machine(tiered):
    got = planned(tiered, "mixtral-8x7b", "--gpu", "rtx4060ti-16gb", "--ram", "32G")
    assert got["simulated"] is True and got["forecast"]["simulated"] is True
    assert got["runs"] and got["verdict"].startswith("fits")
    assert 8 < got["tok_s_low"] <= got["tok_s"] <= got["tok_s_high"] < 40
    assert 0 < got["forecast"]["time_to_first_token"] < 60
    (step,) = got["steps"]  # RAM holds everything already
    assert step["memory"] == "vram" and step["tok_s"] > got["tok_s"]


def test_cards_alike_have_the_memory_of_all(tmp_path):
    shipped = Path(hardware.__file__).parent / "rtx4060-laptop.toml"
    two = tmp_path / "two.toml"
    two.write_text(shipped.read_text().replace("[gpu]", "[gpu]\ncount = 2"))
    model = sizes.of_shape(shapes.find("mixtral-8x7b"), "q4_0", "f16")
    one, both = (share_out(model, hardware.find(f), 4096) for f in ("rtx4060-laptop", str(two)))
    card = hardware.find(str(two)).gpu
    assert both.vram_experts - one.vram_experts == card.vram - card.reserved


def test_cards_in_turn_have_the_memory_of_all_and_times_in_between(tiered):
    fast, slow = (hardware.find(name).gpu for name in ("rtx4090", "rtx3060-12gb"))
    twice = hardware.in_turn([fast, fast])
    assert twice.room == 2 * fast.room and twice.bandwidth == pytest.approx(fast.bandwidth)
    assert (twice.link, twice.compute) == pytest.approx((fast.link, fast.compute))
    both = hardware.in_turn([fast, slow])
    # A byte of each's share takes its own time: seconds add up, rates do not.
    total = both.room / (both.bandwidth * both.efficiency)
    parts = [card.room / (card.bandwidth * card.efficiency) for card in (fast, slow)]
    assert total == pytest.approx(sum(parts))
    got = planned(tiered, "mixtral-8x7b", "--gpu", "rtx4090,rtx3060-12gb")
    assert "RTX 4090" in got["hardware"]["label"] and "RTX 3060" in got["hardware"]["label"]
    alone = [planned(tiered, "mixtral-8x7b", "--gpu", card) for card in ("rtx4090", "rtx3060-12gb")]
    assert got["tok_s"] > alone[1]["tok_s"]
    vram = got["forecast"]["layout"]["vram_experts"]
    assert vram > max(plan["forecast"]["layout"]["vram_experts"] for plan in alone)


def test_the_text_says_that_it_is_simulated(tiered):
    status, out, _ = tiered("plan", "olmoe-1b-7b", "--gpu", "rtx4060-laptop")
    assert status == 0
    assert "simulated, not measured" in out and "fits on the GPU" in out and "tokens/s" in out


def test_too_large_for_ram_reads_from_disk_or_names_what_it_needs(tiered):
    got = planned(tiered, "mixtral-8x7b", "--gpu", "laptop")
    assert "read from disk" in got["verdict"] and got["forecast"]["read_bytes_per_token"] > 0
    got = planned(tiered, "mixtral-8x7b", "--gpu", "laptop", "--ram", "1G")
    assert not got["runs"] and "needs" in got["verdict"] and "tok_s" not in got
    assert got["steps"][0]["memory"] == "ram"
    status, out, _ = tiered("plan", "mixtral-8x7b", "--gpu", "laptop", "--ram", "1G")
    assert status == 0 and "does not run" in out


def test_a_file_is_planned_from_its_headers(tiered, tmp_path):
    path = random_tiny_model(tmp_path)
    got = planned(tiered, path, "--gpu", "laptop", "--context", "64")
    assert got["verdict"] == "fits in RAM" and got["forecast"]["ram_hit_pct"] == 100


def test_what_recurrent_layers_remember_counts_once(tmp_path):
    with open_checkpoint(tiny.hf_checkpoint(tmp_path / "tiny", "qwen3_next")) as checkpoint:
        config = checkpoint.config
        model = sizes.of_checkpoint(checkpoint)
    assert model.state == state_bytes(config) > 0
    for context in (64, 256):
        assert model.kv(context) == kv_bytes(config, context, "f16")
    known = sizes.of_shape(shapes.find("qwen3-next-80b-a3b"))
    assert known.state == 4 * 36 * (3 * 8192 + 32 * 128 * 128)  # as its config.json tells
    assert known.kv(2) - known.kv(1) == known.kv_per_token


def test_this_machine_is_measured(tiered, tmp_path):
    pytest.importorskip("numba")
    got = planned(tiered, random_tiny_model(tmp_path), "--threads", "1", "--context", "64")
    host = got["hardware"]["host"]
    assert got["hardware"]["gpu"] is None and host["cores"] == 1
    assert 0.1 < host["bandwidth"] < 1000 and got["hardware"]["disk"]["bandwidth"] > 0
    assert got["simulated"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixtral-9x9b", "--gpu", "laptop"), "mixtral-8x7b"),
        (("mixtral-8x7b", "--gpu", "rtx1"), "rtx4090"),
        (("mixtral-8x7b", "--gpu", "laptop", "--vram", "8G"), "has no GPU"),
        (("mixtral-8x7b", "--vram", "8G"), "--vram needs --gpu"),
        (("mixtral-8x7b", "--gpu", "rtx4090,laptop"), "laptop has no GPU"),
        (("mixtral-8x7b", "--gpu", "rtx4090,t4", "--vram", "1G,2G,3G"), "has 3 sizes for 2"),
        (("mixtral-8x7b", "--gpu", "laptop", "--ram", "lots"), "is no size"),
        (("mixtral-8x7b", "--gpu", "laptop", "--policy", "best"), "unknown policy"),
    ],
)
def test_mistakes_get_one_line(tiered, arguments, message):
    status, out, err = tiered("plan", *arguments)
    assert status != 0 and out == "" and message in err
    assert "Traceback" not in err


def test_more_of_any_memory_is_never_slower():
    model = sizes.of_shape(shapes.find("qwen3-30b-a3b"))
    small = hardware.find("rtx4060-laptop").with_sizes(ram=8 << 30)
    plan = make_plan(model, small, context=2048)
    assert {step.memory for step in plan.steps} == {"ram", "vram"}
    assert all(step.tok_s >= 0.98 * plan.typical.tok_s for step in plan.steps)


def test_no_forecast_is_faster_than_the_memory_that_holds_the_model():
    for name in ("olmoe-1b-7b", "mixtral-8x7b"):
        model = sizes.of_shape(shapes.find(name))
        machine = hardware.find("h100")
        plan = make_plan(model, machine)
        nbytes = model.active_experts + sum(model.attention) + model.head
        assert plan.verdict == "fits on the GPU"
        assert plan.high < machine.gpu.bandwidth * GB / nbytes

"""Experts of little weight from a copy in fewer bits: what it changes, and what it does not."""

import json
import os

import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.cold_copy import ColdCopy
from tiered.experts import ExpertKey, Routing, group_by_expert
from tiered.formats import CheckpointError

IDS = np.random.default_rng(0).integers(3, 300, 12).tolist()
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model in float32 and in float16, with the very same values; and one in 4 bits."""
    base = tmp_path_factory.mktemp("models")
    tensors = {
        weight.hf: weight.values.astype(np.float16).astype(np.float32)
        for weight in tiny.weights("qwen3_moe")
        if weight.hf
    }
    paths = {}
    for dtype in ("f32", "f16"):
        paths[dtype] = tiny.hf_checkpoint(base / dtype, "qwen3_moe", dtype, tokenizer=True)
        tiny.write_safetensors(paths[dtype] / "model.safetensors", tensors, dtype)
    for format in ("q8_0", "q4_0"):
        paths[format] = tiny.gguf_checkpoint(base / f"{format}.gguf", "qwen3_moe", format)
    return paths


def generate(model, **choices):
    choices = {"threads": 2, "look_ahead": 0, **choices}
    with Engine(model, **choices) as engine:
        return list(engine.generate_tokens(IDS, NUM_TOKENS)), engine.stats


def least(model, **choices):
    """The smallest expert budget there is: most experts have to be read."""
    with Engine(model, threads=1, **choices) as engine:
        return engine.config.top_k * max((engine.blocks or engine.store).blob_bytes)


def test_who_is_cold():
    experts = np.array([[3, 1, 2], [1, 6, 3]], np.int32)
    weights = np.array([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]], np.float32)
    routing = Routing(experts, weights)
    jobs = group_by_expert(routing)
    copy = ColdCopy(None, {}, 0.55, {ExpertKey(4, 6)}.__contains__)
    whole, cold = copy.split(4, routing, jobs)
    # Light for one token: 1, 2; for another: 6, which is in memory. 1 is heavy for the second.
    assert cold.experts.tolist() == [2]
    assert cold.pairs.tolist() == [2]
    assert whole.experts.tolist() == [6, 1, 3]
    assert sorted([*whole.pairs.tolist(), *cold.pairs.tolist()]) == list(range(6))
    assert (copy.served, copy.weight) == (1, pytest.approx(2))
    assert copy.served_weight == pytest.approx(0.1)
    everything = ColdCopy(None, {}, 0.55, lambda key: True)
    assert everything.split(4, routing, jobs) == (jobs, None)
    prompt = Routing(np.repeat(experts, 9, axis=0), np.repeat(weights, 9, axis=0))
    many = group_by_expert(prompt)
    assert copy.split(4, prompt, many) == (many, None)
    assert copy.served == 1


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_a_copy_of_the_same_values_changes_no_token(models, dropped):
    budget = least(models["f32"], quantize="none")
    choices = dict(quantize="none", expert_ram=budget, drop_cold=dropped)
    expected, _ = generate(models["f32"], **choices)
    got, stats = generate(models["f32"], cold_copy=models["f16"], cold_below=1.0, **choices)
    assert got == expected
    assert stats.copied_experts > NUM_TOKENS // 2  # it was not by chance
    assert 0 < stats.copied_weight < stats.computed_weight
    assert bool(stats.skipped_experts) == bool(dropped)


@pytest.mark.parametrize("model_type", [name for name in tiny.ARCHITECTURES if name != "llama"])
def test_a_copy_may_be_of_another_format(model_type, tmp_path):
    """Whatever the architecture: as its folder has it, with experts from a GGUF file."""
    folder = tiny.hf_checkpoint(tmp_path / "hf", model_type, "f32")
    file = tiny.gguf_checkpoint(tmp_path / "copy.gguf", model_type, "q8_0")
    budget = least(folder, quantize="none")
    choices = dict(quantize="none", expert_ram=budget, look_ahead=0, threads=2)
    scores = []
    for copied in ({}, {"cold_copy": file, "cold_below": 1.0}):
        with Engine(folder, **choices, **copied) as engine:
            scores.append(engine.score_tokens(IDS[:9], IDS))
            stats = engine.stats
    assert stats.copied_experts > 0
    assert not np.array_equal(*scores)
    assert np.abs(scores[0] - scores[1]).max() < 0.05


def test_fewer_bytes_are_read_and_counted(models):
    budget = least(models["q8_0"])
    _, whole = generate(models["q8_0"], expert_ram=budget)
    results = []
    for below in (0.7, 1.0):
        choices = dict(cold_copy=models["q4_0"], cold_below=below, expert_ram=budget)
        with Engine(models["q8_0"], threads=2, look_ahead=0, **choices) as engine:
            list(engine.generate_tokens(IDS, NUM_TOKENS))
            stats, tier = engine.stats, engine.source.tier.stats
            assert stats.bytes_read == tier.bytes_read + engine.cold_copy.bytes_read
            assert (
                0
                < engine.cold_copy.bytes_read
                <= stats.copied_experts * max(engine.copy.blob_bytes)
            )
            results.append(stats)
    assert results[1].bytes_read < results[0].bytes_read < whole.bytes_read
    assert results[1].copied_experts > results[0].copied_experts
    assert results[0].copied_weight < 0.7 * results[0].computed_weight
    assert whole.computed_weight == 0


def test_what_is_in_memory_is_not_read_from_a_copy(models):
    expected, _ = generate(models["q8_0"])
    got, stats = generate(models["q8_0"], cold_copy=models["q4_0"], cold_below=1.0)
    assert got == expected
    assert stats.copied_experts == stats.computed_weight == 0


def test_it_takes_part_in_the_budget_for_memory(models):
    with (
        Engine(models["q8_0"], threads=2) as alone,
        Engine(models["q8_0"], threads=2, cold_copy=models["q4_0"]) as both,
    ):
        more = both.config.top_k * max(both.copy.blob_bytes)
        assert both.plan.workspace - alone.plan.workspace == more


def test_a_failed_read_leaves_everything_usable(models, monkeypatch):
    choices = dict(cold_copy=models["q4_0"], cold_below=1.0, expert_ram=least(models["q8_0"]))
    with Engine(models["q8_0"], threads=2, look_ahead=0, **choices) as engine:
        tier = engine.cold_copy.experts.tier
        monkeypatch.setattr(tier, "source", None)
        with pytest.raises(OSError, match="could not read expert"):
            list(engine.generate_tokens(IDS, NUM_TOKENS))
        assert not tier.active
        assert not engine.source.tier.active
        monkeypatch.undo()
        assert len(list(engine.generate_tokens(IDS, NUM_TOKENS))) == NUM_TOKENS


def test_only_a_smaller_copy_of_the_same_model(models, tmp_path):
    other = tiny.gguf_checkpoint(tmp_path / "other.gguf", "qwen3_moe", "q4_0", expert_size=128)
    for path, message in [
        (other, r"other.gguf is no copy of .*q8_0.gguf: they differ in expert_size; make one with"),
        (models["q8_0"], "saves something only if it has fewer bits"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            Engine(models["q8_0"], cold_copy=path)
    with pytest.raises(FileNotFoundError):
        Engine(models["q8_0"], cold_copy=tmp_path / "nothing")
    dense = tiny.gguf_checkpoint(tmp_path / "dense.gguf", "llama", "q8_0")
    with pytest.raises(ValueError, match="dense"):
        Engine(dense, cold_copy=models["q4_0"])
    with pytest.raises(ValueError, match="cold_below must lie"):
        Engine(models["q8_0"], cold_copy=models["q4_0"], cold_below=0.0)
    with pytest.raises(ValueError, match="for the CPU alone"):
        Engine(models["q8_0"], cold_copy=models["q4_0"], device="sim")


def test_the_commands(models, tiered):
    budget = least(models["f32"])
    run = ["run", models["f32"], "the of", "-n", "8", "--expert-ram", budget, "--quantize", "none"]
    budget = least(models["f32"], quantize="none")
    run[run.index("--expert-ram") + 1] = budget
    cold = ["--cold-copy", models["f16"], "--cold-below", "1"]
    status, out, _ = tiered(*run)
    assert status == 0
    status, again, err = tiered(*run, *cold)
    assert (status, again) == (0, out)
    assert " from the cold copy, " in err
    bench = ["bench", *run[1:2], "--prefill", "8", "--decode", "8", *run[5:], *cold]
    status, out, _ = tiered(*bench)
    assert status == 0
    assert " experts read from the cold copy, " in out
    status, out, _ = tiered(*bench, "--json")
    report = json.loads(out)
    assert report["copied_experts"] > 0
    status, _, err = tiered(*run, "--cold-copy", models["q4_0"].parent / "nothing.gguf")
    assert status != 0
    assert len(err.strip().splitlines()) == 1, err
    assert os.fspath(models["q4_0"].parent / "nothing.gguf") in err

"""transformers' decoder with our experts: its own logits, and never its own expert weights."""

import gc
import json

import numpy as np
import pytest
import tiny
from conftest import our_threads

pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.8")

import torch
import transformers
from test_reference import reference  # noqa: F401 (a fixture)

from tiered.checkpoints.checkpoint import CheckpointError
from tiered.config import EngineConfig
from tiered.experts import Routing
from tiered.formats import open_checkpoint
from tiered.standalone import StandaloneExperts
from tiered.store import ExpertStore
from tiered.transformers import TieredConfig, experts_of

LOAD = transformers.AutoModelForCausalLM.from_pretrained
PROMPT = torch.tensor([np.random.default_rng(0).integers(3, 320, 40).tolist()])


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "olmoe", "qwen2_moe"])
def folder(request, tmp_path_factory):
    config = dict(pad_token_id=0, bos_token_id=1, mlp_only_layers=[])
    return tiny.hf_checkpoint(
        tmp_path_factory.mktemp(request.param), request.param, "f32", layers=3, config=config
    )


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    config = dict(pad_token_id=0, bos_token_id=1)
    return tiny.hf_checkpoint(tmp_path_factory.mktemp("m") / "m", "mixtral", "f32", config=config)


def load(path, dtype=torch.float32, load=LOAD, **choices):
    config = TieredConfig(**{"quantize": "none", "threads": 2, **choices})
    return load(path, dtype=dtype, quantization_config=config)


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits[0].numpy()


def floor(path, quantize="none"):
    """Bytes of one layer's top_k experts."""
    with open_checkpoint(path) as checkpoint, ExpertStore(checkpoint, quantize) as store:
        return max(store.blob_bytes) * checkpoint.config.top_k


def test_logits_are_those_of_eager_experts(folder):
    expected = logits(LOAD(folder, dtype=torch.float32, experts_implementation="eager"))
    for expert_ram in (None, floor(folder)):
        model = load(folder, expert_ram=expert_ram)
        with experts_of(model) as experts:
            assert np.abs(logits(model) - expected).max() <= 1e-5 * np.ptp(expected)
            assert (experts.stats.misses > 0) == (expert_ram is not None)


def test_architectures(reference):  # noqa: F811
    """All that we know: those whose experts are computed in another way are refused."""
    path, eager = reference
    kind = eager.config.model_type
    refused = {"llama": "no experts", "llama4_text": "no experts", "gpt_oss": "another way"}
    if kind in refused:
        with pytest.raises(ValueError, match=refused[kind]):
            load(path)
        return
    eager.set_experts_implementation("eager")
    expected = logits(eager)
    # Its own class, because transformers does not know Kimi K2 by its name.
    model = load(path, load=type(eager).from_pretrained, expert_ram=floor(path))
    with experts_of(model) as experts:
        assert np.abs(logits(model) - expected).max() <= 1e-5 * np.ptp(expected)
        assert experts.stats.misses


def test_generate_says_the_same(folder):
    options = dict(max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(PROMPT)
    eager = LOAD(folder, dtype=torch.float32, experts_implementation="eager")
    expected = eager.generate(PROMPT, attention_mask=mask, **options)
    model = load(folder, expert_ram=floor(folder))
    with experts_of(model):
        assert torch.equal(model.generate(PROMPT, attention_mask=mask, **options), expected)


def test_expert_weights_are_never_loaded(mixtral, caplog):
    model = load(mixtral)
    with experts_of(model):
        names = [name for name, _ in model.named_parameters()]
        assert names and not [name for name in names if ".experts." in name]
        assert model.config._experts_implementation == "tiered"
        assert not caplog.records  # nor are they reported as unexpected
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(mixtral / "again")


def test_what_is_resident_changes_no_bit(mixtral):
    """4-bit experts, and dense weights in bfloat16."""
    got = []
    for expert_ram in (floor(mixtral, "int4"), 2 * floor(mixtral, "int4"), None):
        model = load(mixtral, torch.bfloat16, quantize="int4", expert_ram=expert_ram)
        with experts_of(model), torch.no_grad():
            got.append(model(PROMPT).logits)
    assert got[0].dtype == torch.bfloat16
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


def test_four_bits_stay_near(mixtral):
    expected = logits(LOAD(mixtral, dtype=torch.float32, experts_implementation="eager"))
    model = load(mixtral, quantize="int4")
    with experts_of(model):
        got = logits(model)
    assert 0 < np.abs(got - expected).max() <= 0.15 * np.ptp(expected)


def test_experts_of_another_file(mixtral, tmp_path):
    """Dense weights from the folder, experts from a GGUF file of the same model; or of no such."""
    file = tiny.gguf_checkpoint(tmp_path / "m.gguf", "mixtral", "f32")
    expected = logits(LOAD(mixtral, dtype=torch.float32, experts_implementation="eager"))
    model = load(mixtral, experts=file)
    with experts_of(model):
        assert np.abs(logits(model) - expected).max() <= 1e-5 * np.ptp(expected)
    other = tiny.gguf_checkpoint(tmp_path / "other.gguf", "mixtral", "f32", experts=4)
    with pytest.raises(ValueError, match=r"4 experts .* needs 8 .* another model"):
        load(mixtral, experts=other)
    with pytest.raises(ValueError, match="has no experts"):
        load(mixtral, experts=tiny.gguf_checkpoint(tmp_path / "d.gguf", "llama", "f32"))


def test_training_is_refused(mixtral):
    model = load(mixtral)
    with experts_of(model):
        loss = model(PROMPT, labels=PROMPT).loss
        with pytest.raises(RuntimeError, match="cannot be trained"):
            loss.backward()


def test_its_threads_end_with_the_model(mixtral):
    before = our_threads()
    model = load(mixtral, expert_ram=floor(mixtral))
    assert our_threads() - before
    del model
    gc.collect()
    assert not our_threads() - before


def test_errors_say_what_to_do(mixtral, tmp_path):
    before = our_threads()
    with pytest.raises(MemoryError, match="--expert-ram at least"):
        load(mixtral, expert_ram=1000)
    with pytest.raises(ValueError, match="quantize must be"):
        TieredConfig(quantize="int3")
    model = LOAD(mixtral, experts_implementation="tiered")
    with pytest.raises(RuntimeError, match="TieredConfig"):
        model(PROMPT)
    with pytest.raises(ValueError, match="TieredConfig"):
        experts_of(model)
    dense = tiny.hf_checkpoint(tmp_path / "llama", "llama", "f32")
    with pytest.raises(ValueError, match="no experts that can be replaced"):
        load(dense)
    assert our_threads() == before


def test_architectures_that_we_do_not_know_are_named(mixtral, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel_moe"}))
    with pytest.raises(CheckpointError, match=r"unknown model_type 'novel_moe'; known:"):
        load(mixtral, experts=tmp_path)


def test_experts_whose_inputs_are_weighted(tmp_path):
    """With one weight or another, what experts say is no multiple of itself."""
    folder = tiny.hf_checkpoint(tmp_path, "llama4_text", "f32")
    rng = np.random.default_rng(0)
    h, ids = rng.standard_normal((5, 64), np.float32), np.array([[n, 7 - n] for n in range(5)])
    weights = rng.random((5, 2), np.float32)
    found = {w.gguf: w.values for w in tiny.weights("llama4_text") if "exps" in w.gguf}
    gate, up, down = (found[f"blk.1.ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
    expected = np.zeros_like(h)
    for row, rank in np.ndindex(5, 2):
        expert, x = ids[row, rank], h[row] * weights[row, rank]
        gated = gate[expert] @ x
        inner = gated / (1 + np.exp(-gated)) * (up[expert] @ x)
        expected[row] += down[expert] @ inner
    with StandaloneExperts(folder, EngineConfig(threads=2, quantize="none")) as experts:
        got = experts.run(1, h, Routing(ids.astype(np.int32), weights))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(mixtral):
    choices = EngineConfig(threads=1, quantize="none")
    h, ids = np.zeros((2, 64), np.float32), np.zeros((2, 2), np.int32)
    weights = np.zeros((2, 2), np.float32)
    with StandaloneExperts(mixtral, choices) as experts:
        assert not experts.run(0, h, Routing(ids, weights)).any()
        assert experts.run(0, h[:0], Routing(ids[:0], weights[:0])).shape == (0, 64)
        for layer, rows, routing, message in (
            (7, h, Routing(ids, weights), "layer 7"),
            (0, h.astype(np.float64), Routing(ids, weights), "float32"),
            (0, h[:, :8], Routing(ids, weights), r"\[num_tokens, 64\]"),
            (0, h[:1], Routing(ids, weights), "a row for each"),
            (0, h, Routing(ids - 1, weights), "0 ... 7"),
            (0, h, Routing(ids + 8, weights), "0 ... 7"),
        ):
            with pytest.raises(ValueError, match=message):
                experts.run(layer, rows, routing)

"""The layer that drafts tokens: its logits, and the same text with it as without."""

import numpy as np
import pytest
import tiny
from instructions import SAME_INTEGERS
from test_speculation import PLAIN, REPEATING, always_on, cut_short

from cpu_kernels.backend import CpuBackend
from tiered import Engine
from tiered.backend import JoinWeights
from tiered.config import ModelConfig
from tiered.draft_layer import Unseen
from tiered.formats import open_checkpoint
from tiered.weights.convert import convert

EXACT = dict(quantize="none", kv_dtype="f32", threads=2)


def watched_drafts(engine):
    """What the layer is asked for, and the logits that it drafts from."""
    layer, drafts = engine.generation.draft_layer, []
    head, draft = layer.decoder.head, layer.draft

    def watched_head(*given):
        drafts[-1][1].append(head(*given))
        return drafts[-1][1][-1]

    def watched_draft(sequence, tokens, most):
        drafts.append((list(tokens), []))
        return draft(sequence, tokens, 3 if most else 0)  # whatever was right before

    layer.decoder.head, layer.draft = watched_head, watched_draft
    return drafts


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize(
    "model_type",
    ["deepseek_v3", "glm4_moe", "glm4_moe_lite", "hy_v3", "qwen3_next", "qwen3_5_moe_text"],
)
def test_draft_logits(model_type, chunk, tmp_path):
    """Against torch, after a prompt in one piece or several, and after drafts that were wrong."""
    pytest.importorskip("transformers")
    from naive_mtp import Reference

    reference = Reference(tmp_path, model_type)
    with Engine(tmp_path, speculate="mtp", prefill_chunk=chunk, **EXACT) as engine:
        always_on(engine)
        drafts = watched_drafts(engine)
        said = list(engine.generate_tokens(REPEATING, 12))
        assert engine.stats.drafted > engine.stats.drafted_right
    with Engine(tmp_path, **EXACT) as engine:
        assert said == list(engine.generate_tokens(REPEATING, 12))
    assert len(drafts) > 3
    for tokens, logits in drafts:
        if not logits:  # at the end there is no room for drafts
            continue
        got = np.concatenate(logits)
        draft = got.argmax(axis=1).tolist()
        expected = reference.draft_logits(tokens, draft[:-1])
        # The delta rule and latent attention round elsewhere than transformers, as do more layers.
        assert np.abs(got - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.fixture(scope="module", params=tiny.DRAFTING)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny.hf_checkpoint(folder, request.param, tokenizer=True, drafts=1)


def generated(model, prompt=REPEATING, count=40, sampling=None, **choices):
    with Engine(model, threads=2, **choices) as engine:
        always_on(engine)
        return list(engine.generate_tokens(prompt, count, **(sampling or {}))), engine.stats


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.0, seed=3, repetition_penalty=1.3)])
def test_the_text_stays_the_same(model, sampling):
    without, _ = generated(model, sampling=sampling)
    tokens, stats = generated(model, sampling=sampling, speculate="mtp")
    assert tokens == without and stats.drafted > 20


@pytest.mark.parametrize("choices", [dict(kv_dtype="int8"), dict(prefill_chunk=5), {}])
def test_choices_never_change_what_is_said(model, choices):
    if not choices:  # a budget: the layer's experts are read like all others
        with Engine(model, speculate="mtp") as engine:
            choices = dict(expert_ram=engine.plan.experts // 3)
            assert (
                engine.plan.experts > sum(engine.store.blob_bytes[:2]) * engine.config.num_experts
            )
    without, _ = generated(model, **choices)
    tokens, stats = generated(model, speculate="mtp", **choices)
    assert tokens == without and stats.drafted > 20


@pytest.mark.parametrize("model_type", tiny.DRAFTING)
def test_gguf_and_stores_have_the_layer_too(model_type, tmp_path):
    file = tiny.gguf_checkpoint(tmp_path / "model.gguf", model_type, "q8_0", drafts=1)
    convert(file, tmp_path / "store")
    without, _ = generated(file)
    said, drafted = zip(*(generated(p, speculate="mtp") for p in (file, tmp_path / "store")))  # noqa: B905
    assert list(said) == [without, without]
    assert drafted[0].drafted == drafted[1].drafted > 20
    assert drafted[0].drafted_right == drafted[1].drafted_right
    assert generated(tmp_path / "store")[0] == without
    with Engine(tmp_path / "store") as engine:
        assert engine.store.checkpoint.config.num_draft_layers == 0
        assert len(engine.store.blob_bytes) == 2
        assert not any(".mtp." in name for name in engine.checkpoint.tensors)


def foreseeing(weight):
    """A model whose next token depends on the last one alone, and whose layer knows how."""
    values = weight.values
    if weight.hf.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
        values = np.zeros_like(values)
    elif weight.hf.endswith(("eh_proj.weight", "mtp.fc.weight")):
        values = np.eye(*values.shape, dtype=np.float32)
    elif weight.hf.endswith("norm.weight") or "pre_fc_norm" in weight.hf:
        values = np.full_like(values, 0.0 if abs(values.mean()) < 0.5 else 1.0)
    elif weight.hf.endswith("shared_head.head.weight"):
        return weight._replace(hf="unused.weight")  # the model's own
    return weight._replace(values=values)


@pytest.mark.parametrize("model_type", tiny.DRAFTING)
def test_what_is_foreseen_takes_fewer_steps(model_type, tmp_path):
    """Greedily all drafts are right; where tokens are drawn, some of them."""
    model = tiny.hf_checkpoint(tmp_path, model_type, "f32", drafts=1, change=foreseeing)
    without, _ = generated(model, PLAIN, 60)
    tokens, stats = generated(model, PLAIN, 60, speculate="mtp")
    assert tokens == without
    # Drafts of 1, 2, ..., 7 tokens: the prompt's step, and 11 more.
    assert stats.drafted == stats.drafted_right >= 60 - 12
    for temperature in (0.1, 0.3):
        drawn = dict(temperature=temperature, seed=5)
        without, _ = generated(model, PLAIN, 60, drawn)
        tokens, stats = generated(model, PLAIN, 60, drawn, speculate="mtp")
        assert tokens == without
        assert 10 < stats.drafted_right < stats.drafted


def test_a_conversation_goes_on(model):
    """From where it was, from an earlier place, and from the beginning."""
    with (
        Engine(model, isa=SAME_INTEGERS, speculate="auto") as engine,
        Engine(model, isa=SAME_INTEGERS) as plain,
    ):
        always_on(engine)
        sequence = engine.open_sequence()
        for length in (30, 33):
            said = cut_short(engine, sequence, length)
            assert said == list(plain.generate_tokens(REPEATING, length))
            longer = [*REPEATING, *said, 7, 8, 9]
            got = list(engine.generate_tokens(longer, 20, sequence=sequence))
            assert got == list(plain.generate_tokens(longer, 20))
        engine.kv.close(sequence)
        assert engine.kv.free_tokens == plain.kv.free_tokens
        assert engine.stats.drafted > 50


def test_full_contexts_and_caches(model):
    for room in (1, 2, 5, 9):
        choices = dict(context=64 - 9 + room, quantize="none")
        prompt = (REPEATING * 2)[: choices["context"] - room]
        without, _ = generated(model, prompt, 1000, **choices)
        tokens, _ = generated(model, prompt, 1000, speculate="mtp", **choices)
        assert tokens == without and len(tokens) == room + 1


def test_a_trace_has_nothing_of_it(model, tmp_path):
    with Engine(model, speculate="mtp") as engine:
        with engine.record(tmp_path / "trace"):
            first = list(engine.generate_tokens(REPEATING, 30))
        assert engine.stats.drafted == 0
        assert list(engine.generate_tokens(REPEATING, 30)) == first
        assert engine.stats.drafted > 0


def test_without_the_layer(tmp_path):
    plain = tiny.hf_checkpoint(tmp_path / "plain", "glm4_moe")
    with pytest.raises(ValueError, match="has no layer that drafts tokens: use --speculate lookup"):
        Engine(plain, speculate="mtp")
    assert generated(plain, speculate="auto")[1].drafted > 0  # looked up
    whole = tiny.hf_checkpoint(tmp_path / "whole", "glm4_moe", drafts=1)
    with Engine(whole) as engine, open_checkpoint(whole, drafts=True) as checkpoint:
        assert engine.config.num_layers == 2 and checkpoint.config.num_layers == 3
        assert checkpoint.config.without_drafts() == open_checkpoint(whole).config
        assert len(engine.store.blob_bytes) == 2


def joining():
    """Weights, x and hidden states, and in float64 what the layer begins with."""
    rng = np.random.default_rng(0)
    config = ModelConfig("test", 1, 48, 8, 64, 1, 1, 16, 1e-3)
    norms = [rng.uniform(0.5, 1.5, 48).astype(np.float32) for _ in range(3)]
    weight = rng.standard_normal((48, 96), np.float32)
    x, hidden = rng.standard_normal((2, 5, 48), np.float32)

    def normed(values, norm):
        values = values.astype(np.float64)
        return values / np.sqrt((values * values).mean(-1, keepdims=True) + 1e-3) * norm

    right = normed(normed(hidden, norms[1]), norms[2])
    expected = np.concatenate([normed(x, norms[0]), right], 1) @ weight.T.astype(np.float64)
    return config, norms, weight, x, hidden, expected


def join_layer(backend, config, norms, weight):
    matrix = backend.matrix(weight.view(np.uint8).reshape(-1), "f32", weight.shape)
    return backend.join_layer(JoinWeights(*norms, matrix), config)


def test_join():
    """Against float64, with the same bits on any threads, and for other numbers of rows."""
    config, norms, weight, x, hidden, expected = joining()
    for threads in (1, 2, 3):
        backend = CpuBackend(threads)
        layer = join_layer(backend, config, norms, weight)
        got, one = x.copy(), x[3:4].copy()
        backend.join(got, hidden, layer)
        backend.join(one, hidden[3:4], layer)
        assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)
        assert np.array_equal(one[0], got[3])
        with pytest.raises(ValueError, match="x and hidden must be float32"):
            backend.join(got, hidden[1:], layer)
        backend.close()


# --- GPUs ---


def test_a_gpu_joins():
    torch = pytest.importorskip("torch")
    from gpu_backend.backend import GpuBackend

    config, norms, weight, x, hidden, expected = joining()
    backend = GpuBackend("cpu")
    layer, got = join_layer(backend, config, norms, weight), torch.tensor(x)
    backend.join(got, hidden, layer)
    assert np.abs(backend.in_ram(got) - expected).max() <= 1e-5 * np.ptp(expected)
    with pytest.raises(ValueError, match="x and hidden must be alike"):
        backend.join(got, hidden[1:], layer)
    with pytest.raises(ValueError, match="the projection must have shape"):
        join_layer(backend, config, norms, np.ascontiguousarray(weight[:, 1:]))
    backend.close()


@pytest.mark.usefixtures("one_torch_thread")
def test_a_gpu_drafts_and_says_the_same(model):
    """One, two that share the layers, and one with little memory: torch's CPU."""
    from tensor_places import TensorPlaces

    without, _ = generated(model, count=16, device="sim")
    with Engine(model, device="sim", speculate="mtp", threads=2) as engine:
        always_on(engine)
        assert list(engine.generate_tokens(REPEATING, 16)) == without
        assert engine.stats.drafted > 8
        least, nbytes = engine.shares[0].needed, max(engine.store.blob_bytes)
    small = dict(device="sim", vram=least + 64, expert_ram=6 * nbytes)
    for choices in dict(device="sim:2"), small:
        with TensorPlaces():
            tokens, stats = generated(model, count=16, speculate="mtp", **choices)
        assert tokens == without and stats.drafted > 8


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_next"])
def test_what_a_gpu_foresees_is_right(model_type, tmp_path):
    model = tiny.hf_checkpoint(tmp_path, model_type, "f32", drafts=1, change=foreseeing)
    tokens, stats = generated(model, PLAIN, 24, device="sim", speculate="mtp")
    assert tokens == generated(model, PLAIN, 24, device="sim")[0]
    # Drafts of 1, 2, ..., 6 tokens: the prompt's step, and 7 more.
    assert stats.drafted == stats.drafted_right >= 24 - 8


# --- what it has yet to see ---


def test_unseen_hidden_states_follow_the_text():
    states = np.arange(40, dtype=np.float32)[:, None] + 1  # of token t: t + 1
    unseen = Unseen(1)

    def before(start):
        return unseen.take(len(unseen))[:, 0].tolist() if unseen.start == start else None

    unseen.add(0, states[:5])
    assert unseen.end == 6 and before(0) == [0, 1, 2, 3, 4, 5]
    unseen.add(5, states[5:9])
    unseen.cut(7)  # drafts were wrong
    unseen.add(6, states[6:8])  # computed again
    assert unseen.end == 9 and before(6) == [6, 7, 8]
    unseen.cut(4)  # further back than is known
    assert unseen.end == 5
    unseen.add(4, states[4:6])
    assert before(4) == [0, 5, 6]
    unseen.add(20, states[20:22])  # others have computed what is before
    assert before(20) == [0, 21, 22]

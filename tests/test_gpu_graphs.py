"""Decode steps that are recorded and replayed: the same bits; what is refused is done as usual."""

import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.demo import random_tiny_model

torch = pytest.importorskip("torch")
from recorded import record  # noqa: E402

from gpu_backend.graphs import MOST_ROWS, Buffers, Graphs  # noqa: E402

PROMPT = np.random.default_rng(0).integers(3, 256, 50).tolist()
NUM_TOKENS = 24  # a second page of keys and values is begun
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_tiny_model(tmp_path_factory.mktemp("model"))


def run(model, record=None, starts=(0, 7), **choices):
    """Texts, the logits of single tokens, and the graphs of each card."""
    choices = {"device": "sim", "threads": 2, **choices}
    with Engine(model, **choices) as engine:
        for card in engine.backend.cards:
            card.graphs.record = record
        texts = [list(engine.generate_tokens(PROMPT[n:], NUM_TOKENS)) for n in starts]
        sequence = engine.open_sequence()
        logits = [engine.generation.begin(sequence, PROMPT[:5])]
        logits += [engine.generation._decode(sequence, [token]) for token in PROMPT[5:12]]
        return texts, np.stack([each.reshape(-1) for each in logits]), [
            len(card.graphs) for card in engine.backend.cards
        ], [card.graphs.problem for card in engine.backend.cards]  # fmt: skip


@pytest.mark.parametrize(("device", "kv_dtype"), [("sim", "int8"), ("sim:2", "f16")])
def test_a_replay_says_bit_by_bit_what_the_calls_say(model, device, kv_dtype):
    choices = {"device": device, "kv_dtype": kv_dtype}
    texts, logits, none, _ = run(model, **choices)
    got, got_logits, counts, problems = run(model, record, **choices)
    assert got == texts and np.array_equal(got_logits, logits)
    assert not any(none) and all(counts) and not any(problems)


MORE = ["gemma4", "llama4", "qwen3_next", "granitemoehybrid"]


@pytest.mark.parametrize(
    "model_type",
    ["gpt_oss", "deepseek_v2", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)],
)
def test_other_architectures(model_type, tmp_path):
    model = tiny.hf_checkpoint(tmp_path / model_type, model_type, layers=4)
    texts, logits, _, _ = run(model, starts=(40,))
    got, got_logits, counts, problems = run(model, record, starts=(40,))
    assert got == texts and np.array_equal(got_logits, logits)
    assert all(counts) and not any(problems)


def test_each_layer_is_recorded_once_per_number_of_rows(model):
    with Engine(model, device="sim", threads=2) as engine:
        graphs = engine.backend.cards[0].graphs
        graphs.record = record
        layers = engine.config.num_layers
        list(engine.generate_tokens(PROMPT[: MOST_ROWS + 1], 4))
        assert len(graphs) == 3 * layers  # projections, outputs and routers
        list(engine.generate_tokens(PROMPT[:MOST_ROWS], 4))
        assert len(graphs) == 6 * layers
        list(engine.generate_tokens(PROMPT, NUM_TOKENS))
        assert len(graphs) == 6 * layers
        (facts,) = engine.gpu_facts()["cards"].values()
        assert facts == {"layers": [0, layers - 1], "cuda_graphs": f"{6 * layers} calls recorded"}
    assert len(graphs) == 0


def test_what_cannot_be_recorded_is_done_as_usual(model, caplog):
    def refused(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    def wrong(work):
        outputs, replay = record(work)
        return tuple(each + 1 for each in outputs), replay

    texts, logits, *_ = run(model)
    for recorder, reason in ((refused, "not permitted"), (wrong, "other numbers")):
        got, got_logits, counts, (problem,) = run(model, recorder)
        assert got == texts and np.array_equal(got_logits, logits)
        assert counts == [0] and reason in problem
        assert f"CUDA graphs are not used, decoding is slower: {problem}" in caplog.text


def test_a_replay_reads_where_the_first_call_did():
    """Also what lies in buffers, and what the call changes."""
    buffers = Buffers(torch.device("cpu"))
    graphs = Graphs(buffers, record)

    def work(x, y, at):
        x += y[at]
        return (x * 2,)

    for number in range(4):
        x, y = torch.full((2, 3), float(number)), torch.arange(6.0).reshape(2, 3) + number
        at = buffers.put("at", np.array([number % 2, 1]))
        want = x + y[at]
        (got,) = graphs.run("key", work, x, y, at)
        assert torch.equal(x, want) and torch.equal(got, 2 * want)
    assert len(graphs) == 1


def test_what_comes_to_the_host_cannot_be_recorded():
    graphs = Graphs(Buffers(torch.device("cpu")), record)
    (got,) = graphs.run("key", lambda x: (x * x.sum().item(),), torch.ones(1, 3))
    assert torch.equal(got, torch.full((1, 3), 3.0)) and "capturing" in graphs.problem
    assert graphs.state == f"not used: {graphs.problem}"


def test_buffers_stay_where_they_are():
    buffers = Buffers(torch.device("cpu"))
    first = buffers.put("slots", np.arange(2))
    assert buffers.put("slots", np.arange(2) + 5) is first and first.tolist() == [5, 6]
    assert first in buffers and first.clone() not in buffers
    assert buffers.put("slots", np.arange(3)) is not first
    many = buffers.put("slots", np.arange(MOST_ROWS + 1))
    assert many not in buffers

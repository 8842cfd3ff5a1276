"""Decoding when nobody has to know what routers choose: the same bits as when somebody does."""

import golden
import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.generation import log_softmax

# Experts of HF folders, which cannot be mapped: interleaved or transposed.
NOT_MAPPED = "gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe"


class Listener:
    """A recorder of routing that keeps nothing: it is enough that it would like to know."""

    def begin(self, phase):
        pass

    def record(self, layer, positions, routing):
        pass


def open_engine(path, kv_tokens=512, **choices):
    return Engine(path, quantize="none", context=256, kv_tokens=kv_tokens, **choices)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("model_type", tiny.ARCHITECTURES)
def test_chained_and_unchained_passes_are_the_same_bits(model_type, threads, tmp_path):
    if model_type in NOT_MAPPED:
        path = tiny.gguf_checkpoint(tmp_path / "model.gguf", model_type, "f32", seed=7)
    else:
        path = golden.checkpoint(tmp_path / "model", model_type)
    answer = [5, 3, 9, 9, 1, 2, 7, 4]
    with open_engine(path, threads=threads) as engine:
        assert engine.plan.mapped or engine.source is None
        got, hits = engine.score_tokens(golden.PROMPT, answer), engine.stats.hits
        engine.decoder.trace = Listener()
        expected = engine.score_tokens(golden.PROMPT, answer)
        assert engine.stats.hits == 2 * hits
    assert np.array_equal(got, expected)


@pytest.fixture
def engine(tmp_path):
    with open_engine(golden.checkpoint(tmp_path / "model", "olmoe"), threads=2) as engine:
        yield engine


def test_a_known_pass_is_run_again_whatever_came_between(engine):
    """Texts in turn, prompts and pages in between: each goes on as if it were alone."""
    answers = [5, 3, 9, 9, 1, 2], [8, 8, 2, 30, 4, 6]
    prompts = golden.PROMPT, golden.PROMPT[:3]
    alone = [engine.score_tokens(*text) for text in zip(prompts, answers, strict=True)]
    g, known = engine.generation, 0
    sequences = [g.kv.open() for _ in prompts]
    logits = [g.begin(*text) for text in zip(sequences, prompts, strict=True)]
    got = [[], []]
    for step in range(len(answers[0])):
        for text in (0, 1):
            token = answers[text][step]
            got[text].append(log_softmax(logits[text])[token])
            logits[text] = g._decode(sequences[text], [token])[0]
            known += engine.backend._chain.is_known
        if step == 3:
            engine.logits(golden.PROMPT)
    assert known > 5
    assert np.array_equal(np.float32(got), alone)
    for sequence in sequences:
        g.kv.close(sequence)


def test_texts_that_share_passes_are_each_as_alone(engine):
    """Whoever joins or leaves, and whatever experts their tokens share."""
    answers = [[5, 3, 9, 9, 1, 2], [8, 8, 2, 30, 4, 6], [5, 3, 9, 9, 1, 2], [7, 7, 7, 7, 7, 7]]
    prompts = [golden.PROMPT[: 3 + i] for i in range(len(answers))]
    decoder, kv, known = engine.decoder, engine.kv, 0

    def open_all():
        sequences = [kv.open() for _ in prompts]
        for sequence, prompt in zip(sequences, prompts, strict=True):
            decoder.forward(kv.batch([(sequence, prompt)]), kv.pages, np.array([0]))
        return sequences

    def step(sequences, texts, number):
        batch = kv.batch([(sequences[text], [answers[text][number]]) for text in texts])
        return decoder.forward(batch, kv.pages, np.arange(len(texts)))

    steps = [(0, 1, 2, 3), (0, 1, 2, 3), (3, 1, 0, 2), (1, 3), (1, 3), (2,)]
    alone, together = open_all(), open_all()
    expected = [
        np.concatenate([step(alone, [text], number) for text in texts])
        for number, texts in enumerate(steps)
    ]
    for number, texts in enumerate(steps):
        assert np.array_equal(step(together, texts, number), expected[number])
        known += engine.backend._chain.is_known
    assert known >= 3
    for sequence in (*alone, *together):
        kv.close(sequence)


# With experts alone; with a shared expert; with a dense layer first.
@pytest.mark.parametrize("model_type", ["olmoe", "qwen2_moe", "deepseek_v3"])
def test_ops_run_again_for_any_number_of_rows(model_type, tmp_path):
    """Whoever joins or leaves, and whatever prompts come between: nothing is prepared anew."""
    path = golden.checkpoint(tmp_path / "model", model_type)
    with open_engine(path, kv_tokens=2048, threads=2) as engine:
        decoder, kv, known = engine.decoder, engine.kv, []
        again = decoder.again
        decoder.again = lambda *arguments: known.append(again(*arguments)) or known[-1]
        long, few = np.arange(40) % 30, [4, 9, 2]

        def answers():
            engine.logits(long)
            sequences = [kv.open() for _ in range(decoder.backend.few_rows)]
            for sequence in sequences:
                decoder.hidden(kv.batch([(sequence, few)]), kv.pages)
            known.clear()
            for step, count in enumerate((4, 16, 1, 7, 15, 16, 2)):
                added = [(s, [(3 * i + step) % 30]) for i, s in enumerate(sequences[:count])]
                yield decoder.forward(kv.batch(added), kv.pages, np.arange(count))
                if step == 4:
                    engine.logits(few)
                    engine.logits(long)
            for sequence in sequences:
                kv.close(sequence)

        got = list(answers())
        prepared = [x is None for x in known]
        decoder.trace = Listener()
        assert all(map(np.array_equal, got, answers()))
    assert sum(prepared) == 1  # the long prompt, for which few rows had no room; then it has


# Also with a branch beside the experts; with recurrent layers.
@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gemma4", "qwen3_next"])
def test_prompts_of_any_length_are_as_if_somebody_listened(model_type, tmp_path):
    """Longer than all before, shorter, as long as before; tokens in between; and none that is told
    of an expert more than once."""
    path = golden.checkpoint(tmp_path / "model", model_type)
    with open_engine(path, kv_tokens=2048, threads=2) as engine:
        decoder, kv = engine.decoder, engine.kv

        def passes():
            uses = engine.source.uses.copy()
            for length in (3, 20, 64, 17, 65, 100, 100, 40, 130):
                sequence, ids = kv.open(), [(7 * i + length) % 30 for i in range(length)]
                for tokens in (ids, [4], [9]):
                    x = decoder.hidden(kv.batch([(sequence, tokens)]), kv.pages)
                    yield decoder.head(x, np.arange(len(x)))
                kv.close(sequence)
            yield engine.source.uses - uses

        got = list(passes())
        decoder.trace = Listener()
        assert all(map(np.array_equal, got, passes()))


def test_a_prompt_is_one_call_unless_it_would_take_long(engine, monkeypatch):
    """An interrupt waits for what runs in one go."""
    again, calls = engine.decoder.again, []
    engine.decoder.again = lambda *arguments: calls.append(again(*arguments)) or calls[-1]
    expected = engine.logits(range(30))  # memory is made
    for seconds in (1.0, 0.0, 1.0):
        monkeypatch.setattr(engine.backend, "_row_seconds", seconds)
        assert np.array_equal(engine.logits(range(30)), expected)
    assert [x is not None for x in calls] == [False, False, True, False]


def test_an_expert_that_several_tokens_choose_is_used_once(engine):
    batch = engine.kv.batch([(engine.kv.open(), [5] * 4)])
    uses = []
    for trace in (None, Listener()):
        engine.decoder.trace = trace
        before = engine.source.uses.copy()
        engine.decoder.hidden(batch, engine.kv.pages)
        uses.append(engine.source.uses - before)
    assert np.array_equal(*uses)
    assert uses[0].max() == 1


def test_other_layers_are_not_mistaken_for_the_known_ones(engine):
    answer = [5, 3, 9, 9, 1, 2]
    before = engine.score_tokens(golden.PROMPT, answer)
    assert engine.backend._chain.is_known
    layers = engine.decoder.layers
    engine.decoder.layers = layers[:1]
    one = engine.score_tokens(golden.PROMPT, answer)
    engine.decoder.layers = layers
    assert not np.array_equal(one, before)
    assert np.array_equal(engine.score_tokens(golden.PROMPT, answer), before)


def test_time_is_counted_for_the_parts_that_took_it(engine):
    engine.score_tokens(golden.PROMPT, [5] * 50)
    parts = engine.stats.parts
    names = "attention", "router", "experts", "head"
    assert all(parts[name] > 0 for name in names)
    assert sum(parts[name] for name in names) >= engine.backend.seconds * 0.999


def test_a_router_of_no_numbers_leads_to_an_error(engine):
    """Not to experts that are not there."""
    for layer in engine.decoder.layers:
        layer.router.norm["norm"] = np.full(engine.config.hidden_size, np.nan, np.float32)
    batch = engine.kv.batch([(engine.kv.open(), [5])])
    for _ in range(3):
        x = engine.decoder.hidden(batch, engine.kv.pages)
        assert np.isnan(engine.decoder.head(x, np.array([0]))).all()

"""Speculation: the same tokens as without it, and fewer steps where a text repeats itself."""

from itertools import islice, pairwise

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from instructions import SAME_INTEGERS

from tiered import Engine
from tiered.governor import Governor
from tiered.speculation import FEWEST, MOST, PromptLookup, seconds_per_token

# A text that comes back, and one that does not.
REPEATING = [5, 9, 14, 3, 77, 21, 8] * 6
PLAIN = np.random.default_rng(0).permutation(250)[:40].tolist()
RECURRENT = ("qwen3_next", "lfm2_moe", "granitemoehybrid")  # DeltaNet, convolutions, Mamba-2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.hf_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe", tokenizer=True)


def always_on(engine):
    """Whether a draft pays on this machine must not decide what is tested."""
    engine.generation.speculation = governor = Governor((0, MOST), max_patience=10**9)
    governor._patience = 10**9


def both(model, prompt, count, sampling=None, **choices):
    """Tokens without speculation and with it, and what was drafted."""
    results = []
    for speculate in ("off", "lookup"):
        with Engine(model, threads=2, speculate=speculate, **choices) as engine:
            always_on(engine)
            results.append(list(engine.generate_tokens(prompt, count, **(sampling or {}))))
            stats = engine.stats
    return *results, stats


def cut_short(engine, sequence, length):
    """The first tokens of a text that nobody listens to any longer."""
    tokens = engine.generate_tokens(REPEATING, 100, sequence=sequence)
    said = list(islice(tokens, length))
    tokens.close()
    return said


@pytest.mark.parametrize("model_type", sorted(tiny.ARCHITECTURES))
def test_every_architecture_says_the_same(model_type, tmp_path):
    model = tiny.hf_checkpoint(tmp_path, model_type)
    for prompt in (REPEATING, PLAIN):
        without, tokens, _ = both(model, prompt, 48)
        assert tokens == without


@pytest.mark.parametrize(
    "choices", [{}, dict(expert_ram="floor"), dict(kv_dtype="int8"), dict(quantize="none")]
)
@pytest.mark.parametrize(
    "sampling",
    [{}, dict(temperature=0.05, seed=3), dict(temperature=1.0, seed=3, repetition_penalty=1.3)],
)
def test_choices_and_sampling_never_change_what_is_said(model, choices, sampling):
    if choices.get("expert_ram"):
        with Engine(model) as engine:
            choices = dict(expert_ram=engine.plan.experts // 3)
    without, tokens, stats = both(model, REPEATING, 60, sampling, **choices)
    assert tokens == without and len(tokens) == 60
    assert stats.drafted >= stats.drafted_right


def test_a_text_that_repeats_itself_takes_fewer_steps(model):
    """Greedy decoding of a small model falls into a loop, which lookup foresees."""
    with Engine(model, threads=1, speculate="lookup") as engine:
        always_on(engine)
        steps, hidden = [], engine.decoder.hidden

        def watched(batch, *given):
            steps.append(len(batch.tokens))
            return hidden(batch, *given)

        engine.decoder.hidden = watched
        tokens = list(engine.generate_tokens(REPEATING, 200))
        stats = engine.stats
    assert len(tokens) == 200 and stats.new_tokens == 200
    assert 1 + FEWEST < max(steps[1:]) <= 1 + MOST
    assert stats.drafted_right > 10
    # What comes out: a token of each step, and what was drafted rightly.
    assert len(steps) - 1 <= 199 - stats.drafted_right


def test_the_context_ends_where_it_would(model):
    for room in (1, 2, 5, 9):
        choices = dict(context=len(REPEATING) + room, quantize="none")
        without, tokens, _ = both(model, REPEATING, 1000, **choices)
        assert tokens == without and len(tokens) == room + 1


def test_a_conversation_goes_on_from_a_text_that_was_cut_short(model):
    """Whoever stops listening leaves drafts behind; they are not taken for what was said."""
    with (
        Engine(model, isa=SAME_INTEGERS, speculate="lookup") as engine,
        Engine(model, isa=SAME_INTEGERS) as plain,
    ):
        always_on(engine)
        sequence = engine.open_sequence()
        for length in (30, 31, 33, 40):
            said = cut_short(engine, sequence, length)
            assert said == list(plain.generate_tokens(REPEATING, length))
            longer = [*REPEATING, *said, 7, 8, 9]
            got = list(engine.generate_tokens(longer, 20, sequence=sequence))
            assert got == list(plain.generate_tokens(longer, 20))


def test_a_trace_has_each_token_once(model, tmp_path):
    with Engine(model, speculate="lookup") as engine:
        with engine.record(tmp_path / "trace"):
            list(engine.generate_tokens(REPEATING, 30))
        assert engine.stats.drafted == 0


class Guesses:
    """Drafts what a text will say, with a wrong token after so many right ones, in turn."""

    def __init__(self, said, turns):
        self.said, self.turns, self.place = said, turns, 0

    def push(self, token):
        assert token == self.said[self.place]
        self.place += 1

    def draft(self, most):
        right = self.turns[self.place % len(self.turns)]
        draft = self.said[self.place :][: min(right, most)]
        return [*draft, (self.said[self.place] + 1) % 256] if len(draft) < most else draft

    def judge(self, drafted, accepted):
        pass


@pytest.mark.parametrize("model_type", RECURRENT)
@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.0, seed=3)])
def test_what_recurrent_layers_remember_is_taken_back(model_type, sampling, tmp_path, monkeypatch):
    """Bit for bit, however many of a draft were right: what is drawn depends on all logits."""
    model = tiny.hf_checkpoint(tmp_path, model_type, "f32")
    with Engine(model, quantize="none", threads=2) as engine:
        said = list(engine.generate_tokens(PLAIN, 40, **sampling))
    for turns in ([0], [1], [6], [7], [3, 0, 5, 2, 6, 1, 4]):
        guesses = Guesses(said, turns)
        monkeypatch.setattr("tiered.generation.PromptLookup", lambda tokens, g=guesses: g)
        with Engine(model, quantize="none", threads=2, speculate="lookup") as engine:
            assert engine.plan.kv > 0
            always_on(engine)
            sequence = engine.open_sequence()
            got = list(engine.generate_tokens(PLAIN, 40, sequence=sequence, **sampling))
            assert got == said
            assert engine.stats.drafted > engine.stats.drafted_right or turns == [7]
            assert (engine.stats.drafted_right > 20) == (max(turns) > 2)
            # Nothing of the drafts is left: the text goes on from where it is.
            assert sequence.tokens == [*PLAIN, *said][: len(sequence.tokens)]
            assert len(sequence.tokens) >= len(PLAIN) + len(said) - 1 - MOST


@pytest.mark.parametrize("model_type", RECURRENT)
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_tokens_together_have_the_bits_of_one_by_one(model_type, quantize, tmp_path):
    """Also after some of them were taken back and computed again."""
    model = tiny.hf_checkpoint(tmp_path, model_type)
    with Engine(model, quantize=quantize, threads=2) as engine:
        kv, decode = engine.kv, engine.generation._decode
        alone, together = engine.open_sequence(), engine.open_sequence()
        for sequence in (alone, together):
            engine.generation.begin(sequence, PLAIN[:9])
        one_by_one = np.concatenate([decode(alone, [token]) for token in PLAIN[9:]])
        start = 0
        for right in (7, 0, 3, 6):
            tokens = PLAIN[9 + start :][:8]
            kv.set_mark(together)
            assert np.array_equal(decode(together, tokens), one_by_one[start : start + 8])
            again = kv.take_back(together, len(together.tokens) - 7 + right)
            assert again == tokens[: 1 + right]
            decode(together, again)
            start += 1 + right
        assert together.tokens == PLAIN[: 9 + start]


def test_what_a_draft_may_be(model):
    with pytest.raises(ValueError, match="off or lookup or mtp or auto, not 'magic'"):
        Engine(model, speculate="magic")


# --- drafts ---


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 9))
def test_a_draft_followed_the_same_tokens_last_time(tokens, most):
    """Against a search from the end."""
    lookup = PromptLookup(tokens)
    draft = lookup.draft(most)
    for size in PromptLookup.sizes:
        last = tokens[-size:]
        places = [i for i in range(len(tokens) - size) if tokens[i : i + size] == last]
        if len(last) == size and places:
            start = places[-1] + size
            assert draft == tokens[start : start + min(FEWEST, most)]
            return
    assert draft == []


def test_drafts_grow_while_they_are_right():
    lookup = PromptLookup(list(range(20)) * 2)
    lengths = [len(lookup.draft(100))]
    for _ in range(4):
        lookup.judge(lengths[-1], lengths[-1])
        lengths.append(len(lookup.draft(100)))
    assert lengths[0] == FEWEST and lengths[-1] == MOST
    assert all(a <= b for a, b in pairwise(lengths))
    lookup.judge(MOST, MOST - 1)
    assert len(lookup.draft(100)) == FEWEST
    assert len(lookup.draft(1)) == 1 and lookup.draft(0) == []


def test_the_governor_counts_seconds_per_token():
    """A step of three tokens may take twice as long, but not four times."""
    for wide, stays in ((2.0, True), (4.0, False)):
        governor = Governor((0, MOST), "speculation", typical=seconds_per_token)
        for _ in range(2000):
            if governor.limit():
                governor.add(wide, 3)
            else:
                governor.add(1.0)
        assert (governor.chosen > 0) == stays
        assert governor.benefit == pytest.approx(1 - wide / 3)

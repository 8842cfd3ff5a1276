"""Drafts for requests that share steps: the same answers as without, and fewer steps."""

import numpy as np
import pytest
import tiny
from instructions import SAME_INTEGERS
from test_draft_layer import foreseeing
from test_scheduler import Client, assert_nothing_held, make_prompts, run_all
from test_speculation import REPEATING

from cpu_kernels.linear import FEW_ROWS
from tiered.engine import Engine
from tiered.governor import Governor
from tiered.serve.metrics import exposition
from tiered.serve.request import Finish, Piece, Request
from tiered.serve.scheduler import Scheduler
from tiered.serve.service import Service
from tiered.speculation import MOST, PromptLookup
from tiered.text.sampling import SamplingParams

# Models with a layer for drafts, which is mostly right, and models that repeat themselves.
MODELS = {
    "mtp": "glm4_moe",
    "auto": "qwen3_next",
    "lookup": "qwen3_moe",
    "recurrent": "granitemoehybrid",
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(how it speculates, its folder)."""
    name, folder = MODELS[request.param], tmp_path_factory.mktemp("model")
    own = dict(drafts=1, change=foreseeing) if request.param in ("mtp", "auto") else {}
    tiny.hf_checkpoint(folder, name, "f32", seed=3, tokenizer=True, **own)
    return "lookup" if request.param == "recurrent" else request.param, folder


def opened(model, **choices):
    speculate, folder = model
    choices = dict(speculate=speculate, threads=2, context=192, kv_tokens=768) | choices
    return Engine(folder, **choices)


def always_on(scheduler):
    """Whether a draft pays on this machine must not decide what is tested."""
    for number in range(len(scheduler._batcher.speculation)):
        governor = Governor((0, MOST), max_patience=10**9)
        governor._patience = 10**9
        scheduler._batcher.speculation[number] = governor


def requests_of(prompts):
    """Greedy and drawn, with penalties, of different lengths."""
    kinds = [
        dict(),
        dict(sampling=SamplingParams(temperature=0.2, seed=3)),
        dict(presence_penalty=0.5, frequency_penalty=0.2),
        dict(sampling=SamplingParams(temperature=1.0, seed=4, repetition_penalty=1.2)),
        dict(logprobs=3),
    ]
    return [Request(tuple(p), 30 + 7 * i, **kinds[i % len(kinds)]) for i, p in enumerate(prompts)]


def answers(model, requests, on, max_running=16, **choices):
    """Events of each request, text by text, and what was counted."""
    choices |= {} if on else dict(speculate="off")
    with (
        opened(model, **choices) as engine,
        Scheduler(engine, max_running=max_running) as scheduler,
    ):
        always_on(scheduler)
        clients = [Client() for _ in requests]
        for client, request in zip(clients, requests, strict=True):
            scheduler.submit(request, client.events.put)
        results = []
        for client in clients:
            events = [client.events.get(timeout=60)]
            while not isinstance(events[-1], Finish):
                events.append(client.events.get(timeout=60))
            results.append(events)
        counts = scheduler.counts
        metrics = exposition(Service(engine, scheduler, ["tiny"]))
    assert_nothing_held(engine)
    return results, counts, metrics


def said(events):
    """Tokens, texts and log-probabilities, and how it ended."""
    pieces = [event for event in events if isinstance(event, Piece)]
    return [(p.token, p.text, p.choice) for p in pieces], events[-1]._replace(num_cached=0)


class Careless(PromptLookup):
    """Makes mistakes."""

    def draft(self, most):
        draft = super().draft(most)
        if draft and len(self._tokens) % 3 == 0:
            draft[-1] = (draft[-1] + 1) % 256
        return draft


@pytest.mark.parametrize("max_running", [1, 3, 16])
def test_the_same_answers(model, max_running, monkeypatch):
    monkeypatch.setattr("tiered.generation.PromptLookup", Careless)
    prompts = [REPEATING, *[[t % 200 + 3 for t in p] for p in make_prompts(6, high=60)]]
    requests = requests_of(prompts)
    without, _, _ = answers(model, requests, on=False, max_running=max_running)
    results, counts, metrics = answers(model, requests, on=True, max_running=max_running)
    assert list(map(said, results)) == list(map(said, without))
    assert counts.drafted > counts.drafted_right > 0
    assert counts.new_tokens == sum(len(said(events)[0]) for events in results)
    assert counts.decode_rows <= FEW_ROWS * counts.decode_steps
    assert f"tiered_drafted_tokens_total {counts.drafted}\n" in metrics
    assert f"tiered_accepted_tokens_total {counts.drafted_right}\n" in metrics


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("model", ["mtp", "auto"], indirect=True)
def test_the_same_answers_of_a_gpu(model):
    """Torch's CPU; two requests at a time have drafts of the model's own layer."""
    requests = requests_of([REPEATING, [7, 8, 9]])
    without, _, _ = answers(model, requests, on=False, device="sim")
    results, counts, _ = answers(model, requests, on=True, device="sim")
    assert list(map(said, results)) == list(map(said, without))
    assert counts.drafted >= counts.drafted_right > 0


def test_fewer_steps_for_one(model):
    requests = [Request(tuple(REPEATING), 100)]
    _, without, _ = answers(model, requests, on=False, isa=SAME_INTEGERS)
    _, counts, _ = answers(model, requests, on=True, isa=SAME_INTEGERS)
    assert without.drafted == 0 and without.decode_steps == 99
    assert counts.new_tokens == 100
    assert counts.decode_steps <= 99 - counts.drafted_right
    assert counts.drafted_right > 10


def test_an_end_within_a_draft(model):
    """Stop tokens, stop strings and full contexts, wherever in a draft they come."""
    (events,), _, _ = answers(model, [Request(tuple(REPEATING), 24)], on=False)
    tokens = [token for token, _, _ in said(events)[0]]
    requests = []
    for token in dict.fromkeys(tokens):
        requests.append(Request(tuple(REPEATING), 24, stop_ids=frozenset([token])))
    texts = [text for _, text, _ in said(events)[0] if text]
    requests += [Request(tuple(REPEATING), 24, stop=(text,)) for text in texts[:6]]
    requests += [Request((*REPEATING, *range(5, 150 - count)), 24) for count in range(0, 24, 5)]
    without, _, _ = answers(model, requests, on=False, max_running=1)
    results, counts, _ = answers(model, requests, on=True, max_running=1)
    assert list(map(said, results)) == list(map(said, without))
    assert counts.drafted > 0


def test_short_memory(model):
    """Requests are preempted and go on; drafts are for when there is room."""
    prompts = [[t % 200 + 3 for t in p] for p in make_prompts(5, low=40, high=100)]
    requests = [Request(tuple(prompt), 60) for prompt in prompts]
    without, _, _ = answers(model, requests, on=False)
    results, counts, _ = answers(model, requests, on=True, kv_tokens=256)
    assert [said(r)[0] for r in results] == [said(r)[0] for r in without]
    assert counts.drafted > 0


def test_a_second_turn_starts_from_pages_of_the_first(model):
    prompt = tuple(np.random.default_rng(1).integers(3, 200, 130).tolist())
    with opened(model) as engine, Scheduler(engine) as scheduler:
        always_on(scheduler)
        ((first, _),) = run_all(scheduler, [Request(prompt, 20)])
        before = scheduler.counts.drafted_right, scheduler.counts.drafted
        longer = (*prompt, *first, 7, 8, 9)
        ((second, finish),) = run_all(scheduler, [Request(longer, 20)])
        right = scheduler.counts.drafted_right - before[0]
        drafted = scheduler.counts.drafted - before[1]
        assert finish.num_cached == (0 if engine.kv.is_recurrent else 128)
        assert list(engine.generate_tokens(longer, 20)) == second
        if engine.generation.draft_layer is not None:
            assert drafted >= right > 8


def test_structured_answers(model):
    """A grammar rules tokens out row by row: a draft that it does not allow is not said."""
    pytest.importorskip("llguidance")
    from tiered.serve.structured import Grammars

    def run(on):
        choices = {} if on else dict(speculate="off")
        with opened(model, **choices) as engine, Scheduler(engine) as scheduler:
            always_on(scheduler)
            grammars = Grammars(engine.tokenizer, engine.config.vocab_size, engine.eos_ids)
            # The same again and again, so that there is something to look up.
            request = Request(
                tuple(REPEATING),
                60,
                stop_ids=engine.eos_ids,
                constraint=grammars.regex("(he|an){30}"),
            )
            ((tokens, finish),) = run_all(scheduler, [request])
            return tokens, finish.reason, engine.tokenizer.decode(tokens), scheduler.counts.drafted

    without, with_drafts = run(on=False), run(on=True)
    assert without[:3] == with_drafts[:3]
    assert set(with_drafts[2]) <= set("hean") and with_drafts[3] > 0

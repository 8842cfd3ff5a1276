"""Continuous batching: the same answers as one at a time, fairly, and nothing leaks."""

import queue
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
from naive import NaiveBackend
from serving import make_checkpoint

from tiered.engine import Engine
from tiered.kv_cache import PAGE_SIZE, KVCache
from tiered.serve.fair_queue import FairQueue
from tiered.serve.prefix import PrefixCache
from tiered.serve.request import Finish, Piece, PromptScores, Request
from tiered.serve.scheduler import Busy, Scheduler
from tiered.text.sampling import SamplingParams

SLOW = pytest.mark.slow  # compiles kernels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["mapped", "tiered", pytest.param("cpu", marks=SLOW)])
def engine(request, checkpoint):
    budget = {} if request.param == "mapped" else {"expert_ram": 6 * 3 * 96 * 64 * 4}
    backend = None if request.param == "cpu" else NaiveBackend()
    with Engine(
        checkpoint,
        backend=backend,
        quantize="none",
        threads=1,
        context=448,
        kv_tokens=448,
        **budget,
    ) as engine:
        yield engine


def make_prompts(count, seed=0, low=3, high=200):
    source = random.Random(seed)
    return [
        tuple(source.randrange(256) for _ in range(source.randint(low, high))) for _ in range(count)
    ]


def alone(engine, ids, count, **sampling):
    return list(engine.generate_tokens(ids, count, **sampling))


class Client:
    """Collects a request's events."""

    def __init__(self):
        self.events = queue.Queue()

    def result(self):
        tokens = []
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Piece):
                tokens.append(event.token)
            if isinstance(event, Finish):
                return tokens, event


def run_all(scheduler, requests):
    """All arrive before the first is looked at: who is admitted must not depend on the moment."""
    clients, all_here = [Client() for _ in requests], threading.Event()
    scheduler.call(all_here.wait)
    for client, request in zip(clients, requests, strict=True):
        scheduler.submit(request, client.events.put)
    all_here.set()
    return [client.result() for client in clients]


def assert_nothing_held(engine):
    assert engine.kv.free_tokens == engine.kv.num_pages * PAGE_SIZE


def test_each_answer_equals_the_one_alone(engine):
    prompts = make_prompts(12, high=90)
    wanted = [alone(engine, p, 12, temperature=0.9, seed=i) for i, p in enumerate(prompts)]
    with Scheduler(engine) as scheduler:
        results = run_all(
            scheduler,
            [
                Request(p, 12, SamplingParams(temperature=0.9, seed=i))
                for i, p in enumerate(prompts)
            ],
        )
        assert scheduler.counts.decode_rows > 2 * scheduler.counts.decode_steps
    for (tokens, finish), expected in zip(results, wanted, strict=True):
        assert tokens == expected
        assert finish.reason == "length" and finish.num_new == 12
    assert_nothing_held(engine)


def test_short_prompts_share_a_pass_with_those_who_decode(engine, monkeypatch):
    prompts = [*make_prompts(5, low=5, high=5), *make_prompts(1, low=40, high=40)]
    wanted = [alone(engine, p, 6, temperature=0.9, seed=i) for i, p in enumerate(prompts)]
    hidden, passes = engine.decoder.hidden, []

    def counted(batch, *arguments):
        passes.append(np.bincount(batch.sequences).tolist())
        return hidden(batch, *arguments)

    monkeypatch.setattr(engine.decoder, "hidden", counted)
    with Scheduler(engine, decode_rows=16) as scheduler:
        requests = [
            Request(p, 6, SamplingParams(temperature=0.9, seed=i)) for i, p in enumerate(prompts)
        ]
        results = run_all(scheduler, requests)
        assert scheduler.counts.prompt_tokens == 5 * 5 + 40
    assert [tokens for tokens, _ in results] == wanted
    # The long one is computed alone; those that do not fit wait for the next pass.
    assert passes[:4] == [[5, 5, 5], [40], [1, 1, 1, 1, 5, 5], [1] * 6]
    assert_nothing_held(engine)


def test_a_second_turn_starts_from_the_pages_of_the_first(engine):
    (prompt,) = make_prompts(1, low=300, high=300)
    with Scheduler(engine) as scheduler:
        ((tokens, first),) = run_all(scheduler, [Request(prompt, 40)])
        longer = (*prompt, *tokens, 1, 2, 3)
        ((answer, second),) = run_all(scheduler, [Request(longer, 10)])
    assert first.num_cached == 0
    assert second.num_cached == (len(longer) - 4) // PAGE_SIZE * PAGE_SIZE
    assert answer == alone(engine, longer, 10)
    assert_nothing_held(engine)


def test_equal_prompts_are_computed_once(engine):
    (prompt,) = make_prompts(1, low=200, high=200)
    with Scheduler(engine) as scheduler:
        requests = [Request(prompt, 5, SamplingParams(temperature=1, seed=i)) for i in range(4)]
        results = run_all(scheduler, requests)
        assert scheduler.counts.prompt_tokens == 200 + 3 * (200 - 3 * PAGE_SIZE)
    for seed, (tokens, _) in enumerate(results):
        assert tokens == alone(engine, prompt, 5, temperature=1, seed=seed)


def test_preempted_requests_go_on_where_they_were(engine):
    prompts = make_prompts(4, seed=2, low=70, high=80)
    wanted = [alone(engine, p, 90) for p in prompts]
    with Scheduler(engine) as scheduler:
        results = run_all(scheduler, [Request(p, 90) for p in prompts])
        assert scheduler.counts.preemptions  # 4 * 3 pages are needed, and there are 7
    assert [tokens for tokens, _ in results] == wanted
    assert_nothing_held(engine)


def test_prompt_scores_are_those_of_the_logits(engine):
    (prompt,) = make_prompts(1, low=50, high=50)
    logits = engine.logits(prompt).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    client = Client()
    with Scheduler(engine) as scheduler:
        request = Request(prompt, 0, logprobs=2, prompt_logprobs=True)
        scheduler.submit(request, client.events.put)
        scores = client.events.get(timeout=60)
        assert isinstance(scores, PromptScores)
        assert client.result()[1].reason == "length"
    assert [choice.token for choice in scores.choices] == list(prompt[1:])
    for row, choice in zip(logits, scores.choices, strict=False):
        assert choice.logprob == pytest.approx(row[choice.token], abs=1e-4)
        assert choice.alternatives[0] == (row.argmax(), pytest.approx(row.max(), abs=1e-4))


def test_a_prompt_has_longer_passes_while_nobody_else_is_there(engine, monkeypatch):
    """They save reading the same experts again, and would keep others from their next token."""
    monkeypatch.setattr(engine, "choices", replace(engine.choices, prefill_chunk=16))
    monkeypatch.setattr(engine.generation, "pass_tokens", 64)
    prompts, passes, hidden = make_prompts(2, low=100, high=100), [], engine.decoder.hidden
    expected = [alone(engine, ids, 4) for ids in prompts]

    def watched(batch, kv, chunk=0):
        passes.append(len(batch.tokens))
        return hidden(batch, kv, chunk)

    monkeypatch.setattr(engine.decoder, "hidden", watched)
    with Scheduler(engine) as scheduler:
        assert run_all(scheduler, [Request(prompts[0], 4)])[0][0] == expected[0]
        assert passes[:-3] == ([16] * 6 + [4] if engine.plan.mapped else [64, 36])
        scheduler.prefixes.clear()
        passes.clear()
        answers = run_all(scheduler, [Request(ids, 4) for ids in prompts])
        assert [tokens for tokens, _ in answers] == expected
    assert passes[:6] == [16] * 6
    assert_nothing_held(engine)


def test_scores_and_pooled_states_begin_anew_after_a_preemption(engine, monkeypatch):
    """Pages that are lost in the middle of a prompt: it is computed again from its start."""
    monkeypatch.setattr(engine, "choices", replace(engine.choices, prefill_chunk=16))
    (prompt,) = make_prompts(1, low=50, high=50)
    mean = engine.hidden_states(prompt).mean(axis=0, dtype=np.float64)
    for options in dict(logprobs=0, prompt_logprobs=True), dict(pooling="mean"):
        events = []
        scheduler = Scheduler(engine)  # without its thread: step by step
        scheduler.submit(Request(prompt, 0, **options), events.append)
        scheduler.step()
        (job,) = scheduler.running
        assert job.prefilling and job.sequence.tokens
        scheduler._batcher._preempt(job)
        while not (events and isinstance(events[-1], Finish)):
            scheduler.step()
        scheduler.close()
        if "pooling" in options:
            assert events[0].vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
        else:
            assert [choice.token for choice in events[0].choices] == list(prompt[1:])
    assert_nothing_held(engine)


def test_stop_strings_and_stop_tokens(engine):
    ids = engine.tokenizer.encode("Hello world")
    tokens = alone(engine, ids, 20)
    text = engine.tokenizer.decode(tokens)
    with Scheduler(engine) as scheduler:
        results = run_all(
            scheduler,
            [
                Request(tuple(ids), 20, stop=(text[2:4],)),
                Request(tuple(ids), 20, stop_ids=frozenset(tokens[5:6])),
            ],
        )
    (_, by_text), (until, by_token) = results
    assert (by_text.reason, by_text.stop) == ("stop", text[2:4])
    assert (by_token.reason, by_token.stop) == ("stop", None)
    assert until == tokens[: tokens.index(tokens[5])]


def test_clients_take_turns():
    waiting = FairQueue()
    for item in range(4):
        waiting.push("greedy", f"greedy {item}")
    waiting.push("modest", "modest 0")
    assert waiting.pop() == "greedy 0"
    assert waiting.pop() == "modest 0"
    waiting.put_back("modest 0")
    assert (waiting.peek(), waiting.pop()) == ("modest 0", "modest 0")
    assert waiting.remove_if(lambda item: item.endswith("2")) == ["greedy 2"]
    assert [waiting.pop() for _ in range(len(waiting))] == ["greedy 1", "greedy 3"]


def test_a_full_queue_and_a_draining_server_refuse(engine):
    scheduler = Scheduler(engine, max_waiting=1)  # its thread is not started
    scheduler.submit(Request((1,), 1), lambda event: None)
    with pytest.raises(Busy, match="waiting already"):
        scheduler.submit(Request((1,), 1), lambda event: None)
    scheduler.start()
    scheduler.drain()
    with pytest.raises(Busy, match="shutting down"):
        scheduler.submit(Request((1,), 1), lambda event: None)
    assert scheduler.counts.finished == {"length": 1}
    scheduler.close()


def test_a_deadline_ends_a_request(engine):
    now = [0.0]
    client = Client()
    scheduler = Scheduler(engine, clock=lambda: now[0])
    scheduler.submit(Request((1, 2, 3), 100, deadline=5.0), client.events.put)
    scheduler.step()
    now[0] = 6.0
    scheduler.step()
    tokens, finish = client.result()
    assert finish.reason == "timeout" and len(tokens) == 1
    scheduler.close()
    assert_nothing_held(engine)


def test_a_failed_forward_pass_ends_its_requests_and_no_others(engine, monkeypatch):
    failing = Client()
    with Scheduler(engine) as scheduler:
        with monkeypatch.context() as patch:
            patch.setattr(engine.decoder, "hidden", lambda *_: 1 / 0)
            scheduler.submit(Request((1, 2, 3), 5), failing.events.put)
            finish = failing.result()[1]
        assert finish.reason == "error" and isinstance(finish.error, ZeroDivisionError)
        ((tokens, _),) = run_all(scheduler, [Request((1, 2, 3), 5)])
    assert tokens == alone(engine, (1, 2, 3), 5)
    assert_nothing_held(engine)


@pytest.mark.parametrize("seed", range(3))
def test_random_joins_and_leaves_leak_nothing(engine, seed):
    source = random.Random(seed)
    threads = threading.active_count()
    beginnings = make_prompts(4, seed, low=60, high=200)
    with Scheduler(engine, max_running=5, max_waiting=64) as scheduler:
        started = []
        for _ in range(40):
            ids = (*source.choice(beginnings), *make_prompts(1, source.random(), 1, 30)[0])
            client = Client()
            request = Request(ids, source.randint(0, 12), client=source.choice("abc"))
            try:
                started.append((scheduler.submit(request, client.events.put), client))
            except Busy:
                continue
            if source.random() < 0.4:
                victim, watched = source.choice(started)
                if source.random() < 0.5:
                    watched.events.get(timeout=60)  # something has come of it
                    watched.events.put(Finish("seen", "", 0, 0, 0))
                scheduler.cancel(victim)
        for _, client in started:
            client.result()
        scheduler.drain()
        assert all(job.finish is not None for job, _ in started)
        held = engine.kv.num_pages - engine.kv.free_tokens // PAGE_SIZE
        assert held == len(scheduler.prefixes)
    assert_nothing_held(engine)
    assert threading.active_count() == threads
    tier = getattr(engine.source, "tier", None)
    assert tier is None or not tier.active


def test_prefixes_are_evicted_by_last_use(engine):
    kv = KVCache(NaiveBackend(), engine.config, 1024)
    cache = PrefixCache(kv)
    texts = [[i] * 3 * PAGE_SIZE for i in range(3)]
    for text in texts:
        sequence = kv.open()
        kv.batch([(sequence, text)])
        cache.insert(sequence)
        kv.close(sequence)
    assert len(cache.match(texts[0])) == 3  # now the most recently used
    assert cache.evict(4) == 4
    assert [len(cache.match(text)) for text in texts] == [3, 0, 2]
    held = kv.open(texts[0][: 2 * PAGE_SIZE], cache.match(texts[0])[:2])
    assert cache.num_evictable == 3
    assert cache.evict(9) == 3
    assert len(cache.match(texts[0])) == 2
    kv.close(held)
    cache.clear()
    assert kv.free_tokens == 1024

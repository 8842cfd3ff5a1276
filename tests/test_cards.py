"""Several GPUs (torch's CPU device, more than once) give the bits that one does."""

import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.gpu.devices import device_names
from tiered.gpu.shares import MIB, LayerBytes, check_shares, enough, parse_vram, share_out

PROMPT = np.random.default_rng(0).integers(3, 300, 10).tolist()
# Attention of three kinds, windows and sinks, recurrent layers, a dense layer, tied embeddings.
MODELS = ["olmoe", "gpt_oss", "deepseek_v2", "qwen3_next", "granitemoehybrid"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("auto", ["auto"]),
        ("cuda", ["cuda"]),
        ("cuda:1", ["cuda:1"]),
        ("cuda:all", ["cuda:all"]),
        ("cuda, cuda:2", ["cuda:0", "cuda:2"]),
        ("sim", ["sim"]),
        ("sim,sim", ["sim:0", "sim:1"]),
        ("sim:3", ["sim:0", "sim:1", "sim:2"]),
    ],
)
def test_devices_have_names(text, names):
    assert device_names(text) == names


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda:", "cuda:x", "cpu,cuda", "cuda,sim", "sim:0", "cuda:0,"]
)
def test_unknown_devices_are_refused(text):
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda"):
        device_names(text)


def test_a_card_is_named_once():
    with pytest.raises(ValueError, match="has a card twice"):
        device_names("cuda,cuda:0")


def test_sizes_are_each_cards_or_theirs_in_turn():
    assert parse_vram(None, 2) == [None, None]
    assert parse_vram(5, 2) == parse_vram("5", 2) == [5, 5]
    assert parse_vram("2K, 3K", 2) == [2048, 3072]
    with pytest.raises(ValueError, match="no size"):
        parse_vram(-5, 2)
    with pytest.raises(ValueError, match="has 2 sizes for 3 GPUs"):
        parse_vram("2K,3K", 3)


EVEN = LayerBytes([MIB] * 12, [0] * 12, [9 * MIB] * 12, 0, 3 * MIB)


@pytest.mark.parametrize(
    ("memory", "counts"),
    [
        ([1], [12]),
        ([1, 1], [6, 6]),
        ([16, 8], [8, 4]),
        ([1, 2, 3], [2, 4, 6]),
        ([0, 9], [1, 11]),
        ([0, 0], [1, 11]),
    ],
)
def test_layers_are_shared_out_in_proportion_to_memory(memory, counts):
    shares = share_out(EVEN, memory)
    assert [len(share.layers) for share in shares] == counts
    assert [layer for share in shares for layer in share.layers] == list(range(12))
    assert [share.fixed for share in shares] == [count * MIB for count in counts]


def test_the_head_takes_room_of_the_last_card():
    shares = share_out(EVEN._replace(output=40 * MIB), [1, 1])
    assert [len(share.layers) for share in shares] == [8, 4]
    assert shares[1].fixed == 44 * MIB


def test_dense_layers_need_no_room_for_experts():
    first, second = share_out(LayerBytes([MIB, MIB], [0, 0], [0, 9 * MIB], 0, 3 * MIB), [0, 9])
    assert (first.least, second.least) == (0, 3 * MIB)


def test_more_cards_than_layers_are_refused():
    with pytest.raises(ValueError, match="3 GPUs are too many for 2 layers"):
        share_out(LayerBytes([1, 1], [0, 0], [1, 1], 0, 1), [1, 1, 1])


@pytest.mark.parametrize("seed", range(20))
def test_sizes_that_are_said_to_be_enough_are(seed):
    random = np.random.default_rng(seed)
    num_layers, num_cards = random.integers(4, 30), random.integers(1, 5)
    fixed, kv, experts = random.integers(1, 40 * MIB, (3, num_layers)).tolist()
    model = LayerBytes(fixed, kv, experts, 30 * MIB, 7 * MIB)
    memory = random.integers(0, 90 * MIB, num_cards).tolist()
    names = [f"cuda:{number}" for number in range(num_cards)]
    sizes = enough(model, memory)
    check_shares(model, share_out(model, sizes), sizes, names)
    shares = share_out(model, memory)
    if sizes != memory and any(m < s.needed for m, s in zip(memory, shares, strict=True)):
        with pytest.raises(MemoryError, match=f"--vram at least .*{sizes[-1] // MIB}M, or"):
            check_shares(model, shares, memory, names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch")
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder):
    return tiny.hf_checkpoint(folder / "mixtral", "mixtral", layers=4)


def run(model, device, prompt=PROMPT, most=3, **choices):
    """Logits by chunks of seven tokens, which the CPU may compute beside the GPUs, and a text."""
    with Engine(model, device=device, threads=2, prefill_chunk=7, **choices) as engine:
        return engine.logits(prompt), list(engine.generate_tokens(prompt, most)), engine


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("model_type", MODELS)
def test_the_same_bits_on_one_card_and_on_several(model_type, folder):
    from tensor_places import TensorPlaces

    model = tiny.hf_checkpoint(folder / model_type, model_type, layers=3)
    logits, tokens, engine = run(model, "sim")
    assert [list(share.layers) for share in engine.shares] == [[0, 1, 2]]
    with TensorPlaces() as places:
        got, got_tokens, engine = run(model, "sim:3")
    assert np.array_equal(got, logits) and got_tokens == tokens
    assert places.cards - {None} == {0, 1, 2}
    owners = [card for card, share in enumerate(engine.shares) for _ in share.layers]
    backend = engine.backend
    assert [backend.cards.index(backend.of_layer(layer)) for layer in range(3)] == owners

    with Engine(model, device="sim,sim", threads=2, prefill_chunk=7) as engine:
        nbytes, top_k = max(engine.store.blob_bytes), engine.config.top_k
        vram = ",".join(str(share.needed + nbytes) for share in engine.shares)
    got, got_tokens, engine = run(model, "sim,sim", vram=vram, expert_ram=(top_k + 2) * nbytes)
    assert np.array_equal(got, logits) and got_tokens == tokens
    source = engine.decoder.source
    assert source.hits and len(source.cards) == 2
    assert all(card.computed_in_ram + card.copies for card in source.cards)


@pytest.mark.usefixtures("one_torch_thread")
def test_cards_of_different_size_and_a_refusal_that_names_what_works(model):
    logits, tokens, engine = run(model, "sim:2")
    sizes = [3 * sum(share.needed for share in engine.shares), engine.shares[1].needed]
    got, got_tokens, engine = run(model, "sim:2", vram=f"{sizes[0]},{sizes[1]}")
    assert len(engine.shares[0].layers) == 3 and len(engine.shares[1].layers) == 1
    assert np.array_equal(got, logits) and got_tokens == tokens
    with pytest.raises(MemoryError, match=r"sim:1 has 1.0 KiB for layers 3 to 3") as refusal:
        run(model, "sim:2", vram=f"{sizes[0]},1K")
    works = str(refusal.value).split("--vram at least ")[1].split(" ")[0].rstrip(",")
    assert run(model, "sim:2", vram=works)[1] == tokens
    with pytest.raises(ValueError, match="5 GPUs are too many for 4 layers"):
        run(model, "sim:5")


@pytest.mark.usefixtures("one_torch_thread")
def test_drafts_and_look_ahead_go_over_cards(model):
    prompt, choices = PROMPT[:4] * 3, {"look_ahead": 3, "kv_dtype": "int8", "most": 16}
    _, tokens, engine = run(model, "sim", prompt, **choices)
    expert_ram = 4 * max(engine.store.blob_bytes)
    choices |= {"speculate": "lookup", "expert_ram": expert_ram}
    _, got, engine = run(model, "sim:3", prompt, **choices)
    assert got == tokens
    assert engine.stats.drafted


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("device", ["sim", "sim:2"])
def test_what_recurrent_layers_remember_is_taken_back(device, folder):
    model = tiny.hf_checkpoint(folder / f"back-{device}", "granitemoehybrid", layers=4)
    with Engine(model, device=device, threads=2, speculate="lookup") as engine:
        text, decode = engine.open_sequence(), engine.generation._decode
        engine.generation.begin(text, PROMPT)
        engine.kv.set_mark(text)
        first = decode(text, [5])
        assert engine.kv.take_back(text, len(PROMPT)) == []
        assert np.array_equal(decode(text, [5]), first)
        assert not np.array_equal(decode(text, [5]), first)

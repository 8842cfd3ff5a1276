import mmap

import numpy as np
import pytest
import tiny

from tiered import Engine
from tiered.experts import ExpertKey
from tiered.formats import open_checkpoint
from tiered.reader import BLOCK
from tiered.store import ExpertStore
from tiered.weights.convert import convert
from tiered.whole_blocks import WholeBlocks

LARGE = dict(hidden=1024, expert_size=1024, experts=4, layers=2, head_dim=256)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.gguf_checkpoint(tmp_path_factory.mktemp("model") / "m.gguf", "mixtral", **LARGE)


@pytest.mark.parametrize("direct", [True, False])
def test_matrices_are_where_the_offsets_say(model, direct):
    """All of them: the last one of the file ends in a block that is not whole."""
    with open_checkpoint(model) as checkpoint, ExpertStore(checkpoint, direct=direct) as store:
        blocks, total = WholeBlocks(store), 0
        assert blocks.pays
        slot = np.frombuffer(mmap.mmap(-1, max(blocks.blob_bytes)), np.uint8)
        for layer in checkpoint.config.sparse_layers:
            for expert in range(checkpoint.config.num_experts):
                key = ExpertKey(layer, expert)
                slot[:] = 0
                blocks.read_into(key, slot)
                offsets = blocks.offsets[layer][expert].tolist()
                for start, tensor in zip(offsets, store.tensors(key), strict=True):
                    assert start % BLOCK == tensor.offset % BLOCK
                    part = slot[start : start + tensor.nbytes]
                    assert np.array_equal(part, checkpoint.data(tensor.name))
                    total += tensor.nbytes
        assert store.bytes_read == total


def test_small_experts_and_our_own_blobs_are_left_as_they_are(model, tmp_path):
    small = tiny.gguf_checkpoint(tmp_path / "small.gguf", "mixtral")
    for path in (small, convert(model, tmp_path / "store")):
        with open_checkpoint(path) as checkpoint, ExpertStore(checkpoint) as store:
            assert not WholeBlocks(store).pays


def test_tokens_are_the_same_from_blocks_and_from_the_map(model):
    prompt = list(range(1, 30))
    with Engine(model, threads=1) as engine:
        assert engine.plan.mapped
        expected = list(engine.generate_tokens(prompt, 12))
        experts = engine.plan.experts
    with Engine(model, threads=2, expert_ram=experts // 2) as engine:
        assert engine.blocks is not None and not engine.plan.mapped
        assert list(engine.generate_tokens(prompt, 12)) == expected
        assert engine.stats.misses > 0

"""Merging experts: alike ones become one, neuron by neuron, and the result is a checkpoint."""

import json
import shutil

import numpy as np
import pytest
import tiny
from test_prune import SPARSE, check_tensors, fuse, source

from tiered import Engine
from tiered.backend import open_backend
from tiered.checkpoints.checkpoint import Tensor
from tiered.config import EngineConfig
from tiered.experts import Routing
from tiered.formats import CheckpointError, open_checkpoint
from tiered.quality.importance import CRITERIA, Meter
from tiered.quality.layer_tap import read
from tiered.quality.likeness import LikenessMeter, nearest, tokens_at_once, with_everyone
from tiered.weights.merge import align, check_floats, match
from tiered.weights.prune import prune

IDS = np.random.default_rng(0).integers(3, 300, 70).tolist()
KEPT = {0: [0, 3, 4, 7], 1: [1, 2, 5, 6]}
JOINED = {0: {0: [1, 2], 3: [], 4: [5], 7: [6]}, 1: {1: [0], 2: [3], 5: [4, 7], 6: []}}
COUNTS = np.arange(1.0, 17.0).reshape(2, 8)


def naive_match(likeness):
    left, result = likeness.astype(float).copy(), np.empty(len(likeness), int)
    for _ in range(len(likeness)):
        row, column = np.unravel_index(left.argmax(), left.shape)
        result[row] = column
        left[row], left[:, column] = -np.inf, -np.inf
    return result


@pytest.mark.parametrize("size", [1, 2, 17, 60])
def test_the_most_alike_are_matched_first(size):
    likeness = np.random.default_rng(size).standard_normal((size, size)).astype(np.float32)
    assert np.array_equal(match(likeness), naive_match(likeness))
    assert sorted(match(np.zeros((size, size), np.float32))) == list(range(size))  # all alike


def shuffled(folder, model_type="mixtral", **options):
    """A checkpoint whose experts of a layer are all one, each with its neurons in another order."""
    before = source(folder, model_type, **options)
    with open_checkpoint(before) as checkpoint:
        size = checkpoint.config.expert_size
    tensors, random = {}, np.random.default_rng(3)
    orders = [random.permutation(size) for _ in range(8)]
    for weight in tiny.weights(model_type):
        tensors[weight.hf] = weight.values
    for name in list(tensors):
        if ".experts." not in name:
            continue
        head, _, tail = name.partition(".experts.")
        expert, _, part = tail.partition(".")
        first = tensors[f"{head}.experts.0.{part}"] if expert != "0" else tensors[name]
        if expert == "0":
            continue
        axis = int("w2" in part or "down" in part)
        tensors[name] = first.take(orders[int(expert)], axis)
    tiny.write_safetensors(before / "model.safetensors", tensors)
    return before


def merged(before, after, joined=JOINED, counts=COUNTS):
    with open_checkpoint(before) as checkpoint:
        sparse = checkpoint.config.sparse_layers
        groups = align(checkpoint, {layer: joined[layer] for layer in sparse}, counts)
    return prune(before, after, KEPT, groups=groups)


def test_permuted_twins_become_themselves(tmp_path):
    """The mean of one expert and itself, in whatever order, is that expert."""
    before = shuffled(tmp_path)
    after = merged(before, tmp_path / "after")
    with open_checkpoint(before) as old, open_checkpoint(after) as new:
        for layer in KEPT:
            for index, expert in enumerate(KEPT[layer]):
                for part in ("gate", "up", "down"):
                    expected = old.float32(f"layers.{layer}.experts.{expert}.{part}")
                    got = new.float32(f"layers.{layer}.experts.{index}.{part}")
                    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


def naive_mean(old, layer, kept, joined):
    """gate, up and down of a group's mean."""
    experts = [kept, *joined]
    shares = COUNTS[layer, experts] / COUNTS[layer, experts].sum()
    matrices = {
        e: [old.float32(f"layers.{layer}.experts.{e}.{part}") for part in ("gate", "up", "down")]
        for e in experts
    }
    total = [shares[0] * m for m in matrices[kept]]
    for share, expert in zip(shares[1:], joined, strict=True):
        a, b = (np.concatenate([g, u, d.T], axis=1) for g, u, d in
                (matrices[kept], matrices[expert]))  # fmt: skip
        order = naive_match(a @ b.T)
        gate, up, down = matrices[expert]
        for index, part in enumerate((gate[order], up[order], down[:, order])):
            total[index] = total[index] + share * part
    return total


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_a_group_becomes_its_mean_in_the_sources_own_format(tmp_path, model_type, dtype):
    """gpt-oss: fused and transposed tensors, gate and up in turns, biases."""
    before = source(tmp_path, model_type, dtype=dtype)
    after = merged(before, tmp_path / "after")
    rounding = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3}[dtype]
    with open_checkpoint(before) as old, open_checkpoint(after) as new:
        for name in ("layers.0.experts.0.gate", "layers.1.router", "embed"):
            assert old.tensors[name].format == new.tensors[name].format
        for layer, groups in JOINED.items():
            for index, (kept, joined) in enumerate(groups.items()):
                expected = naive_mean(old, layer, kept, joined)
                for part, values in zip(("gate", "up", "down"), expected, strict=True):
                    got = new.float32(f"layers.{layer}.experts.{index}.{part}")
                    assert np.abs(got - values).max() <= rounding * np.abs(values).max()
            router = f"layers.{layer}.router"
            assert np.array_equal(new.float32(router), old.float32(router)[KEPT[layer]])


@pytest.mark.parametrize("model_type", SPARSE)
def test_every_architecture_can_be_merged_and_opens(tmp_path, model_type):
    before = source(tmp_path, model_type, num_files=3)
    after = merged(before, tmp_path / "after")
    with Engine(after, threads=2) as engine:
        assert engine.config.num_experts == 4 and np.isfinite(engine.logits(IDS)).all()


def test_groups_of_one_keep_their_bytes(tmp_path):
    before = source(tmp_path)
    alone = {layer: {expert: [] for expert in experts} for layer, experts in KEPT.items()}
    check_tensors(before, merged(before, tmp_path / "after", alone), KEPT)


def test_fused_experts_are_merged_like_others(tmp_path):
    before = source(tmp_path / "a", "olmoe")
    fused = source(tmp_path / "b", "olmoe")
    fuse(fused)
    with (
        open_checkpoint(merged(before, tmp_path / "x")) as ours,
        open_checkpoint(merged(fused, tmp_path / "y")) as theirs,
    ):
        assert sorted(ours.tensors) == sorted(theirs.tensors)
        for name in ours.tensors:
            assert np.allclose(ours.float32(name), theirs.float32(name), atol=1e-2), name


def test_transformers_opens_it(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    after = merged(source(tmp_path, dtype="f32"), tmp_path / "after")
    reference = transformers.AutoModelForCausalLM.from_pretrained(after, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits[0].numpy()
    with Engine(after, quantize="none", kv_dtype="f32", threads=2) as engine:
        got = engine.logits(IDS)
    assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


# --- likeness ---


def test_everyone_computes_and_nothing_changes(tmp_path):
    before = source(tmp_path)
    choices = dict(threads=2, quantize="none", kv_dtype="f32")
    with open_checkpoint(before) as checkpoint:
        config = checkpoint.config
    meters = [
        kind(open_backend(EngineConfig(**choices)), config) for kind in (Meter, LikenessMeter)
    ]
    chunk = tokens_at_once(config)
    assert chunk == 512 * 2 // 8
    logits = []
    for meter in meters:
        with Engine(before, backend=meter, prefill_chunk=chunk, **choices) as engine:
            read(engine, IDS, lambda done, total: None)
            scores = {name: criterion(meter) for name, criterion in CRITERIA.items()}
            logits.append((engine.logits(IDS), scores))
    assert np.abs(logits[0][0] - logits[1][0]).max() <= 1e-5 * np.ptp(logits[0][0])
    for name, plain in logits[0][1].items():
        assert logits[1][1][name] == pytest.approx(plain, rel=1e-5)
    assert (np.diagonal(meters[1].distances, axis1=1, axis2=2) == 0).all()


def test_distances_find_the_twins(tmp_path):
    """Experts 1 and 5 say the same, though their neurons stand in another order."""
    before = source(tmp_path)
    tensors = {w.hf: w.values for w in tiny.weights("mixtral")}
    for name in list(tensors):
        if ".experts.5." in name:
            values = tensors[name.replace(".experts.5.", ".experts.1.")]
            tensors[name] = np.flip(values, axis=int("w2" in name)).copy()
    tiny.write_safetensors(before / "model.safetensors", tensors)
    choices = dict(threads=2, quantize="none", kv_dtype="f32")
    with open_checkpoint(before) as checkpoint:
        config = checkpoint.config
    meter = LikenessMeter(open_backend(EngineConfig(**choices)), config)
    with Engine(before, backend=meter, **choices) as engine:
        read(engine, IDS, lambda done, total: None)
    for layer in range(2):
        apart = meter.distances[layer]
        assert apart[1, 5] <= 1e-4 * np.median(apart)
        assert apart == pytest.approx(apart.T)
    groups = nearest(meter.distances, {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]})
    assert 5 in groups[0][1] and 1 in groups[1][5]
    assert sorted(e for layer in groups[0].values() for e in layer) == [4, 5, 6, 7]


def test_the_others_follow_with_no_weight():
    routing = Routing(np.array([[3, 1], [0, 2]], np.int32), np.array([[0.7, 0.3]] * 2, np.float32))
    got = with_everyone(routing, 4)
    assert got.experts.tolist() == [[3, 1, 0, 2], [0, 2, 1, 3]] and got.experts.dtype == np.int32
    assert got.weights[:, :2].tolist() == routing.weights.tolist() and not got.weights[:, 2:].any()


# --- the command ---


def test_the_command(tiered, tmp_path):
    text, after = tmp_path / "text.txt", tmp_path / "after"
    text.write_text("the rain in the north, and then the heat " * 8)
    before = source(tmp_path)
    common = ("--experts", 4, "--text", text, "--threads", 2, "--json", tmp_path / "out.json")
    status, _, err = tiered("prune", before, after, *common, "--merge")
    assert status == 0 and "the others merged into them" in err, err
    report = json.loads((tmp_path / "out.json").read_text())
    for layer, groups in report["groups"].items():
        assert sorted(map(int, groups)) == report["kept"][layer]
        everyone = [int(e) for e in groups] + [e for joined in groups.values() for e in joined]
        assert sorted(everyone) == list(range(8))
    status, out, err = tiered("compare", before, after, "--text", text, "--generate", 4, "--json",
                              "--threads", 2)  # fmt: skip
    assert status == 0 and json.loads(out)["kl_mean"] > 0, err
    shutil.rmtree(after)
    status, _, err = tiered("prune", before, after, *common, "--merge", "--criterion", "random")
    assert status == 0 and "by random, the others merged" in err, err


def test_what_cannot_be_merged_is_refused(tiered, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the rain in the north, and then the heat " * 8)
    before = source(tmp_path / "a")
    status, _, err = tiered("prune", before, tmp_path / "after", "--experts", 4, "--merge",
                            "--criterion", "random")  # fmt: skip
    assert status == 2 and "--merge needs a --text" in err
    llama4 = source(tmp_path / "b", "llama4_text")
    status, _, err = tiered("prune", llama4, tmp_path / "after", "--experts", 4, "--merge",
                            "--text", text)  # fmt: skip
    assert status == 1 and "weighted inputs" in err and "Traceback" not in err
    assert not (tmp_path / "after").exists()
    eight = Tensor("x.weight", "f8_e4m3", (4, 4), tmp_path / "x", 0, 16)
    with pytest.raises(CheckpointError, match=r"x\.weight.*F8_E4M3, whose means cannot be written"):
        check_floats(eight)

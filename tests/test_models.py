"""What the files say about a model, for every architecture; compared with transformers."""

import numpy as np
import pytest
import tiny

from tiered import models
from tiered.checkpoints.checkpoint import CheckpointError
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_full_layers
from tiered.checkpoints.hf_config import hf_dense_layers, hf_leading_dense_layers
from tiered.config import LatentConfig, Mamba2Config, RopeConfig
from tiered.formats import open_checkpoint

FACTS = {
    "llama": dict(num_experts=0, ffn_size=96),
    "mixtral": dict(num_experts=8, expert_size=64, normalize_top_k=True),
    "olmoe": dict(expert_size=64, qk_norm="full", normalize_top_k=False),
    "qwen2_moe": dict(expert_size=64, shared_expert_size=96, normalize_top_k=False),
    "qwen3_moe": dict(expert_size=64, qk_norm="head", normalize_top_k=True),
    "gpt_oss": dict(attention_sinks=True, expert_biases=True, sliding_window=24, full_layers={1}),
    "glm4_moe": dict(router_scoring="sigmoid", shared_expert_size=128, dense_layers={0},
                     routing_scale=1.5, expert_groups=4, used_groups=2, qk_norm="head"),
    "minimax_m2": dict(router_scoring="sigmoid", qk_norm="full", normalize_top_k=True),
    "ernie4_5_moe": dict(router_scoring="softmax", shared_expert_size=128, dense_layers={0}),
    "deepseek_v2": dict(latent=LatentConfig(32, 0, 32, 16, 32), dense_layers={0},
                        normalize_top_k=False, routing_scale=1.5, num_kv_heads=1, head_dim=48),
    "deepseek_v3": dict(latent=LatentConfig(32, 32, 32, 16, 32), router_scoring="sigmoid",
                        expert_groups=4, used_groups=2, query_scale=48**-0.5),
    "qwen3_next": dict(delta_layers={0}, gated_attention=True, shared_expert_size=96),
    "qwen3_5_moe": dict(delta_layers={0}, gated_attention=True, normalize_top_k=True),
    "qwen3_5_moe_text": dict(delta_layers={0}, gated_attention=True, qk_norm="head"),
    "gemma4": dict(qk_norm="head", value_norm=True, output_norms=True, expert_scales=True,
                   query_scale=1.0, activation="gelu_tanh", embedding_scale=8.0,
                   logit_softcap=20.0, sliding_window=24, full_layers={1}, shared_expert_size=96,
                   num_kv_heads=2, head_dim=16),
    "gemma4_text": dict(num_experts=8, expert_size=64, normalize_top_k=True),
    "granitemoe": dict(embedding_scale=pytest.approx(20.0), query_scale=pytest.approx(0.2),
                       logit_scale=0.25, norm_eps=pytest.approx(1e-5 / 0.09)),
    "granitemoeshared": dict(shared_expert_size=96, num_experts=8, expert_size=64),
    "granitemoehybrid": dict(mamba2=Mamba2Config(4, 32, 16, 2, 4, pytest.approx(1e-5)),
                             mamba2_layers={0}, full_layers={1}, full_layers_rotate=False,
                             norm_eps=pytest.approx(1e-5 / 0.09), shared_expert_size=96),
    "lfm2_moe": dict(conv_layers={0}, conv_size=4, dense_layers={0}, router_scoring="sigmoid",
                     qk_norm="head", num_kv_heads=2),
    "llama4": dict(weighted_inputs=True, router_scoring="sigmoid", normalize_top_k=False,
                   dense_layers={0}, shared_expert_size=64, sliding_window=8192, qk_norm="unit",
                   chunked_attention=True, full_layers_rotate=False, full_layers=frozenset(),
                   temperature=pytest.approx(0.1), temperature_step=8192),
    "llama4_text": dict(num_experts=8, expert_size=64, ffn_size=96),
    "phimoe": dict(layer_norms=True, router_scoring="sparsemixer", router_jitter=0.01,
                   normalize_top_k=False,
                   rope=RopeConfig(10_000.0, 16, "half", tuple(1 + n / 16 for n in range(8)), 1.25,
                                   256, tuple(1 + n / 2 for n in range(8)), 1.25)),
    "glm4_moe_lite": dict(latent=LatentConfig(32, 32, 32, 16, 32), router_scoring="sigmoid"),
    "dots1": dict(qk_norm="head", router_scoring="sigmoid", dense_layers={0}, routing_scale=1.5,
                  shared_expert_size=128, expert_groups=4, used_groups=2, normalize_top_k=True),
    "solar_open": dict(qk_norm="", router_scoring="sigmoid", dense_layers=frozenset(),
                       shared_expert_size=128, routing_scale=1.5, expert_groups=4),
    "exaone_moe": dict(qk_norm="head", sliding_window=24, full_layers={1}, dense_layers={0},
                       full_layers_rotate=False, router_scoring="sigmoid", routing_scale=1.5,
                       expert_groups=4, shared_expert_size=128, ffn_size=96),
    "hy_v3": dict(qk_norm="head", router_scoring="sigmoid", routing_scale=2.5, dense_layers={0},
                  normalize_top_k=True, shared_expert_size=128, expert_groups=1),
    "mellum": dict(qk_norm="head", sliding_window=24, full_layers={1}, normalize_top_k=True,
                   expert_size=64, rope=RopeConfig(10_000.0, 16)),
    "kimi_k2": dict(latent=LatentConfig(32, 32, 32, 16, 32), router_scoring="sigmoid"),
    "qwen3_vl_moe": dict(expert_size=64, qk_norm="head", normalize_top_k=True),
}  # fmt: skip
HF_NAMES_IT = {  # others: itself
    "qwen3_5_moe_text": "qwen3_5_moe", "gemma4_text": "gemma4", "granitemoeshared": "granitemoe",
    "llama4_text": "llama4",
}  # fmt: skip
GGUF_NAMES_IT = {
    "deepseek_v3": "deepseek_v2", "glm4_moe_lite": "deepseek_v2", "kimi_k2": "deepseek_v2",
    "solar_open": "glm4_moe", **HF_NAMES_IT,
}  # fmt: skip


def test_every_architecture_is_tested():
    assert set(models.names()) == set(FACTS) == set(tiny.ARCHITECTURES)


@pytest.mark.parametrize("model_type", FACTS)
def test_both_kinds_of_files_say_the_same(tmp_path, model_type):
    hf = tiny.hf_checkpoint(tmp_path / "hf", model_type)
    file = tiny.gguf_checkpoint(tmp_path / "tiny.gguf", model_type)
    with open_checkpoint(hf) as a, open_checkpoint(file) as b:
        assert a.config.model_type == HF_NAMES_IT.get(model_type, model_type)
        assert b.config.model_type == GGUF_NAMES_IT.get(model_type, model_type)
        for config in (a.config, b.config):
            assert config.top_k == (0 if model_type == "llama" else 2)
            assert config.eos_ids == (319,)
            for name, value in FACTS[model_type].items():
                assert getattr(config, name) == value, name
        # What one kind has in one matrix and the other in two, or as a logarithm.
        views = {"kv_b", "k_b", "v_b", "qkvz", "qkv", "z", "a_log", "decay"}
        names = [{n for n in c.tensors if n.split(".")[-1] not in views} for c in (a, b)]
        assert names[0] == names[1]
        assert a.config.rope.dim == b.config.rope.dim
        assert a.config.rope.pairs == ("adjacent" if model_type in ADJACENT else "half")
        shapes = [(s.num_kv_heads, s.head_dim, s.rope.theta, np.array(s.rope.inv_freq_scale))
                  for s in (c.attention_shape(1) for c in (a.config, b.config))]  # fmt: skip
        assert shapes[0][:3] == shapes[1][:3]
        assert np.allclose(shapes[0][3], shapes[1][3], rtol=1e-5)
        adjacent = model_type in (*ADJACENT, *tiny.ADJACENT)
        assert b.config.rope.pairs == ("adjacent" if adjacent else "half")


ADJACENT = (
    "ernie4_5_moe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "llama4", "llama4_text",
    "kimi_k2",
)  # fmt: skip


def test_clipping_and_dense_layers(tmp_path):
    file = tiny.gguf_checkpoint(
        tmp_path / "tiny.gguf", "olmoe", metadata={"attention.clamp_kqv": 3.5}
    )
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.config.clip_qkv == 3.5
    facts = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
    assert hf_dense_layers(Facts(facts, tmp_path)) == {0, 1, 2, 4}


def test_gguf_rope_scaling(tmp_path):
    def rope(**metadata):
        keys = {"rope.scaling." + name: value for name, value in metadata.items()}
        file = tiny.gguf_checkpoint(tmp_path / "tiny.gguf", "llama", metadata=keys)
        with open_checkpoint(file) as checkpoint:
            return checkpoint.config.rope

    assert rope(type="none", factor=4.0).inv_freq_scale == ()
    assert rope(type="linear", factor=4.0).inv_freq_scale == (4.0,) * 8
    yarn = rope(type="yarn", factor=4.0)
    assert yarn.inv_freq_scale[0] == 1 and yarn.inv_freq_scale[-1] == 4
    assert yarn.magnitude == pytest.approx(0.1 * np.log(4) + 1)


REFUSED = {
    "granitemoehybrid": [
        ({"num_local_experts": 0}, "'num_local_experts' is 0, but must be at least 1"),
        ({"mamba_proj_bias": True}, "'mamba_proj_bias' is True, but must be false"),
        ({"time_step_limit": [0.1, 2]}, r"'time_step_limit' is \[0\.1, 2\], but must be \[0, I"),
        ({"position_embedding_type": "alibi"}, "'position_embedding_type' is 'alibi', but must be"),
        ({"layer_types": ["mamba"]}, "'layer_types' is .* but must be mamba or attention for each"),
        ({"mamba_d_head": 3}, "'mamba_d_head' is 3, but must be 128 / 4"),
    ],
    "llama4_text": [
        ({"no_rope_layers": [1]}, r"'no_rope_layers' is \[1\], but must be 0 or 1 for each layer"),
        ({"no_rope_layers": [1, 2]}, "'no_rope_layers' is"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'layer_types' is"),
        ({"layer_types": 3}, "'layer_types' is 3, but must be chunked_attention where"),
        ({"floor_scale": 0}, "'floor_scale' is 0, but must be at least 1"),
        ({"attn_temperature_tuning": "on"}, "'attn_temperature_tuning' is 'on', but must be true"),
    ],
    "exaone_moe": [
        ({"sliding_window_pattern": "LLG", "layer_types": None}, "'sliding_window_pattern' is 'L"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'layer_types' is"),
    ],
    "hy_v3": [({"mlp_bias": True}, "'mlp_bias' is True, but must be false")],
    "mellum": [
        ({"rope_parameters": {"rope_theta": 1e4}}, "'sliding_attention' is missing"),
        ({"sliding_window": None}, "'sliding_window' is missing"),
    ],
    "phimoe": [
        ({"num_experts_per_tok": 1}, "'num_experts_per_tok' is 1, but must be 2"),
        ({"router_jitter_noise": "much"}, "'router_jitter_noise' is 'much', but must be a number"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', but must be silu"),
    ],
}


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [(model_type, *case) for model_type, cases in REFUSED.items() for case in cases],
)
def test_what_an_architecture_does_not_do_is_refused(tmp_path, model_type, change, message):
    folder = tiny.hf_checkpoint(tmp_path, model_type, config=change)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_text_ends_with_what_any_part_of_the_config_says(tmp_path):
    folder = tiny.hf_checkpoint(tmp_path, "gemma4", config={"eos_token_id": [7, 8]})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.eos_ids == (7, 8, 319)


def test_which_layers_slide_and_which_are_dense(tmp_path):
    def slides(pattern):
        facts = {"block_count": 6, "attention.sliding_window_pattern": pattern}
        return gguf_full_layers(Facts(facts, tmp_path), period=2)

    assert (
        slides(None) == {1, 3, 5} and slides(3) == {2, 5} and slides([False] * 6) == set(range(6))
    )
    for damaged in [True] * 5, [1] * 6, "all":
        with pytest.raises(CheckpointError, match=r"'attention\.sliding_window_pattern' is"):
            slides(damaged)

    def dense(**facts):
        return hf_leading_dense_layers(Facts(facts, tmp_path), default=1)

    assert dense() == {0} and dense(first_k_dense_replace=2) == {0, 1}
    assert dense(mlp_layer_types=["sparse", "dense"], first_k_dense_replace=2) == {1}
    with pytest.raises(CheckpointError, match=r"'mlp_layer_types' is .* must be a list of dense"):
        dense(mlp_layer_types=["thick"])


def test_which_layers_of_llama_4_see_the_whole_text(tmp_path):
    def config(**change):
        facts = {**tiny.hf_config("llama4_text", layers=8), **change}
        return models.find("llama4_text", tmp_path).from_hf(Facts(facts, tmp_path))

    assert config().full_layers == {3, 7} and config().dense_layers == {0, 2, 4, 6}
    assert [config().window(layer) for layer in (2, 3)] == [8192, 0]
    assert config(moe_layers=[1, 2]).dense_layers == {0, 3, 4, 5, 6, 7}
    still = config(no_rope_layers=[1, 1, 0, 1, 1, 1, 1, 1])
    assert still.full_layers == {2} and set(still.attention_shape(2).rope.inv_freq_scale) == {1e30}
    assert still.attention_shape(1).rope.inv_freq_scale == ()
    for change in {"attention_chunk_size": None}, {"layer_types": ["full_attention"] * 8}:
        whole = config(**change)
        assert whole.window(2) == 0 and not whole.chunked_attention and whole.full_layers == {3, 7}
    assert config(attn_temperature_tuning=False).temperature_step == 0
    assert config(attn_temperature_tuning=4).temperature_step == 8192  # as older files have it


# --- transformers ---

SIZES = dict(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, eos_token_id=7,
)  # fmt: skip
EXPERTS = dict(num_experts=8, num_experts_per_tok=2)
CONFIGS = {
    "llama": dict(intermediate_size=96),
    "mixtral": dict(intermediate_size=48, num_local_experts=8, sliding_window=32),
    "olmoe": dict(EXPERTS, intermediate_size=48, clip_qkv=3.0),
    "qwen2_moe": dict(EXPERTS, intermediate_size=96, moe_intermediate_size=48,
                      shared_expert_intermediate_size=80),
    "qwen3_moe": dict(EXPERTS, intermediate_size=96, moe_intermediate_size=48, head_dim=32,
                      mlp_only_layers=[0], norm_topk_prob=True),
}  # fmt: skip


def saved(folder, model_type, **changes):
    """A folder that transformers wrote, and its configuration."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        model_type, **(SIZES | CONFIGS[model_type] | changes)
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_transformers_saves(tmp_path, model_type):
    model = saved(tmp_path, model_type)
    with open_checkpoint(tmp_path) as checkpoint:
        config = checkpoint.config
        assert (config.num_layers, config.hidden_size, config.vocab_size) == (2, 64, 96)
        assert (config.num_heads, config.num_kv_heads, config.context_length) == (4, 2, 128)
        assert config.head_dim == (32 if model_type == "qwen3_moe" else 16)
        assert config.norm_eps == model.config.rms_norm_eps
        assert config.eos_ids == (7,)
        assert config.rope.theta == model.config.rope_parameters["rope_theta"]
        assert config.dense_layers == ({0} if model_type == "qwen3_moe" else frozenset())
        assert config.sliding_window == (32 if model_type == "mixtral" else 0)
        assert config.clip_qkv == (3.0 if model_type == "olmoe" else 0)
        assert config.normalize_top_k == (model_type not in ("olmoe", "qwen2_moe"))
        stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        assert stored == sum(4 * p.numel() for p in model.parameters())


ROPES = {
    "linear": dict(rope_type="linear", factor=2.5),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    "yarn, all options": dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16,
        beta_slow=2, mscale=0.9, mscale_all_dim=0.7, truncate=False),
    "yarn, given magnitude": dict(rope_type="yarn", factor=4.0, attention_factor=1.3,
                                  original_max_position_embeddings=64),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling(tmp_path, name):
    rope = {"rope_theta": 5000.0, **ROPES[name]}
    model = saved(tmp_path, "llama", rope_parameters=rope, head_dim=32)
    with open_checkpoint(tmp_path) as checkpoint:
        got = checkpoint.config.rope
    expected = model.model.rotary_emb
    plain = 5000.0 ** -(np.arange(0, 32, 2) / 32)
    scale = got.inv_freq_scale or 1.0
    assert np.allclose(plain / scale, expected.inv_freq.numpy(), rtol=1e-6)
    assert got.magnitude == pytest.approx(expected.attention_scaling, rel=1e-6)


def test_rope_of_older_files(tmp_path):
    """`rope_theta` and `rope_scaling` with "type", as before `rope_parameters`."""
    folder = tiny.hf_checkpoint(
        tmp_path,
        "llama",
        config={"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    )
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.rope == RopeConfig(500.0, 16, "half", (2.0,) * 8)

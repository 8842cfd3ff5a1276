"""Logits and greedy tokens against transformers, on random checkpoints of every architecture."""

import json
from functools import partial

import numpy as np
import pytest

from tiered import Engine

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

COMMON = dict(
    vocab_size=384, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
EXPERTS = dict(num_experts=8, num_experts_per_tok=2)
DEEPSEEK = dict(
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, routed_scaling_factor=1.5,
)  # fmt: skip
LATENT = dict(
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, num_key_value_heads=4,
)  # fmt: skip
DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=24,
    linear_value_head_dim=32, linear_conv_kernel_dim=4,
)  # fmt: skip
ARCHITECTURES = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=96),
    "qwen3_moe": dict(
        EXPERTS, moe_intermediate_size=96, intermediate_size=128, head_dim=32, norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "olmoe": dict(EXPERTS, intermediate_size=96, clip_qkv=1.5),
    "qwen2_moe": dict(
        EXPERTS, moe_intermediate_size=96, shared_expert_intermediate_size=160,
        intermediate_size=128,
    ),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=96, head_dim=32,
                    sliding_window=24, rope_parameters=dict(rope_type="yarn", factor=4.0,
                    rope_theta=1e4, original_max_position_embeddings=64, truncate=False)),
    "glm4_moe": dict(
        **DEEPSEEK, first_k_dense_replace=1, moe_intermediate_size=96, intermediate_size=128,
        n_shared_experts=2, use_qk_norm=True, attention_bias=True, head_dim=32,
    ),
    "minimax_m2": dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=96,
                       head_dim=32, rotary_dim=16),
    "ernie4_5_moe": dict(moe_num_experts=8, moe_k=2, moe_intermediate_size=96,
                         intermediate_size=128, moe_layer_start_index=1),
    "granitemoe": dict(
        num_local_experts=8, num_experts_per_tok=2, intermediate_size=96, embedding_multiplier=6.0,
        attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=4.0,
    ),
    "granitemoeshared": dict(
        num_local_experts=8, num_experts_per_tok=2, intermediate_size=96, residual_multiplier=0.5,
        attention_multiplier=0.25, embedding_multiplier=3.0, logits_scaling=2.0,
        shared_intermediate_size=160,
    ),
    "llama4_text": dict(
        num_local_experts=8, num_experts_per_tok=1, intermediate_size=96, intermediate_size_mlp=128,
        interleave_moe_layer_step=2, head_dim=16, num_hidden_layers=4, attention_chunk_size=24,
        no_rope_layers=[1, 0, 1, 1], floor_scale=16, attn_scale=0.4,
        rope_scaling=LLAMA3,
    ),
    "phimoe": dict(
        num_local_experts=8, num_experts_per_tok=2, intermediate_size=96, attention_bias=True,
        lm_head_bias=True, router_jitter_noise=0.1,
        rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_mscale=1.25,
                             long_mscale=1.25, original_max_position_embeddings=256,
                             short_factor=[1 + n / 8 for n in range(8)],
                             long_factor=[1 + n for n in range(8)]),
    ),
    "granitemoehybrid": dict(
        num_local_experts=8, num_experts_per_tok=2, intermediate_size=96, residual_multiplier=0.5,
        attention_multiplier=0.25, embedding_multiplier=3.0, logits_scaling=2.0,
        shared_intermediate_size=160, mamba_n_heads=4, mamba_n_groups=2, mamba_d_state=24,
        mamba_chunk_size=16, layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "lfm2_moe": dict(
        EXPERTS, moe_intermediate_size=96, intermediate_size=128, num_dense_layers=1,
        conv_L_cache=3,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "gemma4_text": dict(
        num_experts=8, top_k_experts=2, enable_moe_block=True, moe_intermediate_size=96,
        intermediate_size=128, head_dim=32, global_head_dim=48, num_global_key_value_heads=1,
        attention_k_eq_v=True, hidden_size_per_layer_input=0, final_logit_softcapping=8.0,
        sliding_window=24,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "deepseek_v2": dict(
        **LATENT, n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
        topk_method="group_limited_greedy", routed_scaling_factor=4.0, q_lora_rank=None,
        first_k_dense_replace=1, moe_intermediate_size=96, intermediate_size=128,
        n_shared_experts=2,
        rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4, mscale=0.7,
                             mscale_all_dim=0.7, original_max_position_embeddings=64),
    ),
    "deepseek_v3": dict(
        **LATENT, **DEEPSEEK, q_lora_rank=48, first_k_dense_replace=1, moe_intermediate_size=96,
        intermediate_size=128, n_shared_experts=1, num_nextn_predict_layers=0,
    ),
    "glm4_moe_lite": dict(
        **LATENT, **DEEPSEEK, q_lora_rank=32, moe_intermediate_size=96, intermediate_size=128,
        mlp_layer_types=["sparse", "dense", "sparse"],
    ),
    "qwen3_next": dict(
        **EXPERTS, **DELTA, moe_intermediate_size=96, shared_expert_intermediate_size=160,
        intermediate_size=128, num_hidden_layers=4, head_dim=32, mlp_only_layers=[1],
    ),
    "qwen3_5_moe_text": dict(
        **EXPERTS, **DELTA, moe_intermediate_size=96, shared_expert_intermediate_size=160,
        num_hidden_layers=4, head_dim=32,
    ),
    "llama": dict(intermediate_size=128, rope_scaling=LLAMA3),
    "dots1": dict(
        **DEEPSEEK, first_k_dense_replace=1, moe_intermediate_size=96, intermediate_size=128,
        n_shared_experts=2, head_dim=32, sliding_window=24, max_window_layers=2,
    ),
    "solar_open": dict(**DEEPSEEK, moe_intermediate_size=96, n_shared_experts=2, head_dim=32),
    "exaone_moe": dict(
        EXPERTS, moe_intermediate_size=96, intermediate_size=128, num_shared_experts=2, head_dim=32,
        n_group=4, topk_group=2, routed_scaling_factor=1.5, sliding_window=24,
        num_hidden_layers=5,
    ),
    "hy_v3": dict(
        EXPERTS, moe_intermediate_size=96, intermediate_size=128, num_shared_experts=2, head_dim=32,
    ),
    "mellum": dict(
        num_local_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, head_dim=32,
        sliding_window=24, intermediate_size=128, mlp_layer_types=["sparse", "dense", "sparse"],
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
            full_attention=dict(rope_type="yarn", rope_theta=5e5, factor=4.0,
                                original_max_position_embeddings=64),
        ),
    ),
    "kimi_k2": dict(
        **LATENT, q_lora_rank=48, first_k_dense_replace=1, moe_intermediate_size=96,
        intermediate_size=128, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
        n_group=1, topk_group=1, routed_scaling_factor=2.827,
        rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=5e4, mscale=1.0,
                             mscale_all_dim=1.0, beta_fast=1.0, beta_slow=1.0,
                             original_max_position_embeddings=64),
    ),
    "qwen3_vl_moe": dict(
        EXPERTS, moe_intermediate_size=96, intermediate_size=128, head_dim=32,
        rope_parameters=dict(rope_type="default", rope_theta=5e4, mrope_section=[8, 4, 4]),
    ),
}  # fmt: skip
VISION = dict(
    depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64,
    deepstack_visual_indexes=[0],
)  # fmt: skip
PROMPT = np.random.default_rng(0).integers(3, 384, 40).tolist()


def random_model(model_type):
    """A model of transformers, which calls Kimi K2 DeepSeek-V3."""
    values = COMMON | ARCHITECTURES[model_type]
    for_model = transformers.AutoConfig.for_model
    if model_type == "qwen3_vl_moe":
        config = for_model(model_type, text_config=values, vision_config=VISION)
        return transformers.AutoModelForImageTextToText.from_config(config)
    config = for_model({"kimi_k2": "deepseek_v3"}.get(model_type, model_type), **values)
    return transformers.AutoModelForCausalLM.from_config(config)


def corrections(model):
    """Weights that are no parameters: what is added to scores to choose experts by, and Gemma's
    scale of a layer."""
    names = ("e_score_correction_bias", "layer_scalar")
    return [(name, b) for name, b in model.named_buffers() if name.endswith(names)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reference(request, tmp_path_factory):
    """(folder, model) of a random model, weights scaled so that activations stay finite."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    model = random_model(request.param).eval().float()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *corrections(model)]:
            if weight.dim() >= 2 and "correction" not in name:
                # Routers twice as wide: nearly equal scores would make comparisons chancy.
                wide = 2 if name.endswith((".gate.weight", ".router.weight")) else 1
                weight.normal_(0, wide * weight.shape[-1] ** -0.5)
            elif "correction" in name or "bias" in name:
                weight.normal_(0, 0.1)
            else:
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    as_published(folder, request.param)
    return folder, model


def as_published(folder, model_type):
    """What their makers write otherwise than transformers does."""
    if model_type == "kimi_k2":
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"model_type": model_type}))
    if model_type == "qwen3_vl_moe":
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name in (name for name in tensors if ".experts." in name):
            tensors[name] = tensors[name].swapaxes(1, 2).contiguous()
        save_file(tensors, file)


def test_logits(reference):
    folder, model = reference
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    with Engine(folder, quantize="none", kv_dtype="f32", threads=2) as engine:
        got = engine.logits(PROMPT)
    # Latent attention never makes the keys, and the delta rule and Mamba-2 go token by token, not
    # in chunks: they round elsewhere.
    names = "kv_lora_rank", "linear_key_head_dim", "mamba_d_state"
    elsewhere = any(hasattr(model.config, name) for name in names)
    tolerance = 3e-5 if elsewhere else 1e-5
    assert np.abs(got - expected).max() <= tolerance * np.ptp(expected)


def test_greedy_tokens(reference):
    folder, model = reference
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=32, do_sample=False, eos_token_id=None
        )
    expected = ids[0, len(PROMPT) :].tolist()
    for chunk in (512, 7):
        with Engine(
            folder, quantize="none", kv_dtype="f32", threads=2, prefill_chunk=chunk
        ) as engine:
            assert list(engine.generate_tokens(PROMPT, 32)) == expected


def test_a_f16_kv_cache_stays_close(reference):
    folder, model = reference
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    with Engine(folder, quantize="none", threads=2) as engine:
        got = engine.logits(PROMPT)
    # Gemma does not divide scores by the root of a head's size: they round more.
    tolerance = 3e-3 if model.config.model_type == "gemma4_text" else 1e-3
    assert np.abs(got - expected).max() <= tolerance * np.ptp(expected)


def test_longrope_is_chosen_by_the_context(tmp_path):
    """Of the keys that are kept, none was rotated otherwise than the next one will be."""
    rope = ARCHITECTURES["phimoe"]["rope_parameters"] | dict(
        original_max_position_embeddings=32, long_mscale=0.8
    )
    changes = ARCHITECTURES["phimoe"] | dict(rope_parameters=rope)
    config = transformers.AutoConfig.for_model("phimoe", **(COMMON | changes))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    model.save_pretrained(tmp_path)
    embedding = model.model.rotary_emb
    original = embedding.rope_init_fn
    # It is not told how long the text is, and takes the short factors for all.
    embedding.rope_init_fn = partial(original, seq_len=len(PROMPT))
    with torch.no_grad():
        long = model(torch.tensor([PROMPT])).logits[0].numpy()
        embedding.rope_init_fn = original
        short = model(torch.tensor([PROMPT[:20]])).logits[0].numpy()
    for context, prompt, expected in (256, PROMPT, long), (32, PROMPT[:20], short):
        with Engine(
            tmp_path, quantize="none", kv_dtype="f32", threads=2, context=context, prefill_chunk=7
        ) as engine:
            assert np.abs(engine.logits(prompt) - expected).max() <= 1e-5 * np.ptp(expected)

"""Tiny random weights of every architecture, and what sets the architectures apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tiny_exaone_moe
import tiny_gemma4
import tiny_granite
import tiny_granite_hybrid
import tiny_granite_shared
import tiny_hy_v3
import tiny_lfm2
import tiny_llama4
import tiny_mellum
import tiny_phimoe
import tiny_qwen3_vl

SIZES = dict(vocab=320, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, experts=8, top_k=2)
SIZES |= dict(expert_size=64, ffn_size=96, shared_size=96, context=256)
SIZES |= dict(drafts=0)  # whether there is a layer that drafts tokens
SIZES |= dict(key_heads=2, value_heads=4, delta_dim=32, conv_size=4)  # of DeltaNet
SIZES |= dict(q_rank=32, kv_rank=32, nope_dim=32, rope_dim=16, value_dim=32)  # of latent attention
NUM_SHARED = 2  # experts that every token uses, where there are several
K_QUANT_SIZES = dict(hidden=256, head_dim=64, expert_size=256, ffn_size=256, shared_size=256)
K_QUANT_SIZES |= dict(q_rank=256, kv_rank=256, nope_dim=256, value_dim=256, delta_dim=64)


class Kind(NamedTuple):
    """What an architecture has, and what it is called."""

    gguf: str
    ffn_norm: str = "ffn_norm"  # in GGUF
    biases: str = ""  # of which of q, k, v, o
    qk_norm: str = ""
    latent: int = 0  # latent attention, whose queries are made in so many steps
    sinks: bool = False
    mlp: str = "mlp."  # in Hugging Face folders, as are the next four
    router: str = "gate"
    experts: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    correction: str = ""
    gated_shared: bool = False
    expert_biases: bool = False  # and experts fused, transposed and interleaved
    dense: tuple[int, ...] = ()  # layers without experts
    half_rope: bool = False
    delta: str = ""  # Qwen's DeltaNet in all but every second layer; its rows "mixed" or "apart"
    own: Any = None  # a module with add_layer, hf_config and write_metadata
    prefix: str = "model."
    head: str = "lm_head"


_DEEPSEEK = Kind("deepseek2", latent=1, shared="shared_experts.", dense=(0,))
_QWEN = Kind("qwen35moe", ffn_norm="post_attention_norm", qk_norm="head", delta="apart",
             shared="shared_expert.", gated_shared=True)  # fmt: skip
_GEMMA = Kind("gemma4", ffn_norm="post_attention_norm", own=tiny_gemma4)
_CORRECTION = "gate.e_score_correction_bias"
KINDS = {
    "llama": Kind("llama", experts=None),
    "mixtral": Kind("llama", mlp="block_sparse_moe.", experts=("w1", "w3", "w2")),
    "olmoe": Kind("olmoe", qk_norm="full"),
    "qwen2_moe": Kind("qwen2moe", biases="qkv", shared="shared_expert.", gated_shared=True),
    "qwen3_moe": Kind("qwen3moe", qk_norm="head"),
    "gpt_oss": Kind("gpt-oss", ffn_norm="post_attention_norm", biases="qkvo", sinks=True,
                    router="router", expert_biases=True),
    "glm4_moe": Kind("glm4moe", ffn_norm="post_attention_norm", biases="qkv", qk_norm="head",
                     shared="shared_experts.", correction=_CORRECTION, dense=(0,), half_rope=True),
    "minimax_m2": Kind("minimax-m2", qk_norm="full", mlp="block_sparse_moe.",
                       experts=("w1", "w3", "w2"), correction="e_score_correction_bias",
                       half_rope=True),
    "ernie4_5_moe": Kind("ernie4_5-moe", shared="shared_experts.", dense=(0,),
                         correction="moe_statics.e_score_correction_bias"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK._replace(latent=2, correction=_CORRECTION),
    "glm4_moe_lite": _DEEPSEEK._replace(latent=2, correction=_CORRECTION),
    "qwen3_next": _QWEN._replace(gguf="qwen3next", delta="mixed"),
    "qwen3_5_moe": _QWEN._replace(prefix="model.language_model."),
    "qwen3_5_moe_text": _QWEN,
    "gemma4": _GEMMA._replace(prefix="model.language_model."),
    "gemma4_text": _GEMMA,
    "granitemoe": Kind("granitemoe", own=tiny_granite),
    "granitemoeshared": Kind("granitemoe", own=tiny_granite_shared),
    "granitemoehybrid": Kind("granitehybrid", own=tiny_granite_hybrid),
    "lfm2_moe": Kind("lfm2moe", own=tiny_lfm2),
    "llama4": Kind("llama4", own=tiny_llama4, prefix="language_model.model.",
                   head="language_model.lm_head"),
    "llama4_text": Kind("llama4", own=tiny_llama4),
    "phimoe": Kind("phimoe", biases="qkvo", own=tiny_phimoe),
    "dots1": Kind("dots1", qk_norm="head", shared="shared_experts.", correction=_CORRECTION,
                  dense=(0,)),
    "solar_open": Kind("glm4moe", ffn_norm="post_attention_norm", shared="shared_experts.",
                       correction=_CORRECTION),
    "exaone_moe": Kind("exaone-moe", qk_norm="head", shared="shared_experts.", dense=(0,),
                       correction="e_score_correction_bias", own=tiny_exaone_moe),
    "hy_v3": Kind("hy_v3", qk_norm="head", router="router.gate", shared="shared_mlp.", dense=(0,),
                  correction="expert_bias", own=tiny_hy_v3),
    "mellum": Kind("mellum", qk_norm="head", own=tiny_mellum),
    "kimi_k2": _DEEPSEEK._replace(latent=2, correction=_CORRECTION),
    "qwen3_vl_moe": Kind("qwen3vlmoe", qk_norm="head", own=tiny_qwen3_vl,
                         prefix="model.language_model."),
}  # fmt: skip
ARCHITECTURES = tuple(KINDS)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, truncate=False)
DENSE = "llama"
ADJACENT = (
    "llama",
    "mixtral",
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid",
)  # GGUF has the values that rotate together side by side, HF not


def after_attention(model_type: str, layer: int) -> str:
    """The canonical name of what is mostly called post_attention_layernorm."""
    name = "attention_out_norm" if KINDS[model_type].own is tiny_gemma4 else "ffn_norm"
    return f"layers.{layer}.{name}"


class Weight(NamedTuple):
    hf: str  # "" for what only GGUF has
    gguf: str  # "" for what GGUF does not have, or fuses: one expert's matrix
    values: np.ndarray  # float32


class _Weights:
    """Random tensors, one after the other."""

    def __init__(self, model_type: str, seed: int, sizes: dict[str, int]) -> None:
        self.kind, self.s = KINDS[model_type], sizes
        self.rng = np.random.default_rng(seed)
        self.found: list[Weight] = []

    def add(self, hf: str, gguf: str, *shape: int, scale: float = 1.0) -> None:
        """Matrices are scaled so that activations stay finite; other vectors than biases are
        about 1."""
        values = self.rng.standard_normal(shape, np.float32)
        is_bias = hf.endswith(("bias", "sinks"))
        if is_bias:
            values *= np.float32(0.1)
        elif len(shape) > 1:
            values *= scale / np.sqrt(np.float32(shape[-1]))
        else:
            values = 1 + np.float32(0.1) * values
        self.found.append(Weight(hf + ("" if is_bias else ".weight"), gguf, values))

    def add_values(self, hf: str, gguf: str, values: np.ndarray) -> None:
        self.found.append(Weight(hf, gguf, values))

    def matrix(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[-1]))

    def norm(self, hf: str, gguf: str, size: int) -> None:
        """Hugging Face has Qwen's newer norms less 1."""
        self.add(hf, gguf, size)
        if self.kind.delta:
            weight = self.found.pop()
            self.found += [weight._replace(gguf="", values=weight.values - 1)]
            self.found += [weight._replace(hf="")]

    def layer(self, hf: str, gg: str, number: int) -> None:
        """What most layers have."""
        kind, s, hidden = self.kind, self.s, self.s["hidden"]
        self.norm(hf + "input_layernorm", gg + "attn_norm.weight", hidden)
        self.norm(hf + "post_attention_layernorm", f"{gg}{kind.ffn_norm}.weight", hidden)
        attention = self.latent_attention if kind.latent else self.attention
        if kind.delta and number % 2 == 0:
            self.delta(hf + "linear_attn.", gg)
        else:
            attention(hf + "self_attn.", gg)
        if kind.experts is None or number in kind.dense:
            self.feed_forward(hf + "mlp.", gg + "ffn_{}.weight", s["ffn_size"])
        else:
            self.experts(hf + kind.mlp, gg)

    def attention(self, hf: str, gg: str) -> None:
        kind, s, hidden = self.kind, self.s, self.s["hidden"]
        q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
        gates = q if kind.delta else 0
        for name, size in ("q", q + gates), ("k", kv), ("v", kv):
            self.add(f"{hf}{name}_proj", f"{gg}attn_{name}.weight", size, hidden)
            if name in kind.biases:
                self.add(f"{hf}{name}_proj.bias", f"{gg}attn_{name}.bias", size)
        self.add(hf + "o_proj", gg + "attn_output.weight", hidden, q)
        if "o" in kind.biases:
            self.add(hf + "o_proj.bias", gg + "attn_output.bias", hidden)
        if kind.qk_norm:
            full = kind.qk_norm == "full"
            self.norm(hf + "q_norm", gg + "attn_q_norm.weight", q if full else s["head_dim"])
            self.norm(hf + "k_norm", gg + "attn_k_norm.weight", kv if full else s["head_dim"])
        if kind.sinks:
            self.add(hf + "sinks", gg + "attn_sinks.weight", s["heads"])

    def latent_attention(self, hf: str, gg: str) -> None:
        s, hidden, heads, q_rank = self.s, self.s["hidden"], self.s["heads"], self.s["q_rank"]
        rank, nope, value = s["kv_rank"], s["nope_dim"], s["value_dim"]
        q_size = heads * (nope + s["rope_dim"])
        if self.kind.latent == 2:
            self.add(hf + "q_a_proj", gg + "attn_q_a.weight", q_rank, hidden)
            self.add(hf + "q_a_layernorm", gg + "attn_q_a_norm.weight", q_rank)
            self.add(hf + "q_b_proj", gg + "attn_q_b.weight", q_size, q_rank)
        else:
            self.add(hf + "q_proj", gg + "attn_q.weight", q_size, hidden)
        compressed = rank + s["rope_dim"]
        self.add(hf + "kv_a_proj_with_mqa", gg + "attn_kv_a_mqa.weight", compressed, hidden)
        self.add(hf + "kv_a_layernorm", gg + "attn_kv_a_norm.weight", rank)
        self.add(hf + "kv_b_proj", "", heads * (nope + value), rank)
        both = self.found[-1].values.reshape(heads, nope + value, rank)
        k_b = np.ascontiguousarray(both[:, :nope].swapaxes(1, 2))
        self.found.append(Weight("", gg + "attn_k_b.weight", k_b))
        self.found.append(Weight("", gg + "attn_v_b.weight", both[:, nope:].copy()))
        self.add(hf + "o_proj", gg + "attn_output.weight", hidden, heads * value)

    def delta(self, hf: str, gg: str) -> None:
        s, keys, heads = self.s, self.s["key_heads"], self.s["value_heads"]
        dim, hidden = s["delta_dim"], s["hidden"]
        parts = dict(q=keys * dim, k=keys * dim, v=heads * dim, z=heads * dim, b=heads, a=heads)
        q, k, v, z, b, a = (self.matrix(rows, hidden) for rows in parts.values())
        o = self.matrix(hidden, heads * dim)
        conv = self.rng.standard_normal((2 * keys * dim + heads * dim, s["conv_size"]), np.float32)
        a_log = np.log(self.rng.uniform(0.5, 8, heads)).astype(np.float32)
        dt_bias = self.rng.standard_normal(heads, np.float32)
        norm = 1 + self.rng.standard_normal(dim, np.float32) / 10
        both = {"conv1d.weight": conv[:, None] / 2, "A_log": a_log, "dt_bias": dt_bias}
        both |= {"norm.weight": norm, "out_proj.weight": o}
        if self.kind.delta == "mixed":  # by heads of keys
            parts = [t.reshape(keys, -1, hidden) for t in (q, k, v, z)]
            both["in_proj_qkvz.weight"] = np.concatenate(parts, 1).reshape(-1, hidden)
            parts = [t.reshape(keys, -1, hidden) for t in (b, a)]
            both["in_proj_ba.weight"] = np.concatenate(parts, 1).reshape(-1, hidden)
        else:
            both |= {"in_proj_qkv.weight": np.concatenate([q, k, v]), "in_proj_z.weight": z}
            both |= {"in_proj_b.weight": b, "in_proj_a.weight": a}
        self.found += [Weight(hf + name, "", values) for name, values in both.items()]

        def tiled(values: np.ndarray, axis: int = 0) -> np.ndarray:
            """GGUF has every key_heads-th head of values side by side; not of Qwen3-Next."""
            if self.kind.delta == "mixed":
                return values
            shape = values.shape
            rest = shape[:axis], (keys, heads // keys, shape[axis] // heads), shape[axis + 1 :]
            parts = values.reshape(*rest[0], *rest[1], *rest[2])
            return np.ascontiguousarray(parts.swapaxes(axis, axis + 1)).reshape(shape)

        queries = 2 * keys * dim
        gguf = {"attn_qkv.weight": np.concatenate([q, k, tiled(v)]), "attn_gate.weight": tiled(z)}
        gguf["ssm_conv1d.weight"] = np.concatenate([conv[:queries], tiled(conv[queries:])]) / 2
        gguf |= {"ssm_dt.bias": tiled(dt_bias), "ssm_a": tiled(-np.exp(a_log))}
        gguf |= {"ssm_norm.weight": norm, "ssm_out.weight": tiled(o, 1)}
        if self.kind.delta == "mixed":
            gguf["ssm_ba.weight"] = both["in_proj_ba.weight"]
        else:
            gguf |= {"ssm_beta.weight": tiled(b), "ssm_alpha.weight": tiled(a)}
        self.found += [Weight("", gg + name, values) for name, values in gguf.items()]

    def feed_forward(self, hf: str, gguf: str, size: int, names: Any = None) -> None:
        gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
        hidden = self.s["hidden"]
        self.add(hf + gate, gguf.format("gate"), size, hidden)
        self.add(hf + up, gguf.format("up"), size, hidden)
        self.add(hf + down, gguf.format("down"), hidden, size)

    def experts(self, hf: str, gg: str) -> None:
        kind, s, hidden, experts = self.kind, self.s, self.s["hidden"], self.s["experts"]
        self.add(hf + kind.router, gg + "ffn_gate_inp.weight", experts, hidden, scale=2.0)
        if kind.correction:
            self.add(hf + kind.correction, gg + "exp_probs_b.bias", experts)
            if "statics" in kind.correction:  # a row of a matrix
                weight = self.found.pop()
                self.found += [
                    weight._replace(hf=""),
                    weight._replace(gguf="", values=weight.values[None]),
                ]
        for expert in range(experts):
            self.feed_forward(f"{hf}experts.{expert}.", "", s["expert_size"], kind.experts)
        if kind.expert_biases:
            self.add(hf + "router.bias", gg + "ffn_gate_inp.bias", experts)
            self.fuse(hf + "experts.", gg)
        if kind.shared:
            shared = gg + "ffn_{}_shexp.weight"
            size = s["shared_size"] if kind.gated_shared else NUM_SHARED * s["expert_size"]
            self.feed_forward(hf + kind.shared, shared, size)
        if kind.gated_shared:
            self.add(hf + "shared_expert_gate", gg + "ffn_gate_inp_shexp.weight", 1, hidden)

    def fuse(self, hf: str, gg: str) -> None:
        """All experts of a layer in one tensor, transposed, gate and up alternating; and biases."""
        mine = [w for w in self.found if w.hf.startswith(hf)]
        self.found = [w for w in self.found if not w.hf.startswith(hf)]
        gate, up, down = (np.stack([w.values for w in mine[i::3]]) for i in range(3))
        for name, values in ("gate", gate), ("up", up), ("down", down):
            self.found.append(Weight("", f"{gg}ffn_{name}_exps.weight", values))
        both = np.stack([gate, up], 2).reshape(len(gate), -1, gate.shape[2])
        self.found.append(Weight(hf + "gate_up_proj", "", both.swapaxes(1, 2).copy()))
        self.found.append(Weight(hf + "down_proj", "", down.swapaxes(1, 2).copy()))
        sizes = dict(gate=gate.shape[1], up=gate.shape[1], down=down.shape[1])
        biases = {}
        for name, size in sizes.items():
            biases[name] = self.rng.standard_normal((len(gate), size), np.float32) / 10
            self.found.append(Weight("", f"{gg}ffn_{name}_exps.bias", biases[name]))
        both = np.stack([biases["gate"], biases["up"]], 2).reshape(len(gate), -1)
        self.found.append(Weight(hf + "gate_up_proj_bias", "", both))
        self.found.append(Weight(hf + "down_proj_bias", "", biases["down"]))


def weights(model_type: str, seed: int = 0, tied: bool = False, **sizes: int) -> list[Weight]:
    """All tensors of a random model."""
    s = {**SIZES, **sizes}
    w, kind, hidden = _Weights(model_type, seed, s), KINDS[model_type], s["hidden"]
    scale = float(np.sqrt(hidden))
    w.add(kind.prefix + "embed_tokens", "token_embd.weight", s["vocab"], hidden, scale=scale)
    is_lfm2 = kind.own is tiny_lfm2
    last, stored = ("embedding_norm", "token_embd_norm") if is_lfm2 else ("norm", "output_norm")
    w.norm(kind.prefix + last, f"{stored}.weight", hidden)
    if not tied:
        w.add(kind.head, "output.weight", s["vocab"], hidden)
    for i in range(s["layers"]):
        hf, gg = f"{kind.prefix}layers.{i}.", f"blk.{i}."
        add_layer = _Weights.layer if kind.own is None else kind.own.add_layer
        add_layer(w, hf, gg, i)
    if s["drafts"]:
        _draft_layer(w, model_type)
    return w.found


DRAFTING = (  # what may have drafts=1
    "deepseek_v3", "glm4_moe", "glm4_moe_lite", "hy_v3", "qwen3_next", "qwen3_5_moe",
)  # fmt: skip


def _draft_layer(w: _Weights, model_type: str) -> None:
    kind, number, hidden = w.kind, w.s["layers"], w.s["hidden"]
    hf, gg = f"{kind.prefix}layers.{number}.", f"blk.{number}."
    last = "final_layernorm" if model_type == "hy_v3" else "shared_head.norm"
    names = ("enorm", "hnorm", "eh_proj", last)
    if kind.delta:
        hf = "mtp.layers.0."
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    own = "mtp." if kind.delta else hf
    w.norm(own + names[0], gg + "nextn.enorm.weight", hidden)
    w.norm(own + names[1], gg + "nextn.hnorm.weight", hidden)
    w.add(own + names[2], gg + "nextn.eh_proj.weight", hidden, 2 * hidden)
    w.norm(own + names[3], gg + "nextn.shared_head_norm.weight", hidden)
    if model_type.startswith("glm4_moe"):
        w.add(hf + "embed_tokens", gg + "nextn.embed_tokens.weight", w.s["vocab"], hidden)
        w.add(hf + "shared_head.head", gg + "nextn.shared_head_head.weight", w.s["vocab"], hidden)
    w.norm(hf + "input_layernorm", gg + "attn_norm.weight", hidden)
    w.norm(hf + "post_attention_layernorm", f"{gg}{kind.ffn_norm}.weight", hidden)
    attention = w.latent_attention if kind.latent else w.attention
    attention(hf + "self_attn.", gg)
    w.experts(hf + kind.mlp, gg)


# --- Hugging Face ---

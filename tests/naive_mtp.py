"""Multi-token prediction in torch, with transformers' own layers: no cache, every row anew.

transformers computes no drafts. But the layer that drafts is an ordinary decoder layer, so a random
model with one layer more is made, and its last one becomes the layer that drafts.
"""

from __future__ import annotations

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

COMMON = dict(
    vocab_size=384, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, attn_implementation="eager",
    moe_intermediate_size=96, intermediate_size=128,
)  # fmt: skip
DEEPSEEK = dict(
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, routed_scaling_factor=1.5,
    first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip
DELTA = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=24,
    linear_value_head_dim=32, linear_conv_kernel_dim=4, num_experts=8, num_experts_per_tok=2,
    shared_expert_intermediate_size=160, head_dim=32,
    layer_types=["linear_attention", "full_attention", "full_attention"],
)  # fmt: skip
ARCHITECTURES = {
    "deepseek_v3": dict(
        **DEEPSEEK, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=24, num_key_value_heads=4,
    ),
    "glm4_moe": dict(**DEEPSEEK, use_qk_norm=True, attention_bias=True, head_dim=32),
    "glm4_moe_lite": dict(
        **DEEPSEEK, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=24, num_key_value_heads=4, mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "hy_v3": dict(num_experts=8, num_experts_per_tok=2, num_shared_experts=1, head_dim=32),
    "qwen3_next": DELTA,
    "qwen3_5_moe_text": DELTA,
}  # fmt: skip
OWN = ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
HY = ("enorm", "hnorm", "eh_proj", "final_layernorm")  # and the model's head
QWENS = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")


class Reference:
    """A random model, written to `folder` as its makers do."""

    def __init__(self, folder, model_type):
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(
            model_type, **(COMMON | ARCHITECTURES[model_type])
        )
        self.model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
        self.is_qwen = model_type.startswith("qwen")
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if weight.dim() >= 2:
                    wide = 2 if name.endswith(".gate.weight") else 1
                    weight.normal_(0, wide * weight.shape[-1] ** -0.5)
                elif self.is_qwen and "norm" in name and "linear" not in name:
                    weight.normal_(0, 0.1)
                else:
                    weight.copy_(1 + 0.1 * torch.randn_like(weight))
        self.model.save_pretrained(folder)
        self.own = self._own()
        self._rename(folder)
        self.drafting = self.model.model.layers[-1]
        self.model.model.layers = self.model.model.layers[:-1]
        self.eps = config.rms_norm_eps

    def _own(self):
        around = 0.0 if self.is_qwen else 1.0
        own = {name: around + 0.1 * torch.randn(64) for name in ("enorm", "hnorm")}
        own |= {"eh_proj": torch.randn(64, 128) / 128**0.5}
        own |= {"shared_head.norm": around + 0.1 * torch.randn(64)}
        own |= {"shared_head.head": self.model.lm_head.weight.detach().clone()}
        if not self.is_qwen:  # GLM may have another head; DeepSeek's is always the model's
            scale = 0.5 if self.model.config.model_type.startswith("glm4_moe") else 0.0
            own["shared_head.head"] += scale * torch.randn_like(own["shared_head.head"]) / 8
        return own

    def _rename(self, folder):
        last = f"model.layers.{COMMON['num_hidden_layers'] - 1}."
        tensors = load_file(folder / "model.safetensors")
        if self.is_qwen:
            moved = {name.replace(last, "mtp.layers.0."): t for name, t in tensors.items()}
            moved |= {f"mtp.{new}.weight": self.own[old] for old, new in zip(OWN, QWENS)}  # noqa: B905
        else:
            names = HY if self.model.config.model_type == "hy_v3" else OWN
            own = {new: self.own[old] for old, new in zip(OWN, names)}  # noqa: B905
            moved = tensors | {f"{last}{name}.weight": t for name, t in own.items()}
        save_file({name: t.contiguous() for name, t in moved.items()}, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["num_hidden_layers"] -= 1
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:-1]
        (folder / "config.json").write_text(json.dumps(config))

    def norm(self, x, weight):
        weight = 1 + weight if self.is_qwen else weight
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * weight

    @torch.no_grad()
    def draft_logits(self, tokens, draft):
        """Of `tokens`, and one by one of `draft` after them: float32 [1 + len(draft), vocab]."""
        base = self.model.model
        hidden = base(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        before = torch.cat([torch.zeros(1, hidden.shape[1]), hidden[:-1]])
        logits, tokens = [], list(tokens)
        for following in [*draft, None]:
            x = self.norm(base.embed_tokens(torch.tensor(tokens)), self.own["enorm"])
            x = torch.cat([x, self.norm(before, self.own["hnorm"])], 1) @ self.own["eh_proj"].T
            size = len(tokens)
            places = torch.arange(size)[None]
            mask = torch.full((size, size), -torch.inf).triu(1)[None, None]
            x = self.drafting(
                x[None],
                attention_mask=mask,
                position_ids=places,
                position_embeddings=base.rotary_emb(x[None], places),
            )
            x = self.norm(x[0], self.own["shared_head.norm"])
            logits.append(x[-1] @ self.own["shared_head.head"].T)
            tokens.append(following)
            before = torch.cat([before, x[-1:]])
        return torch.stack(logits).numpy()

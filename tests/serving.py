"""A small random Mixtral with a byte vocabulary and a chat template, and a server of it."""

import contextlib
import http.client
import json
import threading

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

SPECIAL = ["<|im_start|>", "<|im_end|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
TEMPLATE = """\
{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
Call with <tool_call>...</tool_call>.<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""


def make_checkpoint(folder, seed=0, layers=2, hidden=64, experts=8, context=2048):
    """Write a Hugging Face folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(PLAIN)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    size = backend.get_vocab_size(with_added_tokens=True)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "vocab_size": size,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "eos_token_id": backend.token_to_id("<|im_end|>"),
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)

    def matrix(*shape):
        return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    head_dim = hidden // 4
    tensors = {
        "model.embed_tokens.weight": matrix(size, hidden) * 4,
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": matrix(size, hidden) * 3,
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows in ("q", hidden), ("k", 2 * head_dim), ("v", 2 * head_dim):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
        tensors[prefix + "self_attn.o_proj.weight"] = matrix(hidden, hidden)
        for name in "input_layernorm", "post_attention_layernorm":
            tensors[f"{prefix}{name}.weight"] = np.ones(hidden, np.float32)
        moe = prefix + "block_sparse_moe."
        tensors[moe + "gate.weight"] = matrix(experts, hidden) * 2
        for expert in range(experts):
            for name, shape in ("w1", (96, hidden)), ("w3", (96, hidden)), ("w2", (hidden, 96)):
                tensors[f"{moe}experts.{expert}.{name}.weight"] = matrix(*shape)
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


@contextlib.contextmanager
def serving(service, **options):
    """A server of this service on a free port of localhost; yields the port."""
    from tiered.serve.app import make_app
    from tiered.serve.server import Server

    server = Server(make_app(service, **options), "127.0.0.1", 0, service=service)
    thread = threading.Thread(target=server.run, name="test-server")
    thread.start()
    try:
        assert server.ready.wait(30)
        yield server.port
    finally:
        server.stop()
        thread.join()


def call(port, method, path, body=None, headers=None):
    """One request; (status, parsed JSON or text)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection.request(
            method, path, body, {"Content-Type": "application/json", **(headers or {})}
        )
        response = connection.getresponse()
        text = response.read().decode()
        kind = response.getheader("content-type", "")
        return response.status, json.loads(text) if kind.startswith("application/json") else text
    finally:
        connection.close()


def events(port, path, body):
    """The data of a stream's events, parsed; [DONE] as text."""
    status, text = call(port, "POST", path, {**body, "stream": True})
    assert status == 200, text
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]

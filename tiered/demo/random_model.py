"""A tiny mixtral model with random weights, for a demo without network. Its text is nonsense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tiered.demo.checkpoint_writer import SafetensorsWriter, mixtral_config, mixtral_shapes
from tiered.text.pieces import BYTE_LETTERS

WORDS = "the of and to in is that it was for on are as with his they at be this have from or one"


def random_tiny_model(folder: Path, *, num_layers: int = 4) -> Path:
    """Write a model of a few hundred thousand weights to `folder`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    config = mixtral_config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        eos_token_id=end,
    )
    random = np.random.default_rng(0)
    shapes = mixtral_shapes(config)
    with SafetensorsWriter(folder / "model.safetensors", shapes) as out:
        for name, shape in shapes.items():
            # scaled by 1/sqrt(fan_in), but routers more, so that their choices are clear
            scale = (4 if ".gate." in name else 1) / np.sqrt(shape[-1])
            values = random.standard_normal(shape, np.float32) * np.float32(scale)
            out.write(name, np.ones(shape, np.float32) if "norm" in name else values)
    text = {"eos_token": "<|end|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(text), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE of 256 bytes and a few common words, so that nonsense reads like text."""
    vocab = {letter: i for i, letter in enumerate(BYTE_LETTERS)}
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        left = "\u0120"  # a space
        for letter in word:
            if left + letter not in vocab:
                vocab[left + letter] = len(vocab)
                merges.append((left, letter))
            left += letter
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer

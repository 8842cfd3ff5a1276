"""Tiny random checkpoints: Hugging Face folders and GGUF files of every architecture."""

from tiny_gguf import gguf_checkpoint
from tiny_hf import hf_checkpoint, hf_config, vocabulary, write_safetensors, write_tokenizer
from tiny_weights import (
    ADJACENT,
    ARCHITECTURES,
    DENSE,
    DRAFTING,
    KINDS,
    SIZES,
    after_attention,
    weights,
)

__all__ = [
    "ADJACENT",
    "ARCHITECTURES",
    "DENSE",
    "DRAFTING",
    "KINDS",
    "SIZES",
    "after_attention",
    "gguf_checkpoint",
    "hf_checkpoint",
    "hf_config",
    "vocabulary",
    "weights",
    "write_safetensors",
    "write_tokenizer",
]

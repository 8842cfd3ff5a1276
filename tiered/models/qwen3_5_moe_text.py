"""What transformers calls the text part of Qwen3.5 when it stands alone."""

from tiered.models.qwen3_5_moe import GGUF_NAMES, HF_NAMES, from_gguf, from_hf

GGUF_ARCHITECTURE = ""  # qwen3_5_moe's
HAS_EXPERTS = True

__all__ = ["GGUF_ARCHITECTURE", "GGUF_NAMES", "HAS_EXPERTS", "HF_NAMES", "from_gguf", "from_hf"]

"""What transformers calls Llama 4's text part when it stands alone."""

from tiered.models.llama4 import GGUF_NAMES, HF_NAMES, from_gguf, from_hf

GGUF_ARCHITECTURE = ""  # llama4's
HAS_EXPERTS = True

__all__ = ["GGUF_ARCHITECTURE", "GGUF_NAMES", "HAS_EXPERTS", "HF_NAMES", "from_gguf", "from_hf"]

"""What transformers calls Gemma 4's text part when it stands alone."""

from tiered.models.gemma4 import GGUF_NAMES, HF_NAMES, from_gguf, from_hf

GGUF_ARCHITECTURE = ""  # gemma4's
HAS_EXPERTS = True

__all__ = ["GGUF_ARCHITECTURE", "GGUF_NAMES", "HAS_EXPERTS", "HF_NAMES", "from_gguf", "from_hf"]

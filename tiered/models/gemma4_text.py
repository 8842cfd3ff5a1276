"""Gemma 4's language model alone."""

from tiered.models.gemma4 import (
    GGUF_NAMES,
    HAS_EXPERTS,
    TEXT_NAMES,
    from_gguf,
)
from tiered.models.gemma4 import text_from_hf as from_hf

GGUF_ARCHITECTURE = ""  # gemma4's
HF_NAMES = TEXT_NAMES

__all__ = ["GGUF_ARCHITECTURE", "GGUF_NAMES", "HAS_EXPERTS", "HF_NAMES", "from_gguf", "from_hf"]

"""Granite with experts and one that every token uses."""

from tiered.models.granitemoe import GGUF_NAMES, HF_NAMES, from_gguf, from_hf

GGUF_ARCHITECTURE = ""  # granitemoe's
HAS_EXPERTS = True

__all__ = ["GGUF_ARCHITECTURE", "GGUF_NAMES", "HAS_EXPERTS", "HF_NAMES", "from_gguf", "from_hf"]

"""A Hugging Face folder's vocabulary as the keys of a GGUF file (`tokenizer.ggml.*`).

GGUF says how text is cut into words by a name, and SentencePiece's merges by scores. Both are
found by trying: what is written must give the folder's own tokens on a text made to tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiered.checkpoints.checkpoint import CheckpointError
from tiered.text import tokenizer_folder, tokenizer_gguf
from tiered.text.pieces import byte_level_bytes
from tiered.text.tokenizer import Vocabulary

# As pre-tokenizers differ: digits, contractions, letter case, runs of spaces, scripts, signs.
SAMPLE = """Don't we'LL I've 3.14159 and 1234567 in 2026?  Two  spaces,   three
\tdef f(x): return x**2 // 10_000  # CamelCaseWords HTTPServer iPhone\r\n\r\n
naïve Ünïcödé — “quotes” … 100% $5,000.00 a/b\\c; e-mail@example.org {"k": [1, 2]}
Привет, мир! Ελληνικά 你好，世界。こんにちは 안녕하세요 नमस्ते العربية 🙂👩‍💻 x²≤y
 trailing   \n\n\n   end'S  ''quoted'' I'M you're"""
# Of the names in split_patterns, one for each way to cut; the commonest first.
PRE_TOKENIZERS = (
    "gpt-2", "qwen2", "llama-bpe", "smollm", "tekken", "gpt-4o", "deepseek-v3", "dbrx", "qwen35",
    "seed-coder", "bailingmoe", "deepseek-llm", "deepseek-coder", "falcon", "bloom", "viking",
    "exaone-moe", "tiny_aya", "default",
)  # fmt: skip
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def gguf_vocabulary(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Keys and values for `vocab_size` tokens. CheckpointError if GGUF has no words for it."""
    vocabulary = tokenizer_folder.read_vocabulary(folder)
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    values = {
        "tokens": _tokens(vocabulary, vocab_size),
        "token_type": _types(vocabulary, description, vocab_size),
        "add_bos_token": vocabulary.add_bos,
    }
    if vocabulary.bos_id is not None:
        values["bos_token_id"] = vocabulary.bos_id
    if vocabulary.eos_ids:
        values["eos_token_id"] = vocabulary.eos_ids[0]
    if len(vocabulary.eos_ids) > 1:
        values["eot_token_id"] = vocabulary.eos_ids[1]
    expected = vocabulary.backend.encode(SAMPLE, add_special_tokens=False).ids
    for kind in _kinds(vocabulary, description, values):
        keys = {f"tokenizer.ggml.{name}": value for name, value in (values | kind).items()}
        found = tokenizer_gguf.read_vocabulary(keys).backend
        if found.encode(SAMPLE, add_special_tokens=False).ids == expected:
            if vocabulary.chat_template:
                keys["tokenizer.chat_template"] = vocabulary.chat_template
            return keys
    raise CheckpointError(
        f"{folder / 'tokenizer.json'} cuts text in a way that GGUF has no name for; write a store "
        "instead (a destination without .gguf)"
    )


def _tokens(vocabulary: Vocabulary, vocab_size: int) -> list[str]:
    """Models have room for more tokens than their vocabulary names."""
    names = {i: token for token, i in vocabulary.backend.get_vocab(True).items()}
    return [names.get(i, f"[PAD{i}]") for i in range(vocab_size)]


def _types(vocabulary: Vocabulary, description: dict[str, Any], vocab_size: int) -> list[int]:
    types = [_UNUSED] * vocab_size
    for token, i in vocabulary.backend.get_vocab(True).items():
        if i < vocab_size:
            types[i] = _BYTE if _BYTE_TOKEN.fullmatch(token) else _NORMAL
    for i, added in vocabulary.backend.get_added_tokens_decoder().items():
        if i < vocab_size:
            types[i] = _CONTROL if added.special else _USER_DEFINED
    unknown = vocabulary.backend.token_to_id(description["model"].get("unk_token") or "")
    if unknown is not None and unknown < vocab_size:
        types[unknown] = _UNKNOWN
    return types


def _kinds(
    vocabulary: Vocabulary, description: dict[str, Any], values: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the vocabulary may be, in GGUF's words."""
    if vocabulary.piece_bytes is byte_level_bytes:
        merges = [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in description["model"].get("merges", [])
        ]
        for pre in PRE_TOKENIZERS:
            yield {"model": "gpt2", "pre": pre, "merges": merges}
        return
    # Ids follow the order of merges, and so do scores, in all vocabularies that SentencePiece made.
    first = sum(type != _NORMAL for type in values["token_type"])
    yield {
        "model": "llama",
        "scores": [float(min(first - i, 0)) for i in range(len(values["tokens"]))],
        "add_space_prefix": vocabulary.space_prefix,
    }

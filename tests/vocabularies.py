"""Small vocabularies of both kinds as GGUF metadata, trained on this text or made by hand."""

from __future__ import annotations

import itertools
import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 1234 o'clock, they've said; we'll see!\n"
    "def main(argument: int) -> None:\n    return argument + 1\n\n"
    "Żółć gęślą jaźń, éèê äöü ß. 日本語の文章 🙂🙃 👩‍🚀 \u00a0 end  \t of   it.\n"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"


def train_byte_level(size: int = 400) -> Tokenizer:
    """GPT-2's kind of tokenizer, as the tokenizers library makes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, pre: str = "gpt-2") -> dict[str, Any]:
    """The same vocabulary as a GGUF file has it, with three special tokens at its end."""
    description = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(description["vocab"], key=description["vocab"].get)
    added = ["<|start|>", "<|im_end|>", "<extra>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + added,
        "tokenizer.ggml.token_type": [NORMAL] * len(tokens) + [CONTROL, CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in description["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def sentencepiece_metadata() -> dict[str, Any]:
    """A SentencePiece vocabulary by hand: `<unk> <s> </s>`, 256 bytes, letters and words."""
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyzTé."]
    words = ["th", "the", SPACE + "t", SPACE + "the", "er", "in", "ing", SPACE + "th", "aa", "aaa",
             "ere", SPACE + "there", SPACE * 2, SPACE * 4]  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    num_bytes, num_normal = 256, len(words) + len(letters)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * (3 + num_bytes) + [-float(i) for i in range(num_normal)],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL]
        + [BYTE] * num_bytes
        + [NORMAL] * num_normal,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def naive_sentencepiece(metadata: dict[str, Any], text: str) -> list[int]:
    """Merge the neighbours whose union scores best, the leftmost first, until none is a token."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    types, scores = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.scores"]
    parts = list((SPACE + text).replace(" ", SPACE)) if text else []
    while True:
        unions = ["".join(pair) for pair in itertools.pairwise(parts)]
        found = [
            (-scores[ids[union]], i)
            for i, union in enumerate(unions)
            if union in ids and types[ids[union]] == NORMAL
        ]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [unions[i]]
    out: list[int] = []
    for part in parts:
        spelled = [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        out += [ids[part]] if part in ids else spelled
    return out

"""The vocabulary in a GGUF file's metadata (`tokenizer.ggml.*`, see the GGUF specification)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tiered.checkpoints.checkpoint import CheckpointError
from tiered.text.pieces import SPACE_MARK, byte_level_bytes, sentencepiece_bytes
from tiered.text.split_patterns import GPT2, SPLITS
from tiered.text.tokenizer import Vocabulary

logger = logging.getLogger("tiered")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type
_SPECIAL = ("bos", "eos", "eot", "eom")
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "tekken")  # files may leave add_bos_token out


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a GGUF file, from its key-value pairs."""
    model = _required(metadata, "model")
    if not isinstance(model, str) or model not in _READERS:
        raise CheckpointError(
            f"GGUF vocabulary of kind {model!r}: only {' and '.join(map(repr, _READERS))} "
            "are supported"
        )
    tokens = _list(metadata, "tokens", str, required=True)
    types = _list(metadata, "token_type", int) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(
            f"damaged GGUF vocabulary: {len(tokens)} tokens, but {len(types)} token types"
        )
    bos, *ends = (_token(metadata, f"{name}_token_id", len(tokens)) for name in _SPECIAL)
    vocabulary = _READERS[model](metadata, tokens, types)
    added = [
        AddedToken(token, special=type != _USER_DEFINED, normalized=False)
        for token, type in zip(tokens, types, strict=True)
        if type in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]
    vocabulary.backend.add_special_tokens([token for token in added if token.special])
    vocabulary.backend.add_tokens([token for token in added if not token.special])
    return vocabulary._replace(
        bos_id=bos,
        eos_ids=tuple(token for token in ends if token is not None),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    """Byte-level BPE: `tokens` in GPT-2's letters, and merges "left right" in order of rank."""
    name = _get(metadata, "pre", "")
    split = SPLITS.get(name)
    if split is None:
        logger.warning("unknown pre-tokenizer %r: words are cut as GPT-2 does", name)
        split = GPT2
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [_pair(merge) for merge in _list(metadata, "merges", str, required=True)]
    backend = Tokenizer(_bpe(vocab, merges, ignore_merges=split.whole_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    add_bos = bool(_get(metadata, "add_bos_token", name in _BOS_BY_DEFAULT))
    return Vocabulary(backend, byte_level_bytes, add_bos=add_bos)


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    """SentencePiece BPE: no merges in the file, the pair that makes the best scored token goes
    first; characters that are no token are spelled in bytes."""
    scores = _list(metadata, "scores", float, required=True)
    if len(scores) != len(tokens):
        raise CheckpointError(
            f"damaged GGUF vocabulary: {len(tokens)} tokens, {len(scores)} scores"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {t: scores[i] for i, t in enumerate(tokens) if types[i] == _NORMAL}
    unknown = next((t for i, t in enumerate(tokens) if types[i] == _UNKNOWN), None)
    backend = Tokenizer(
        _bpe(vocab, _merges_of(normal), unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )
    space_prefix = bool(_get(metadata, "add_space_prefix", True))
    prefix = [normalizers.Prepend(SPACE_MARK)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE_MARK)])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    add_bos = bool(_get(metadata, "add_bos_token", True))
    return Vocabulary(backend, sentencepiece_bytes, add_bos=add_bos, space_prefix=space_prefix)


_READERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score first; of one token, the pair with the
    longest left part first, as merging goes from left to right."""
    merges = []
    for token, score in scores.items():
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in scores and right in scores:
                merges.append((-score, left, right))
    merges.sort(key=lambda merge: merge[0])  # stable: keeps the order of one token's pairs
    return [(left, right) for _, left, right in merges]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab, merges, **options)
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"damaged GGUF vocabulary: {error}") from error


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        raise CheckpointError(f"damaged GGUF vocabulary: {merge!r} is no merge of two tokens")
    return left, right


def _get(metadata: Mapping[str, Any], name: str, default: Any = None) -> Any:
    return metadata.get(f"tokenizer.ggml.{name}", default)


def _required(metadata: Mapping[str, Any], name: str) -> Any:
    value = _get(metadata, name)
    if value is None:
        raise CheckpointError(
            f"the GGUF file has no tokenizer.ggml.{name}: it carries no vocabulary"
        )
    return value


def _list(metadata: Mapping[str, Any], name: str, kind: type, required: bool = False) -> list[Any]:
    """An array of the metadata; empty if it may be missing and is."""
    values = _required(metadata, name) if required else _get(metadata, name, [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise CheckpointError(
            f"damaged GGUF vocabulary: tokenizer.ggml.{name} must be a list of {kind.__name__}"
        )
    return values


def _token(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    token = _get(metadata, name)
    if token is None:
        return None
    if not isinstance(token, int) or not 0 <= token < num_tokens:
        raise CheckpointError(
            f"damaged GGUF vocabulary: {name} is {token!r}, but there are {num_tokens} tokens"
        )
    return token

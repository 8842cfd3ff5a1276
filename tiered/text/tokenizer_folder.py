"""The vocabulary of a Hugging Face folder: tokenizer.json and the small files beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tiered.checkpoints.checkpoint import CheckpointError
from tiered.text.pieces import byte_level_bytes, sentencepiece_bytes
from tiered.text.tokenizer import Vocabulary


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in `folder/tokenizer.json`; special tokens and chat template as
    tokenizer_config.json, generation_config.json, config.json and chat_template.* say."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: copy it from the model's original folder"
        )
    try:
        text = path.read_text(encoding="utf-8")
        description = json.loads(text)
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"{path} is damaged: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    prefix = backend.encode("").ids  # what the post-processor puts around every text
    bos_id = _token_id(backend, config.get("bos_token"))
    if bos_id is None and prefix:
        bos_id = prefix[0]
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bool(prefix) and prefix[0] == bos_id
    kinds = _decoder_kinds(description)
    is_byte_level = "ByteLevel" in kinds
    if not is_byte_level and not kinds & {"ByteFallback", "Metaspace"}:
        raise CheckpointError(
            f"{path} decodes with {sorted(kinds) or 'nothing'}: only byte-level BPE and "
            "SentencePiece vocabularies are supported"
        )
    return Vocabulary(
        backend=backend,
        piece_bytes=byte_level_bytes if is_byte_level else sentencepiece_bytes,
        bos_id=bos_id,
        eos_ids=_eos_ids(folder, backend, config),
        add_bos=bool(add_bos) and bos_id is not None,
        space_prefix=not is_byte_level and _adds_space(description),
        chat_template=_chat_template(folder, config),
    )


def _eos_ids(folder: Path, backend: Tokenizer, config: dict[str, Any]) -> tuple[int, ...]:
    found = [_token_id(backend, config.get("eos_token"))]
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(i for i in found if isinstance(i, int)))


def _token_id(backend: Tokenizer, token: Any) -> int | None:
    """The id of a token that a config names, either plainly or as {"content": name, ...}."""
    name = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(name) if isinstance(name, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own wins over tokenizer_config.json; of several, the one named "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template")
    template = template or config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, which may be a sequence of some."""
    if not isinstance(part, dict):
        return []
    return [step for inner in part[key] for step in _steps(inner, key)] if key in part else [part]


def _decoder_kinds(description: dict[str, Any]) -> set[str]:
    return {step["type"] for step in _steps(description.get("decoder"), "decoders")}


def _adds_space(description: dict[str, Any]) -> bool:
    steps = _steps(description.get("normalizer"), "normalizers")
    if any(step["type"] == "Prepend" for step in steps):
        return True
    steps = _steps(description.get("pre_tokenizer"), "pretokenizers")
    return any(
        step["type"] == "Metaspace"
        and step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "never")
        != "never"
        for step in steps
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a missing file is an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return value if isinstance(value, dict) else {}

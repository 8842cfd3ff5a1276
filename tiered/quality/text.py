"""The text that quality is measured on."""

from __future__ import annotations

from pathlib import Path

from tiered.text.tokenizer import Tokenizer


def read_text(file: Path) -> str:
    """A file's UTF-8 text. ValueError names the file if it is something else, or empty."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no UTF-8 text (byte {error.start}); convert it, as with iconv -t utf-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{file} is empty: there is nothing to measure on")
    return text


def text_tokens(tokenizer: Tokenizer, file: Path, max_tokens: int | None = None) -> list[int]:
    """The tokens of a file, at most the first `max_tokens`; names of control tokens in it are
    plain text."""
    ids = tokenizer.encode(read_text(file), parse_special=False)[:max_tokens]
    if len(ids) < 2:
        raise ValueError(f"{file} has {len(ids)} token: at least 2 are needed to predict one")
    return ids

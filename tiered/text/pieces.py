"""How a vocabulary spells the bytes of a token: as byte-level BPE or as SentencePiece does."""

from __future__ import annotations

import re

SPACE_MARK = "\u2581"  # how SentencePiece writes a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """GPT-2's letter for each of the 256 bytes: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


BYTE_LETTERS = _byte_letters()


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a byte-level BPE token. Letters outside the alphabet stand for themselves."""
    try:
        return bytes([BYTE_LETTERS[letter] for letter in piece])
    except KeyError:
        return piece.encode()


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece token; `<0x0A>` is a single byte."""
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_MARK, " ").encode()

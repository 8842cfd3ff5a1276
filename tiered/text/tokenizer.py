"""Text to token ids and back: one class, whatever kind of file the vocabulary came from."""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

# Control tokens that end a turn or a text in the models we know; files often name only one of
# them as their end of text, and a chat that does not stop at the others runs on.
END_TOKENS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<eos>", "<turn|>", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)  # fmt: skip


class Vocabulary(NamedTuple):
    """What a tokenizer file says; the readers of each kind of file make one."""

    backend: tokenizers.Tokenizer
    piece_bytes: Callable[[str], bytes]  # the text of a token that is not a special one
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False  # texts start with bos_id unless the caller says otherwise
    space_prefix: bool = False  # the vocabulary puts a space before the first word
    chat_template: str | None = None


class Tokenizer:
    """Encodes and decodes; safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._backend = vocabulary.backend
        self._piece_bytes = vocabulary.piece_bytes
        self._add_bos = vocabulary.add_bos and vocabulary.bos_id is not None
        self._space_prefix = vocabulary.space_prefix
        self._added = self._backend.get_added_tokens_decoder()
        self._lock = threading.Lock()  # guards the backend's encode_special_tokens
        self._bytes: dict[int, bytes] = {}  # of tokens that were asked for
        self.bos_id = vocabulary.bos_id
        self.eos_ids = tuple(dict.fromkeys([*vocabulary.eos_ids, *self._end_tokens()]))
        self.chat_template = vocabulary.chat_template

    def _end_tokens(self) -> list[int]:
        return [i for i, token in self._added.items() if token.special and str(token) in END_TOKENS]

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens: they steer the model and are not part of a text."""
        return frozenset(i for i, token in self._added.items() if token.special)

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its name in the vocabulary, as `<|im_end|>`."""
        return self._backend.token_to_id(token)

    def token_name(self, token: int | None) -> str:
        """The name of a token in the vocabulary; empty if there is none."""
        return "" if token is None else self._backend.id_to_token(token) or ""

    def encode(
        self, text: str, add_bos: bool | None = None, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        `add_bos`: start with the beginning-of-sequence token; None: as the model wants it, unless
        the text starts with one already. With `parse_special` false, names of control tokens in
        the text are plain text: for input that must not steer the model.
        """
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            ids = self._backend.encode(text, add_special_tokens=False).ids
        if add_bos is None:
            add_bos = self._add_bos and ids[:1] != [self.bos_id]
        if not add_bos:
            return ids
        if self.bos_id is None:
            raise ValueError("this model has no beginning-of-sequence token: pass add_bos=False")
        return [self.bos_id, *ids]

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 of one token, often only a part of a character. Unknown ids are empty: models pad
        their output beyond the vocabulary."""
        data = self._bytes.get(token)
        if data is None:
            data = self._look_up(token)
            if data:  # as many as the vocabulary has, then
                self._bytes[token] = data
        return data

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._backend.id_to_token(token) if token >= 0 else None
        return b"" if piece is None else self._piece_bytes(piece)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`, a whole one: what `encode` put in front of it is taken off again."""
        ids = list(ids)
        if self._add_bos and ids[:1] == [self.bos_id]:
            ids = ids[1:]
        text = self.stream(skip_special).push_all(ids)
        starts_with_word = bool(ids) and ids[0] not in self._added
        return text.removeprefix(" ") if self._space_prefix and starts_with_word else text

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for tokens as they come. Their text continues another: no space is removed."""
        return TextStream(self.token_bytes, self.special_ids if skip_special else frozenset())

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `load_tokenizer` reads."""
        self._backend.save(str(folder / "tokenizer.json"))
        config = {
            "bos_token": self.token_name(self.bos_id),
            "eos_token": self.token_name(self.eos_ids[0] if self.eos_ids else None),
            "add_bos_token": self._add_bos,
            "chat_template": self.chat_template,
        }
        text = json.dumps({k: v for k, v in config.items() if v not in ("", None)}, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


class TextStream:
    """Turns tokens into text and holds back the bytes of a character that is not complete yet.

    All that was pushed, joined, is the text that the tokens decode to in one piece.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skip: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skip = skip
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty."""
        return "" if token in self._skip else self._decoder.decode(self._token_bytes(token))

    def push_all(self, tokens: Iterable[int]) -> str:
        """The whole text of `tokens`, after which the stream is at its end."""
        return "".join([self.push(token) for token in tokens]) + self.finish()

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character was never completed."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(source: Path | str | Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a checkpoint: of a folder with tokenizer.json, or of GGUF metadata.

    Raises ValueError if the vocabulary is damaged or of a kind that is not supported.
    """
    from tiered.text import tokenizer_folder, tokenizer_gguf

    if isinstance(source, Mapping):
        return Tokenizer(tokenizer_gguf.read_vocabulary(source))
    return Tokenizer(tokenizer_folder.read_vocabulary(Path(source)))

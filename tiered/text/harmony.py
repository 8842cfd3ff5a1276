"""gpt-oss's answers, told in the words of other models: reasoning, text and tool calls.

The model writes messages, each with a channel: analysis is reasoning, final is the answer, and
commentary to a function is a call.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...

becomes `<think>...</think>...`, and a call becomes

    <tool_call>{"name": ..., "arguments": ...}</tool_call>

https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
MARKS = START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN

_HEADERS = START, CHANNEL, MESSAGE, "assistant", "to=", " to="  # how they begin
_ENDS = re.compile("|".join(map(re.escape, (END, CALL, RETURN, START))))
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


def is_harmony(template: str | None) -> bool:
    """Whether a chat template asks for such answers."""
    return template is not None and CHANNEL in template and MESSAGE in template


def rewritten(pieces: Iterable[str]) -> Iterator[str]:
    """A whole answer, piece by piece."""
    harmony = Harmony()
    for piece in pieces:
        if text := harmony.push(piece):
            yield text
    if text := harmony.finish():
        yield text


class Harmony:
    """Rewrites an answer as it comes; control tokens must be in the text that it is given."""

    def __init__(self) -> None:
        self._waiting = ""
        self._in_header = True
        self._thinking = False
        self._closing = ""  # what ends the message at hand

    def push(self, text: str) -> str:
        """What `text` completes of the rewritten answer."""
        self._waiting += text
        pieces: list[str] = []
        while self._step(pieces):
            pass
        return "".join(pieces)

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        rest = "" if self._in_header and CHANNEL in self._waiting else self._waiting
        self._waiting = ""
        return rest + self._closing + ("</think>" if self._thinking else "")

    def _step(self, pieces: list[str]) -> bool:
        """Go on by a header or a message; False when the rest has to wait."""
        return self._header(pieces) if self._in_header else self._body(pieces)

    def _header(self, pieces: list[str]) -> bool:
        text = self._waiting
        if not any(text.startswith(begin) or begin.startswith(text) for begin in _HEADERS):
            self._in_header = False  # the prompt has begun the message already
            return True
        header, mark, rest = text.partition(MESSAGE)
        if not mark:
            return False
        self._waiting, self._in_header = rest, False
        self._open(header, pieces)
        return True

    def _open(self, header: str, pieces: list[str]) -> None:
        """A message begins. Reasoning that goes on stays one."""
        is_reasoning = header.partition(CHANNEL)[2].lstrip().startswith("analysis")
        recipient = _RECIPIENT.search(header)
        is_reasoning = is_reasoning and recipient is None
        if self._thinking != is_reasoning:
            pieces.append("<think>" if is_reasoning else "</think>\n")
            self._thinking = is_reasoning
        if recipient is not None:
            name = json.dumps(recipient[1], ensure_ascii=False)
            pieces.append(f'<tool_call>{{"name": {name}, "arguments": ')
            self._closing = "}</tool_call>"

    def _body(self, pieces: list[str]) -> bool:
        found = _ENDS.search(self._waiting)
        if found is None:
            end = len(self._waiting) - _overlap(self._waiting)
            pieces.append(self._waiting[:end])
            self._waiting = self._waiting[end:]
            return False
        pieces += [self._waiting[: found.start()], self._closing]
        self._closing, self._in_header = "", True
        self._waiting = self._waiting[found.end() :]
        return bool(self._waiting)


def _overlap(text: str) -> int:
    """How many characters at the end may begin a mark."""
    start = text.rfind("<")
    tail = text[start:] if start >= 0 else ""
    return len(tail) if tail and any(mark.startswith(tail) for mark in MARKS) else 0

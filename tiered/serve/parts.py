"""The parts of an answer, told apart as they come: reasoning, text, tool calls."""

from __future__ import annotations

from typing import NamedTuple

from tiered.serve.tool_formats import ToolCall, ToolFormat
from tiered.text.harmony import Harmony

THINK, END_THINK = "<think>", "</think>"


class Part(NamedTuple):
    """A piece of one kind: reasoning or text with `text`, or a whole `call`."""

    kind: str
    text: str = ""
    call: ToolCall | None = None


class Splitter:
    """Tells the parts of a text apart; what might be the beginning of a mark is held back.

    `thinking`: None for a model that does not reason aloud, True if the prompt has begun its
    reasoning. `tools`: how it writes calls, if it was offered tools. What looks like a call and is
    none is text. `rewriter`: for a model whose parts are marked in another way.
    """

    def __init__(
        self,
        thinking: bool | None = None,
        tools: ToolFormat | None = None,
        rewriter: Harmony | None = None,
    ) -> None:
        self.tools = tools
        self.rewriter = rewriter
        self.num_calls = 0
        self._waiting = ""
        self._state = "start"
        self._may_think = thinking is not None
        if thinking:
            self._state = "reasoning"

    def push(self, text: str) -> list[Part]:
        self._waiting += self.rewriter.push(text) if self.rewriter else text
        parts: list[Part] = []
        while self._step(parts, last=False):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The rest, at the end of the answer."""
        self._waiting += self.rewriter.finish() if self.rewriter else ""
        parts: list[Part] = []
        while self._step(parts, last=True):
            pass
        return parts

    def _step(self, parts: list[Part], last: bool) -> bool:
        """Consume some of what is waiting; False when the rest has to wait."""
        return getattr(self, f"_{self._state}")(parts, last)  # type: ignore[no-any-return]

    def _start(self, parts: list[Part], last: bool) -> bool:
        text = self._waiting.lstrip()
        if self._may_think:
            if text.startswith(THINK):
                self._waiting = text.removeprefix(THINK)
                self._state = "reasoning"
                return True
            if THINK.startswith(text) and not last:
                return False
        if self.tools and self.tools.bare and text.startswith("{"):
            self._state = "call"
            return True
        if not text and not last:
            return False
        self._state = "text"
        return True

    def _reasoning(self, parts: list[Part], last: bool) -> bool:
        before, mark, after = self._waiting.partition(END_THINK)
        if mark:
            self._emit(parts, "reasoning", before)
            self._waiting = after.lstrip()
            self._state = "after_reasoning"
            return True
        self._emit_safe(parts, "reasoning", [END_THINK], last)
        return False

    def _after_reasoning(self, parts: list[Part], last: bool) -> bool:
        self._waiting = self._waiting.lstrip()  # the blank lines between reasoning and answer
        if not self._waiting:
            return False
        self._may_think = False
        self._state = "start"
        return True

    def _text(self, parts: list[Part], last: bool) -> bool:
        if self.tools is None:
            self._emit(parts, "text", self._waiting)
            self._waiting = ""
            return False
        before, mark, after = self._waiting.partition(self.tools.opening)
        if mark:
            self._emit(parts, "text", before.rstrip())
            self._waiting = after
            self._state = "call"
            return True
        self._emit_safe(parts, "text", [self.tools.opening], last, blanks=True)
        return False

    def _call(self, parts: list[Part], last: bool) -> bool:
        assert self.tools is not None
        body, mark, after = self._waiting, "", ""
        if self.tools.closing:
            body, mark, after = self._waiting.partition(self.tools.closing)
        if not mark and not last:
            return False
        try:
            calls = self.tools.parse(body)
        except (ValueError, RecursionError):
            bare = self.tools.bare and body.lstrip().startswith("{")
            self._emit(parts, "text", ("" if bare else self.tools.opening) + body + mark)
        else:
            parts += [Part("call", call=call) for call in calls]
            self.num_calls += len(calls)
            after = after.lstrip()
        self._waiting = after
        self._state = "text"
        return bool(after)

    def _emit(self, parts: list[Part], kind: str, text: str) -> None:
        if text:
            parts.append(Part(kind, text))

    def _emit_safe(
        self, parts: list[Part], kind: str, marks: list[str], last: bool, blanks: bool = False
    ) -> None:
        """All but what may be the beginning of a mark, or blanks before one."""
        text = self._waiting
        keep = 0 if last else max(_overlap(text, mark) for mark in marks)
        end = len(text) - keep
        if blanks and not last:
            end = len(text[:end].rstrip())
        self._emit(parts, kind, text[:end])
        self._waiting = text[end:]


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` begin `mark`."""
    for count in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-count:]):
            return count
    return 0

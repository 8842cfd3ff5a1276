"""The items of a response (/v1/responses): a text, reasoning or a function call, and its events."""

from __future__ import annotations

from typing import Any, ClassVar

from tiered.serve.parts import Part
from tiered.serve.service import new_id

Change = tuple[str, dict[str, Any]]  # an event's name and data


class Item:
    """Opened, added to, closed; each gives the events that tell so."""

    kind: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, index: int, part: Part) -> None:
        self.id = new_id(self.prefix)
        self.text = ""
        self.place = {"item_id": self.id, "output_index": index}
        self.index = index

    def body(self, status: str) -> dict[str, Any]:
        raise NotImplementedError

    def open(self) -> list[Change]:
        item = self.body("in_progress")
        return [("response.output_item.added", {"output_index": self.index, "item": item})]

    def add(self, part: Part) -> list[Change]:
        raise NotImplementedError

    def close(self) -> list[Change]:
        item = self.body("completed")
        return [("response.output_item.done", {"output_index": self.index, "item": item})]


class TextItem(Item):
    kind, prefix = "text", "msg_"

    def content(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def body(self, status: str) -> dict[str, Any]:
        content = [self.content()] if status == "completed" else []
        head = {"id": self.id, "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": content}

    def open(self) -> list[Change]:
        part = {**self.place, "content_index": 0, "part": self.content()}
        return [*super().open(), ("response.content_part.added", part)]

    def add(self, part: Part) -> list[Change]:
        self.text += part.text
        data = {**self.place, "content_index": 0, "delta": part.text, "logprobs": []}
        return [("response.output_text.delta", data)]

    def close(self) -> list[Change]:
        place = {**self.place, "content_index": 0}
        return [
            ("response.output_text.done", {**place, "text": self.text, "logprobs": []}),
            ("response.content_part.done", {**place, "part": self.content()}),
            *super().close(),
        ]


class ReasoningItem(Item):
    kind, prefix = "reasoning", "rs_"

    def body(self, status: str) -> dict[str, Any]:
        content = [{"type": "reasoning_text", "text": self.text}] if status == "completed" else []
        head = {"id": self.id, "type": "reasoning", "summary": []}
        return {**head, "content": content, "status": status}

    def add(self, part: Part) -> list[Change]:
        self.text += part.text
        data = {**self.place, "content_index": 0, "delta": part.text}
        return [("response.reasoning_text.delta", data)]

    def close(self) -> list[Change]:
        data = {**self.place, "content_index": 0, "text": self.text}
        return [("response.reasoning_text.done", data), *super().close()]


class CallItem(Item):
    kind, prefix = "call", "fc_"

    def __init__(self, index: int, part: Part) -> None:
        super().__init__(index, part)
        assert part.call is not None
        self.name = part.call.name
        self.call_id = new_id("call_")

    def body(self, status: str) -> dict[str, Any]:
        head = {"id": self.id, "type": "function_call", "call_id": self.call_id}
        return {**head, "name": self.name, "arguments": self.text, "status": status}

    def add(self, part: Part) -> list[Change]:
        assert part.call is not None
        self.text = part.call.arguments
        return [("response.function_call_arguments.delta", {**self.place, "delta": self.text})]

    def close(self) -> list[Change]:
        data = {**self.place, "name": self.name, "arguments": self.text}
        return [("response.function_call_arguments.done", data), *super().close()]

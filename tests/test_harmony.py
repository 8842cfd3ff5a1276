"""gpt-oss's channels become reasoning, text and tool calls, however the answer is cut."""

import random

import pytest

from tiered.serve.parts import Splitter
from tiered.serve.tool_formats import ToolCall, find_format, harmony
from tiered.text.harmony import is_harmony, rewritten

TEMPLATE = "<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|return|>"
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}<|call|>'
ANSWERS = {
    "<|channel|>final<|message|>Hello<|return|>": "Hello",
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>4 < 5":
        "<think>Hm.</think>\n4 < 5",
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b":
        "<think>ab</think>",
    CALL: '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
    "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant" + CALL:
        '<think>Sum.</think>\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
    ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}':
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
    "<|channel|>commentary<|message|>I will look.<|end|>": "I will look.",
    "begun by the prompt<|return|>": "begun by the prompt",
    '{"a": 1}': '{"a": 1}',
    "a <|not a mark|> and <|mess": "a <|not a mark|> and <|mess",
    "<|channel|>analysis": "",
    "": "",
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_rewritten(answer):
    assert "".join(rewritten([answer])) == ANSWERS[answer]
    assert "".join(rewritten(answer)) == ANSWERS[answer]
    source = random.Random(0)
    for _ in range(20):
        cuts = sorted(source.choices(range(len(answer) + 1), k=4))
        pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        assert "".join(rewritten(pieces)) == ANSWERS[answer]


def test_parts_of_an_answer():
    from tiered.text.harmony import Harmony

    splitter = Splitter(False, harmony.FORMAT, Harmony())
    text = "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant" + CALL
    parts = [part for letter in text for part in splitter.push(letter)] + splitter.finish()
    assert "".join(part.text for part in parts if part.kind == "reasoning") == "Sum."
    assert [part.call for part in parts if part.kind == "call"] == [ToolCall("add", '{"a": 1}')]
    assert splitter.num_calls == 1


def test_which_templates():
    assert is_harmony(TEMPLATE) and find_format(TEMPLATE) is harmony.FORMAT
    assert not is_harmony(None) and not is_harmony("<|im_start|>")
    assert "<|channel|>" in harmony.FORMAT.marks

"""The parts of an answer, however its text is cut into pieces; tool calls of every format."""

import contextlib
import importlib
import json
import pkgutil
import random

import pytest

from tiered.serve import tool_formats
from tiered.serve.parts import Splitter
from tiered.serve.tool_formats import find_format

HERMES = find_format("... <tool_call> ...")
LLAMA = find_format("... <|python_tag|> ...")
MISTRAL = find_format("... [TOOL_CALLS] ...")
XML = find_format("<tool_call><function=...")
CALL = '{"name": "add", "arguments": {"a": 1}}'
ADD = ("call", "add", {"a": 1})

CASES = [
    (None, None, "just text", [("text", "just text")]),
    (None, HERMES, "a < b", [("text", "a < b")]),
    (False, None, "<think>\nhm</think>\n\nyes", [("reasoning", "\nhm"), ("text", "yes")]),
    (True, None, "hm</think>yes", [("reasoning", "hm"), ("text", "yes")]),
    (True, None, "hm </thin", [("reasoning", "hm </thin")]),
    (False, None, "no <think> here", [("text", "no <think> here")]),
    (None, HERMES, f"ok\n<tool_call>\n{CALL}\n</tool_call>", [("text", "ok"), ADD]),
    (None, HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", [ADD, ADD]),
    (None, HERMES, f"<tool_call>{CALL}", [ADD]),
    (None, HERMES, "<tool_call>no</tool_call>", [("text", "<tool_call>no</tool_call>")]),
    (True, HERMES, f"hm</think>\n<tool_call>{CALL}</tool_call>", [("reasoning", "hm"), ADD]),
    (None, MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", [ADD, ADD]),
    (None, MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": 1}', [ADD]),
    (None, LLAMA, '{"name": "add", "parameters": {"a": 1}}', [ADD]),
    (None, LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', [ADD]),
    (None, LLAMA, '{"just": "an object"}', [("text", '{"just": "an object"}')]),
    (None, XML, "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n"
     "</tool_call>", [ADD]),
]  # fmt: skip


def told_apart(splitter, pieces):
    """Parts, with neighbours of one kind joined."""
    parts = [part for piece in pieces for part in splitter.push(piece)] + splitter.finish()
    joined = []
    for part in parts:
        if part.call:
            joined.append(("call", part.call.name, json.loads(part.call.arguments)))
        elif joined and joined[-1][0] == part.kind:
            joined[-1] = (part.kind, joined[-1][1] + part.text)
        else:
            joined.append((part.kind, part.text))
    return joined


@pytest.mark.parametrize(("thinking", "format", "text", "wanted"), CASES)
def test_parts_do_not_depend_on_the_cuts(thinking, format, text, wanted):
    assert told_apart(Splitter(thinking, format), [text]) == wanted
    assert told_apart(Splitter(thinking, format), text) == wanted
    source = random.Random(0)
    for _ in range(20):
        cuts = sorted(source.choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert told_apart(Splitter(thinking, format), pieces) == wanted


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(tool_formats.__path__)])
def test_a_format_reads_what_its_envelope_encloses(name):
    format = importlib.import_module(f"tiered.serve.tool_formats.{name}").FORMAT
    try:
        before, after = format.envelope("add")
    except ValueError:
        pytest.skip("its calls cannot be enforced")
    assert told_apart(Splitter(None, format), [before + '{"a": 1}' + after]) == [ADD]


@pytest.mark.parametrize("format", [HERMES, LLAMA, MISTRAL, XML])
@pytest.mark.parametrize("text", ["", "[", "{}", "null", "[1]", '{"name": 3}', "[" * 5000])
def test_damaged_calls_are_value_errors(format, text):
    with contextlib.suppress(ValueError, RecursionError):
        assert isinstance(format.parse(text), list)

import logging

import pytest
from vocabularies import byte_level_metadata, sentencepiece_metadata, train_byte_level

from tiered.text.chat import MAX_TEMPLATE, ChatTemplate
from tiered.text.tokenizer import load_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The way Mixtral's template complains.
STRICT = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate!') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""


def render(template, messages=HELLO, **variables):
    return ChatTemplate(template, "<s>", "</s>").render(messages, **variables)


def test_chatml():
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert render(CHATML, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(CHATML, add_generation_prompt=False).endswith("Hello<|im_end|>\n")


def test_a_template_may_refuse():
    messages = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "?"}]
    assert render(STRICT, messages) == "<s>[INST] Hello [/INST]Hi</s>[INST] ? [/INST]"
    with pytest.raises(ValueError, match="roles must alternate"):
        render(STRICT, [*HELLO, *HELLO])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ {'a': '<é>', 'b': [1]} | tojson }}", '{"a": "<é>", "b": [1]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}", "2"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),  # trim_blocks and lstrip_blocks
        ("{% for m in messages %}{{ loop.length }}{{ loop.last }}{% endfor %}", "1True"),
        ("{{ ['a', 'b'] | join(', ') }}{{ 'c' ~ 1 }}", "a, bc1"),
        ("{{ tools is none }}{{ enable_thinking }}", "TrueFalse"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(messages[0].content) }}", "<Hello>"),
        ("{{ messages[0]['content'].split('l')[0].strip().upper() }}", "HE"),
    ],
)
def test_what_templates_use(template, expected):
    assert render(template, enable_thinking=False) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% set messages[0].role = 'system' %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
        "{{ ('{0.__class__.__base__}'.format(1)).nothing.here }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_leads_out_of_the_sandbox(template):
    before = [dict(message) for message in HELLO]
    with pytest.raises(ValueError, match="chat template"):
        render(template)
    assert before == HELLO


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 999999999 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ ('a' * 1000).replace('a', 'a' * 10000) }}",
        "{{ lipsum(99999) }}",
        "{% set x = range(999) | list %}"
        "{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}"
        "{% endfor %}",
    ],
)
def test_endless_work_ends(template):
    with pytest.raises(ValueError, match="chat template"):
        render(template)


@pytest.mark.parametrize("template", ["{{", "{% for %}", "{% unknown %}", "{{ x | unknown }}"])
def test_damaged_templates(template):
    with pytest.raises(ValueError, match="template is damaged"):
        ChatTemplate(template)


def test_a_template_has_a_longest_length():
    with pytest.raises(ValueError, match="the file is damaged"):
        ChatTemplate("x" * (MAX_TEMPLATE + 1))


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "not empty"),
        ("Hello", "must be a list"),
        ({"role": "user", "content": "x"}, "must be a list"),
        (["Hello"], "message 1 must be an object"),
        ([*HELLO, {"content": "x"}], "message 2 needs a role"),
        ([{"role": 3, "content": "x"}], "needs a role"),
        ([{"role": "user"}], "needs a content"),
        ([{"role": "user", "content": 3}], "needs a content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part that is no text"),
    ],
)
def test_bad_messages(messages, error):
    with pytest.raises(ValueError, match=error):
        render("x", messages)


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "Hello"
    called = [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]
    assert render("{{ messages[0].content }}|{{ messages[0].tool_calls }}", called)[0] == "|"


def test_the_template_of_a_tokenizer():
    tokenizer = load_tokenizer(byte_level_metadata(train_byte_level()))
    assert ChatTemplate.of(tokenizer).render(HELLO) == "Hello"


def test_models_without_a_template(caplog):
    caplog.set_level(logging.WARNING, "tiered")
    plain = ChatTemplate.of(load_tokenizer(sentencepiece_metadata()))
    assert plain.render(HELLO) == "User: Hello\n\nAssistant:"
    assert "no chat template" in caplog.text
    metadata = byte_level_metadata(train_byte_level())
    del metadata["tokenizer.chat_template"]
    metadata["tokenizer.ggml.tokens"][-3] = "<|im_start|>"
    chatml = ChatTemplate.of(load_tokenizer(metadata))
    assert chatml.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"

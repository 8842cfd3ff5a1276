"""Chat templates: a conversation as the text that a model was trained on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from tiered.text.template import MAX_TEXT, Sandbox
from tiered.text.tokenizer import Tokenizer

logger = logging.getLogger("tiered")

MAX_TEMPLATE = 256 * 1024  # characters; the longest we know has 30 thousand

# For models without a template of their own: the two commonest kinds.
CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PLAIN = """\
{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}

{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""

Message = Mapping[str, Any]


class ChatTemplate:
    """A model's chat template. It comes with the model's files, so it is not trusted: it runs in
    a sandbox, with a limit on its steps and on the text it makes."""

    def __init__(self, template: str, bos_token: str = "", eos_token: str = "") -> None:
        if len(template) > MAX_TEMPLATE:
            raise ValueError(
                f"the model's chat template has {len(template)} characters, more than "
                f"{MAX_TEMPLATE}: the file is damaged"
            )
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._sandbox = Sandbox()
        self._lock = threading.Lock()  # guards the sandbox's count of steps
        try:
            self._template = self._sandbox.from_string(template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the model's chat template is damaged: {error}") from error

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The model's template; if it has none, a common one, with a warning."""
        template = tokenizer.chat_template
        if not template:
            is_chatml = tokenizer.token_id("<|im_start|>") is not None
            template = CHATML if is_chatml else PLAIN
            logger.warning(
                "the model has no chat template: a conversation is written as %s, which may not "
                "be what it was trained on",
                "ChatML" if is_chatml else '"User: ..." and "Assistant: ..."',
            )
        return cls(
            template,
            bos_token=tokenizer.token_name(tokenizer.bos_id),
            eos_token=tokenizer.token_name(tokenizer.eos_ids[0] if tokenizer.eos_ids else None),
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text; with `add_generation_prompt`, up to where the answer starts.

        `variables` are for the template, as `enable_thinking`. Raises ValueError for messages
        that are malformed or that the template refuses.
        """
        values = {
            **self._tokens,
            "messages": checked_messages(messages),
            "add_generation_prompt": add_generation_prompt,
            "tools": tools,
            **variables,
        }
        pieces, length = [], 0
        with self._lock:
            self._sandbox.start()
            try:
                for piece in self._template.generate(values):
                    pieces.append(piece)
                    length += len(piece)
                    if length > MAX_TEXT:
                        raise ValueError(f"more than {MAX_TEXT} characters of text")
            except (jinja2.TemplateError, ValueError) as error:
                raise ValueError(f"the model's chat template says: {error}") from error
            except Exception as error:  # a template can fail in any way that Python can
                name = type(error).__name__
                raise ValueError(f"the model's chat template failed: {name}: {error}") from error
        return "".join(pieces)


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies of the messages, the content of each a text."""
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError('messages must be a list of {"role": ..., "content": ...}, not empty')
    return [_checked(message, f"message {i + 1}") for i, message in enumerate(messages)]


def _checked(message: Message, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be an object with role and content, not {message!r:.80}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f'{name} needs a role: "system", "user" or "assistant", not {role!r:.80}')
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join([_text_of(part, name) for part in content])
    if not isinstance(content, str):
        raise ValueError(f"{name} needs a content that is text, not {content!r:.80}")
    return {**message, "content": content}


def _text_of(part: Any, name: str) -> str:
    """The text of a part, {"type": "text", "text": ...}."""
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or part.get("type", "text") != "text":
        raise ValueError(f"{name} has a part that is no text, which is all that is supported")
    return text

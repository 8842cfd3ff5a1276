"""What the endpoints share: the engine, its scheduler, the model's names, and the limits."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tiered.engine import Engine
from tiered.serve.errors import ApiError
from tiered.serve.fields import MISSING, Fields
from tiered.serve.live import Live
from tiered.serve.request import Constraint, Request
from tiered.serve.scheduler import Scheduler
from tiered.serve.structured import Grammars
from tiered.serve.tool_formats import ToolFormat, find_format
from tiered.text.chat import ChatTemplate
from tiered.text.sampling import SamplingParams


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body_bytes: int = 8 << 20
    request_seconds: float = 600.0  # from arrival to the last token
    choices: int = 16  # answers to one request
    logprobs: int = 20
    stop_strings: int = 16


class Service:
    """One model, served. `names` are what clients may call it; the first is the answer's."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        names: Sequence[str],
        limits: Limits | None = None,
    ) -> None:
        self.engine = engine
        self.scheduler = scheduler
        self.names = list(names)
        self.limits = limits or Limits()
        self.created = int(time.time())
        self.tokenizer = engine.tokenizer
        self.template: ChatTemplate | None = None
        self.tools: ToolFormat | None = None
        if self.tokenizer.chat_template:
            self.template = ChatTemplate.of(self.tokenizer)
            self.tools = find_format(self.tokenizer.chat_template)
        self.grammars = Grammars(self.tokenizer, engine.config.vocab_size, engine.eos_ids)
        self.live = Live(engine, scheduler)
        self.draining = False
        # Control tokens are no text, but for those that the parts of an answer are told apart by.
        marks = {self.tokenizer.token_id(mark) for mark in (self.tools.marks if self.tools else ())}
        self.skip_ids = self.tokenizer.special_ids - marks
        names = sorted(map(self.tokenizer.token_name, self.tokenizer.special_ids), reverse=True)
        self.control_names = re.compile("|".join(map(re.escape, filter(None, names))) or r"(?!)")

    @property
    def name(self) -> str:
        return self.names[0]

    def check_model(self, fields: Fields) -> None:
        """A request for another model than ours is refused; one that names none is not."""
        name = fields.text("model", None)
        if name is not None and "*" not in self.names and name not in self.names:
            raise ApiError(
                f"no model {name!r} here: this server has {self.name!r}",
                404,
                code="model_not_found",
                param="model",
            )

    def encode(self, text: str, **options: Any) -> list[int]:
        return self.tokenizer.encode(text, **options)

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **variables: Any
    ) -> str:
        """The conversation as the model's template writes it."""
        if self.template is None:
            raise ApiError("this model has no chat template: use /v1/completions")
        try:
            return self.template.render(messages, tools=tools, **variables)
        except ValueError as error:
            raise ApiError(str(error), param="messages") from None

    def request(
        self,
        fields: Fields,
        ids: Sequence[int],
        client: str,
        *,
        max_new_tokens: int | None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        pooling: str = "",
        constraint: Constraint | None = None,
        choice: int = 0,
    ) -> Request:
        """Continue `ids` as the sampling fields say; an answer ends with the context at the latest.

        `choice` counts the answers to one request: each has a seed of its own.
        """
        if not ids:
            raise ApiError("the prompt is empty")
        room = self.engine.context - len(ids)
        if room < 0 or (room == 0 and max_new_tokens != 0):
            raise ApiError(
                f"the prompt has {len(ids)} tokens and the context holds {self.engine.context}",
                code="context_length_exceeded",
            )
        seed = fields.integer("seed", None, -(2**63), 2**64)
        return Request(
            ids=tuple(ids),
            max_new_tokens=room if max_new_tokens is None else min(room, max_new_tokens),
            sampling=SamplingParams(
                temperature=fields.number("temperature", 1.0, 0.0, 100.0),
                top_p=max(fields.number("top_p", 1.0, 0.0, 1.0), 1e-9),
                top_k=max(0, fields.integer("top_k", 0, -1)),
                min_p=fields.number("min_p", 0.0, 0.0, 1.0),
                repetition_penalty=fields.number("repetition_penalty", 1.0, 1e-3, 1e3),
                seed=None if seed is None else (seed + choice) % 2**63,
            ),
            stop=tuple(stop),
            stop_ids=frozenset() if fields.flag("ignore_eos") else self.engine.eos_ids,
            skip_ids=self.skip_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            pooling=pooling,
            logit_bias=self.logit_bias(fields),
            presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
            constraint=constraint,
            client=client,
            deadline=self.scheduler.clock() + self.limits.request_seconds,
        )

    def logit_bias(self, fields: Fields) -> tuple[tuple[int, float], ...]:
        biases = []
        for key, value in fields.object("logit_bias", {}).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
            if not (number and -100 <= value <= 100 and 0 <= token < self.engine.config.vocab_size):
                raise fields.wrong("logit_bias", "must map token ids to -100 ... 100")
            biases.append((token, -1e9 if value == -100 else float(value)))
        return tuple(biases)

    def stop_strings(self, fields: Fields, name: str = "stop") -> list[str]:
        given = fields.get(name, [])
        stops = [given] if isinstance(given, str) else given
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise fields.wrong(name, "must be a string or an array of strings, none empty")
        if len(stops) > self.limits.stop_strings:
            raise fields.wrong(name, f"must have at most {self.limits.stop_strings} strings")
        return stops

    def num_choices(self, fields: Fields, prompts: int = 1) -> int:
        count: int = fields.integer("n", 1, 1, self.limits.choices)
        if count * prompts > max(self.limits.choices, prompts):
            raise fields.wrong("n", f"times the prompts must be at most {self.limits.choices}")
        return count


def max_tokens(fields: Fields, *names: str, default: Any = None, low: int = 0) -> Any:
    """The first of `names` that is given."""
    for name in names:
        if fields.has(name):
            return fields.integer(name, MISSING, low)
    if default is MISSING:
        raise fields.wrong(names[0], "is missing")
    return default


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex[:24]}"

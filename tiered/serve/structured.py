"""Answers in a given form: JSON schemas, grammars and regular expressions, through llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from tiered.serve.errors import ApiError
from tiered.serve.parts import END_THINK
from tiered.serve.request import Constraint
from tiered.serve.tool_formats import ToolFormat
from tiered.text.tokenizer import Tokenizer

COMPACT = {"whitespace_flexible": False}  # small models lose themselves in blank lines


class Grammars:
    """Compiles grammars for one vocabulary. Thread-safe; llguidance is imported when first used."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self._lock = threading.Lock()
        self._compiled: Any = None

    def json_schema(self, schema: Any) -> Constraint:
        library = _library()
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(json.dumps(schema), COMPACT)
        except ValueError as error:
            raise ApiError(f"the JSON schema cannot be used: {error}") from None
        return self._constraint(grammar)

    def regex(self, pattern: str) -> Constraint:
        return self._constraint(_library().LLMatcher.grammar_from_regex(pattern))

    def lark(self, grammar: str) -> Constraint:
        """A grammar in Lark's notation, or llama.cpp's (GBNF)."""
        library = _library()
        if "::=" in grammar:
            try:
                grammar = library.gbnf_to_lark.gbnf_to_lark(grammar)
            except Exception as error:  # a parser of its own, with errors of its own
                raise ApiError(f"the grammar cannot be used: {error}") from None
        return self._constraint(library.LLMatcher.grammar_from_lark(grammar))

    def choice(self, texts: Sequence[str]) -> Constraint:
        return self.lark("start: " + " | ".join(_literal(text) for text in texts))

    def tool_call(
        self, format: ToolFormat, tools: Sequence[dict[str, Any]], several: bool
    ) -> Constraint:
        """At least one call of one of `tools`, with arguments that its schema allows."""
        rules = ["start: call+" if several and format.closing else "start: call"]
        names = [f"call_{index}" for index in range(len(tools))]
        rules.append("call: " + " | ".join(names))
        for name, tool in zip(names, tools, strict=True):
            try:
                before, after = format.envelope(tool["name"])
            except ValueError as error:
                raise ApiError(str(error), 501, param="tool_choice") from None
            schema = tool.get("parameters") or {"type": "object"}
            rules.append(f"{name}: {_literal(before)} {name}_arguments {_literal(after)}")
            schema = {**schema, "x-guidance": COMPACT}
            rules.append(f"{name}_arguments: %json {json.dumps(schema)}")
        return self.lark("\n".join(rules))

    def _constraint(self, grammar: str) -> Constraint:
        vocabulary = self._vocabulary()
        matcher = _library().LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            message = matcher.get_error().split("\n")[0][:300]
            raise ApiError(f"the grammar or schema cannot be used: {message}")
        return GrammarConstraint(matcher, vocabulary.vocab_size)

    def _vocabulary(self) -> Any:
        with self._lock:
            if self._compiled is None:
                library, tokenizer = _library(), self.tokenizer
                words = _Words(tokenizer, self.vocab_size, self.eos_ids)
                wrapper = library.TokenizerWrapper(words)
                self._compiled = library.LLTokenizer(wrapper, eos_token=words.eos_token_ids)
            return self._compiled


class _Words:
    """A vocabulary as llguidance wants it: the bytes of each token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.eos_token_ids = sorted(token for token in eos_ids if token < vocab_size)
        if not self.eos_token_ids:  # a text without end: a token that no model can choose
            self.eos_token_ids = [vocab_size]
            self.tokens.append(b"")
        self.eos_token_id = self.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_id
        # Marks of tool calls are text to a grammar, even where the vocabulary calls them special.
        marks = (b"<", b"[")
        self.special_token_ids = [
            token
            for token in tokenizer.special_ids
            if token < vocab_size
            and (token in eos_ids or not self.tokens[token].startswith(marks)
                 or b"tool" not in self.tokens[token].lower())
        ]  # fmt: skip

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return self._tokenizer.encode(text, add_bos=False, parse_special=False)


class GrammarConstraint:
    """One answer's position in a grammar."""

    def __init__(self, matcher: Any, num_tokens: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros(-(-num_tokens // 32), np.int32)

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def mask(self, logits: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
        if not allowed.any():
            raise RuntimeError("the grammar allows no token: " + self._matcher.get_error())
        logits[allowed == 0] = -np.inf

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar does not allow token {token}")


class AfterReasoning:
    """A constraint that begins to hold when the model has ended its reasoning."""

    def __init__(self, constraint: Constraint, tokenizer: Tokenizer) -> None:
        self._constraint = constraint
        self._tokenizer = tokenizer
        self._tail: bytes | None = b""  # of the reasoning; None: it has ended

    @property
    def finished(self) -> bool:
        return self._tail is None and self._constraint.finished

    def mask(self, logits: np.ndarray) -> None:
        if self._tail is None:
            self._constraint.mask(logits)

    def accept(self, token: int) -> None:
        if self._tail is None:
            self._constraint.accept(token)
            return
        self._tail = (self._tail + self._tokenizer.token_bytes(token))[-64:]
        if END_THINK.encode() in self._tail:
            self._tail = None


def _literal(text: str) -> str:
    """A string of a Lark grammar."""
    return json.dumps(text)


def _library() -> Any:
    try:
        import llguidance
        import llguidance.gbnf_to_lark
    except ImportError:
        raise ApiError(
            'this server has no llguidance: pip install "tiered[structured]"', 501
        ) from None
    return llguidance

"""Text of several kinds that any machine with Python has, to see what a model's neurons do."""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tiered.demo import prose
from tiered.text.chat import ChatTemplate
from tiered.text.tokenizer import Tokenizer

SOURCES = ("argparse", "ast", "csv", "datetime", "heapq", "json.decoder", "pathlib", "random")
DOCUMENTED = (
    "asyncio.tasks", "collections", "decimal", "difflib", "doctest", "functools", "inspect",
    "itertools", "logging", "statistics", "textwrap", "typing", "unittest.case", "zipfile",
)  # fmt: skip


def calibration_texts(tokenizer: Tokenizer, num_texts: int, length: int) -> np.ndarray:
    """Token ids of texts, int64 [num_texts, length], as many of each kind as there are.

    Kinds that a machine lacks are left out; the built-in prose is always there.
    """
    kinds = [chunks(tokenizer.encode(kind(tokenizer), add_bos=False), length) for kind in KINDS]
    chosen: list[np.ndarray] = []
    for turn in range(num_texts):
        chosen += [kind[turn] for kind in kinds if turn < len(kind)]
    if not chosen:
        raise ValueError(f"there is no text of {length} tokens")
    return np.stack(chosen[:num_texts])


def chunks(ids: list[int], length: int) -> np.ndarray:
    """int64 [n, length]: all whole pieces."""
    count = len(ids) // length
    return np.array(ids[: count * length], np.int64).reshape(count, length)


def conversations(tokenizer: Tokenizer) -> str:
    template = ChatTemplate.of(tokenizer)
    return "".join(
        template.render(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
            add_generation_prompt=False,
        )
        for asked, answer in prose.CONVERSATIONS
    )


def own_prose(tokenizer: Tokenizer) -> str:
    return prose.STORY + "\n\n" + prose.FACTS


def manual(tokenizer: Tokenizer) -> str:
    """The language reference that Python's help() shows, if this Python has it."""
    source = source_of("pydoc_data.topics")
    try:
        topics = ast.literal_eval(source[source.index("{") : source.rindex("}") + 1])
    except (ValueError, SyntaxError):
        return ""
    return "\n\n".join(str(text)[:6000] for text in topics.values())[:200_000]


def docstrings(tokenizer: Tokenizer) -> str:
    """What modules of the standard library say about themselves."""
    return "\n\n".join(text for name in DOCUMENTED for text in docstrings_of(source_of(name)))


def sources(tokenizer: Tokenizer) -> str:
    """Program code; each module's first part, so that several are seen."""
    return "\n\n".join(source_of(name)[:12_000] for name in SOURCES)


def licence(tokenizer: Tokenizer) -> str:
    """Python's own licence and, where Debian keeps them, others."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [folder / "LICENSE.txt", Path("/usr/share/common-licenses/GPL-3")]
    return "\n\n".join(read_text(file)[:20_000] for file in files)


KINDS: tuple[Callable[[Tokenizer], str], ...] = (
    own_prose, conversations, manual, docstrings, sources, licence,
)  # fmt: skip


def docstrings_of(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text and len(text) > 80]


def source_of(module: str) -> str:
    """The source of a module of the standard library; empty if it is not there as text."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return ""
    origin = spec.origin if spec else None
    return read_text(Path(origin)) if origin and origin.endswith(".py") else ""


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

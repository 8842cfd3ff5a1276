"""Multiple-choice tasks: which answer a model holds likeliest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiered.engine import Engine
from tiered.generation import common_prefix
from tiered.quality.likelihood import token_log_probs


class Task(NamedTuple):
    question: str
    choices: tuple[str, ...]
    answer: int  # position in `choices`


class Answer(NamedTuple):
    """The choice a model prefers: by log-likelihood, and by that per byte of the choice."""

    plain: int
    normalized: int


def read_tasks(file: Path) -> list[Task]:
    """Lines of {"question": text, "choices": [texts], "answer": index}; ValueError names a wrong
    one."""
    tasks = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            tasks.append(_task(line, f"{file}, line {number}"))
    if not tasks:
        raise ValueError(f"{file} is empty: there is no task in it")
    return tasks


def _task(line: bytes, place: str) -> Task:
    try:
        values = json.loads(line.decode())
        question, choices, answer = values["question"], values["choices"], values["answer"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(
            f'{place}: no {{"question": ..., "choices": [...], "answer": index}} in JSON'
        ) from error
    texts = [question, *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts) or len(texts) < 3:
        raise ValueError(f"{place}: the question and at least two choices must be texts, not empty")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{place}: the answer must be a position in the choices, from 0 on")
    return Task(question, tuple(choices), answer)


def answer_task(engine: Engine, task: Task) -> Answer:
    """Each choice is scored as the continuation of the question, a space between them."""
    scores = np.array([choice_score(engine, task.question, choice) for choice in task.choices])
    lengths = [len(choice.encode()) for choice in task.choices]
    return Answer(int(scores.argmax()), int((scores / lengths).argmax()))


def choice_score(engine: Engine, question: str, choice: str) -> float:
    """Log-likelihood of a choice's tokens after the question's."""
    question = question if question[-1].isspace() else question + " "
    prompt = engine.tokenizer.encode(question.rstrip(" "), parse_special=False)
    ids = engine.tokenizer.encode(question + choice, parse_special=False)
    start = max(1, common_prefix(prompt, ids))
    score, at = 0.0, start
    for logits in engine.logits_by_rows(ids[:-1], start=start - 1):
        score += float(token_log_probs(logits, ids[at : at + len(logits)]).sum())
        at += len(logits)
    return score


def accuracy(tasks: Sequence[Task], answers: Sequence[Answer]) -> dict[str, Any]:
    """Shares of tasks that were answered right."""
    pairs = list(zip(tasks, answers, strict=True))
    return {
        "plain": float(np.mean([answer.plain == task.answer for task, answer in pairs])),
        "normalized": float(np.mean([answer.normalized == task.answer for task, answer in pairs])),
    }

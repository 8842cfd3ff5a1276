"""Comparison: how far what B says is from what A says, token by token of the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tiered.generation import common_prefix
from tiered.quality.interval import METHOD, interval
from tiered.quality.likelihood import by_rows
from tiered.quality.perplexity import perplexity_of
from tiered.quality.rows import Rows
from tiered.quality.side import Side, TextPlan, check_same_tokens
from tiered.quality.tasks import accuracy
from tiered.text.sampling import log_softmax


class Comparison(NamedTuple):
    """Per predicted token, in order; A is the reference."""

    divergence: np.ndarray  # float64 [num_predicted]: KL(A || B) in nats
    agrees: np.ndarray  # bool [num_predicted]: the same likeliest token
    losses_a: np.ndarray  # float64 [num_predicted]
    losses_b: np.ndarray
    shared: np.ndarray | None  # float64 [num_sparse_layers]: mean share of common experts

    def as_dict(self) -> dict[str, Any]:
        change = self.losses_b - self.losses_a
        low, high = interval(change)
        kl = self.divergence
        return {
            "predicted": len(kl),
            "kl_mean": float(kl.mean()),
            "kl_mean_interval": list(interval(kl)),
            "kl_99": float(np.percentile(kl, 99)),
            "kl_max": float(kl.max()),
            "top_1_agreement": float(self.agrees.mean()),
            "perplexity_a": perplexity_of(float(self.losses_a.mean())),
            "perplexity_b": perplexity_of(float(self.losses_b.mean())),
            "perplexity_ratio": perplexity_of(float(change.mean())),
            "perplexity_ratio_interval": [perplexity_of(low), perplexity_of(high)],
            "interval": METHOD,
        }


def compare_text(
    a: Side, b: Side, plan: TextPlan, progress: Callable[[int], None] = lambda rows: None
) -> Comparison:
    """Ask both for the same rows and compare them as they come. ValueError for two tokenizers."""
    check_same_tokens(a.facts, b.facts)
    same_shape = a.facts[-2:] == b.facts[-2:] and len(a.facts.sparse_layers) > 0
    pieces: list[tuple[np.ndarray, ...]] = []
    shared = np.zeros(len(a.facts.sparse_layers))
    for ours, theirs in zip(a.rows(plan), b.rows(plan), strict=True):
        if len(ours.losses) != len(theirs.losses):
            raise ValueError(f"{b.facts.name} has other rows than {a.facts.name}: save it again")
        agrees = ours.best == theirs.best
        pieces.append((divergence(ours, theirs), agrees, ours.losses, theirs.losses))
        if same_shape:
            shared += shared_experts(ours.experts, theirs.experts).sum(axis=1)
        progress(len(agrees))
    kl, agrees, losses_a, losses_b = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return Comparison(kl, agrees, losses_a, losses_b, shared / len(kl) if same_shape else None)


def divergence(a: Rows, b: Rows) -> np.ndarray:
    """KL(A || B) of the next token's distributions, in nats: float64 [num_rows]."""
    result = np.empty(len(a.losses))
    for rows in by_rows(len(result)):
        p, q = log_softmax(a.logits[rows]), log_softmax(b.logits[rows])
        result[rows] = (np.exp(p) * (p - q)).sum(axis=1)
    return np.maximum(result, 0.0)  # rounding may leave it a hair below


def shared_experts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The share of experts that both chose for a token, of the longer list: float64
    [num_sparse_layers, num_rows]. Both are int16 [num_sparse_layers, num_rows, any top_k]."""
    found = ((a[..., :, None] == b[..., None, :]) & (a[..., :, None] >= 0)).sum(axis=(2, 3))
    longer = np.maximum((a >= 0).sum(axis=2), (b >= 0).sum(axis=2))
    share: np.ndarray = found / np.maximum(longer, 1)
    return share


def compare_generations(a: Sequence[int], b: Sequence[int]) -> dict[str, Any]:
    """Where two greedy continuations part, and how many tokens stand at the same place in both."""
    length = max(len(a), len(b))
    first = common_prefix(a, b)
    return {
        "generated": length,
        "first_difference": None if first == length else first,
        "agreement": sum(x == y for x, y in zip(a, b, strict=False)) / length,
    }


def compare_answers(a: Side, b: Side, plan: TextPlan) -> dict[str, Any]:
    """Accuracy of both on the tasks, and how often they prefer the same choice."""
    ours, theirs = a.answers(plan), b.answers(plan)
    return {
        "tasks": len(plan.tasks),
        "accuracy_a": accuracy(plan.tasks, ours),
        "accuracy_b": accuracy(plan.tasks, theirs),
        "same_choice": float(
            np.mean([x.plain == y.plain for x, y in zip(ours, theirs, strict=True)])
        ),
    }


def compare(
    a: Side,
    b: Side,
    plan: TextPlan,
    progress: Callable[[int], None] = lambda rows: None,
    doing: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Everything that the plan asks for, as one object for JSON. `progress` gets rows of the text
    as they are compared, `doing` what comes next."""
    doing("comparing")
    found = compare_text(a, b, plan, progress)
    report: dict[str, Any] = {
        "a": {"name": a.facts.name, "settings": a.facts.settings},
        "b": {"name": b.facts.name, "settings": b.facts.settings},
        "tokens": len(plan.ids),
        "window": plan.size,
        "stride": plan.stride,
        **found.as_dict(),
    }
    if found.shared is not None:
        layers = map(str, a.facts.sparse_layers)
        report["routing_agreement"] = float(found.shared.mean())
        report["routing_agreement_by_layer"] = dict(zip(layers, found.shared.tolist(), strict=True))
    if plan.num_generated:
        doing("continuing")
        report["drift"] = compare_generations(a.generate(plan), b.generate(plan))
    if plan.tasks:
        doing("answering")
        report["tasks"] = compare_answers(a, b, plan)
    return report

"""The tokens of a recorded trace, in the form in which a simulation wants routing."""

from __future__ import annotations

from tiered.experts import group_by_expert
from tiered.planning.synthetic import Routed
from tiered.tracing.trace import DECODE, Pass, Trace
from tiered.tracing.trace import Routed as RoutedLayer


def tokens_of(trace: Trace, top_k: int | None = None) -> tuple[Routed, list[Routed]]:
    """(the distinct experts of the prompt by layer, in the order in which an engine asks for them,
    the experts of each decoded token by layer).

    Only the `top_k` best choices count, if given. Prompts after the first are left out.
    """
    num_layers = len(trace.info.blob_bytes)
    prompt: list[dict[int, None]] = [{} for _ in range(num_layers)]
    tokens: list[Routed] = []
    decoding = False
    for event in trace.events:
        if isinstance(event, Pass):
            decoding = event.phase == DECODE
            if decoding:
                tokens.append([()] * num_layers)
        elif isinstance(event, RoutedLayer):
            chosen = event.routing.experts[:, :top_k]  # [num_tokens, top_k]
            if decoding:
                tokens[-1][event.layer] = tuple(dict.fromkeys(chosen.reshape(-1).tolist()))
            elif not tokens:
                asked = group_by_expert(event.routing._replace(experts=chosen)).experts
                for expert in asked.tolist():
                    prompt[event.layer].pop(expert, None)
                    prompt[event.layer][expert] = None
    if not tokens:
        raise ValueError("the trace has no decoded token: record one with an answer")
    return [tuple(experts) for experts in prompt], tokens

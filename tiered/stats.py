"""What an engine counted and timed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EngineStats:
    """Totals since the engine was made, or between two of them (`later - earlier`).

    Times are seconds. Hits and misses count demand only, each used expert once per layer and
    forward pass; an engine whose experts are all in memory counts hits.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_python: float = 0.0  # of these, what was neither the CPU's arithmetic nor waiting
    simulated_prefill_seconds: float = 0.0  # of a described machine (--device sim:CARD) ...
    simulated_decode_seconds: float = 0.0  # ... on its virtual clock
    hits: int = 0
    misses: int = 0
    prefetches: int = 0
    prefetches_used: int = 0
    prefetches_wasted: int = 0
    bytes_read: int = 0
    skipped_experts: int = 0  # by drop_cold, token by token
    skipped_weight: float = 0.0  # and what they had of the routing weights ...
    routed_weight: float = 0.0  # ... of all tokens that were written meanwhile
    copied_experts: int = 0  # read from the cold copy, token by token
    copied_weight: float = 0.0  # and what they had of the routing weights ...
    computed_weight: float = 0.0  # ... of all tokens that were written with a cold copy
    chosen_experts: int = 0  # by the routers, token by token, where there are rules
    chosen_weight: float = 0.0
    dropped_experts: int = 0  # of these, by the rules (top_k, layer_k, top_p, min_weight)
    dropped_weight: float = 0.0
    drafted: int = 0  # tokens computed ahead, by speculation
    drafted_right: int = 0
    # Of both: attention, router, experts, waiting (for reads) and head; "python" is what these took
    # beyond arithmetic and waiting, "reads" what reader threads took, all together, meanwhile.
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def prefill_tok_s(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Of the tokens after the first, which comes out of the prefill."""
        return max(0, self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def simulated_decode_tok_s(self) -> float:
        """The same on a described machine: simulated, not measured."""
        seconds = self.simulated_decode_seconds
        return max(0, self.new_tokens - 1) / seconds if seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Read from disk, per new token, prefill included."""
        return self.bytes_read / max(1, self.new_tokens)

    @property
    def dropped_share(self) -> float:
        """Of the experts that the routers chose, what rules took away."""
        return self.dropped_experts / max(1, self.chosen_experts)

    @property
    def dropped_weight_share(self) -> float:
        return self.dropped_weight / self.chosen_weight if self.chosen_weight else 0.0

    def __sub__(self, earlier: EngineStats) -> EngineStats:
        mine, theirs = asdict(self), asdict(earlier)
        parts = {name: mine["parts"][name] - theirs["parts"].get(name, 0.0) for name in self.parts}
        numbers = {name: mine[name] - theirs[name] for name in mine if name != "parts"}
        return EngineStats(**numbers, parts=parts)

    def as_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        if self.simulated_prefill_seconds:
            facts["simulated_decode_tok_s"] = self.simulated_decode_tok_s
        else:
            del facts["simulated_prefill_seconds"], facts["simulated_decode_seconds"]
        return {
            **facts,
            "hit_rate": self.hit_rate,
            "prefill_tok_s": self.prefill_tok_s,
            "decode_tok_s": self.decode_tok_s,
            "time_to_first_token": self.prefill_seconds,
            "bytes_per_token": self.bytes_per_token,
        }

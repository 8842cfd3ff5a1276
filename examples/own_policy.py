"""An eviction policy of your own in 20 lines, beside the built-in ones.

    python examples/own_policy.py MODEL

The same class works on the command line: tiered run MODEL --policy examples/own_policy.py:Policy
"""

from __future__ import annotations

import sys

from tiered import Engine
from tiered.experts import ExpertKey
from tiered.policies import Evictable, Space


class Policy:
    """Evict the oldest expert of the layer that holds most: layers stay equally full."""

    def __init__(self, space: Space) -> None:
        self._layers: list[dict[ExpertKey, None]] = [{} for _ in range(space.num_layers)]

    def touch(self, key: ExpertKey) -> None:
        order = self._layers[key.layer]
        order.pop(key, None)
        order[key] = None  # dictionaries keep the order of insertion

    def forget(self, key: ExpertKey) -> None:
        del self._layers[key.layer][key]

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        for layer in sorted(self._layers, key=len, reverse=True):
            for key in layer:
                if evictable(key):
                    return key
        return None


def main(model: str, max_new_tokens: int = 32) -> None:
    with Engine(model) as engine:
        expert_ram = engine.plan.experts // 2
    for policy in ("lru", "layer_lfu", Policy):
        with Engine(model, policy=policy, expert_ram=expert_ram) as engine:
            tokens = list(engine.generate_tokens(range(1, 17), max_new_tokens))
            name = policy if isinstance(policy, str) else "yours"
            print(f"{name:10} hit rate {engine.stats.hit_rate:.1%}, same tokens: {tokens[:6]}")


if __name__ == "__main__":
    main(sys.argv[1])

"""Compare memory budgets: the same tokens, at different speeds.

python examples/budgets.py MODEL
"""

from __future__ import annotations

import sys

from tiered import Engine


def main(model: str, max_new_tokens: int = 32) -> None:
    with Engine(model) as engine:
        experts = engine.plan.experts
    print("experts in RAM   tokens/s   hit rate   read per token")
    first = None
    for share in (1.0, 0.6, 0.4):
        with Engine(model, expert_ram=int(experts * share)) as engine:
            tokens = list(engine.generate_tokens(range(1, 17), max_new_tokens))
            stats = engine.stats
        first = first or tokens
        assert tokens == first, "what is in memory must not change what the model says"
        print(
            f"{share:14.0%} {stats.decode_tok_s:10.1f} {stats.hit_rate:10.1%} "
            f"{stats.bytes_per_token / 2**20:9.1f} MiB"
        )


if __name__ == "__main__":
    main(sys.argv[1])

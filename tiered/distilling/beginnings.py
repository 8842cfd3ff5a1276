"""Beginnings: students that are made of the teacher's neurons, before any training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from tiered.config import ModelConfig
from tiered.distilling.pool import Floats, Pool, dense_weights
from tiered.quality.importance import Scores, best_experts

NUM_TOKENS = 1024  # that neurons are judged by
CHUNK = 1024  # neurons at once


def pools(
    teacher: Pool,
    inputs: Floats,
    config: ModelConfig,
    scores: Mapping[str, Scores],
    layer: int,
    num_experts: int,
) -> Iterator[tuple[str, Pool]]:
    """Named pools of `num_experts`: pruned by each criterion; and merged, where the experts that
    "loss" leaves out join those that stay."""
    tried: list[list[int]] = []
    for criterion, values in scores.items():
        kept = best_experts(values, [layer], num_experts)[layer]
        if kept not in tried:
            tried.append(kept)
            yield criterion, teacher.take(kept)
    kept = best_experts(scores["loss"], [layer], num_experts)[layer]
    yield "merged", merged(teacher, inputs[:NUM_TOKENS], config, kept)


def merged(teacher: Pool, inputs: Floats, config: ModelConfig, kept: Sequence[int]) -> Pool:
    """The experts `kept`, each joined by those left out whose rows of the router are most like
    its own, of which the neurons that matter most stay."""
    assert teacher.router is not None
    student = teacher.take(kept)
    assert student.router is not None
    rows = torch.nn.functional.normalize(teacher.router - teacher.router.mean(0), dim=1)
    nearest = (rows @ rows[list(kept)].T).argmax(1).tolist()
    said, heard = (dense_weights(inputs, pool, config) for pool in (teacher, student))
    for place, expert in enumerate(kept):
        group = [e for e, near in enumerate(nearest) if near == place and e not in kept]
        if group:
            members = [expert, *group]
            parts = _neurons(teacher, members)
            joined = join(inputs, *parts, _spread(said, members, parts[0]), heard[:, place],
                          teacher.gate.shape[1])  # fmt: skip
            for matrices, matrix in zip(student[:3], joined, strict=True):
                matrices[place] = matrix
    return student


def concatenated(
    teacher: Pool,
    shared: tuple[Floats, Floats, Floats, Floats | None] | None,
    inputs: Floats,
    config: ModelConfig,
    size: int,
) -> Pool:
    """One feed-forward of the `size` neurons of all experts that matter most."""
    inputs = inputs[:NUM_TOKENS]
    members = range(len(teacher.gate))
    gate, up, down = _neurons(teacher, members)
    weights = _spread(dense_weights(inputs, teacher, config), members, gate)
    if shared is not None:
        always = torch.ones(len(inputs), 1)
        if shared[3] is not None:
            always = (inputs @ shared[3].T).sigmoid()
        gate, up = torch.cat([gate, shared[0]]), torch.cat([up, shared[1]])
        down = torch.cat([down, shared[2].T])
        weights = torch.cat([weights, always.expand(-1, len(shared[0]))], 1)
    joined = join(inputs, gate, up, down, weights, torch.ones(len(inputs)), size)
    return Pool(*(matrix[None] for matrix in joined))


def join(
    inputs: Floats,
    gate: Floats,
    up: Floats,
    down: Floats,
    weights: Floats,
    heard: Floats,
    size: int,
) -> tuple[Floats, Floats, Floats]:
    """An expert of the `size` neurons with the most energy in what they add to the output.

    Neurons are rows of `gate`, `up` and `down` [num_neurons, hidden_size]; each was multiplied with
    `weights` [num_tokens, num_neurons] and will be with `heard` [num_tokens], for which its row of
    `down` is scaled to fit best. Of neurons that are equal one gets what all of them add.
    """
    first: dict[bytes, int] = {}
    whole = torch.cat([gate, up, down], 1).numpy()
    owner = torch.tensor([first.setdefault(row.tobytes(), i) for i, row in enumerate(whole)])
    energy, scale = torch.zeros(len(gate)), torch.zeros(len(gate))
    weights = torch.zeros_like(weights).index_add(1, owner, weights)
    for start in range(0, len(gate), CHUNK):
        part = slice(start, start + CHUNK)
        active = torch.nn.functional.silu(inputs @ gate[part].T) * (inputs @ up[part].T)
        was, will = active * weights[:, part], active * heard[:, None]
        energy[part] = was.square().sum(0) * down[part].square().sum(1)
        scale[part] = (was * will).sum(0) / will.square().sum(0).clamp_min(1e-30)
    chosen = energy.sort(descending=True, stable=True).indices[:size].sort().values
    return gate[chosen], up[chosen], (down[chosen] * scale[chosen, None]).T.contiguous()


def _neurons(pool: Pool, experts: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """Neurons of several experts, one after the other: [num_neurons, hidden_size] each."""
    index = list(experts)
    hidden = pool.gate.shape[2]
    return (
        pool.gate[index].reshape(-1, hidden),
        pool.up[index].reshape(-1, hidden),
        pool.down[index].swapaxes(1, 2).reshape(-1, hidden),
    )


def _spread(weights: Floats, experts: Sequence[int], neurons: Floats) -> Floats:
    """Each expert's weights for each of its neurons: [num_tokens, num_neurons]."""
    return weights[:, list(experts)].repeat_interleave(len(neurons) // len(experts), dim=1)

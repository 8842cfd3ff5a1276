"""A dense feed-forward as experts, without training ("sparse upcycling", arXiv 2212.05055).

What a layer gets is clustered; each cluster becomes an expert, made of the neurons that are most
active on it; the router is the clusters' centres. The routers are built, not trained: their text
is real, but hit rates measured on them say nothing about real models.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tiered.demo.dense import DenseLayer

ROUNDS = 15  # of k-means
TOP_WEIGHT_GAP = 1.0  # mean logit of the best expert over the second: weights of about 0.7 and 0.3


class SparseLayer(NamedTuple):
    router: np.ndarray  # float32 [num_experts, hidden_size]
    neurons: np.ndarray  # int [num_experts, expert_size], ascending: rows of the dense gate and up


def upcycle(
    layer: DenseLayer, num_experts: int, expert_size: int, random: np.random.Generator
) -> SparseLayer:
    """Experts of `expert_size` neurons, two of which are to be used per token."""
    ffn_size = layer.activations.shape[-1]
    if not 1 <= expert_size <= ffn_size:
        raise ValueError(f"experts of {expert_size} neurons cannot be cut out of {ffn_size}")
    inputs = layer.inputs[:, 1:].reshape(-1, layer.inputs.shape[-1])  # a text's first token is
    centres = spherical_kmeans(inputs, num_experts, random)  # an outlier and would be a cluster
    router = scaled_router(centres, inputs)
    all_inputs = layer.inputs.reshape(-1, layer.inputs.shape[-1])
    share = top_two_weights(all_inputs @ router.T)
    down_norms = np.square(layer.weights["ffn.down"]).sum(axis=0)
    energy = np.square(layer.activations.reshape(len(all_inputs), -1)) * down_norms
    importance = share.T @ energy  # [num_experts, ffn_size]: what each neuron adds, squared
    best = np.argpartition(-importance, expert_size - 1, axis=1)[:, :expert_size]
    return SparseLayer(router, np.sort(best, axis=1))


def spherical_kmeans(x: np.ndarray, num_clusters: int, random: np.random.Generator) -> np.ndarray:
    """Unit vectors [num_clusters, size], each the mean direction of the rows nearest to it."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    centres = first_centres(x, num_clusters, random)
    for _ in range(ROUNDS):
        similarity = x @ centres.T
        nearest = similarity.argmax(axis=1)
        member = (nearest[:, None] == np.arange(num_clusters)).astype(np.float32)
        sums = member.T @ x
        empty = ~member.any(axis=0)
        if empty.any():  # start again from the rows that suit their centres worst
            worst = similarity.max(axis=1).argsort()[: empty.sum()]
            sums[empty] = x[worst]
        centres = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return centres


def first_centres(x: np.ndarray, num_clusters: int, random: np.random.Generator) -> np.ndarray:
    """Rows far from each other: each drawn in proportion to its squared distance (k-means++)."""
    centres = [x[random.integers(len(x))]]
    distance = np.full(len(x), np.inf)
    for _ in range(num_clusters - 1):
        distance = np.minimum(distance, np.maximum(1 - x @ centres[-1], 0))
        centres.append(x[random.choice(len(x), p=distance / distance.sum())])
    return np.stack(centres)


def scaled_router(centres: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Rows whose products with an input are a router's logits.

    What all centres have in common changes no choice and no weight, and is taken away, so that
    rounding to BF16 does not lose the rest.
    """
    router = centres - centres.mean(axis=0)
    second, best = np.partition(inputs @ router.T, -2, axis=1)[:, -2:].T
    result: np.ndarray = router * (TOP_WEIGHT_GAP / (best - second).mean())
    return result.astype(np.float32)


def top_two_weights(logits: np.ndarray) -> np.ndarray:
    """The share of each expert in each token, 0 for all but two: float32, the shape of logits."""
    second = np.partition(logits, -2, axis=1)[:, -2:-1]
    weights = np.exp(logits - logits.max(axis=1, keepdims=True)) * (logits >= second)
    result: np.ndarray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return result

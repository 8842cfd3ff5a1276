"""How much of what its experts say a layer loses with fewer of them, and who may have how many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tiered.backend import Backend
from tiered.config import ModelConfig
from tiered.quality.layer_tap import Heard, LayerTap


class LayerErrors(LayerTap):
    """Adds up, per layer and number of experts, the squared change of the layer's output if tokens
    keep only so many, and the squared residual stream that it is added to."""

    def __init__(self, backend: Backend, config: ModelConfig) -> None:
        super().__init__(backend)
        shape = config.num_layers, config.top_k
        self.changes = np.zeros(shape)  # float64 [num_layers, top_k]: with 1, 2, ... experts
        self.residual = np.zeros(config.num_layers)
        self.num_tokens = 0
        self._normalize = config.normalize_top_k
        self._first = config.sparse_layers[0]

    def hear(self, heard: Heard) -> None:
        changes = errors_of_fewer(heard.out, heard.weights, self._normalize)
        self.changes[heard.layer] += changes.sum(axis=0)
        self.residual[heard.layer] += heard.residual.sum()
        self.num_tokens += len(changes) if heard.layer == self._first else 0

    @property
    def errors(self) -> np.ndarray:
        """Changes as a share of the residual stream, over all tokens: float64 [num_layers, top_k].

        On the model of `tiered demo` these find better tables than the mean of the tokens' shares,
        and than shares of what the experts add.
        """
        errors: np.ndarray = self.changes / np.maximum(self.residual, 1e-30)[:, None]
        return errors


def errors_of_fewer(out: np.ndarray, weights: np.ndarray, normalize: bool) -> np.ndarray:
    """How far a token's combined output moves with its first 1, 2, ... experts alone, their weights
    scaled to the same sum if the model normalizes: squared, float64 [num_tokens, top_k].

    `out` is float32 [num_tokens, top_k, hidden_size], `weights` float32 [num_tokens, top_k].
    """
    sums = np.cumsum(weights[..., None].astype(np.float64) * out, axis=1)
    whole = sums[:, -1:]
    if normalize:
        total = np.cumsum(weights, axis=1, dtype=np.float64)
        sums *= (total[:, -1:] / total)[..., None]
    errors: np.ndarray = np.square(whole - sums).sum(axis=2)
    errors[:, -1] = 0.0
    return errors


def allocate(errors: np.ndarray, layers: Sequence[int], average: float) -> dict[int, int]:
    """Experts per token for each of `layers`, `average` of them in the mean: one each, and then,
    expert by expert, wherever one more takes the most from the error.

    `errors` is float64 [num_layers, top_k]. ValueError if the average lies outside 1 ... top_k.
    """
    top_k = errors.shape[1]
    if not 1 <= average <= top_k:
        raise ValueError(f"an average of {average:g} experts: it must lie in 1 ... {top_k}")
    result = dict.fromkeys(layers, 1)
    for _ in range(round(average * len(layers)) - len(layers)):
        left = [layer for layer in layers if result[layer] < top_k]
        best = max(left, key=lambda i: errors[i, result[i] - 1] - errors[i, result[i]])
        result[best] += 1
    return result

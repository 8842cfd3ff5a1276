"""How well a layer's experts can be foreseen: watched while a model writes, nothing is loaded."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from tiered.experts import Routing
from tiered.prefetch import Accuracy, accuracy

PREVIOUS, MOST_USED = "token before", "most used"  # predictors to compare with
Predictor = int | str  # layers ahead, or one of these


class LookAheadWatch:
    """A decoder's look-ahead that scores guesses, and loads nothing.

    Guesses are made up to `most` layers ahead, and by the layer's own router right before its turn
    (0 layers: nothing is stale, so all of it is right). Compared with them: what the layer chose
    for the token before, and what it has chosen most often so far. Tokens of a prompt, which come
    together, count for these two only.
    """

    def __init__(self, num_layers: int, num_experts: int, most: int = 3) -> None:
        self.num_layers, self.most = num_layers, most
        self.scores: defaultdict[tuple[int, Predictor], Accuracy] = defaultdict(Accuracy)
        self._uses = np.zeros((num_layers, num_experts), np.int64)
        self._before: dict[int, np.ndarray] = {}  # the last token's choice, by layer
        self._guesses: defaultdict[int, dict[Predictor, np.ndarray]] = defaultdict(dict)
        self._chosen = np.empty((0, 0), np.int32)  # by the layer that is being computed
        self._layer = 0

    def distances(self, layer: int) -> range:
        """How many layers ahead to guess from this one."""
        if len(self._chosen) != 1:
            return range(0)
        return range(min(self.most, self.num_layers - 1 - layer) + 1)

    def submit(self, layer: int, guess: Routing) -> None:
        """A guess for this layer, made from the one that is being computed."""
        distance = layer - self._layer
        if distance:
            self._guesses[layer][distance] = guess.experts
        else:
            self.scores[layer, 0] += accuracy(guess.experts, self._chosen)

    def observe(self, layer: int, routing: Routing) -> None:
        """What the layer's router chose."""
        self._layer, self._chosen = layer, routing.experts
        guesses = self._guesses.pop(layer, {})
        if len(routing.experts) == 1 and layer in self._before:
            num_chosen = routing.experts.shape[1]
            ranked = np.argsort(-self._uses[layer], kind="stable")[:num_chosen]
            guesses |= {PREVIOUS: self._before[layer], MOST_USED: ranked[None]}
            for predictor, guess in guesses.items():
                self.scores[layer, predictor] += accuracy(guess, routing.experts)
        np.add.at(self._uses[layer], routing.experts.reshape(-1), 1)
        self._before[layer] = routing.experts[-1:].copy()

    @property
    def predictors(self) -> list[Predictor]:
        return [*range(self.most + 1), PREVIOUS, MOST_USED]

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.scores})

    def total(self, predictor: Predictor) -> Accuracy:
        """Of all layers."""
        scores = (score for (_, of), score in self.scores.items() if of == predictor)
        return sum(scores, start=Accuracy())

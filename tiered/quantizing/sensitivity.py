"""How much the answers change if one part of a model alone has fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.checkpoint import Checkpoint
from tiered.config import EngineConfig, ModelConfig
from tiered.experts import ExpertKey, aligned
from tiered.quality.likelihood import by_rows
from tiered.quantizing.allocation import Option, Unit
from tiered.quantizing.inputs import Inputs, expert_inputs
from tiered.quantizing.layer import inside, read_expert
from tiered.quantizing.rewritten import layer_layouts
from tiered.quantizing.rounding import round_nearest
from tiered.quantizing.threads import expert_threads
from tiered.quantizing.walk import Given, States, Walk
from tiered.store import PROJECTIONS, ExpertStore
from tiered.text.sampling import log_softmax
from tiered.weights.dequantize import dequantize

SAMPLED = 8  # experts of a layer that formats are compared on
PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}

Matrix = tuple[np.ndarray, Inputs]  # float32 [rows, columns], and what goes into it


class Sensitivity(NamedTuple):
    """What formats cost: `options` of each layer's units, and which `shares` of the cost each of
    the layer's experts has."""

    options: dict[Unit, list[Option]]
    shares: dict[Unit, list[float]]

    def by_expert(self) -> dict[Unit, list[Option]]:
        """The options of each expert's part of the units."""
        return {
            unit._replace(expert=expert): [
                Option(format, nbytes // len(self.shares[unit]), share * loss)
                for format, nbytes, loss in options
            ]
            for unit, options in self.options.items()
            for expert, share in enumerate(self.shares[unit])
        }

    def as_json(self) -> list[Any]:
        return [list(each.items()) for each in self]

    @classmethod
    def from_json(cls, saved: list[Any]) -> Sensitivity:
        """What `as_json` gave."""
        options, shares = ({Unit(*unit): found for unit, found in each} for each in saved)
        return cls({unit: [Option(*o) for o in found] for unit, found in options.items()}, shares)


def measure_options(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    formats: Sequence[str],
    reference: str,
    fewest: int,
    choices: EngineConfig,
    progress: Callable[[int, int], None],
) -> Sensitivity:
    """What each format costs each unit: an estimate of the mean KL divergence of the next token's
    distribution, in nats.

    With `reference`, the divergence is measured, unit by unit, all others exact; that of another
    format is as much larger or smaller as the error of the unit's matrices, each column's weighed
    by its inputs. An expert's share is that of the error with `reference`, which counts for every
    token as much as the token weighs the expert. The text goes through the model once, beside a
    copy of it for every unit.
    """
    config = checkpoint.config
    with _Measurement(checkpoint, windows, reference, fewest, choices) as measurement:
        errors: dict[Unit, dict[str, float]] = {}
        for layer in range(config.num_layers):
            progress(layer, config.num_layers)
            errors |= measurement.layer(layer, formats)
        progress(config.num_layers, config.num_layers)
        divergences = measurement.divergences()
    options = {
        unit: [
            Option(
                format,
                unit_bytes(config, unit, format),
                divergences[unit] * by_format[format] / max(by_format[reference], 1e-30),
            )
            for format in formats
        ]
        for unit, by_format in errors.items()
    }
    return Sensitivity(options, measurement.shares)


def unit_bytes(config: ModelConfig, unit: Unit, format: str) -> int:
    sizes = config.hidden_size, config.expert_size
    columns, rows = sizes if unit.part == "gate_up" else sizes[::-1]
    matrices = len(PARTS[unit.part]) * config.num_experts
    return matrices * rows * int(FORMATS[format].row_bytes(columns))


class _Measurement:
    """The walk of the text, and of one copy of it for each unit that has been changed so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Sequence[int]],
        reference: str,
        fewest: int,
        choices: EngineConfig,
    ) -> None:
        self.checkpoint, self.reference, self.fewest = checkpoint, reference, fewest
        with ExitStack() as stack:
            self.walk = Walk(checkpoint, windows, choices)
            stack.callback(self.walk.close)
            self.store = stack.enter_context(ExpertStore(checkpoint, "none"))
            threads = self.walk.backend.num_threads
            self.pool = stack.enter_context(expert_threads(threads))
            self._closing = stack.pop_all()
        self.exact = self.walk.start()
        self.changed: dict[Unit, States] = {}
        self.shares: dict[Unit, list[float]] = {}

    def __enter__(self) -> _Measurement:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def layer(self, index: int, formats: Sequence[str]) -> dict[Unit, dict[str, float]]:
        """Go on by a layer; the error of its units by format."""
        walk, errors = self.walk, {}
        sparse = self.checkpoint.config.is_sparse(index)
        layouts = self.store.layouts(index) if sparse else None
        walk.open(index, layouts)
        for states in (self.exact, *self.changed.values()):
            walk.attend(index, states)
        if layouts is not None:
            given = walk.given(index, self.exact)
            experts = _ExactExperts(self.store, index)
            new: dict[Unit, States] = {}
            for unit in (Unit(index, part) for part in PARTS):
                new[unit] = [x.copy() for x in self.exact]
                self._run_changed(unit, given, experts.addresses, new[unit])
                errors[unit] = self._errors(unit, formats, given)
            walk.use(index, layouts)
            for states in (self.exact, *self.changed.values()):
                walk.run(index, states, experts.addresses)
            self.changed |= new
        walk.leave(index)
        return errors

    def _run_changed(self, unit: Unit, given: Given, exact: np.ndarray, states: States) -> None:
        """The layer with experts whose matrices of the unit have the reference format; what that
        costs which expert."""
        parts = [PROJECTIONS.index(name) for name in PARTS[unit.part]]

        def rounded(number: int) -> tuple[list[np.ndarray], float]:
            matrices = self._matrices(unit, given, number)
            data = [round_nearest(v, self.reference, i.importance) for v, i in matrices]
            weight = float(np.square(matrices[0][1].weights).sum())
            lost = [_lost(m, d, self.reference) for m, d in zip(matrices, data, strict=True)]
            return data, weight * sum(lost)

        new = list(self.pool.map(rounded, range(len(exact))))  # kept until they have run
        addresses, changed = exact.copy(), []
        for number, (matrices, _) in enumerate(new):
            formats = [tensor.format for tensor in self.store.layouts(unit.layer).layout(number)]
            for part, data in zip(parts, matrices, strict=True):
                addresses[number, part] = data.ctypes.data
                formats[part] = self.reference
            changed.append((formats[0], formats[1], formats[2]))
        self.walk.use(unit.layer, layer_layouts(self.checkpoint.config, changed))
        self.walk.run(unit.layer, states, addresses)
        costs = np.array([cost for _, cost in new])
        self.shares[unit] = (costs / max(float(costs.sum()), 1e-30)).tolist()

    def _errors(self, unit: Unit, formats: Sequence[str], given: Given) -> dict[str, float]:
        """Squared error of the unit's matrices, each column's weighed by its importance: of a
        sample of the experts."""
        count = self.checkpoint.config.num_experts
        sample = np.unique(np.linspace(0, count - 1, min(SAMPLED, count)).astype(int)).tolist()
        matrices = [m for number in sample for m in self._matrices(unit, given, number)]
        return {
            format: float(sum(self.pool.map(partial(_error, format=format), matrices)))
            for format in formats
        }

    def _matrices(self, unit: Unit, given: Given, number: int) -> list[Matrix]:
        inputs, _ = expert_inputs(given, number, self.fewest)
        expert = read_expert(self.checkpoint, unit.layer, number)
        if unit.part == "down":
            inputs = inside(self.checkpoint.config, expert, expert.gate, expert.up, inputs)
        return [(getattr(expert, name), inputs) for name in PARTS[unit.part]]

    def divergences(self) -> dict[Unit, float]:
        """Mean KL(exact || changed) over all tokens, in nats."""
        walk, totals = self.walk, dict.fromkeys(self.changed, 0.0)
        for window, x in enumerate(self.exact):
            for rows in by_rows(len(x)):
                true = log_softmax(walk.logits(x, rows))
                for unit, states in self.changed.items():
                    other = log_softmax(walk.logits(states[window], rows))
                    totals[unit] += float((np.exp(true) * (true - other)).sum())
        return {unit: max(total, 0.0) / sum(map(len, self.exact)) for unit, total in totals.items()}


class _ExactExperts:
    """A layer's experts as the checkpoint has them: mapped, or in memory if they must be read."""

    def __init__(self, store: ExpertStore, layer: int) -> None:
        if store.mappable:
            self.addresses = store.address_table(layer)
            return
        layouts, count = store.layouts(layer), store.checkpoint.config.num_experts
        self._blobs = np.empty((count, aligned(max(layouts.blob_bytes))), np.uint8)
        for expert, blob in enumerate(self._blobs):
            store.read_into(ExpertKey(layer, expert), blob)
        starts = self._blobs.ctypes.data + np.arange(count) * self._blobs.shape[1]
        self.addresses = starts[:, None] + layouts.offsets


def _error(matrix: Matrix, format: str) -> float:
    values, inputs = matrix
    return _lost(matrix, round_nearest(values, format, inputs.importance), format)


def _lost(matrix: Matrix, data: np.ndarray, format: str) -> float:
    """Squared error of a matrix that was rounded to `data`, each column's weighed by its
    importance."""
    values, inputs = matrix
    lost = dequantize(data.reshape(-1), format, values.shape) - values
    return float((np.square(lost) @ inputs.importance).sum())

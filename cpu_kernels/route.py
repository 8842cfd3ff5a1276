"""The router: norm, logits, softmax over all experts, and the best `top_k` of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.exponential import exp
from cpu_kernels.inner import inner
from cpu_kernels.lanes import LANES, by_lanes, larger, store_i32
from cpu_kernels.linear import multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, store_f32, word
from cpu_kernels.norm import rms_norm_rows
from cpu_kernels.record import Record, Scratch, fields, floats
from cpu_kernels.simd import emitted, f32
from cpu_kernels.team import Team, barrier, op, share

ROUTER = fields(
    "num_rows x norm eps h hidden_size router num_experts top_k normalize prepared logits experts "
    "weights"
)


@emitted("void", "i64 i64")
def softmax(k, x, count):
    """In place, over `count` float32."""
    lowest = {n: k.constant(f32(n), float("-inf")) for n in (1, LANES)}
    most = {n: k.variable(value) for n, value in lowest.items()}
    total = {n: k.variable(k.constant(f32(n), 0.0)) for n in (1, LANES)}

    def find_largest(offset, lanes):
        value = k.load(x + offset, f32(lanes), align=4)
        most[lanes].set(larger(k, value, most[lanes].get()))

    by_lanes(k, count, find_largest)
    largest = larger(k, most[1].get(), k.largest(most[LANES].get()))

    def exponentiate(offset, lanes):
        value = exp(k, k.load(x + offset, f32(lanes), align=4) - k.splat(largest, lanes))
        total[lanes].set(total[lanes].get() + value)
        k.store(x + offset, value, align=4)

    by_lanes(k, count, exponentiate)
    sum = k.sum(total[LANES].get()) + total[1].get()

    def divide(offset, lanes):
        value = k.load(x + offset, f32(lanes), align=4)
        k.store(x + offset, value / k.splat(sum, lanes), align=4)

    by_lanes(k, count, divide)


@inner
def choose_experts(scores, num_experts, top_k, normalize, experts, weights):
    """Write the `top_k` largest scores, the largest first and of equal ones the first, and which
    they are. `scores`, not negative, are used up. All are addresses."""
    total = np.float32(0.0)
    for rank in range(top_k):
        best, most = -1, np.float32(0.0)
        for expert in range(num_experts):
            score = load_f32(scores, expert)
            if score != np.float32(-1.0) and (best < 0 or score > most):
                best, most = expert, score
        store_f32(scores, best, np.float32(-1.0))
        store_i32(experts, rank, best)
        store_f32(weights, rank, most)
        total += most
    if normalize:
        for rank in range(top_k):
            store_f32(weights, rank, load_f32(weights, rank) / total)


@op
def route(r, thread, num_threads, team):
    num_rows, hidden_size = word(r, ROUTER.num_rows), word(r, ROUTER.hidden_size)
    h, prepared = word(r, ROUTER.h), word(r, ROUTER.prepared)
    lo, hi = share(num_rows, thread, num_threads)
    if word(r, ROUTER.norm):
        eps = load_f32(r, 2 * ROUTER.eps)
        rms_norm_rows(word(r, ROUTER.x), word(r, ROUTER.norm), h, lo, hi, hidden_size, eps)
        barrier(team)
    prepare_activations(h, hidden_size, num_rows, hidden_size, prepared, thread, num_threads)
    barrier(team)
    logits, num_experts = word(r, ROUTER.logits), word(r, ROUTER.num_experts)
    router, top_k = word(r, ROUTER.router), word(r, ROUTER.top_k)
    multiply(router, prepared, num_rows, logits, num_experts, thread, num_threads)
    barrier(team)
    for row in range(lo, hi):
        scores = logits + 4 * row * num_experts
        softmax(scores, num_experts)
        experts = word(r, ROUTER.experts) + 4 * row * top_k
        weights = word(r, ROUTER.weights) + 4 * row * top_k
        normalize = word(r, ROUTER.normalize)
        choose_experts(scores, num_experts, top_k, normalize, experts, weights)


class Routing(NamedTuple):
    experts: np.ndarray  # int32   [num_tokens, top_k], best first
    weights: np.ndarray  # float32 [num_tokens, top_k]


class RouterLayer:
    """A layer's router: `norm` is float32 [hidden_size], `router` a Matrix [num_experts,
    hidden_size]; `config` has the attributes of tiered.config.ModelConfig."""

    def __init__(self, norm: np.ndarray, router: Any, config: Any) -> None:
        if tuple(router.shape) != (config.num_experts, config.hidden_size):
            raise ValueError(
                f"the router must have shape {(config.num_experts, config.hidden_size)}, "
                f"not {tuple(router.shape)}"
            )
        self.hidden_size, self.num_experts = config.hidden_size, config.num_experts
        self.top_k = config.top_k
        self.norm = floats(norm, "norm", config.hidden_size)
        self._router = router  # the record has only its address
        # Look-ahead may guess in one thread while another routes: each has a record.
        self.record, self.guess_record = (
            Record(
                ROUTER,
                eps=float(config.norm_eps),
                hidden_size=config.hidden_size,
                router=router.address,
                num_experts=config.num_experts,
                top_k=config.top_k,
                normalize=int(config.normalize_top_k),
            )
            for _ in range(2)
        )
        _ = route.address  # compiled before the first token


class Router:
    """Runs router layers; one call at a time. (To guess in another thread takes another Router.)"""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._scratch = Scratch()
        self._chosen: Routing | None = None  # where the op writes

    def route(self, x: np.ndarray, layer: RouterLayer) -> tuple[np.ndarray, Routing]:
        """h = norm(x), which stays until the next call, and the experts chosen for it."""
        h = self._scratch.floats("h", *x.shape)
        return h, self._run(x, h, layer, layer.record)

    def guess(self, h: np.ndarray, layer: RouterLayer) -> Routing:
        """The experts that the layer would choose for an `h` that another layer normed."""
        return self._run(None, h, layer, layer.guess_record)

    def _run(
        self, x: np.ndarray | None, h: np.ndarray, layer: RouterLayer, record: Record
    ) -> Routing:
        chosen = self._chosen
        if chosen is None or not record.is_filled_for(x, h, chosen):
            chosen = self._fill(x, h, layer, record)
        self._team.run(route.address, record.address)
        # Copies, because look-ahead and traces keep them; quicker than the address of new arrays.
        return Routing(chosen.experts.copy(), chosen.weights.copy())

    def _fill(
        self, x: np.ndarray | None, h: np.ndarray, layer: RouterLayer, record: Record
    ) -> Routing:
        """Fill `record` for such a call; returns where its results will be."""
        num_rows = len(h)
        if h.shape != (num_rows, layer.hidden_size) or h.dtype != np.float32:
            raise ValueError(
                f"rows must be float32 [num_tokens, {layer.hidden_size}], not {h.dtype} {h.shape}"
            )
        chosen, shape = self._chosen, (num_rows, layer.top_k)
        if chosen is None or chosen.experts.shape != shape:
            chosen = Routing(np.empty(shape, np.int32), np.empty(shape, np.float32))
            self._chosen = chosen
        room = self._scratch.room
        record.set(
            num_rows=num_rows,
            x=x,
            norm=None if x is None else layer.norm,
            h=h,
            prepared=room("prepared", prepared_bytes(num_rows, layer.hidden_size)),
            logits=room("logits", 4 * num_rows * layer.num_experts),
            experts=chosen.experts,
            weights=chosen.weights,
        )
        record.filled_for = x, h, chosen
        return chosen

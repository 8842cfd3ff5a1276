"""The router: norm, logits, a score for each expert, and the best `top_k` of them.

Scores are the softmax over all experts, or each logit's sigmoid. What an expert is chosen by may
differ from the score it is weighted with: by a correction that balances the load, and by groups of
experts of which only the best are used. https://arxiv.org/abs/2412.19437

SparseMixer weights each expert with its softmax among those that are nearly as good and have not
been chosen before it. https://arxiv.org/abs/2409.12136
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.chain import OF_ROUTER, Chain
from cpu_kernels.compiler import inner
from cpu_kernels.exponential import exp
from cpu_kernels.lanes import LANES, by_lanes, larger, store_i32
from cpu_kernels.linear import multiply, prepare_activations, prepared_bytes
from cpu_kernels.memory import load_f32, load_i32, store_f32, word
from cpu_kernels.norm import norm_rows, norm_vectors, rms_norm_rows
from cpu_kernels.record import Record, Scratch, fields, floats
from cpu_kernels.simd import emitted, f32
from cpu_kernels.team import barrier, op, share
from cpu_kernels.workspace import room_for

ROUTER = fields(
    "num_rows x norm norm_bias eps h hidden_size router num_experts top_k scoring correction "
    "scales num_groups used_groups own_norm own normalize scale jitter prepared logits choices "
    "group_scores experts weights"
)
SCORINGS = ("softmax", "sigmoid", "sparsemixer")  # a scoring's number in records is its place here
TAKEN = np.float32(-np.inf)


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


@emitted("void", "i64 i64")
def sigmoids(k, x, count):
    """In place, over `count` float32."""

    def do(offset, lanes):
        one, zero = k.constant(f32(lanes), 1.0), k.constant(f32(lanes), 0.0)
        value = k.load(x + offset, f32(lanes), align=4)
        k.store(x + offset, one / (exp(k, zero - value) + 1.0), align=4)

    by_lanes(k, count, do)


@emitted("void", "i64 i64 i64 i64")
def add_correction(k, scores, correction, choices, count):
    """choices = scores + correction, over `count` float32."""

    def do(offset, lanes):
        value = k.load(scores + offset, f32(lanes), align=4)
        value = value + k.load(correction + offset, f32(lanes), align=4)
        k.store(choices + offset, value, align=4)

    by_lanes(k, count, do)


@inner
def _group_score(choices, first, last, num_best):
    """The sum of the `num_best` (1 or 2) largest."""
    best, second = TAKEN, TAKEN
    for expert in range(first, last):
        value = load_f32(choices, expert)
        if value > best:
            best, second = value, best
        elif value > second:
            second = value
    return best + second if num_best == 2 else best


@inner
def keep_groups(choices, num_experts, num_groups, used_groups, num_best, group_scores):
    """Take the experts of all but the best `used_groups` groups out of the choice."""
    size = num_experts // num_groups
    for group in range(num_groups):
        score = _group_score(choices, group * size, (group + 1) * size, num_best)
        store_f32(group_scores, group, score)
    for group in range(num_groups):
        score, num_better = load_f32(group_scores, group), 0
        for other in range(num_groups):
            value = load_f32(group_scores, other)
            num_better += 1 if value > score or (value == score and other < group) else 0
        if num_better >= used_groups:
            for expert in range(group * size, (group + 1) * size):
                store_f32(choices, expert, TAKEN)


@inner
def choose_experts(choices, scores, num_experts, top_k, normalize, scale, experts, weights):
    """Write which experts have the `top_k` largest choices, the largest first and of equal ones the
    first, and their scores, times `scale`. `choices` are used up. All are addresses."""
    total = np.float32(0.0)
    for rank in range(top_k):
        best, most = -1, TAKEN
        for expert in range(num_experts):
            choice = load_f32(choices, expert)
            if choice != TAKEN and (best < 0 or choice > most):
                best, most = expert, choice
        score = load_f32(scores, best)
        store_f32(choices, best, TAKEN)
        store_i32(experts, rank, best)
        store_f32(weights, rank, score)
        total += score
    if normalize:
        for rank in range(top_k):
            store_f32(weights, rank, load_f32(weights, rank) / total)
    if scale != np.float32(1.0):
        for rank in range(top_k):
            store_f32(weights, rank, load_f32(weights, rank) * scale)


@emitted("f32", "f32")
def _exponential(k, value):
    return exp(k, value)


@inner
def mix_sparsely(logits, num_experts, top_k, jitter, experts, weights):
    """Write the experts of the `top_k` largest logits, and each one's weight: its softmax among
    those left whose logit is at most 2 * `jitter` below, as a share of the larger of the two. What
    is chosen is taken out of `logits`. All are addresses."""
    for rank in range(top_k):
        best, most = -1, TAKEN
        for expert in range(num_experts):
            logit = load_f32(logits, expert)
            if logit != TAKEN and (best < 0 or logit > most):
                best, most = expert, logit
        total = np.float32(0.0)
        for expert in range(num_experts):
            logit = load_f32(logits, expert)
            # Written so that what is not a number counts, and shows.
            below = (most - logit) / max(abs(logit), most)
            if logit != TAKEN and not below > np.float32(2.0) * jitter:
                total += _exponential(logit - most)
        store_f32(logits, best, TAKEN)
        store_i32(experts, rank, best)
        store_f32(weights, rank, np.float32(1.0) / total)


@inner
def _route_row(r, row):
    num_experts, top_k = word(r, ROUTER.num_experts), word(r, ROUTER.top_k)
    scores = word(r, ROUTER.logits) + 4 * row * num_experts
    choices, num_groups = scores, word(r, ROUTER.num_groups)
    experts = word(r, ROUTER.experts) + 4 * row * top_k
    weights = word(r, ROUTER.weights) + 4 * row * top_k
    if word(r, ROUTER.scoring) == 2:
        jitter = load_f32(r, 2 * ROUTER.jitter)
        mix_sparsely(scores, num_experts, top_k, jitter, experts, weights)
        return
    sigmoid = word(r, ROUTER.scoring) == 1
    if sigmoid:
        sigmoids(scores, num_experts)
    else:
        softmax(scores, num_experts)
    if word(r, ROUTER.correction):
        choices = word(r, ROUTER.choices) + 4 * row * num_experts
        add_correction(scores, word(r, ROUTER.correction), choices, num_experts)
    if num_groups > 1:
        used, group_scores = word(r, ROUTER.used_groups), word(r, ROUTER.group_scores)
        group_scores += 4 * row * num_groups
        num_best = 2 if sigmoid and num_groups < num_experts else 1
        keep_groups(choices, num_experts, num_groups, used, num_best, group_scores)
    normalize, scale = word(r, ROUTER.normalize), load_f32(r, 2 * ROUTER.scale)
    choose_experts(choices, scores, num_experts, top_k, normalize, scale, experts, weights)
    scales = word(r, ROUTER.scales)
    if scales:
        for rank in range(top_k):
            own = load_f32(scales, load_i32(experts, rank))
            store_f32(weights, rank, load_f32(weights, rank) * own)


@op
def route(r, thread, num_threads, team):
    num_rows, hidden_size = word(r, ROUTER.num_rows), word(r, ROUTER.hidden_size)
    h, prepared = word(r, ROUTER.h), word(r, ROUTER.prepared)
    lo, hi = share(num_rows, thread, num_threads)
    x, eps = word(r, ROUTER.x), load_f32(r, 2 * ROUTER.eps)
    if word(r, ROUTER.norm):
        bias = word(r, ROUTER.norm_bias)
        norm_rows(x, word(r, ROUTER.norm), bias, h, lo, hi, hidden_size, eps)
    if word(r, ROUTER.own_norm):
        h = word(r, ROUTER.own)
        rms_norm_rows(x, word(r, ROUTER.own_norm), h, lo, hi, hidden_size, eps)
    if x:
        barrier(team)
    prepare_activations(h, hidden_size, num_rows, hidden_size, prepared, thread, num_threads)
    barrier(team)
    logits, num_experts = word(r, ROUTER.logits), word(r, ROUTER.num_experts)
    router = word(r, ROUTER.router)
    multiply(router, prepared, num_rows, logits, num_experts, team, 0)
    barrier(team)
    for row in range(lo, hi):
        _route_row(r, row)


class Routing(NamedTuple):
    experts: np.ndarray  # int32   [num_tokens, top_k], best first
    weights: np.ndarray  # float32 [num_tokens, top_k]


class RouterLayer:
    """A layer's router. `weights` has the attributes of tiered.backend.RouterWeights, its router is
    a Matrix; `config` has those of tiered.config.ModelConfig."""

    def __init__(self, weights: Any, config: Any) -> None:
        router = weights.router
        if tuple(router.shape) != (config.num_experts, config.hidden_size):
            raise ValueError(
                f"the router must have shape {(config.num_experts, config.hidden_size)}, "
                f"not {tuple(router.shape)}"
            )
        self.hidden_size, self.num_experts = config.hidden_size, config.num_experts
        self.top_k, self.num_groups = config.top_k, max(config.expert_groups, 1)
        if config.router_scoring not in SCORINGS:
            raise ValueError(
                f"router_scoring must be one of {', '.join(SCORINGS)}, "
                f"not {config.router_scoring!r}"
            )
        self.norm = norm_vectors(weights.norm, config.hidden_size)
        self.own_norm = floats(weights.own_norm, "own_norm", config.hidden_size)
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
                scoring=SCORINGS.index(config.router_scoring),
                correction=floats(weights.correction, "correction", config.num_experts),
                scales=floats(weights.scales, "scales", config.num_experts),
                own_norm=self.own_norm,
                num_groups=self.num_groups,
                used_groups=config.used_groups,
                normalize=int(config.normalize_top_k),
                scale=float(config.routing_scale),
                jitter=float(config.router_jitter),
            )
            for _ in range(2)
        )
        _ = route.address  # compiled before the first token

    def resize(self, num_rows: int) -> None:
        """So many tokens are there when they are routed next."""
        self.record.resize(num_rows=num_rows)


class Routed(NamedTuple):
    """What the op writes: h = norm(x) and what is chosen for it, with room for more rows than those
    at hand, which come first."""

    h: np.ndarray  # float32 [most_rows, hidden_size]
    experts: np.ndarray  # int32 [most_rows, top_k]
    weights: np.ndarray  # float32 [most_rows, top_k]


class Router:
    """Runs router layers; one call at a time. (To guess in another thread takes another Router.)"""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._scratch = Scratch()
        self._routed: Routed | None = None

    def route(self, x: np.ndarray, layer: RouterLayer) -> tuple[np.ndarray, Routing]:
        """h = norm(x), which stays until the next call, and the experts chosen for it."""
        self._chain.forget()  # the layer may wait to be run for other rows
        routed = self._prepare(x, layer)
        return routed.h[: len(x)], self._run(layer.record, routed, len(x))

    def choose(self, x: np.ndarray, layer: RouterLayer) -> Routed:
        """The same where only ops want to know: it is there when what waits is done, and
        until the next call. Another call returns the same object, while memory suffices."""
        routed = self._prepare(x, layer)
        self._chain.queue(route.address, layer.record.address, OF_ROUTER, layer.resize)
        return routed

    def guess(self, x: np.ndarray, h: np.ndarray, layer: RouterLayer) -> Routing:
        """The experts that the layer would choose for x, of which another layer made the `h`."""
        routed, record = self._room(len(h), layer), layer.guess_record
        given = {"h": h} if layer.own_norm is None else {"h": h, "x": x}
        if not (record.is_filled_for(routed) and record.points_to(**given)):
            self._fill(record, routed, layer, **given)
        record.resize(num_rows=len(h))
        return self._run(record, routed, len(h))

    def _prepare(self, x: np.ndarray, layer: RouterLayer) -> Routed:
        """Have the layer's record say that x is routed."""
        routed, record = self._room(len(x), layer), layer.record
        if not (record.is_filled_for(routed) and record.points_to(x=x)):
            self._chain.forget()  # the layer may wait to be run as it is
            self._fill(record, routed, layer, x=x, h=routed.h)
            record.set(**layer.norm)
        layer.resize(len(x))
        return routed

    def _run(self, record: Record, routed: Routed, num_rows: int) -> Routing:
        self._chain.run(route.address, record.address, OF_ROUTER)
        # Copies, because look-ahead and traces keep them; quicker than the address of new arrays.
        return Routing(routed.experts[:num_rows].copy(), routed.weights[:num_rows].copy())

    def _room(self, num_rows: int, layer: RouterLayer) -> Routed:
        most, routed = room_for(num_rows), self._routed
        if routed is not None:
            shapes = (num_rows, layer.hidden_size), (num_rows, layer.top_k)
            if (routed.h[:num_rows].shape, routed.experts[:num_rows].shape) == shapes:
                return routed
            most = max(most, len(routed.h))
        h, shape = self._scratch.floats("h", most, layer.hidden_size), (most, layer.top_k)
        self._routed = Routed(h, np.zeros(shape, np.int32), np.zeros(shape, np.float32))
        return self._routed

    def _fill(
        self, record: Record, routed: Routed, layer: RouterLayer, **given: np.ndarray
    ) -> None:
        for rows in given.values():
            if rows.shape[1:] != (layer.hidden_size,) or rows.dtype != np.float32:
                raise ValueError(
                    f"rows must be float32 [num_tokens, {layer.hidden_size}], "
                    f"not {rows.dtype} {rows.shape}"
                )
        room, most = self._scratch.room, len(routed.h)
        record.set(
            **given,
            own=room("own", 0 if layer.own_norm is None else 4 * most * layer.hidden_size),
            prepared=room("prepared", prepared_bytes(most, layer.hidden_size)),
            logits=room("logits", 4 * most * layer.num_experts),
            choices=room("choices", 4 * most * layer.num_experts),
            group_scores=room("group_scores", 4 * most * layer.num_groups),
            experts=routed.experts,
            weights=routed.weights,
        )
        record.mark_filled_for(routed)

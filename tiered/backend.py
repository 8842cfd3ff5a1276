"""The arithmetic that a decoder needs from a device. Implemented in cpu_kernels and gpu_backend.

A backend's own array is opaque here: the decoder hands it from one call to the next and never
looks inside (where a rule dropped experts, it sets rows of pair outputs to 0). Arrays named `x` and
`h` are float32 [num_tokens, hidden_size] in backend memory; `x` stays valid until the next `embed`,
`h` until the next `route`. What steers (ids, weights, positions, addresses) is NumPy.

Where a model has `layer_norms`, the `norm` of attention, router and output layer is float32
[2, hidden_size]: weights, then biases.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import psutil

from tiered.config import EngineConfig, ModelConfig
from tiered.experts import ExpertJobs, ExpertLayout, ExpertTable, Routing
from tiered.gpu.devices import described, device_names
from tiered.planning.hardware import Hardware
from tiered.user_cache import gpu_file, tuning_file

Array = Any
Matrix = Any  # a weight matrix in backend memory, whatever its number format


class AttentionWeights(NamedTuple):
    norm: np.ndarray  # float32 [hidden_size]
    q: Matrix  # [num_heads * head_dim, hidden_size]
    k: Matrix  # [num_kv_heads * head_dim, hidden_size]
    v: Matrix  # [num_kv_heads * head_dim, hidden_size]
    o: Matrix  # [hidden_size, num_heads * head_dim]
    q_norm: np.ndarray | None = None  # float32 [head_dim] or [num_heads * head_dim]
    k_norm: np.ndarray | None = None  # float32 [head_dim] or [num_kv_heads * head_dim]
    sinks: np.ndarray | None = None  # float32 [num_heads]
    gate: Matrix | None = None  # [num_heads * head_dim, hidden_size]
    out_norm: np.ndarray | None = None  # float32 [hidden_size]: of the result


class LatentWeights(NamedTuple):
    """Multi-head latent attention; dimensions are those of tiered.config.LatentConfig."""

    norm: np.ndarray  # float32 [hidden_size]
    q: Matrix  # [num_heads * (nope_dim + rope_dim), q_rank, or hidden_size without q_a]
    q_a: Matrix | None  # [q_rank, hidden_size]
    q_a_norm: np.ndarray | None  # float32 [q_rank]
    kv_a: Matrix  # [kv_rank + rope_dim, hidden_size]
    kv_a_norm: np.ndarray  # float32 [kv_rank]
    k_b: Matrix  # [num_heads * kv_rank, nope_dim]
    v_b: Matrix  # [num_heads * value_dim, kv_rank]
    o: Matrix  # [hidden_size, num_heads * value_dim]


class DeltaWeights(NamedTuple):
    """Gated DeltaNet; `channels` are queries, keys and values of all heads."""

    norm: np.ndarray  # float32 [hidden_size]
    qkv: Matrix  # [channels, hidden_size]
    z: Matrix  # [num_value_heads * value_dim, hidden_size]: gates the result
    b: Matrix  # [num_value_heads, hidden_size]
    a: Matrix  # [num_value_heads, hidden_size]
    conv: np.ndarray  # float32 [conv_size, channels]
    dt_bias: np.ndarray  # float32 [num_value_heads]
    decay: np.ndarray  # float32 [num_value_heads]: -exp(A_log)
    head_norm: np.ndarray  # float32 [value_dim]
    o: Matrix  # [hidden_size, num_value_heads * value_dim]


class ConvWeights(NamedTuple):
    """A gated short convolution."""

    norm: np.ndarray  # float32 [hidden_size]
    gates: Matrix  # [3 * hidden_size, hidden_size]: two gates, and what is convolved
    conv: np.ndarray  # float32 [conv_size, hidden_size]
    o: Matrix  # [hidden_size, hidden_size]


class Mamba2Weights(NamedTuple):
    """Mamba-2; dimensions are those of tiered.config.Mamba2Config."""

    norm: np.ndarray  # float32 [hidden_size]
    z: Matrix  # [inner_size, hidden_size]: gates the result
    xbc: Matrix  # [channels, hidden_size]: values, keys and queries
    dt: Matrix  # [num_heads, hidden_size]: how far each head goes on
    conv: np.ndarray  # float32 [conv_size, channels]
    conv_bias: np.ndarray | None  # float32 [channels]
    dt_bias: np.ndarray  # float32 [num_heads]
    decay: np.ndarray  # float32 [num_heads]: -exp(A_log)
    skip: np.ndarray  # float32 [num_heads]: what values are multiplied with and added to results
    out_norm: np.ndarray  # float32 [inner_size]
    o: Matrix  # [hidden_size, inner_size]


class RouterWeights(NamedTuple):
    norm: np.ndarray  # float32 [hidden_size]: makes the experts' input, and mostly the router's
    router: Matrix  # [num_experts, hidden_size]
    correction: np.ndarray | None = None  # float32 [num_experts]: added to choose experts by
    own_norm: np.ndarray | None = None  # float32 [hidden_size]: makes the router's input
    scales: np.ndarray | None = None  # float32 [num_experts]: times the routing weights


class MergeWeights(NamedTuple):
    """Of a layer whose experts run beside a dense feed-forward, each with norms of its own."""

    dense_norm: np.ndarray  # float32 [hidden_size]: of the dense result
    routed_norm: np.ndarray  # float32 [hidden_size]: of the experts' result
    norm: np.ndarray  # float32 [hidden_size]: of their sum
    scale: float  # of the whole layer


class JoinWeights(NamedTuple):
    """What a layer that drafts tokens begins with; see tiered.draft_layer."""

    embedding_norm: np.ndarray  # float32 [hidden_size]
    last_norm: np.ndarray  # float32 [hidden_size]: of whatever made the hidden states
    hidden_norm: np.ndarray  # float32 [hidden_size]: of these, once they are normed
    projection: Matrix  # [hidden_size, 2 * hidden_size]


class ExpertBiases(NamedTuple):
    """What all experts of a layer add to their products: small, so never in a tier."""

    gate: np.ndarray  # float32 [num_experts, expert_size]
    up: np.ndarray  # float32 [num_experts, expert_size]
    down: np.ndarray  # float32 [num_experts, hidden_size]


class FeedForwardWeights(NamedTuple):
    """A dense feed-forward: the whole of a dense layer, or the shared expert of a sparse one."""

    gate: Matrix  # [size, hidden_size]
    up: Matrix  # [size, hidden_size]
    down: Matrix  # [hidden_size, size]
    scale: Matrix | None = None  # [1, hidden_size]: output times sigmoid(scale @ h), per token


class Batch(NamedTuple):
    """Which token stands where. Rows of one sequence are in order of position."""

    tokens: np.ndarray  # int32 [num_tokens]
    positions: np.ndarray  # int32 [num_tokens]
    sequences: np.ndarray  # int32 [num_tokens]: a row of `page_tables`
    page_tables: np.ndarray  # int32 [num_sequences, max_pages]: pages of the KV cache, -1: none
    states: list[Any] | None = None  # of recurrent models, each sequence's `recurrent_state`


class Backend(Protocol):
    """See cpu_kernels.backend.CpuBackend for the meaning of each call in code."""

    few_rows: int
    """Tokens of a forward pass up to which each gets the bits that it would have alone."""

    finds_experts: bool
    """Whether there is `routed_experts`."""

    name: str
    isa: str  # the instructions its kernels use
    num_threads: int
    seconds: float  # spent in these calls' arithmetic so far

    def matrix(
        self, data: np.ndarray, format: str, shape: tuple[int, int], bias: np.ndarray | None = None
    ) -> Matrix:
        """Adopt `data` (uint8, rows of `format` blocks; kept by reference, not copied)."""

    def attention_layer(
        self, weights: AttentionWeights, config: ModelConfig, index: int = 0
    ) -> Any:
        """Prepare the attention of layer `index` once; the result goes to `attention`."""

    def latent_attention_layer(
        self, weights: LatentWeights, config: ModelConfig, index: int = 0
    ) -> Any:
        """The same for a layer whose keys and values are views of one compressed vector."""

    def delta_layer(self, weights: DeltaWeights, config: ModelConfig, number: int) -> Any:
        """The same for a recurrent layer, the model's `number`-th (from 0)."""

    def conv_layer(self, weights: ConvWeights, config: ModelConfig, number: int) -> Any:
        """The same for a gated short convolution."""

    def mamba2_layer(self, weights: Mamba2Weights, config: ModelConfig, number: int) -> Any:
        """The same for Mamba-2."""

    def recurrent_state(self, config: ModelConfig) -> Any:
        """Memory for what the recurrent layers remember of one text."""

    def copy_state(self, source: Any, target: Any) -> None:
        """Make `target` remember what `source` does."""

    def router_layer(self, weights: RouterWeights, config: ModelConfig) -> Any:
        """Prepare the norm before the experts and the router; the result goes to `route`."""

    def expert_layer(
        self,
        layout: ExpertLayout,
        config: ModelConfig,
        biases: ExpertBiases | None = None,
        others: Sequence[ExpertLayout] = (),
        kinds: np.ndarray | None = None,
    ) -> Any:
        """Prepare a layer's experts once; the result goes to `experts`. With `others`, expert e has
        the `kinds[e]`-th (int32 [num_experts]) of `layout` and these."""

    def feed_forward_layer(
        self, weights: FeedForwardWeights, config: ModelConfig, norm: np.ndarray | None = None
    ) -> Any:
        """Prepare a dense feed-forward once; with `norm`, of a layer without experts."""

    def merge_layer(self, weights: MergeWeights, config: ModelConfig) -> Any:
        """Prepare the norms after a layer's branches once; the result goes to `merge`."""

    def join_layer(self, weights: JoinWeights, config: ModelConfig) -> Any:
        """Prepare the beginning of a layer that drafts tokens; the result goes to `join`."""

    def of_layer(self, index: int) -> Backend:
        """The backend that layer `index` lies on, and that is asked for all of its calls; the
        first layer's embeds, that of the last one (-1) has the head. Itself, but for several
        GPUs."""

    def kv_pages(self, config: ModelConfig, num_pages: int, page_size: int, dtype: str) -> Any:
        """KV cache memory for all layers; `dtype` is "f32", "f16" or "int8"."""

    def chain(self, num_tokens: int, layers: Sequence[Any]) -> AbstractContextManager[None]:
        """Within, a pass of so many tokens through `layers`: what does not return NumPy may be put
        off until something does, or until the end, if that is quicker. (On a GPU all is.)"""

    def again(
        self, layers: Sequence[Any], table: Matrix, batch: Batch, kv: Any, scale: float = 1.0
    ) -> Array | None:
        """The last chain, if it was for the same `layers` and all in it was put off, with another
        batch: x after all of it, from `embed` on. None: it must be called for anew."""

    def chained_seconds(self) -> Mapping[str, float]:
        """Seconds that what was put off has taken since the last call, by part: "attention",
        "router", "experts", "head"."""

    def embed(self, table: Matrix, tokens: np.ndarray, scale: float = 1.0) -> Array:
        """x: rows of the embedding table, times `scale`; starts a new forward pass."""

    def take(self, x: Array) -> Array:
        """x or h in this backend's memory: itself, or a copy of another backend's."""

    def attention(self, x: Array, layer: Any, kv: Any, index: int, batch: Batch) -> None:
        """x += attention(norm(x)); appends this batch's keys and values to layer `index` of kv."""

    def route(self, x: Array, layer: Any) -> tuple[Array, Routing]:
        """h = norm(x), and the experts that the router chooses for it."""

    def guess(self, x: Array, h: Array, layer: Any) -> Routing:
        """What another layer's router makes of `h`, or of `x` by a norm of its own: look-ahead."""

    def experts(
        self, h: Array, layer: Any, addresses: np.ndarray, jobs: ExpertJobs, out: Array
    ) -> None:
        """Run jobs.experts[i], whose gate, up and down lie at addresses[i] (int64 [num_used, 3]),
        on its pairs; write each pair's result (unweighted) to that row of `out`. `h` has a row for
        each token, or one for each pair."""

    def routed_experts(
        self, x: Array, router: Any, layer: Any, table: ExpertTable, into: Array
    ) -> Array:
        """route, experts and combine, of a pass in one chunk, without telling what was chosen:
        `into` (x, or a branch) += what the experts say. Counts in the `table` which are used.
        Returns h."""

    def weighted(self, h: Array, weights: np.ndarray) -> Array:
        """A row for each pair: weights[t, rank] * h[t]; until the next call."""

    def hidden_states(self, num_tokens: int) -> Array:
        """Room for hidden states, which stays until it is asked for again: float32 [num_tokens,
        hidden_size]."""

    def pair_outputs(self, num_pairs: int) -> Array:
        """Room for `experts` to write to: float32 [num_pairs, hidden_size]."""

    def combine(self, x: Array, out: Array, weights: np.ndarray) -> None:
        """x[t] += sum over ranks, in order, of weights[t, rank] * out[t * top_k + rank]."""

    def feed_forward(
        self, x: Array, h: Array | None, layer: Any, into: Array | None = None
    ) -> None:
        """x (or `into`) += ffn(h), where h is norm(x) if not given."""

    def branches(self, x: Array) -> tuple[Array, Array]:
        """Two arrays like x, zero, for what is to be merged; until the next layer's."""

    def merge(self, x: Array, dense: Array, routed: Array, layer: Any) -> None:
        """x = (x + norm(norm(dense) + norm(routed))) * scale."""

    def join(self, x: Array, hidden: np.ndarray, layer: Any) -> None:
        """x = projection @ [norm(x), norm(last_norm(hidden))]; `hidden` is float32, shaped as x."""

    def in_ram(self, x: Array) -> np.ndarray:
        """x of a forward pass whose logits are there: float32, until the next pass."""

    def output_layer(self, norm: np.ndarray, head: Matrix, config: ModelConfig) -> Any:
        """Prepare the last norm and the output head once; the result goes to `head`."""

    def head(self, x: Array, rows: np.ndarray, layer: Any) -> np.ndarray:
        """Logits of the given rows of x: float32 [len(rows), vocab_size]."""

    def close(self) -> None:
        """End the threads."""


def open_cpu(choices: EngineConfig, beside_gpu: bool = False) -> Backend:
    """The CPU's backend, with the threads and kernels that the user chose."""
    from cpu_kernels.backend import CpuBackend

    backend: Backend = CpuBackend(
        choices.threads or default_threads(), choices.isa, choices.quantize == "none", beside_gpu
    )
    return backend


def open_backend(choices: EngineConfig) -> Backend:
    """The backend of the device that the user chose; "auto" is a GPU where torch finds one."""
    if choices.device == "cpu" or (choices.device == "auto" and not has_gpu()):
        return open_cpu(choices)
    return open_gpu(choices)


def open_gpu(choices: EngineConfig) -> Backend:
    """A GPU, or several, with the CPU beside them. RuntimeError says what is missing."""
    names = device_names("cuda" if choices.device == "auto" else choices.device)
    machines = [machine for machine in map(described, names) if machine is not None]
    if machines:
        return open_simulated(choices, names, machines)
    with needing_torch(choices.device):
        from gpu_backend.backend import GpuBackend
        from gpu_backend.device import card_name
        from gpu_backend.torch_cards import TorchCards
        from gpu_backend.tuning import load_tuning
    names = numbered(names)
    exact, host = choices.quantize == "none", open_cpu(choices, beside_gpu=True)
    cards: list[Any] = []
    try:
        for name in names:
            device = name.replace("sim", "cpu")
            tuning = load_tuning(tuning_file(), card_name(device))
            cards.append(GpuBackend(device, exact, tuning, host))
    except BaseException:
        host.close()
        raise
    backend: Backend = TorchCards(cards, names)
    return backend


@contextmanager
def needing_torch(device: str) -> Iterator[None]:
    """Around imports: RuntimeError says what to install."""
    try:
        yield
    except ImportError as error:
        raise RuntimeError(f"device {device!r} needs torch: pip install 'tiered[gpu]'") from error


def open_simulated(choices: EngineConfig, names: list[str], machines: list[Hardware]) -> Backend:
    """Described cards, in the first one's machine; the CPU computes for them."""
    from gpu_backend.simulated import SimulatedCard, SimulatedCards, SimulatedGpu, Stream
    from tiered.simulated.clock import VirtualClock
    from tiered.simulated.machine import LiveMachine
    from tiered.simulated.timing import simulated

    clock, kernels, host = VirtualClock(), Stream(), open_cpu(choices)
    hosts, cards, locked = machines[0], list[Any](), dict[int, int]()
    for machine in machines:
        assert machine.gpu is not None
        live = LiveMachine.of(replace(hosts, gpu=machine.gpu))
        device = SimulatedGpu(
            live, clock, machine.gpu.room, kernels,
            lockable_bytes=hosts.host.lockable, locked=locked,
        )  # fmt: skip
        cards.append(SimulatedCard(host, device))
    label = " and ".join(machine.label for machine in machines)
    timing = simulated(clock, cards[0].device.machine, label)
    backend: Backend = SimulatedCards(cards, names, host, timing)
    return backend


def numbered(names: list[str]) -> list[str]:
    """The same, with all that torch finds in the place of "cuda:all"."""
    if names != ["cuda:all"]:
        return names
    from gpu_backend.device import num_cards

    return [f"cuda:{number}" for number in range(num_cards())] or ["cuda"]


def calibrate_gpu(name: str) -> dict[str, Any]:
    """Measure a CUDA device and find how its kernels are best launched, keep both, and return what
    was measured (see gpu_backend.calibrate). RuntimeError says what is missing."""
    with needing_torch(name):
        from gpu_backend.probe import calibrate_card
    measured: dict[str, Any] = calibrate_card(name, gpu_file(), tuning_file())
    return measured


def bench_gpu(name: str, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Rates of a GPU's kernels (see gpu_backend.bench); "sim" is torch's CPU device. RuntimeError
    says what is missing."""
    with needing_torch(name):
        from gpu_backend.bench import kernel_report
        from gpu_backend.device import card_name
        from gpu_backend.tuning import load_tuning
    device = "cpu" if name == "sim" else name
    tuning = load_tuning(tuning_file(), card_name(device))
    report: dict[str, Any] = kernel_report(device, tuning, progress)
    return report


def has_gpu() -> bool:
    """Whether torch is installed and finds a CUDA device that kernels run on."""
    try:
        from gpu_backend.device import is_usable
    except ImportError:
        return False
    return bool(is_usable())


def default_threads() -> int:
    """Cores that this process may use: one thread each, hyperthreads left out."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False)
    return max(1, min(allowed or 1, physical or allowed or 1))

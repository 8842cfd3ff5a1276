"""The arithmetic of a decoder on the CPU: see tiered.backend.Backend, which this implements.

Each method is one op on a team of threads, whose arguments were written to memory when the layer
was prepared; a call only adds what changes with the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from cpu_kernels.attention import Attention, AttentionLayer, kv_pages
from cpu_kernels.chain import Chain
from cpu_kernels.chosen import ChosenExperts
from cpu_kernels.combine import Combine, Weighted
from cpu_kernels.delta import DELTA_BATCH, DeltaLayer
from cpu_kernels.embed import Embedding
from cpu_kernels.experts import ExpertLayer
from cpu_kernels.feed_forward import FeedForwardLayer
from cpu_kernels.fetched import FetchedExperts
from cpu_kernels.head import Head, OutputLayer
from cpu_kernels.isa import choose
from cpu_kernels.join import Join, JoinLayer
from cpu_kernels.kv import KVPages
from cpu_kernels.latent import LatentAttentionLayer
from cpu_kernels.linear import FEW_ROWS, Matrix
from cpu_kernels.mamba2 import MAMBA_BATCH, Mamba2Layer
from cpu_kernels.merge import Merge, MergeLayer
from cpu_kernels.record import Scratch
from cpu_kernels.recurrent import RecurrentLayers, RecurrentState
from cpu_kernels.route import Router, RouterLayer, Routing
from cpu_kernels.short_conv import CONV_BATCH, ConvLayer
from cpu_kernels.team import Team
from cpu_kernels.workspace import Workspace, room_for

# Of a pass of many rows in one go: whoever interrupts it waits for its end.
MOST_SECONDS = 1.0


class PreparedExperts(NamedTuple):
    """A layer's experts in the two ways that they are run."""

    fetched: FetchedExperts
    chosen: ChosenExperts


class CpuBackend:
    """`threads`: how many compute. `isa`: which instructions, "auto" for the best there are.
    `exact`: quantized weights are multiplied with float32 activations, not with int8 ones.
    `beside_gpu`: experts get the bits that a GPU gives them, whatever instructions there are.

    One forward pass at a time; arrays that a method returns stay until its next call.
    """

    name = "cpu"
    finds_experts = True
    few_rows = FEW_ROWS

    def __init__(
        self, threads: int, isa: str = "auto", exact: bool = False, beside_gpu: bool = False
    ) -> None:
        self._isa = choose(isa)
        self.isa = self._isa.name
        self.exact, self._beside_gpu = exact, beside_gpu
        self.num_threads = threads
        self._workspace = Workspace()
        self._scratch = Scratch()
        self._team = Team(threads)
        self._chain = Chain(self._team)
        self._embedding = Embedding(self._chain)
        self._attention = Attention(self._chain)
        self._recurrent = {
            kind: RecurrentLayers(self._chain, batch)
            for kind, batch in (
                (DeltaLayer, DELTA_BATCH),
                (ConvLayer, CONV_BATCH),
                (Mamba2Layer, MAMBA_BATCH),
            )
        }
        self._router = Router(self._chain)
        # Look-ahead may run beside the forward pass, and must not use its memory.
        self._guesser = Router(self._chain)
        self._combine = Combine()
        self._weighted = Weighted()
        self._merge = Merge(self._chain)
        self._join = Join(self._chain)
        self._head = Head(self._chain)
        self._hidden_size = 0
        self._known: tuple[Any, ...] = ()  # what the last chain was for
        self._row_seconds = float("inf")  # of the last pass of many rows

    def matrix(
        self, data: np.ndarray, format: str, shape: tuple[int, int], bias: np.ndarray | None = None
    ) -> Matrix:
        return Matrix(data, format, shape, self._isa, bias, self.exact)

    # -- layers, prepared once --

    def attention_layer(self, weights: Any, config: Any, index: int = 0) -> AttentionLayer:
        return self._attention.layer(weights, config, index)

    def latent_attention_layer(
        self, weights: Any, config: Any, index: int = 0
    ) -> LatentAttentionLayer:
        return self._attention.latent_layer(weights, config, index)

    def delta_layer(self, weights: Any, config: Any, number: int) -> DeltaLayer:
        return DeltaLayer(weights, config, number, self._recurrent[DeltaLayer].batch)

    def conv_layer(self, weights: Any, config: Any, number: int) -> ConvLayer:
        return ConvLayer(weights, config, number, self._recurrent[ConvLayer].batch)

    def mamba2_layer(self, weights: Any, config: Any, number: int) -> Mamba2Layer:
        return Mamba2Layer(weights, config, number, self._recurrent[Mamba2Layer].batch)

    def recurrent_state(self, config: Any) -> RecurrentState:
        return RecurrentState(config)

    def of_layer(self, index: int) -> CpuBackend:
        return self

    def copy_state(self, source: RecurrentState, target: RecurrentState) -> None:
        np.copyto(target.values, source.values)

    def router_layer(self, weights: Any, config: Any) -> RouterLayer:
        return RouterLayer(weights, config)

    def expert_layer(
        self,
        layout: Any,
        config: Any,
        biases: Any = None,
        others: Sequence[Any] = (),
        kinds: np.ndarray | None = None,
    ) -> PreparedExperts:
        layer = ExpertLayer(
            layout, config, self._isa, self.exact, self._workspace, biases, others, kinds,
            self._beside_gpu,
        )  # fmt: skip
        self._hidden_size = layer.hidden_size  # of all layers
        return PreparedExperts(FetchedExperts(layer), ChosenExperts(layer))

    def feed_forward_layer(
        self, weights: Any, config: Any, norm: np.ndarray | None = None
    ) -> FeedForwardLayer:
        return FeedForwardLayer(weights, config, self._isa, self.exact, self._workspace, norm)

    def merge_layer(self, weights: Any, config: Any) -> MergeLayer:
        return MergeLayer(weights, config)

    def join_layer(self, weights: Any, config: Any) -> JoinLayer:
        return JoinLayer(weights, config)

    def output_layer(self, norm: np.ndarray, head: Matrix, config: Any) -> OutputLayer:
        return OutputLayer(norm, head, config)

    def kv_pages(self, config: Any, num_pages: int, page_size: int, dtype: str) -> KVPages:
        return kv_pages(config, num_pages, page_size, dtype)

    # -- the forward pass --

    @contextmanager
    def chain(self, num_tokens: int, layers: Sequence[Any]) -> Iterator[None]:
        with self._timed(num_tokens), self._chain.opened(num_tokens):
            yield
        self._known = room_for(num_tokens), list(layers), *self._attention.batch

    def again(
        self, layers: Sequence[Any], table: Matrix, batch: Any, kv: KVPages, scale: float = 1.0
    ) -> np.ndarray | None:
        if not self._chain.is_known or not self._is_short(len(batch.tokens)):
            return None
        most_rows, known, x, _, known_kv, geometry = self._known
        if len(batch.tokens) > most_rows:
            return None
        if kv is not known_kv or len(layers) != len(known) or not all(map(is_, layers, known)):
            return None
        new = self._embedding.fill(table, batch.tokens, scale)
        if new.base is not x.base or not self._attention.again(new, batch, kv, geometry):
            return None
        if not self._chain.resize(len(new)):
            return None
        with self._timed(len(new)):
            self._chain.again()
        return new

    def _is_short(self, num_tokens: int) -> bool:
        return num_tokens <= FEW_ROWS or num_tokens * self._row_seconds <= MOST_SECONDS

    @contextmanager
    def _timed(self, num_tokens: int) -> Iterator[None]:
        start = self._team.seconds
        yield
        if num_tokens > FEW_ROWS:
            self._row_seconds = (self._team.seconds - start) / num_tokens

    def chained_seconds(self) -> dict[str, float]:
        return self._chain.take_seconds()

    def embed(self, table: Matrix, tokens: np.ndarray, scale: float = 1.0) -> np.ndarray:
        return self._embedding.run(table, tokens, scale)

    def take(self, x: np.ndarray) -> np.ndarray:
        return x

    def attention(self, x: np.ndarray, layer: Any, kv: KVPages, index: int, batch: Any) -> None:
        if len(x) > FEW_ROWS:
            self._chain.finish()  # of many rows a layer at a time: an interrupt waits for one
        if (recurrent := self._recurrent.get(type(layer))) is not None:
            recurrent.run(x, layer, batch)
        else:
            self._attention.run(x, layer, kv, index, batch)

    def route(self, x: np.ndarray, layer: RouterLayer) -> tuple[np.ndarray, Routing]:
        return self._router.route(x, layer)

    def guess(self, x: np.ndarray, h: np.ndarray, layer: RouterLayer) -> Routing:
        return self._guesser.guess(x, h, layer)

    def experts(
        self,
        h: np.ndarray,
        layer: PreparedExperts,
        addresses: np.ndarray,
        jobs: Any,
        out: np.ndarray,
    ) -> None:
        layer.fetched.run(self._chain, h, addresses, jobs, out)

    def routed_experts(
        self,
        x: np.ndarray,
        router: RouterLayer,
        layer: PreparedExperts,
        table: Any,
        into: np.ndarray,
    ) -> np.ndarray:
        routed = self._router.choose(x, router)
        out = self._scratch.room("pairs", 4 * routed.experts.size * self._hidden_size)
        layer.chosen.run(self._chain, routed, table, out, into)
        return routed.h[: len(x)]

    def weighted(self, h: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return self._weighted.run(self._chain, h, weights)

    def hidden_states(self, num_tokens: int) -> np.ndarray:
        return self._scratch.floats("hidden states", num_tokens, self._hidden_size)

    def pair_outputs(self, num_pairs: int) -> np.ndarray:
        return self._scratch.floats("pairs", num_pairs, self._hidden_size)

    def combine(self, x: np.ndarray, out: np.ndarray, weights: np.ndarray) -> None:
        self._combine.run(self._chain, x, out, weights)

    def feed_forward(
        self,
        x: np.ndarray,
        h: np.ndarray | None,
        layer: FeedForwardLayer,
        into: np.ndarray | None = None,
    ) -> None:
        layer.run(self._chain, x, h, into)

    def branches(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._merge.branches(x)

    def merge(
        self, x: np.ndarray, dense: np.ndarray, routed: np.ndarray, layer: MergeLayer
    ) -> None:
        self._merge.run(x, dense, routed, layer)

    def join(self, x: np.ndarray, hidden: np.ndarray, layer: JoinLayer) -> None:
        self._join.run(x, hidden, layer)

    def in_ram(self, x: np.ndarray) -> np.ndarray:
        return x

    def head(self, x: np.ndarray, rows: np.ndarray, layer: OutputLayer) -> np.ndarray:
        return self._head.run(x, rows, layer)

    @property
    def seconds(self) -> float:
        """Time spent in ops so far; the rest of a forward pass is Python."""
        return self._team.seconds

    def close(self) -> None:
        self._team.close()

"""The arithmetic of a decoder on a GPU: see tiered.backend.Backend, which this implements.

On torch's "cpu" device, plain torch takes the place of the kernels and computes the same numbers,
so that everything here runs, and is tested, on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from gpu_backend import reference
from gpu_backend.arrays import Jobs
from gpu_backend.attention import Attention, AttentionLayer
from gpu_backend.delta import DeltaLayer
from gpu_backend.device import TorchDevice
from gpu_backend.experts import ExpertLayer, weighted
from gpu_backend.feed_forward import FeedForwardLayer
from gpu_backend.graphs import Buffers, CudaRecorder, Graphs
from gpu_backend.head import OutputLayer
from gpu_backend.host_speed import expert_seconds
from gpu_backend.join import JoinLayer
from gpu_backend.kv import KVPages, kv_pages
from gpu_backend.latent import LatentAttentionLayer
from gpu_backend.mamba2 import Mamba2Layer
from gpu_backend.matrix import Matrix, Rows
from gpu_backend.merge import MergeLayer
from gpu_backend.pieces import in_pieces
from gpu_backend.recurrent import RecurrentState, copy_state
from gpu_backend.route import RouterLayer, Routing, on_host
from gpu_backend.short_conv import ConvLayer
from gpu_backend.slots import ON_DEVICE, GpuSlots
from gpu_backend.tuning import Tuning

RECURRENT = DeltaLayer, ConvLayer, Mamba2Layer


class GpuBackend:
    """`device` is "cuda", "cuda:1", ... or "cpu". `exact`: quantized dense weights are multiplied
    with float32 activations (not those of experts: they keep the integer arithmetic). `host` is a
    CpuBackend: an expert runs where its blob lies, so one that is not in a slot of this device's
    memory runs there, while the device computes what it was given before.

    One forward pass at a time. Raises RuntimeError if there is no such device.
    """

    finds_experts = False

    def __init__(
        self,
        device: str = "cuda",
        exact: bool = False,
        tuning: Tuning | None = None,
        host: Any = None,
    ) -> None:
        self.device = TorchDevice(device)
        self.name = device
        self.exact = exact
        self.host = host
        self._torch = self.device.torch_device
        self.arithmetic: Any = reference
        if self._torch.type == "cuda" or _interpreted():
            launcher = _launcher()(tuning, self.device.capability, self.device.index)
            if self.device.is_cuda:
                launcher.try_out(self._torch)
            self.arithmetic = launcher
        record = CudaRecorder(self._torch) if self.device.is_cuda and not exact else None
        self.graphs = Graphs(Buffers(self._torch), record)
        self._attention = Attention(self._torch, self.arithmetic, self.graphs)
        self._slots: GpuSlots | None = None
        self._shared: torch.Tensor | None = None  # by slots and the KV cache
        self._hidden_size = 0
        self._rows: Rows | None = None  # of the latest h
        self._host_h: tuple[torch.Tensor, np.ndarray] | None = None

    def chain(self, num_tokens: int, layers: Any) -> AbstractContextManager[None]:
        return nullcontext()  # a device puts off everything by itself

    def again(self, layers: Any, table: Any, batch: Any, kv: Any, scale: float = 1.0) -> None:
        """Never: a device is given each pass anew."""

    def chained_seconds(self) -> dict[str, float]:
        return {}

    @property
    def isa(self) -> str:
        """The instructions that the host's kernels use."""
        return self.host.isa if self.host else ""

    @property
    def num_threads(self) -> int:
        return self.host.num_threads if self.host else 1

    @property
    def seconds(self) -> float:
        """Time that the host's kernels took. The device's is not known: nothing waits for it."""
        return self.host.seconds if self.host else 0.0

    @property
    def few_rows(self) -> int:
        """Rows of activations up to which the host computes the same bits."""
        from cpu_kernels.linear import FEW_ROWS

        return FEW_ROWS

    def slots(
        self, space: Any, layouts: dict[int, Any], num_experts: int, nbytes: int = 0
    ) -> GpuSlots:
        """Memory for a tier of experts on this device; `layouts` by layer. With `nbytes`, it has so
        many, and the KV cache is at its end. Raises MemoryError."""
        self._slots = GpuSlots(
            self.device, space, layouts, self.arithmetic.rearrange, num_experts, nbytes
        )
        self._shared = self._slots.slab if nbytes else None
        if self.device.is_cuda:
            self._slots.try_out()
        return self._slots

    def matrix(
        self, data: np.ndarray, format: str, shape: tuple[int, int], bias: np.ndarray | None = None
    ) -> Matrix:
        return Matrix(data, format, shape, self._torch, self.arithmetic, bias, self.exact)

    # -- layers, prepared once --

    def attention_layer(self, weights: Any, config: Any, index: int = 0) -> AttentionLayer:
        return self._attention.layer(weights, config, index)

    def latent_attention_layer(
        self, weights: Any, config: Any, index: int = 0
    ) -> LatentAttentionLayer:
        return self._attention.latent_layer(weights, config, index)

    def delta_layer(self, weights: Any, config: Any, number: int) -> DeltaLayer:
        return DeltaLayer(weights, config, number, self._torch)

    def conv_layer(self, weights: Any, config: Any, number: int) -> ConvLayer:
        return ConvLayer(weights, config, number, self._torch)

    def mamba2_layer(self, weights: Any, config: Any, number: int) -> Mamba2Layer:
        return Mamba2Layer(weights, config, number, self._torch)

    def recurrent_state(self, config: Any) -> RecurrentState:
        with self.device.allocating("what recurrent layers remember of a text"):
            return RecurrentState(config, [self._torch] * config.num_layers)

    def copy_state(self, source: RecurrentState, target: RecurrentState) -> None:
        copy_state(source, target)

    def router_layer(self, weights: Any, config: Any) -> RouterLayer:
        return RouterLayer(weights, config, self._torch)

    def merge_layer(self, weights: Any, config: Any) -> MergeLayer:
        return MergeLayer(weights, config, self._torch)

    def join_layer(self, weights: Any, config: Any) -> JoinLayer:
        return JoinLayer(weights, config, self._torch)

    def expert_layer(
        self,
        layout: Any,
        config: Any,
        biases: Any = None,
        others: Sequence[Any] = (),
        kinds: np.ndarray | None = None,
    ) -> ExpertLayer:
        layer = ExpertLayer(layout, config, biases, self._torch, self.host, others, kinds)
        self._hidden_size = layer.hidden_size  # of all layers
        return layer

    def feed_forward_layer(
        self, weights: Any, config: Any, norm: np.ndarray | None = None
    ) -> FeedForwardLayer:
        return FeedForwardLayer(weights, config, norm, self._torch)

    def output_layer(self, norm: np.ndarray, head: Matrix, config: Any) -> OutputLayer:
        return OutputLayer(norm, head, config, self._torch)

    def kv_pages(self, config: Any, num_pages: int, page_size: int, dtype: str) -> KVPages:
        return kv_pages(config, num_pages, page_size, dtype, [self] * config.num_layers)

    def kv_memory(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]: the end of what slots share with it, if there are any. Raises
        MemoryError."""
        if self._shared is None:
            return self.device.allocate(nbytes, "the KV cache")
        return self._shared[len(self._shared) - nbytes :]

    def of_layer(self, index: int) -> GpuBackend:
        return self

    # -- a forward pass --

    def embed(self, table: Matrix, tokens: np.ndarray, scale: float = 1.0) -> torch.Tensor:
        rows = table.rows(tokens)
        return self.graphs.buffers.keep("x", rows if scale == 1.0 else rows * scale)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._torch, non_blocking=True)

    def attention(self, x: torch.Tensor, layer: Any, kv: KVPages, index: int, batch: Any) -> None:
        with self.device.allocating("attention, whose --context or --vram should be smaller,"):
            if isinstance(layer, RECURRENT):
                layer.run(x, batch, self.arithmetic)
            else:
                self._attention.run(x, layer, kv, index, batch)

    def route(self, x: torch.Tensor, layer: RouterLayer) -> tuple[torch.Tensor, Routing]:
        work = partial(layer.normed_and_chosen, self.arithmetic)
        h, chosen = self.graphs.run(("route", layer), work, x)
        return h, on_host(chosen)

    def guess(self, x: torch.Tensor, h: torch.Tensor, layer: RouterLayer) -> Routing:
        return layer.choose(x, self._rows_of(h), self.arithmetic)

    def experts(
        self, h: torch.Tensor, layer: ExpertLayer, addresses: np.ndarray, jobs: Any,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        here = addresses[:, 0] >= ON_DEVICE
        if not here.all():
            if here.any():
                raise ValueError("experts in slots and experts in RAM need a call each")
            self._run_on_host(h, layer.on_host, addresses, jobs, out)
            return
        assert self._slots is not None
        launches = []
        for weights, at in layer.alike(np.asarray(jobs.experts)):
            begins, own = addresses[at, 0] - ON_DEVICE - weights.layout.gate.offset, jobs.take(at)
            owners = np.asarray(own.experts, np.int32)
            launches.append(
                (weights, Jobs(begins, owners, own.starts, own.pairs, len(out) // len(h)))
            )
        quantized = self._rows_of(h).quantized()
        # Rows of a prompt take longer: they say nothing about reading weights.
        nbytes = sum(len(own.owners) * weights.layout.nbytes for weights, own in launches)
        few = len(h) <= self.few_rows
        with self.device.timed(nbytes) if few else nullcontext():
            for weights, own in launches:
                self.arithmetic.experts(self._slots.slab, weights, own, quantized, out)
        self.device.mark()

    def _run_on_host(
        self, h: torch.Tensor, layer: Any, addresses: np.ndarray, jobs: Any, out: torch.Tensor
    ) -> None:
        """h comes to RAM once per layer; the rows of the pairs go back."""
        if self.host is None:
            raise RuntimeError("an expert lies in RAM, but this backend was given no host backend")
        if self._host_h is None or self._host_h[0] is not h:
            self._host_h = h, self.device.download(h)
        rows = self.host.pair_outputs(len(out))
        addresses, jobs = in_pieces(addresses, jobs, self.few_rows)
        self.host.experts(self._host_h[1], layer, addresses, jobs, rows)
        pairs = jobs.pairs[jobs.starts[0] : jobs.starts[-1]].astype(np.int64)
        at = torch.from_numpy(pairs).to(self._torch, non_blocking=True)
        out[at] = torch.from_numpy(rows[pairs]).to(self._torch, non_blocking=True)

    def host_seconds(self, layer: ExpertLayer, layout: Any, num_rows: int) -> float:
        """What an expert with so many rows takes on the host."""
        return expert_seconds(self.host, layer.on_host, layout, num_rows)

    def weighted(self, h: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
        rows = weighted(h, self._from_host(weights))
        self.device.synchronize()  # the host may compute with them, too: see `download`
        return rows

    def hidden_states(self, num_tokens: int) -> torch.Tensor:
        return torch.empty((num_tokens, self._hidden_size), device=self._torch)

    def pair_outputs(self, num_pairs: int) -> torch.Tensor:
        return torch.empty((num_pairs, self._hidden_size), device=self._torch)

    def combine(self, x: torch.Tensor, out: torch.Tensor, weights: np.ndarray) -> None:
        self.arithmetic.combine(x, out, self._from_host(weights))

    def feed_forward(
        self,
        x: torch.Tensor,
        h: torch.Tensor | None,
        layer: FeedForwardLayer,
        into: torch.Tensor | None = None,
    ) -> None:
        add, given = (layer.add_normed, x) if h is None else (layer.add, h)
        target = x if into is None else into
        self.graphs.run(("feed_forward", layer), partial(add, self.arithmetic), target, given)

    def branches(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(x), torch.zeros_like(x)

    def merge(
        self, x: torch.Tensor, dense: torch.Tensor, routed: torch.Tensor, layer: MergeLayer
    ) -> None:
        layer.run(x, dense, routed)

    def join(self, x: torch.Tensor, hidden: np.ndarray, layer: JoinLayer) -> None:
        layer.run(x, self._from_host(hidden), self.arithmetic)

    def in_ram(self, x: torch.Tensor) -> np.ndarray:
        return self.device.download(x)

    def head(self, x: torch.Tensor, rows: np.ndarray, layer: OutputLayer) -> np.ndarray:
        last = x[torch.from_numpy(np.asarray(rows, np.int64)).to(self._torch)]
        return np.asarray(layer.run(last, self.arithmetic).cpu().numpy(), np.float32)

    def facts(self) -> dict[str, Any]:
        """What is known of the card only while it runs, for people."""
        return {"cuda_graphs": self.graphs.state}

    def close(self) -> None:
        """Wait for what was launched, and end the host's threads."""
        self.device.close()
        self.graphs.clear()
        if self.host is not None:
            self.host.close()

    def _from_host(self, values: np.ndarray) -> torch.Tensor:
        rows = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        # From pageable memory it is copied before this returns; what is launched is not waited for.
        return rows.to(self._torch, non_blocking=True)

    def _rows_of(self, h: torch.Tensor) -> Rows:
        if self._rows is None or self._rows.x is not h:
            self._rows = Rows(h, self.arithmetic)
        return self._rows


def _launcher() -> Any:
    try:
        from gpu_backend.launch import Launcher
    except ImportError as error:
        raise RuntimeError(
            "a GPU's kernels need triton, which torch brings along on Linux only: pip install "
            f"'tiered[gpu]', on Windows in WSL, or use --device cpu ({error})"
        ) from error
    return Launcher


def _interpreted() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)

"""What the model dictates (ModelConfig) and what the user chooses (EngineConfig).

Both are frozen, and checked once, when they are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from os import PathLike

from tiered.gpu.devices import device_names

# What float experts become as they are read, by the name of the choice.
EXPERT_FORMATS = {"int4": "q4_0", "int4_g128": "int4_g128", "nf4": "nf4"}
QUANTIZATIONS = (*EXPERT_FORMATS, "none")
DEFAULT_POLICY = "keep_last"
SPECULATIONS = ("lookup", "mtp", "auto")
NO_ROTATION = 1e30  # divisor of a frequency


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    `inv_freq_scale` divides the position of each of the `dim // 2` frequencies (empty: all 1), and
    `magnitude` multiplies cos and sin; together they express linear, llama-3 and YaRN scaling.
    `pairs` says which two values rotate together: "half" (i, i + dim/2) as Hugging Face stores
    them, or "adjacent" (2i, 2i + 1) as GGUF's llama family does.

    LongRoPE has factors for contexts beyond `short_context` tokens, too. Keys that are kept were
    rotated with one or the other, so it is the context that decides, not how long a text is.
    https://arxiv.org/abs/2402.13753
    """

    theta: float = 10_000.0
    dim: int = 0  # 0: the whole head
    pairs: str = "half"
    inv_freq_scale: tuple[float, ...] = ()
    magnitude: float = 1.0
    short_context: int = 0  # 0: all contexts are alike
    long_inv_freq_scale: tuple[float, ...] = ()
    long_magnitude: float = 1.0

    def still(self, head_dim: int) -> RopeConfig:
        """The same, but for heads that do not rotate."""
        half = (self.dim or head_dim) // 2
        return RopeConfig(self.theta, self.dim, self.pairs, (NO_ROTATION,) * half)

    def for_context(self, context: int) -> RopeConfig:
        """What texts of up to `context` tokens are rotated with."""
        if not 0 < self.short_context < context:
            return self
        return replace(self, inv_freq_scale=self.long_inv_freq_scale, magnitude=self.long_magnitude)


@dataclass(frozen=True)
class AttentionShape:
    """What attention may have otherwise in one layer than in another."""

    num_kv_heads: int
    head_dim: int
    rope: RopeConfig


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention: a token's keys and values are views of one vector of `kv_rank`
    values, and `rope_dim` more that carry its position. https://arxiv.org/abs/2405.04434

    A model with it has one head of keys, of kv_rank + rope_dim values.
    """

    kv_rank: int = 0  # 0: the model has ordinary attention
    q_rank: int = 0  # queries are made in two steps, with so many values between; 0: in one
    nope_dim: int = 0  # values of a head's queries that carry no position
    rope_dim: int = 0
    value_dim: int = 0  # of one head


@dataclass(frozen=True)
class DeltaConfig:
    """Gated DeltaNet: a layer that remembers a text in matrices of fixed size, one per head of
    values, instead of the keys and values of all tokens. https://arxiv.org/abs/2412.06464

    Several heads of values share one of keys: neighbours, or, with `is_tiled`, every
    num_key_heads-th.
    """

    num_key_heads: int = 0  # 0: the model has no such layers
    num_value_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    conv_size: int = 4  # tokens that the convolution before it sees
    is_tiled: bool = False

    @property
    def channels(self) -> int:
        """Queries, keys and values of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def state_values(self) -> int:
        """float32 values that a layer remembers of a text."""
        history = (self.conv_size - 1) * self.channels
        return history + self.num_value_heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2: a layer that remembers a text in matrices of fixed size, one per head.
    https://arxiv.org/abs/2405.21060

    Heads of a group share keys and queries, and a norm of their results.
    """

    num_heads: int = 0  # 0: the model has no such layers
    head_dim: int = 0
    state_dim: int = 0  # values of a key
    num_groups: int = 1
    conv_size: int = 4  # tokens that the convolution before it sees
    norm_eps: float = 0.0  # of the results' norm

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Values of all heads, keys and queries of all groups."""
        return self.inner_size + 2 * self.num_groups * self.state_dim

    @property
    def state_values(self) -> int:
        """float32 values that a layer remembers of a text."""
        return (self.conv_size - 1) * self.channels + self.inner_size * self.state_dim


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a model that its arithmetic depends on."""

    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    delta: DeltaConfig = field(default_factory=DeltaConfig)
    delta_layers: frozenset[int] = frozenset()  # have that in the place of attention
    conv_layers: frozenset[int] = frozenset()  # have a gated short convolution in its place ...
    conv_size: int = 0  # ... over so many tokens
    mamba2: Mamba2Config = field(default_factory=Mamba2Config)
    mamba2_layers: frozenset[int] = frozenset()  # have that in its place
    gated_attention: bool = False  # each head's result times the sigmoid of a gate, beside q
    value_norm: bool = False  # values are normed, head by head, without weights
    output_norms: bool = False  # attention's and the feed-forward's results are normed, too
    layer_norms: bool = False  # norms are LayerNorm with biases, not RMSNorm
    norm_offset: float = 0.0  # what is added to the stored weights of norms
    query_scale: float = 0.0  # what scores are multiplied with; 0: 1 / sqrt(head_dim)
    num_experts: int = 0  # 0: a dense model
    top_k: int = 0
    expert_size: int = 0  # width of one expert
    ffn_size: int = 0  # width of the dense feed-forward of dense layers
    shared_expert_size: int = 0  # width of the expert that every token uses; 0: none
    dense_layers: frozenset[int] = frozenset()  # layers without experts
    # "", "head" (one norm per head), "full" (over all heads together) or "unit" (per head and
    # without weights, in layers that rotate)
    qk_norm: str = ""
    clip_qkv: float = 0.0  # clamp q, k and v to +-this; 0: no
    router_scoring: str = "softmax"  # or "sigmoid" or "sparsemixer": see cpu_kernels.route
    router_jitter: float = 0.0  # of SparseMixer: how much worse than the best is nearly as good
    weighted_inputs: bool = False  # routing weights multiply what experts get, not what they say
    normalize_top_k: bool = True  # routing weights of the chosen experts sum to 1 ...
    routing_scale: float = 1.0  # ... or to this
    expert_groups: int = 1  # experts are chosen from the best `used_groups` of so many groups
    used_groups: int = 1
    expert_scales: bool = False  # routing weights times a number of each expert
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # logits are softcap * tanh(logits / softcap); 0: they are not
    sliding_window: int = 0  # attend to this many last positions; 0: all of them
    full_layers: frozenset[int] = frozenset()  # layers that attend to all of them nevertheless
    full_shape: AttentionShape | None = None  # of those, where it is another
    full_layers_rotate: bool = True  # whether those have a rotary embedding
    chunked_attention: bool = False  # windows are chunks of so many positions, which do not slide
    # With a step, full layers multiply scores with 1 + temperature * ln(1 + (position + 1) // step)
    temperature: float = 0.0
    temperature_step: int = 0
    attention_sinks: bool = False  # a score per head that takes attention and gives nothing
    activation: str = "silu"  # of experts and feed-forwards: see cpu_kernels.gating.ACTIVATIONS
    activation_limit: float = 0.0  # where "clamped_silu" clamps
    expert_biases: bool = False
    eos_ids: tuple[int, ...] = ()
    # At the end, and counted by num_layers: layers that only draft tokens (tiered.draft_layer).
    num_draft_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "vocab_size", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        shapes = [self.own_shape, self.full_shape or self.own_shape]
        if any(s.num_kv_heads < 1 or self.num_heads % s.num_kv_heads for s in shapes):
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({' and '.join(str(s.num_kv_heads) for s in dict.fromkeys(shapes))})"
            )
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, but the model has {self.num_experts} experts")
        if sum(map(bool, (self.delta_layers, self.conv_layers, self.mamba2_layers))) > 1:
            raise ValueError(
                "recurrent layers must be of one kind: DeltaNet, Mamba-2, convolutions"
            )
        if self.chunked_attention and not self.sliding_window:
            raise ValueError("attention by chunks needs their size, as sliding_window")
        groups, used = max(self.expert_groups, 1), self.used_groups
        if self.num_experts % groups or (
            groups > 1 and not self.top_k <= used * (self.num_experts // groups)
        ):
            raise ValueError(
                f"{self.num_experts} experts in {groups} groups, of which {used} are used, are not "
                f"enough for top_k {self.top_k}"
            )

    def for_context(self, context: int) -> ModelConfig:
        """The same for texts of up to `context` tokens."""
        return replace(self, rope=self.rope.for_context(context))

    def without_drafts(self) -> ModelConfig:
        """The same without layers that only draft tokens."""
        num_layers = self.num_layers - self.num_draft_layers
        return replace(self, num_layers=num_layers, num_draft_layers=0)

    def window(self, layer: int) -> int:
        """How many last positions a layer attends to; 0: all."""
        return 0 if layer in self.full_layers else self.sliding_window

    @property
    def own_shape(self) -> AttentionShape:
        return AttentionShape(self.num_kv_heads, self.head_dim, self.rope)

    def attention_shape(self, layer: int) -> AttentionShape:
        if layer not in self.full_layers:
            return self.own_shape
        if self.full_layers_rotate:
            return self.full_shape or self.own_shape
        return AttentionShape(self.num_kv_heads, self.head_dim, self.rope.still(self.head_dim))

    def is_sparse(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def attention_layers(self) -> list[int]:
        recurrent = self.recurrent_layers
        return [layer for layer in range(self.num_layers) if layer not in recurrent]

    @property
    def recurrent_layers(self) -> frozenset[int]:
        """Layers that remember a text as a whole."""
        return self.delta_layers | self.conv_layers | self.mamba2_layers

    @property
    def state_values(self) -> int:
        """float32 values that a recurrent layer remembers of a text."""
        if self.delta_layers:
            return self.delta.state_values
        if self.mamba2_layers:
            return self.mamba2.state_values
        return max(self.conv_size - 1, 0) * self.hidden_size

    @property
    def sparse_layers(self) -> list[int]:
        return [layer for layer in range(self.num_layers) if self.is_sparse(layer)]


def check_quantization(name: str) -> None:
    """ValueError names those that there are."""
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantize must be {', '.join(QUANTIZATIONS)}, not {name!r}")


@dataclass(frozen=True)
class EngineConfig:
    """The user's choices. Sizes are bytes or text such as "8G" (powers of 1024); None: decide.

    `quantize` concerns float checkpoints, and says how weights are computed with: "int4" (q4_0),
    "int4_g128" and "nf4" turn experts into 4-bit as they are read and multiply in integers; "none"
    keeps every weight as stored and multiplies in float32.
    """

    ram: int | str | None = None  # everything the process holds
    expert_ram: int | str | None = None  # expert slots alone
    threads: int | None = None
    policy: str = DEFAULT_POLICY
    look_ahead: int = 1  # layers
    quantize: str = "int4"
    context: int | None = None  # tokens of one text
    kv_tokens: int | None = None  # tokens of KV cache, over all texts at once; None: one context
    kv_dtype: str = "f16"
    prefill_chunk: int = 512  # tokens computed at once
    readers: int = 4  # threads that read experts from disk
    speculate: str = "off"  # or one of SPECULATIONS: see tiered.speculation
    isa: str = "auto"  # see `tiered info`
    # cpu, auto, cuda, cuda:1, ..., sim:CARD for a described card on a virtual clock, or sim: a
    # GPU's arithmetic on the CPU. A GPU has to be asked for: its code is tested without one and has
    # not run on a real card yet. Several cards, as "cuda:0,cuda:1", "cuda:all" or
    # "sim:CARD,sim:CARD", share a model's layers.
    device: str = "cpu"
    # What may be used of the GPU's memory; of several, each one's, or "16G,8G". None: what is free.
    vram: int | str | None = None
    # Rules for the routers' choices: see tiered.routing.
    expert_top_k: int | None = None
    expert_layer_k: str | PathLike[str] | None = None  # a table: see tiered.layer_k
    expert_top_p: float = 1.0
    expert_min_weight: float = 0.0
    drop_cold: float = 0.0  # skip experts below this share of the largest weight, if on disk
    cold_copy: str | PathLike[str] | None = None  # the same model in fewer bits, for experts ...
    cold_below: float = 0.5  # ... below this share of the largest weight, if on disk
    routing: str | PathLike[str] | None = None  # a trace, whose choices are used instead

    def __post_init__(self) -> None:
        check_quantization(self.quantize)
        if self.speculate not in ("off", *SPECULATIONS):
            known = " or ".join(("off", *SPECULATIONS))
            raise ValueError(f"speculate must be {known}, not {self.speculate!r}")
        if self.kv_dtype not in ("f32", "f16", "int8"):
            raise ValueError(f"kv_dtype must be f32, f16 or int8, not {self.kv_dtype!r}")
        device_names(self.device)
        if self.vram is not None and self.device == "cpu":
            raise ValueError("vram is a GPU's: choose one by --device (auto, cuda or sim:CARD)")
        if not 0 <= self.look_ahead <= 3:
            raise ValueError(f"look_ahead is 0 (off) to 3 layers, not {self.look_ahead}")
        if not 0 <= self.drop_cold <= 1:
            raise ValueError(f"drop_cold must lie in 0 ... 1, not be {self.drop_cold}")
        if not 0 < self.cold_below <= 1:
            raise ValueError(f"cold_below must lie in 0 ... 1, not be {self.cold_below}")
        if self.cold_copy is not None and self.device != "cpu":
            raise ValueError("a cold copy is for the CPU alone: give no --cold-copy with --device")
        if not 0 < self.expert_top_p <= 1 or not 0 <= self.expert_min_weight <= 1:
            raise ValueError(
                "expert_top_p must lie above 0 and be at most 1, expert_min_weight lie in 0 ... 1; "
                f"they are {self.expert_top_p} and {self.expert_min_weight}"
            )
        for name in ("threads", "context", "kv_tokens", "prefill_chunk", "readers", "expert_top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

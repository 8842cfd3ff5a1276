"""Load a model and generate text from it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tiered import kv_cache, memory
from tiered.backend import Backend, open_backend
from tiered.budget import LONGEST_PASS, MemoryPlan, pass_bytes, plan_memory, workspace_bytes
from tiered.checkpoints.damage import find_damage
from tiered.cold_copy import ColdCopy, copy_bytes, copy_tier, open_copy
from tiered.config import EngineConfig, ModelConfig
from tiered.draft_layer import open_draft_layer
from tiered.experts import ExpertKey
from tiered.formats import open_checkpoint
from tiered.generation import Generation, texts
from tiered.governor import Governor, Governors, depths
from tiered.gpu.accelerator import model_bytes, pass_on_cards, place_experts, spread
from tiered.gpu.shared_room import SharedRoom
from tiered.gpu.shares import Share
from tiered.gpu.splits import Governed, govern
from tiered.kv_cache import KVCache
from tiered.model import Decoder
from tiered.planning.admission import promotion_governor
from tiered.prefetch import Prefetcher
from tiered.routing import open_rules
from tiered.simulated.timing import REAL, Timing
from tiered.slots import RamMemory
from tiered.source import MappedExperts, TieredExperts, count, open_source
from tiered.stats import EngineStats
from tiered.store import ExpertStore
from tiered.text.chat import ChatTemplate
from tiered.text.harmony import is_harmony, rewritten
from tiered.text.sampling import Sampler, SamplingParams
from tiered.text.tokenizer import Tokenizer, load_tokenizer
from tiered.tracing.trace import TraceInfo, TraceWriter
from tiered.weights.dense import dense_bytes
from tiered.weights.loader import WeightLoader
from tiered.whole_blocks import WholeBlocks

DEFAULT_CONTEXT = 4096  # tokens


class Engine:
    """A model, ready to generate.

        with Engine("model.gguf", ram="8G") as engine:
            for piece in engine.generate("Once upon a time", max_new_tokens=64):
                print(piece, end="", flush=True)

    `path` is a GGUF file (any part of a split one), a Hugging Face folder or a store made by
    `tiered convert`. The other arguments are EngineConfig's. Not safe to use from several threads
    at once. Raises CheckpointError for damaged or unknown files, MemoryError for budgets that
    cannot work, both with the number or the name that would.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, backend: Backend | None = None, **choices: Any
    ) -> None:
        self.choices = EngineConfig(**choices)
        with ExitStack() as stack:
            self.checkpoint = stack.enter_context(open_checkpoint(Path(path), self._drafts))
            self.config: ModelConfig = self.checkpoint.config
            self.backend = backend or open_backend(self.choices)
            stack.callback(self.backend.close)
            self._build(stack)
            self._closing = stack.pop_all()

    def _build(self, stack: ExitStack) -> None:
        choices, config = self.choices, self._choose_context()
        self._open_stores(stack)
        self.plan = self._plan_memory()
        governors = self._open_source(stack)
        at_once = self._share_cards()
        loader = WeightLoader(self.checkpoint, self.backend, choices.quantize)
        loaders = [loader.for_layer(index) for index in range(config.num_layers)]
        last = loader.for_layer(-1)
        self.cold_copy = self._open_cold_copy(loader, stack)
        self.decoder = Decoder(
            config,
            self.backend,
            loaders[0].embedding(),
            [loaders[index].layer(index, self.store) for index in range(config.num_layers)],
            last.output(),
            self.source,
            self.prefetcher,
            open_rules(choices, config, self._is_resident),
            self.cold_copy,
        )
        # After the weights, because experts and the KV cache get what these have left.
        room = self._place_on_cards(governors, stack)
        self.kv = KVCache(
            self.backend, self.checkpoint.config, self.kv_tokens, choices.kv_dtype,
            self.num_texts, room,
        )  # fmt: skip
        draft_layer = open_draft_layer(
            self.decoder, last, self.store, self.kv, choices.prefill_chunk
        )
        self.governors = Governors(governors, self.timing.clock)
        self.generation = Generation(
            self.decoder, self.kv, self.governors, choices, at_once,
            partial(find_damage, self.checkpoint), self.timing.clock,
        )  # fmt: skip
        self.generation.draft_layer = draft_layer
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None

    def _choose_context(self) -> ModelConfig:
        """How long texts may be, and the model for it."""
        choices = self.choices
        self.context = min(choices.context or DEFAULT_CONTEXT, self.config.context_length)
        self.checkpoint.config = self.config.for_context(self.context)
        self.config = self.checkpoint.config.without_drafts()
        if choices.speculate == "mtp" and self.config == self.checkpoint.config:
            raise ValueError(
                f"{self.checkpoint.path} has no layer that drafts tokens: use --speculate lookup"
            )
        self.kv_tokens = max(choices.kv_tokens or 0, self.context)
        self.num_texts = -(-self.kv_tokens // self.context)
        return self.config

    def _open_stores(self, stack: ExitStack) -> None:
        """Where experts, and those of a cold copy, are read from; None: there are none."""
        choices = self.choices
        self.store: ExpertStore | None = None
        self.blocks: WholeBlocks | None = None
        self.copy: ExpertStore | None = None
        if self.config.sparse_layers:
            self.store = ExpertStore(self.checkpoint, choices.quantize)
            stack.callback(self.store.close)
            blocks = WholeBlocks(self.store)
            # What goes on to a GPU is a blob of the store's layout.
            if choices.device == "cpu" and blocks.pays:
                self.blocks = blocks
        if choices.cold_copy is not None:
            if self.store is None:
                raise ValueError("this model is dense: it has no experts to read from a cold copy")
            copy = Path(choices.cold_copy)
            self.copy = open_copy(copy, self.store, choices.quantize, stack)

    def _open_source(self, stack: ExitStack) -> list[Governor]:
        """The experts in RAM, and who governs reads into it."""
        choices, config = self.choices, self.config
        self.source: MappedExperts | TieredExperts | None = None
        self.prefetcher: Prefetcher | None = None
        if self.store is not None:
            self.source = open_source(
                self.store, self.blocks, self.plan, choices, stack, self.timing
            )
        if not isinstance(self.source, TieredExperts):
            return []
        tier, governors = self.source.tier, []
        if choices.look_ahead:
            look_ahead = Governor((0, config.top_k), "look-ahead")
            self.prefetcher = Prefetcher(tier, config.num_layers, choices.look_ahead, look_ahead)
            governors.append(look_ahead)
        # All of them together are mostly best: a short text should not pay for finding out.
        read_depth = Governor(depths(choices.readers), "read depth", patience=4)
        tier.loaders.depth = read_depth
        return [*governors, read_depth]

    def _share_cards(self) -> int:
        """Tell GPUs which layers are whose. Returns how many tokens of a prompt are one pass."""
        at_once, choices = self.plan.pass_tokens, self.choices
        self.shares: list[Share] = []  # of GPUs
        if self._has_gpu:
            model = model_bytes(
                self.checkpoint, self.store, choices, self.kv_tokens, self._num_states
            )
            shares = spread(self.backend, model, choices)
            self.shares, at_once = pass_on_cards(shares, at_once, self.config, choices)
        return at_once

    def _open_cold_copy(self, loader: WeightLoader, stack: ExitStack) -> ColdCopy | None:
        if self.copy is None or not isinstance(self.source, TieredExperts):
            return None
        experts = copy_tier(self.copy, self.choices.readers, stack)
        experts.tier.loaders.depth = self.source.tier.loaders.depth
        layers = {layer: loader.experts(layer, self.copy) for layer in self.config.sparse_layers}
        return ColdCopy(experts, layers, self.choices.cold_below, self._is_resident)

    def _place_on_cards(self, governors: list[Governor], stack: ExitStack) -> SharedRoom | None:
        """Give GPUs their experts, if there are any, and add to those who govern what is copied."""
        if not (self.shares and self.store and self.source):
            return None
        num_pages = -(-self.kv_tokens // kv_cache.PAGE_SIZE)
        source, room = place_experts(
            self.backend, self.shares, self.store, self.source, self.choices, stack, self.timing,
            num_pages, {n: self.decoder.layers[n].experts for n in self.config.sparse_layers},
        )  # fmt: skip
        self.decoder.source = source
        promotion = promotion_governor()
        for placed in source.cards:
            placed.promotion = promotion
        splits = [placed.split for placed in source.cards]
        governors += promotion, govern([each for each in splits if isinstance(each, Governed)])
        return room

    @property
    def timing(self) -> Timing:
        """Whose seconds this engine takes."""
        timing: Timing = getattr(self.backend, "timing", REAL)
        return timing

    @property
    def _drafts(self) -> bool:
        """Whether the model's own layer for drafts is wanted, if it has one."""
        return self.choices.speculate in ("mtp", "auto")

    @property
    def is_of_one_text(self) -> bool:
        """Whether the routing was recorded from a text, and suits no other."""
        rules = self.decoder.rules
        return rules is not None and rules.given is not None and rules.given.is_of_one_text

    def _is_resident(self, key: ExpertKey) -> bool:
        return not isinstance(self.source, TieredExperts) or key in self.source.tier

    def _plan_memory(self) -> MemoryPlan:
        config, choices = self.checkpoint.config, self.choices
        limit = None if choices.ram is None else memory.parse_bytes(choices.ram)
        expert_ram = None if choices.expert_ram is None else memory.parse_bytes(choices.expert_ram)
        below = self.blocks or self.store
        slots = copy_bytes(self.copy) if self.copy else 0
        return plan_memory(
            limit=memory.default_limit() if limit is None else limit,
            expert_ram=expert_ram,
            process=psutil.Process().memory_info().rss,
            dense=dense_bytes(self.checkpoint, choices.quantize),
            kv=kv_cache.kv_bytes(config, self.kv_tokens, choices.kv_dtype, self._num_states),
            workspace=workspace_bytes(config, choices.prefill_chunk) + slots,
            experts=sum(below.layer_bytes) if below else 0,
            floor=max(below.blob_bytes) * config.top_k if below else 0,
            mappable=self.store is not None and self.store.mappable,
            chunk=choices.prefill_chunk,
            longest_pass=LONGEST_PASS,
            pass_bytes=pass_bytes(config),
        )

    @property
    def _has_gpu(self) -> bool:
        return hasattr(self.backend, "cards")

    @property
    def _num_states(self) -> int:
        """What recurrent layers remember is kept twice where drafts may have to be taken back."""
        return self.num_texts * (1 if self.choices.speculate == "off" else 2)

    # --- text ---

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint.tokenizer_source)
        return self._tokenizer

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.eos_ids) | frozenset(self.config.eos_ids)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        stop: Sequence[str] = (),
        sequence: kv_cache.Sequence | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Continue `prompt`; yields pieces of text. `sampling` is SamplingParams'."""
        ids = self.tokenizer.encode(prompt)
        stream = self.tokenizer.stream()
        return texts(self._said(ids, max_new_tokens, sequence, sampling), stream, stop)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        max_new_tokens: int = 256,
        *,
        stop: Sequence[str] = (),
        sequence: kv_cache.Sequence | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Answer a conversation: [{"role": "user", "content": "..."}, ...]. Yields text, of which
        reasoning, if the model writes any, stands between <think> and </think>."""
        if self._template is None:
            self._template = ChatTemplate.of(self.tokenizer)
        ids = self.tokenizer.encode(self._template.render(messages))
        harmony = is_harmony(self.tokenizer.chat_template)
        stream = self.tokenizer.stream(skip_special=not harmony)
        pieces = texts(self._said(ids, max_new_tokens, sequence, sampling), stream, stop)
        return rewritten(pieces) if harmony else pieces

    def _said(
        self,
        ids: Sequence[int],
        most: int,
        sequence: kv_cache.Sequence | None,
        sampling: dict[str, Any],
    ) -> Iterator[int]:
        """Tokens, up to one that ends the text."""
        return self.generate_tokens(ids, most, stop_ids=self.eos_ids, sequence=sequence, **sampling)

    # --- tokens ---

    def generate_tokens(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 256,
        *,
        stop_ids: frozenset[int] = frozenset(),
        sequence: kv_cache.Sequence | None = None,
        **sampling: Any,
    ) -> Iterator[int]:
        """Continue token ids; yields ids, and ends before one of `stop_ids` or a full context.

        With `sequence` (of `open_sequence`), what it has in common with `ids` is not computed
        again, and it stays open for the next call.
        """
        params = SamplingParams(**sampling)
        ids = self.checked(ids)
        own = sequence is None
        sequence = sequence or self.kv.open()
        try:
            logits = self.generation.begin(sequence, ids)
            most = min(max_new_tokens, self.context - len(ids) + 1)
            for token in self.generation.tokens(sequence, logits, Sampler(params, ids), most):
                if token in stop_ids:
                    return
                self.generation.counted.new_tokens += 1
                yield token
        finally:
            if own:
                self.kv.close(sequence)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """What follows each token: float32 [len(ids), vocab_size]."""
        return np.concatenate(list(self.logits_by_rows(ids)))

    def logits_by_rows(self, ids: Sequence[int], start: int = 0) -> Iterator[np.ndarray]:
        """What follows each token from position `start` on, a few at a time, so that a budget for
        memory holds: float32 [num_rows, vocab_size].

        Between two of them this engine must not compute anything else.
        """
        return self.generation.outputs(self.checked(ids), start)

    def hidden_states(self, ids: Sequence[int]) -> np.ndarray:
        """What the model makes of each token, after its last norm: float32 [len(ids), hidden_size].

        A model that was trained to go on with a text was not trained to compare texts by these.
        """
        outputs = self.generation.outputs(self.checked(ids), output=self.hidden_output)
        return np.concatenate(list(outputs))

    @cached_property
    def hidden_output(self) -> Any:
        """An output layer that ends with the norm: its head is the identity, on any device."""
        size = self.config.hidden_size
        identity = np.eye(size, dtype=np.float32).view(np.uint8).reshape(-1)
        backend = self.backend.of_layer(-1)
        head = backend.matrix(identity, "f32", (size, size))
        loader = WeightLoader(self.checkpoint, backend, self.choices.quantize)
        plain = replace(self.config, logit_softcap=0.0)
        return backend.output_layer(loader.norm("norm"), head, plain)

    def score_tokens(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Decode a given answer token by token, as if it had been sampled.

        Returns the log-probability of each of its tokens, float32 [len(answer)]; counts like
        `generate_tokens`, so that speed can be measured on tokens of one's choice.
        """
        return self.generation.score(self.checked(prompt), [int(token) for token in answer])

    def open_sequence(self) -> kv_cache.Sequence:
        """A text of its own in the KV cache, empty; for `generate_tokens(sequence=...)`."""
        return self.kv.open()

    def checked(self, ids: Sequence[int]) -> list[int]:
        """`ids` as a list; ValueError if this model cannot continue them."""
        ids = [int(token) for token in ids]
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        if len(ids) > self.context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the context holds {self.context}: "
                f"shorten it, or raise --context (this model: {self.config.context_length} at most)"
            )
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise ValueError(f"token ids must lie in 0 ... {self.config.vocab_size - 1}")
        return ids

    # --- the rest ---

    @contextmanager
    def record(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Write a routing trace of what is generated within the block; see tiered.tracing.trace.

        A replay gives the same hits and misses if the tier was empty when it began: record from
        the first token on. Raises ValueError for a dense model.
        """
        if self.store is None or self.source is None:
            raise ValueError(f"{self.checkpoint.path} is a dense model: it routes nothing")
        tiered = isinstance(self.source, TieredExperts)
        space = (self.blocks or self.store).space(self.plan.slots if tiered else 0)
        info = TraceInfo(
            model=self.checkpoint.path.name,
            num_experts=self.config.num_experts,
            top_k=self.config.top_k,
            blob_bytes=space.blob_bytes,
            policy=str(self.choices.policy) if tiered else "",
            capacity=space.capacity,
            mixes=space.mixes,
        )
        journaled = self.source.tier if isinstance(self.source, TieredExperts) else self.source
        with TraceWriter(Path(path), info) as writer:
            self.decoder.trace = journaled.journal = writer
            try:
                yield
            finally:
                self.decoder.trace = journaled.journal = None

    @property
    def stats(self) -> EngineStats:
        """Totals so far; subtract an earlier one for what happened between."""
        stats = EngineStats(**vars(self.generation.counted))
        parts = dict(self.decoder.clock.seconds)
        # "python" overlaps the others: what they took beyond arithmetic and waiting.
        python = sum(parts.values()) - parts["waiting"] - self.backend.seconds
        reads = sum(store.seconds for store in (self.store, self.copy) if store)
        stats.parts = {**parts, "python": python, "reads": reads}
        count(self.source, stats)
        for counting in (self.decoder.rules, self.cold_copy):
            if counting is not None:
                counting.report(stats)
        return stats

    def gpu_facts(self) -> dict[str, Any]:
        """What is known of GPUs only while they run: bytes of RAM that are page-locked for copies,
        and what each card has and says of itself; empty without one."""
        if not self.shares:
            return {}
        memory = self.source.tier.memory if isinstance(self.source, TieredExperts) else None
        cards: Any = self.backend
        return {
            "page_locked_bytes": memory.locked.nbytes if isinstance(memory, RamMemory) else 0,
            "cards": {
                name: {"layers": [share.layers.start, share.layers.stop - 1], **card.facts()}
                for name, card, share in zip(cards.names, cards.cards, self.shares, strict=True)
            },
        }

    def close(self) -> None:
        """End the threads and unmap the files. Closing twice is harmless."""
        self._closing.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

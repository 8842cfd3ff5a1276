"""Simulation: the scheduler's own bookkeeping, run over a machine that exists as numbers only.

The tiers are the engine's (`Residency` with a policy), misses are split by costs.py, and time is
what `Machine` says. All results are simulated, never measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

from tiered import policies
from tiered.cache.residency import Above, Residency, TierStats
from tiered.config import DEFAULT_POLICY
from tiered.experts import ExpertKey
from tiered.governor import Allowance, Always
from tiered.gpu.splits import Balanced, Fixed, Split
from tiered.planning.admission import Admission
from tiered.planning.costs import Costs, Miss
from tiered.planning.gpu_tier import GpuTier, fill
from tiered.planning.machine import Machine
from tiered.planning.sizes import ModelSizes
from tiered.planning.strategies import STRATEGIES, Budgets, Strategy

TERMS = (
    "attention", "router", "shared", "gpu_experts", "cpu_experts", "link_wait", "disk_wait", "head",
)  # fmt: skip


class Simulation:
    """Feed it tokens: `warm` for those that are not timed, `token` for those that are.

    `costs` are learnt while it runs, as an engine learns them; None: they are known. `split` says
    in the strategy's place how many misses are copied, and `promotion` whether any are promoted.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        machine: Machine,
        budgets: Budgets,
        strategy: Strategy = STRATEGIES["tiered"],
        *,
        policy: str = DEFAULT_POLICY,
        look_ahead: int = 1,
        accuracy: float = 0.85,
        costs: Costs | None = None,
        split: Split | None = None,
        promotion: Allowance | None = None,
        mapped: bool = True,
        lockable: int = 1 << 62,
        seed: int = 0,
    ) -> None:
        self.sizes, self.machine, self.strategy = sizes, machine, strategy
        self._look_ahead, self._accuracy, self._random = look_ahead, accuracy, Random(seed)
        self._has_gpu = machine.rates.has_gpu
        vram = budgets.vram if self._has_gpu and strategy.cached else 0
        all_there = mapped and budgets.ram >= sizes.all_experts
        machine.staged = 1.0 if all_there else sizes.staged(budgets.ram, lockable)
        self._learns = costs is not None
        self.costs = costs or machine.rates.costs(max(sizes.experts), machine.staged)
        share = strategy.share if self._has_gpu else 0.0
        self._split = split or (Balanced(self.costs) if share is None else Fixed(share))
        self.ram = None if all_there else self._tier(budgets.ram, policy)
        if not all_there and self.ram is None:
            raise MemoryError(f"{budgets.ram} bytes of RAM hold no expert of {sizes.name}")
        self.admission = Admission(sizes.space(vram), self.costs)
        self.gpu = GpuTier(
            self._tier(vram, policy), self.admission, strategy, promotion or Always()
        )
        if self.ram is not None and self.gpu.residency is not None:
            self.ram.above = [Above(self.gpu.residency, self.admission.popularity.count)]
        self._loaded: dict[ExpertKey, float] = {}  # of guesses on their way into RAM
        self.reset()

    def _tier(self, capacity: int, policy: str) -> Residency | None:
        space = self.sizes.space(capacity)
        if capacity < max(space.blob_bytes):
            return None
        return Residency(space, policies.create(policy, space))

    def reset(self) -> None:
        """Forget what was counted so far."""
        self.terms = dict.fromkeys(TERMS, 0.0)  # seconds
        self.hits = self.demands = 0  # on the GPU
        self.machine.copied = self.machine.read_bytes = 0
        self._moved = 0, 0  # bytes copied and read when that was last looked at
        for tier in (self.gpu.residency, self.ram):
            if tier is not None:
                tier.stats = TierStats()

    # --- before the clock starts ---

    def warm(self, tokens: Iterable[Sequence[Sequence[int]]], fill_ram: bool = True) -> None:
        """Choose experts without timing; then fill each tier, what was chosen most first."""
        for token in tokens:
            for layer, experts in enumerate(token):
                self.admission.touch([ExpertKey(layer, expert) for expert in experts])
            self.admission.token_done(1.0)
        ranked = self.admission.popularity.ranked(self._keys())
        if self._learns:  # filling is the first measurement
            m, nbytes = self.machine, max(self.sizes.experts)
            for count in (1, 2, 4):
                self.costs.link.observe(nbytes, m.copy_seconds(nbytes))
                self.costs.disk.observe(count * nbytes, m.read_seconds(count * nbytes))
        if self.gpu.residency is not None:
            fill(self.gpu.residency, ranked)
        if self.ram is not None and fill_ram:  # of what the GPU has, what it would evict first
            there = [key for key in ranked if key in self.gpu]
            fill(self.ram, [key for key in ranked if key not in self.gpu] + there[::-1])

    def _keys(self) -> list[ExpertKey]:
        """All experts, so that the first ones are spread over layers and ids."""
        num = self.sizes.num_experts
        return [
            ExpertKey(layer, (expert + layer) % num)
            for expert in range(num)
            for layer, nbytes in enumerate(self.sizes.experts)
            if nbytes
        ]

    def prefill(self, layers: Sequence[Sequence[int]]) -> None:
        """The distinct experts of a prompt, by layer, as the RAM tier sees them. Not timed."""
        for layer, experts in enumerate(layers):
            if self.ram is not None and experts:
                self.ram.demand([ExpertKey(layer, expert) for expert in experts])

    # --- one token ---

    def token(self, routed: Sequence[Sequence[int]], context: int) -> float:
        """The seconds that this token takes, after `context` others."""
        m, sizes, begin = self.machine, self.sizes, self.machine.now
        rates = m.rates
        kv = sizes.kv(context) / sizes.num_layers
        for layer, experts in enumerate(routed):
            self._spend("attention", m.dense_seconds(sizes.attention[layer] + kv))
            if sizes.shared[layer]:
                self._spend("shared", m.dense_seconds(sizes.shared[layer]))
            self._spend("router", rates.launch if self._has_gpu else rates.overhead)
            if sizes.experts[layer]:
                if self.ram is not None and not self._has_gpu:
                    self._spend("disk_wait", rates.lookup)
                keys = [ExpertKey(layer, expert) for expert in experts]
                self.admission.touch(keys)
                self._experts(keys)
                self._guess(layer, routed)
        self._spend("head", m.head_seconds(sizes.head))
        self.admission.token_done(m.now - begin)
        return m.now - begin

    def _spend(self, term: str, seconds: float) -> None:
        self.machine.now += seconds
        self.terms[term] += seconds

    def _experts(self, keys: list[ExpertKey]) -> None:
        m, start, nbytes = self.machine, self.machine.now, self.sizes.experts[keys[0].layer]
        patience = m.rates.sync + self.costs.cpu(nbytes)
        hits, awaited = self.gpu.split(keys, start, patience)
        missed = [key for key in keys if key not in hits and key not in awaited]
        self.hits += len(hits)
        self.demands += len(keys)
        flag = start + (m.rates.sync if missed else 0.0)  # from then the host knows what is missing
        ready = dict(zip(missed, self._fetch(missed, flag), strict=True))
        missed.sort(key=ready.__getitem__)
        wait = max(0.0, m.link_free - flag)
        misses = [Miss(nbytes, ready[key] - flag) for key in missed]
        num_copied = self._split.place(nbytes * len(hits), misses, wait)
        num_copied = self.gpu.most_copied(keys, missed[:num_copied], self.ram)
        copied, rest = missed[:num_copied], missed[num_copied:]
        gpu = start + m.gpu_seconds(nbytes * len(hits))
        busy = gpu - start
        arrivals = [*awaited.values(), *(m.copy(nbytes, ready[key]) for key in copied)]
        for arrival in sorted(arrivals):
            gpu = max(gpu, arrival) + m.gpu_seconds(nbytes)
            busy += m.gpu_seconds(nbytes)
        copying = max(0.0, m.link_free - flag)
        cpu, cpu_busy = m.cpu_run([(ready[key], nbytes) for key in rest], flag)
        m.now = max(gpu, cpu if rest else 0.0) + m.rates.launch
        self.terms["router"] += m.rates.launch
        if rest and cpu >= gpu:
            self.terms["router"] += flag - start
            self.terms["cpu_experts"] += cpu_busy
            self.terms["disk_wait"] += cpu - flag - cpu_busy
        else:
            self.terms["gpu_experts"] += busy
            self.terms["link_wait"] += gpu - start - busy
        self.admission.copying(bool(copied))
        self.gpu.keep(keys, copied, rest, m, self.ram)
        if self._learns:
            self._observe(nbytes, len(hits), bool(missed), len(rest), cpu_busy, copying)

    def _fetch(self, keys: list[ExpertKey], flag: float) -> list[float]:
        """When each of these experts is in RAM."""
        if self.ram is None or not keys:
            return [flag] * len(keys)
        m = self.machine
        _, missing = self.ram.lookup(keys)
        absent = {keys[position] for position in missing}
        return [
            m.read(self.sizes.experts[key.layer], flag)
            if key in absent
            else max(flag, self._loaded.pop(key, 0.0))
            for key in keys
        ]

    def _observe(
        self, nbytes: int, hits: int, asked: bool, rest: int, cpu_busy: float, copying: float
    ) -> None:
        """What a live engine would learn from its own clocks."""
        m, costs = self.machine, self.costs
        if hits:
            costs.gpu.observe(nbytes * hits, m.gpu_seconds(nbytes * hits))
        if rest and cpu_busy:
            costs.observe_cpu(nbytes * rest, cpu_busy, min(1.0, copying / cpu_busy))
        if asked:
            costs.sync += 0.1 * (m.rates.sync - costs.sync)
        copied, read = self._moved
        if m.copied > copied:
            costs.link.observe(nbytes, m.copy_seconds(nbytes))
        if m.read_bytes > read:
            costs.disk.observe(m.read_bytes - read, m.read_seconds(m.read_bytes - read))
        self._moved = m.copied, m.read_bytes

    def _guess(self, layer: int, routed: Sequence[Sequence[int]]) -> None:
        """Read what later layers are likely to want, as long as the disk has nothing else to do."""
        m, tier, num = self.machine, self.ram, self.sizes.num_experts
        if tier is None:
            return
        for ahead in range(layer + 1, min(layer + 1 + self._look_ahead, len(routed))):
            if m.disk_free > m.now or not self.sizes.experts[ahead]:
                return
            guesses = [
                expert if self._random.random() < self._accuracy else self._random.randrange(num)
                for expert in routed[ahead]
            ]
            keys = list(dict.fromkeys(ExpertKey(ahead, expert) for expert in guesses))
            keys = [key for key in keys if key not in self.gpu]
            for key in tier.guess(keys, len(keys)):
                self._loaded[key] = m.read(self.sizes.experts[ahead], m.now)

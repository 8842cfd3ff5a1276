"""Room in the KV cache: what requests need, and whether another one fits."""

from __future__ import annotations

from collections.abc import Sequence as Items

from tiered.kv_cache import PAGE_SIZE, Sequence
from tiered.serve.job import Job
from tiered.serve.prefix import PrefixCache


def sequence_of(job: Job) -> Sequence:
    """The pages of a job that is running."""
    assert job.sequence is not None
    return job.sequence


def new_pages(job: Job, tokens: Items[int]) -> int:
    """Pages that are needed to append these tokens."""
    sequence = sequence_of(job)
    return -(-(len(sequence.tokens) + len(tokens)) // PAGE_SIZE) - sequence.num_pages


def has_room(job: Job, running: Items[Job], prefixes: PrefixCache) -> bool:
    """Whether its prompt fits beside the others' prompts and a page for each; one always does."""
    if not running:
        return True
    kv = prefixes.kv
    if kv.is_recurrent and len(running) >= kv.num_texts:
        return False
    known = prefixes.matched_tokens(job.tokens[:-1]) // PAGE_SIZE
    needed = -(-len(job.tokens) // PAGE_SIZE) - known + 1 + len(running)
    promised = sum(len(other.to_do) // PAGE_SIZE for other in running)
    free = kv.free_tokens // PAGE_SIZE + prefixes.num_evictable
    return needed + promised + known <= free  # what is known may be all that could be evicted

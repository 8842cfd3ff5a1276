"""Attention over the pages of the KV cache: blocks of rows against chunks of positions.

A block is some consecutive rows (tokens) of one sequence; a chunk is CHUNK positions.
Chunks begin at multiples of CHUNK and are merged in order, and the arithmetic of one row knows
nothing of the other rows. So a token's result has the same bits in prefill and in decode, in any
batch, and on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

from cpu_kernels.compiler import inner
from cpu_kernels.kv import CHUNK, KV
from cpu_kernels.lanes import ELEMENT_BYTES, LANES, load_lanes
from cpu_kernels.memory import call_kernel, load_f32, load_i32, word
from cpu_kernels.products import kernel
from cpu_kernels.record import fields
from cpu_kernels.simd import emitted
from cpu_kernels.softmax import (
    HEADER,
    empty_row,
    finish,
    limit_row,
    merge,
    scale_row,
    weigh_row,
)
from cpu_kernels.team import barrier, next_task

BLOCK_ROWS = 64  # of a block: as many at most, or more
BLOCK_QUERIES = 128  # where these are so many query heads: a chunk is copied for each block
STRIP = 32  # query heads whose scores are kept at once: 32 KiB, the first-level cache
PACK_FROM = 24  # query heads from which it pays to copy a chunk's keys and values to float32

# What attention needs to know of a batch, the same in all layers ...
BATCH = fields(
    "num_rows positions sequences tables max_pages num_blocks blocks num_chunks split x queries "
    "normed projected attended partials workspaces workspace_bytes prepared prepared_out out "
    "values head_rows gates"
)
# ... and of a layer. `kv` is the address of a record of KV.
ATTENTION = fields(
    "batch kv num_heads num_kv_heads head_dim padded_dim group window sinks hidden_size eps norm "
    "norm_bias "
    "q k v o gate q_norm k_norm full_norm value_norm out_norm clip query_scale fine coarse "
    "half adjacent chunked temperature temperature_step multiply attend_chunk"
)


@inner
def partial_bytes(padded_dim):
    return HEADER + 4 * padded_dim


@inner
def block_rows(group):
    """At most, where `group` query heads share one of keys."""
    return max(BLOCK_ROWS, BLOCK_QUERIES // group)


@inner
def workspace_bytes(padded_dim, group):
    """Bytes that one thread needs: packed keys, packed values, scores, partials, totals."""
    packed = 2 * 4 * CHUNK * padded_dim
    rows = STRIP + block_rows(group) * group
    return packed + 4 * CHUNK * STRIP + rows * partial_bytes(padded_dim)


@inner
def first_visible(layer, position):
    window = word(layer, ATTENTION.window)
    if word(layer, ATTENTION.chunked):
        return position // window * window
    return position + 1 - window if 0 < window <= position else 0


@emitted("void", "i64 i64 i64 i64 i64 i64 i64 i64")
def _pack_page(
    k, kind, keys, values, head_dim, padded_dim, page_size, offset, packed_keys, packed_values
):
    """Copy a page, whose first token has number `offset` in the chunk, as float32, into panels of
    the whole chunk: keys [CHUNK / 16, head_dim, 16], values [padded_dim / 16, CHUNK, 16]."""
    source_bytes, target_bytes = LANES * ELEMENT_BYTES[kind], LANES * ELEMENT_BYTES["f32"]

    def copy(source, count, target):
        with k.loop(count) as i:
            value = load_lanes(k, kind, source + i * source_bytes)
            k.store(target + i * target_bytes, value, align=4)

    target = packed_keys + (offset >> 4) * head_dim * target_bytes
    copy(keys, (page_size >> 4) * head_dim, target)
    with k.loop(padded_dim >> 4) as v:
        target = packed_values + (v * CHUNK + offset) * target_bytes
        copy(values + v * page_size * source_bytes, page_size, target)


@inner
def _block(kv, page, head):
    return page * word(kv, KV.num_heads) + head


@inner
def _keys(kv, table, position, head):
    block = _block(kv, load_i32(table, position // word(kv, KV.page_size)), head)
    return word(kv, KV.keys) + block * word(kv, KV.key_page)


@inner
def _values(kv, table, position, head):
    block = _block(kv, load_i32(table, position // word(kv, KV.page_size)), head)
    return word(kv, KV.values) + block * word(kv, KV.value_page)


@inner
def _pack_chunk(kv, table, head, start, lo, hi, to_keys, to_values):
    """Positions start + lo to start + hi - 1 (whole pages) as float32."""
    kind, page_size = word(kv, KV.kind), word(kv, KV.page_size)
    head_dim, padded_dim = word(kv, KV.head_dim), word(kv, KV.padded_dim)
    for offset in range(lo // page_size * page_size, hi, page_size):
        position = start + offset
        keys, values = _keys(kv, table, position, head), _values(kv, table, position, head)
        depth, keep = head_dim, padded_dim
        if kind == 0:
            _pack_page("f32", keys, values, depth, keep, page_size, offset, to_keys, to_values)
        elif kind == 1:
            _pack_page("f16", keys, values, depth, keep, page_size, offset, to_keys, to_values)
        else:
            _pack_page("int8", keys, values, depth, keep, page_size, offset, to_keys, to_values)


@inner
def _scores_from_pages(kv, table, head, start, lo, hi, queries, num_rows, scores):
    page_size, multiply = word(kv, KV.page_size), word(kv, KV.multiply)
    row, depth = 4 * word(kv, KV.padded_dim), word(kv, KV.head_dim)
    panel = depth * LANES * word(kv, KV.element_bytes)
    for offset in range(lo // page_size * page_size, hi, page_size):
        num_panels = (min(hi - offset, page_size) + LANES - 1) // LANES
        keys, out = _keys(kv, table, start + offset, head), scores + 4 * offset
        if offset + page_size < hi:
            next = _keys(kv, table, start + offset + page_size, head)
        else:  # the chunk's values come next
            next = _values(kv, table, start + lo, head)
        arguments = (
            queries, row, num_rows, keys, panel, num_panels, depth, out, 4 * CHUNK, 1, next, 0
        )  # fmt: skip
        call_kernel(multiply, arguments)


@inner
def _values_from_pages(kv, table, head, start, lo, hi, scores, num_rows, out, out_row, after):
    page_size, multiply = word(kv, KV.page_size), word(kv, KV.multiply)
    row = LANES * word(kv, KV.element_bytes)
    at, panel, num_panels = lo, page_size * row, word(kv, KV.padded_dim) // LANES
    while at < hi:
        page_end = min((at // page_size + 1) * page_size, hi)
        values = _values(kv, table, start + at, head) + at % page_size * row
        a, depth, fresh = scores + 4 * at, page_end - at, 1 if at == lo else 0
        next = _values(kv, table, start + page_end, head) if page_end < hi else after
        arguments = (
            a, 4 * CHUNK, num_rows, values, panel, num_panels, depth, out, out_row, fresh, next, 0
        )  # fmt: skip
        call_kernel(multiply, arguments)
        at = page_end


@inner
def _apply_scales(kv, table, head, start, lo, hi, is_value, scores, num_rows):
    """int8: the scales of keys belong to the scores, those of values to the weights."""
    page_size = word(kv, KV.page_size)
    for offset in range(lo // page_size * page_size, hi, page_size):
        block = _block(kv, load_i32(table, (start + offset) // page_size), head)
        scales = word(kv, KV.scales) + 4 * (block * 2 + is_value) * page_size
        num_vectors = (min(hi - offset, page_size) + LANES - 1) // LANES
        for row in range(num_rows):
            scale_row(scores + 4 * (row * CHUNK + offset), 0, num_vectors, scales)


@inner
def _table(layer, row):
    """The page table of a row's sequence."""
    batch = word(layer, ATTENTION.batch)
    sequence = load_i32(word(batch, BATCH.sequences), row)
    return word(batch, BATCH.tables) + 4 * sequence * word(batch, BATCH.max_pages)


@inner
def _seen(layer, chunk, first_row, last_row):
    """Positions [lo, hi) of a chunk, counted from its start, that rows first to last see."""
    positions, start = word(word(layer, ATTENTION.batch), BATCH.positions), chunk * CHUNK
    lo = first_visible(layer, load_i32(positions, first_row)) - start
    hi = load_i32(positions, last_row) + 1 - start
    return min(max(lo, 0), CHUNK), min(max(hi, 0), CHUNK)


@inner
def _softmax(layer, chunk, first_query, count, first, last, scores, partials):
    """Of rows of scores, in vectors first to last - 1; a row is limited before the one above it is
    weighed."""
    group, size = word(layer, ATTENTION.group), partial_bytes(word(layer, ATTENTION.padded_dim))
    above_lo, above_hi = 0, 0
    for i in range(count + 1):
        lo, hi, row, partial = 0, 0, scores + 4 * CHUNK * i, partials + i * size
        if i < count:
            this_row = (first_query + i) // group
            lo, hi = _seen(layer, chunk, this_row, this_row)
            if lo < hi:
                limit_row(row, first, last, lo, hi, partial)
            else:
                empty_row(row, first, last, partial)
        if above_lo < above_hi:
            weigh_row(row - 4 * CHUNK, first, last, above_lo, above_hi, partial - size)
        above_lo, above_hi = lo, hi


def _attend_chunk(
    layer, workspace, first_row, num_rows, head, chunk, out, accumulate, next, _9, _10, _11
):
    """A kernel, so that it is compiled once and by itself.

    The partials of a block's query heads, of one head of keys, for one chunk: written to `out`,
    one for each row and query head, or merged into those that are there. `next`: the first keys
    that are needed afterwards, to be prefetched."""
    batch, kv = word(layer, ATTENTION.batch), word(layer, ATTENTION.kv)
    group, padded_dim = word(layer, ATTENTION.group), word(layer, ATTENTION.padded_dim)
    head_dim, kind = word(kv, KV.head_dim), word(kv, KV.kind)
    table = _table(layer, first_row)
    start, size = chunk * CHUNK, partial_bytes(padded_dim)
    num_queries, query_bytes = num_rows * group, 4 * padded_dim
    queries = word(batch, BATCH.queries)
    queries += (head * word(batch, BATCH.num_rows) + first_row) * group * query_bytes
    packed_keys = workspace
    packed_values = packed_keys + 4 * CHUNK * padded_dim
    scores = packed_values + 4 * CHUNK * padded_dim
    parts = scores + 4 * CHUNK * STRIP
    is_packed, multiply = num_queries >= PACK_FROM, word(layer, ATTENTION.multiply)
    if is_packed:
        lo, hi = _seen(layer, chunk, first_row, first_row + num_rows - 1)
        _pack_chunk(kv, table, head, start, lo, hi, packed_keys, packed_values)
    for strip in range(0, num_queries, STRIP):
        count = min(STRIP, num_queries - strip)
        last_row = first_row + (strip + count - 1) // group
        lo, hi = _seen(layer, chunk, first_row + strip // group, last_row)
        lo = lo // LANES * LANES
        first, last = lo // LANES, (hi + LANES - 1) // LANES  # vectors of positions
        target = parts if accumulate else out + strip * size
        q = queries + strip * query_bytes
        if is_packed:
            panel = head_dim * 4 * LANES
            arguments = (
                q, query_bytes, count, packed_keys + first * panel, panel, last - first, head_dim,
                scores + 4 * lo, 4 * CHUNK, 1, packed_values, 0,
            )  # fmt: skip
            call_kernel(multiply, arguments)
        else:
            _scores_from_pages(kv, table, head, start, lo, hi, q, count, scores)
        if kind == 2:
            _apply_scales(kv, table, head, start, lo, hi, 0, scores, count)
        _softmax(layer, chunk, first_row * group + strip, count, first, last, scores, target)
        if kind == 2:
            _apply_scales(kv, table, head, start, lo, hi, 1, scores, count)
        if is_packed:
            arguments = (
                scores + 4 * lo, 4 * CHUNK, count, packed_values + lo * 4 * LANES,
                CHUNK * 4 * LANES, padded_dim // LANES, hi - lo, target + HEADER, size, 1,
                packed_keys, 0,
            )  # fmt: skip
            call_kernel(multiply, arguments)
        else:
            _values_from_pages(
                kv, table, head, start, lo, hi, scores, count, target + HEADER, size, next
            )
        if accumulate:
            for i in range(count):
                merge(out + (strip + i) * size, target + i * size, padded_dim)


def _make_attend_chunk(_isa: str, _format: str) -> Callable:
    return _attend_chunk


def attend_chunk_kernel() -> int:
    return kernel(_make_attend_chunk, "", "")[0]


@inner
def _finish_row(layer, row, head, query, total):
    """The result of query head `query` of the group of `head`, from its total."""
    group, head_dim = word(layer, ATTENTION.group), word(layer, ATTENTION.head_dim)
    number, sinks = head * group + query, word(layer, ATTENTION.sinks)
    out = word(word(layer, ATTENTION.batch), BATCH.attended)
    out += 4 * head_dim * (row * word(layer, ATTENTION.num_heads) + number)
    sink = load_f32(sinks, number) if sinks else load_f32(total, 0)
    finish(total, out, head_dim, sink, 1 if sinks else 0)


@inner
def _chunks(layer, first_row, num_rows):
    """Chunks [lo, hi) that some row of a block sees."""
    positions = word(word(layer, ATTENTION.batch), BATCH.positions)
    lo = first_visible(layer, load_i32(positions, first_row)) // CHUNK
    return lo, load_i32(positions, first_row + num_rows - 1) // CHUNK + 1


@inner
def attend_blocks(layer, thread, team):
    """Many rows: a task is a block and a head, all of its chunks one after the other."""
    batch, size = word(layer, ATTENTION.batch), partial_bytes(word(layer, ATTENTION.padded_dim))
    num_heads, group = word(layer, ATTENTION.num_kv_heads), word(layer, ATTENTION.group)
    padded_dim, blocks = word(layer, ATTENTION.padded_dim), word(batch, BATCH.blocks)
    workspace = word(batch, BATCH.workspaces) + thread * word(batch, BATCH.workspace_bytes)
    totals = workspace + 4 * CHUNK * (2 * padded_dim + STRIP) + STRIP * size
    num_blocks = word(batch, BATCH.num_blocks)
    task = next_task(team, 0)
    while task < num_blocks * num_heads:
        # Later blocks see more: start with those, so that the last tasks are small ones.
        block, head = num_blocks - 1 - task // num_heads, task % num_heads
        first_row, num_rows = word(blocks, 2 * block), word(blocks, 2 * block + 1)
        for i in range(num_rows * group):
            empty_row(0, 0, 0, totals + i * size)
        lo, hi = _chunks(layer, first_row, num_rows)
        for chunk in range(lo, hi):
            arguments = (
                layer, workspace, first_row, num_rows, head, chunk, totals, 1, totals, 0, 0, 0
            )  # fmt: skip
            call_kernel(word(layer, ATTENTION.attend_chunk), arguments)
        for i in range(num_rows * group):
            _finish_row(layer, first_row + i // group, head, i % group, totals + i * size)
        task = next_task(team, 0)


@inner
def _partials(layer, chunk, head, row):
    """Where split attention keeps the partials of a row's query heads of one head and chunk."""
    batch, size = word(layer, ATTENTION.batch), partial_bytes(word(layer, ATTENTION.padded_dim))
    number = chunk * word(layer, ATTENTION.num_kv_heads) + head
    number = (number * word(batch, BATCH.num_rows) + row) * word(layer, ATTENTION.group)
    return word(batch, BATCH.partials) + number * size


@inner
def _split_task(layer, task):
    """First row, number of rows (0: there is nothing to do), head and chunk of a task."""
    batch, num_heads = word(layer, ATTENTION.batch), word(layer, ATTENTION.num_kv_heads)
    num_blocks, blocks = word(batch, BATCH.num_blocks), word(batch, BATCH.blocks)
    chunk, block = task // num_heads // num_blocks, task // num_heads % num_blocks
    first_row, num_rows = word(blocks, 2 * block), word(blocks, 2 * block + 1)
    lo, hi = _chunks(layer, first_row, num_rows)
    return first_row, num_rows if lo <= chunk < hi else 0, task % num_heads, chunk


@inner
def attend_split(layer, thread, team):
    """Few rows: a task is a block, a head and a chunk. `merge_split` follows, after a barrier."""
    batch, kv = word(layer, ATTENTION.batch), word(layer, ATTENTION.kv)
    workspace = word(batch, BATCH.workspaces) + thread * word(batch, BATCH.workspace_bytes)
    num_tasks = word(batch, BATCH.num_blocks) * word(layer, ATTENTION.num_kv_heads)
    num_tasks *= word(batch, BATCH.num_chunks)
    task = next_task(team, 0)
    if task < num_tasks:
        first_row, num_rows, head, chunk = _split_task(layer, task)
    while task < num_tasks:
        this_row, these_rows, this_head, this_chunk = first_row, num_rows, head, chunk
        task, next = next_task(team, 0), workspace
        if task < num_tasks:  # taken already, so that its keys can be prefetched
            first_row, num_rows, head, chunk = _split_task(layer, task)
            if num_rows:
                next = _keys(kv, _table(layer, first_row), chunk * CHUNK, head)
        if these_rows:
            out = _partials(layer, this_chunk, this_head, this_row)
            arguments = (
                layer, workspace, this_row, these_rows, this_head, this_chunk, out, 0, next, 0, 0, 0
            )  # fmt: skip
            call_kernel(word(layer, ATTENTION.attend_chunk), arguments)


@inner
def merge_split(layer, thread, num_threads):
    batch, size = word(layer, ATTENTION.batch), partial_bytes(word(layer, ATTENTION.padded_dim))
    num_heads, group = word(layer, ATTENTION.num_kv_heads), word(layer, ATTENTION.group)
    total = word(batch, BATCH.workspaces) + thread * word(batch, BATCH.workspace_bytes)
    num_tasks = word(batch, BATCH.num_rows) * num_heads * group
    for task in range(num_tasks * thread // num_threads, num_tasks * (thread + 1) // num_threads):
        row, head, query = task // group // num_heads, task // group % num_heads, task % group
        empty_row(0, 0, 0, total)
        lo, hi = _chunks(layer, row, 1)
        for chunk in range(lo, hi):
            part = _partials(layer, chunk, head, row) + query * size
            merge(total, part, word(layer, ATTENTION.padded_dim))
        _finish_row(layer, row, head, query, total)


@inner
def run_attention(layer, thread, num_threads, team):
    """From queries and the KV cache to `attended`; ends with a barrier."""
    if word(word(layer, ATTENTION.batch), BATCH.split):
        attend_split(layer, thread, team)
        barrier(team)
        merge_split(layer, thread, num_threads)
    else:
        attend_blocks(layer, thread, team)
    barrier(team)

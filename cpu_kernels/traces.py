"""Traces of routing from files to the integers that `residency.py` replays.

`tiered/tracing/trace.py` and `trace_csv.py` describe the two formats, and read them event by event;
here a long file is gone through once, at hundreds of megabytes per second.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from cpu_kernels.cache import compiling
from cpu_kernels.compiler import called, inner
from cpu_kernels.record import fields
from cpu_kernels.residency import DROPPED, FETCHED, PASS, PREFETCHED

COUNTS = fields("length num_routed num_asked at")  # `at`: where reading ended
NUM_COUNTS = len(COUNTS)
WHOLE, UNKNOWN_RECORD, UNKNOWN_EXPERT, NO_NUMBER, NO_BATCH = range(5)  # how it ended

LETTER_P, LETTER_R, LETTER_G, LETTER_F, LETTER_A, LETTER_D, LETTER_C = map(ord, "PRGFADC")
NEWLINE, COMMA, ZERO, NINE = map(ord, "\n,09")


@inner
def number(data, at):
    """u16, little-endian."""
    return np.int64(data[at]) | np.int64(data[at + 1]) << 8


@inner
def append_keys(data, at, records, length, num_experts, is_named):
    """Copy keys behind their number; returns where the records end, or -1: no such expert."""
    count = number(data, at)
    records[length] = count
    for i in range(count):
        layer, expert = number(data, at + 2 + 4 * i), number(data, at + 4 + 4 * i)
        if expert >= num_experts or (layer + 1) * num_experts > len(is_named):
            return -1
        key = layer * num_experts + expert
        records[length + 1 + i] = key
        is_named[key] = 1
    return length + 1 + count


@inner
def keys_end(data, at, extra):
    """Where keys end whose number lies here, with `extra` more bytes for each."""
    return at + 2 + (4 + extra) * number(data, at) if at + 2 <= len(data) else len(data) + 1


def _parse(data, num_experts, records, is_named, counts):
    """Records of a trace file of ours. What a crash cut short is left out."""
    at, length, size = counts[COUNTS.at], 0, len(data)
    latest = -1  # where the last demand says how many it asked for
    status = WHOLE
    while at < size:
        letter = data[at]
        if letter == LETTER_F:
            end = keys_end(data, at + 1, 1)
        elif letter in (LETTER_R, LETTER_G):
            begin = at + (6 if letter == LETTER_R else 7)
            end = begin
            if end <= size:
                num_routed = number(data, begin - 3) * data[begin - 1]
                end += 4 * num_routed
        elif letter == LETTER_P:
            end = at + 2
        elif letter == LETTER_A:
            end = keys_end(data, keys_end(data, at + 5, 0), 0)
        elif letter == LETTER_D:
            end = at + 5
        elif letter == LETTER_C:
            end = at + 3
        else:
            status = UNKNOWN_RECORD
            break
        if end > size:
            break
        if letter == LETTER_F:
            latest = length + 1
            records[length] = FETCHED
            records[latest] = -1
            after = append_keys(data, at + 1, records, length + 2, num_experts, is_named)
            if after < 0:
                status = UNKNOWN_EXPERT
                break
            counts[COUNTS.num_asked] += records[length + 2]
            length = after
        elif letter == LETTER_R:
            counts[COUNTS.num_routed] += num_routed
        elif letter == LETTER_P:
            records[length], records[length + 1] = PASS, data[at + 1] == 1
            length += 2
        elif letter == LETTER_A:
            records[length] = PREFETCHED
            records[length + 1] = number(data, at + 1) | number(data, at + 3) << 16
            middle = append_keys(data, at + 5, records, length + 2, num_experts, is_named)
            after = -1
            if middle >= 0:
                second = keys_end(data, at + 5, 0)
                after = append_keys(data, second, records, middle, num_experts, is_named)
            if after < 0:
                status = UNKNOWN_EXPERT
                break
            counts[COUNTS.num_asked] += records[length + 2]
            length = after
        elif letter == LETTER_D:
            layer, expert = number(data, at + 1), number(data, at + 3)
            if expert >= num_experts or (layer + 1) * num_experts > len(is_named):
                status = UNKNOWN_EXPERT
                break
            records[length] = DROPPED
            records[length + 1] = layer * num_experts + expert
            is_named[records[length + 1]] = 1
            length += 2
        elif letter == LETTER_C and latest >= 0:
            records[latest] = number(data, at + 1)
        at = end
    counts[COUNTS.length], counts[COUNTS.at] = length, at
    return status


def _parse_csv(data, num_experts, top_k, records, is_named, counts):
    """Rows `turn,phase,step,layer,slot,expert,weight,...`; lines that begin otherwise are skipped.

    A batch's experts are put down as they come, and then only the last of equal ones is kept.
    """
    at, length, size = counts[COUNTS.at], 0, len(data)
    begin, in_batch = -1, 0  # of the batch's keys; -1: there is none
    row = np.zeros(6, np.int64)
    batch = np.full(4, -1, np.int64)  # turn, phase, step, layer
    last_use = np.full(len(is_named), -1, np.int64)  # of each expert, in the batch
    while True:
        while at < size and not ZERO <= data[at] <= NINE:  # to the next row
            while at < size and data[at] != NEWLINE:
                at += 1
            at += 1
        is_over = at >= size
        start = at
        if not is_over:
            for column in range(6):
                value, num_digits = np.int64(0), 0
                while at < size and ZERO <= data[at] <= NINE:
                    value = 10 * value + data[at] - ZERO
                    at += 1
                    num_digits += 1
                if not 0 < num_digits < 10 or at >= size or data[at] != COMMA:
                    counts[COUNTS.at] = start
                    return NO_NUMBER
                at += 1
                row[column] = value
            while at < size and data[at] != NEWLINE:
                at += 1
            at += 1
            if row[1] == 0:
                row[2] = 0  # all tokens of a prompt are one batch
        same_pass = not is_over and batch[0] == row[0] and batch[1] == row[1] and batch[2] == row[2]
        if begin >= 0 and not (same_pass and batch[3] == row[3]):
            if in_batch % top_k:
                counts[COUNTS.at] = start
                return NO_BATCH
            kept = begin
            for i in range(begin, begin + in_batch):
                if last_use[records[i]] == i:
                    records[kept] = records[i]
                    kept += 1
            for i in range(begin, kept):
                last_use[records[i]] = -1
            records[begin - 1] = kept - begin
            counts[COUNTS.num_asked] += kept - begin
            counts[COUNTS.num_routed] += in_batch
            length, begin = kept, -1
        if is_over:
            break
        if row[5] >= num_experts or (row[3] + 1) * num_experts > len(is_named):
            counts[COUNTS.at] = start
            return UNKNOWN_EXPERT
        if not same_pass:
            records[length], records[length + 1] = PASS, row[1] == 1
            length += 2
        if begin < 0:
            batch[:] = row[:4]
            records[length], records[length + 1] = FETCHED, -1
            begin, in_batch = length + 3, 0
        key = row[3] * num_experts + row[5]
        records[begin + in_batch] = key
        last_use[key] = begin + in_batch
        is_named[key] = 1
        in_batch += 1
    counts[COUNTS.length], counts[COUNTS.at] = length, at
    return WHOLE


@inner
def after(records, at):
    """Where the record behind the one at `at` begins."""
    kind, end = records[at], at + 2
    if kind in (FETCHED, PREFETCHED):
        end += 1 + records[end]
    if kind == PREFETCHED:
        end += 1 + records[end]
    return end


def _count_demands(records, first):
    """How often each expert is demanded: `first` [number of experts + 1], shifted by one."""
    at = 0
    while at < len(records):
        if records[at] == FETCHED:
            for i in range(at + 3, after(records, at)):
                first[records[i] + 1] += 1
        at = after(records, at)


def _demand_times(records, free, times):
    """When each expert is demanded; `free` is where the next time of each one goes."""
    at, now = 0, 0
    while at < len(records):
        if records[at] == FETCHED:
            for i in range(at + 3, after(records, at)):
                key = records[i]
                times[free[key]] = now
                free[key] += 1
            now += 1
        at = after(records, at)


class Parsed(NamedTuple):
    """`status` is WHOLE, or says what is wrong `at` a byte."""

    records: np.ndarray  # int64
    is_named: np.ndarray  # uint8 [layers x experts]
    num_routed: int
    num_asked: int
    status: int
    at: int


class Kernels(NamedTuple):
    parse: Any
    parse_csv: Any
    count_demands: Any
    demand_times: Any


@cache
def load() -> Kernels:
    """The compiled functions."""
    data, words = types.Array(types.uint8, 1, "C", readonly=True), types.int64[::1]
    named, i8 = types.uint8[::1], types.int64
    with compiling():
        kernels = Kernels(*map(called(), (_parse, _parse_csv, _count_demands, _demand_times)))
        kernels.parse.compile((data, i8, words, named, words))
        kernels.parse_csv.compile((data, i8, i8, words, named, words))
        kernels.count_demands.compile((words, words))
        kernels.demand_times.compile((words, words, words))
    return kernels


def parse(data: bytes, begin: int, num_layers: int, num_experts: int) -> Parsed:
    """A file of ours, whose records begin at `begin`."""
    most = len(data) + 8  # no record takes more numbers than bytes; what is not used takes no room
    return _parsed(load().parse, data, begin, num_layers, num_experts, (), most)


def parse_csv(data: bytes, num_layers: int, num_experts: int, top_k: int) -> Parsed:
    """A CSV trace. A row has 12 bytes at least, and becomes six numbers at most."""
    most = len(data) // 2 + 8
    return _parsed(load().parse_csv, data, 0, num_layers, num_experts, (top_k,), most)


def _parsed(
    kernel: Any,
    data: bytes,
    begin: int,
    num_layers: int,
    num_experts: int,
    more: tuple[int, ...],
    most: int,
) -> Parsed:
    records, counts = np.empty(most, np.int64), np.zeros(NUM_COUNTS, np.int64)
    is_named = np.zeros(num_layers * num_experts, np.uint8)
    counts[COUNTS.at] = begin
    read = np.frombuffer(data, np.uint8)
    read.flags.writeable = False
    status = int(kernel(read, num_experts, *more, records, is_named, counts))
    length, num_routed, num_asked, at = counts.tolist()
    return Parsed(records[:length], is_named, num_routed, num_asked, status, at)


def future(records: np.ndarray, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """When each expert is demanded: int64 times, one expert after the other, and int64 [number of
    experts + 1], where each one's begin."""
    kernels, first = load(), np.zeros(num_keys + 1, np.int64)
    kernels.count_demands(records, first)
    np.cumsum(first, out=first)
    times = np.empty(first[-1], np.int64)
    kernels.demand_times(records, first.copy(), times)
    return times, first

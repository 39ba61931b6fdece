"""Anchors: where the prefixes of long keys stand in the tree, so that a long path need not be walked node after node.

The boundaries of a key are the ends of its chunks. An anchor is an entry (tag << 32 | row) of a table, keyed by a
fingerprint of the prefix up to a boundary: the prefix ends on the edge of that row, or on a row above it. Anchors are
hints, as a row may be used again and fingerprints may collide: whoever uses an anchor compares all tokens. A missing or
wrong anchor costs time only. A long match notes the anchors that it has missed, and nothing else maintains them.

The words of a launch carry numbers from program to program without a fence: the upper half of a word says by which
launch (`epoch`) it was written, so a program that reads it knows whether the lower half has arrived.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.climb import check_group, hinted_group, next_group
from flatradix.kernels.gpu.launch import device_function
from flatradix.kernels.gpu.rows import FREE
from flatradix.layout import hashing, scratch

mix = device_function(hashing.mix)

WAYS = tl.constexpr(scratch.ANCHOR_WAYS)
LOW32 = tl.constexpr(0xFFFFFFFF)
# Words that a program reads at once, and entries that it writes at once.
LOOK = tl.constexpr(512)
NOTED = tl.constexpr(64)
# The parts of `Scratch.words`: of each chunk its hash, what is known of its prefix, on what that relies, and the row at
# its end for the program that notes anchors.
HASHES = tl.constexpr(0)
FOUND = tl.constexpr(scratch.CHUNK_WORDS)
FEET = tl.constexpr(2 * scratch.CHUNK_WORDS)
NOTES = tl.constexpr(3 * scratch.CHUNK_WORDS)


@triton.jit
def hash_chunks(
    s, key, stage, chunk, there, CHUNK: tl.constexpr, PART: tl.constexpr, STAGED: tl.constexpr
):  # fmt: skip
    """Return a hash of each of these chunks of a key, 32 bits in an int64; lanes. It differs from tree to tree.

    PART: the tokens of each chunk that are read at once. STAGED: copy the tokens to `stage`.
    """
    total = tl.zeros_like(chunk).to(tl.int64)
    seed = tl.load(s.multipliers)
    for first in range(0, CHUNK, PART):
        j = first + tl.arange(0, PART)
        at = (chunk * CHUNK)[:, None] + j[None, :]
        inside = there[:, None] & (j < CHUNK)[None, :]
        token = tl.load(key + at, mask=inside, other=0)
        if STAGED:
            tl.store(stage + at, token, mask=inside)
        total += tl.sum(token.to(tl.int64) * (mix(seed + j.to(tl.int64)) | 1)[None, :], axis=1)
    return (total >> 32) & LOW32


@triton.jit
def await_words(words, there, epoch):
    """Wait until the words that are `there` were written by this launch. Return their numbers; 0 for the others."""
    word = tl.load(words, mask=there, other=0, volatile=True)
    while tl.max((there & ((word >> 32) != epoch)).to(tl.int32)) > 0:
        word = tl.load(words, mask=there, other=0, volatile=True)
    return word & LOW32


@triton.jit
def weight_of(chunk_hash, chunk):
    """Return what a chunk adds to the fingerprints of the prefixes that contain it."""
    return mix(chunk_hash + (chunk.to(tl.int64) << 32))


@triton.jit
def sum_before(words, chunk, code, epoch):
    """Return the fingerprint, unmixed, of the prefix before a chunk: a sum over the chunks before it; scalar."""
    total = mix(code.to(tl.int64))
    first = chunk * 0
    while first < chunk:
        j = first + tl.arange(0, LOOK)
        found = await_words(words + HASHES + j, j < chunk, epoch)
        total += tl.sum(tl.where(j < chunk, weight_of(found, j), 0))
        first += LOOK
    return total


@triton.jit
def _bucket(w, total, mask):
    """Return (pointers to the first entries of the buckets of fingerprints, their tags)."""
    fingerprint = mix(total)
    return w.anchors + WAYS * (fingerprint & mask), fingerprint >> 32


@triton.jit
def find_anchors(w, total, there, mask, TAG: tl.constexpr):
    """Return the rows of the anchors with these fingerprints, int32, 0 where there is none; lanes.

    mask: the number of buckets minus 1. TAG: the bits of a tag that are compared.
    """
    bucket, tag = _bucket(w, total, mask)
    entry = tl.load(bucket[:, None] + tl.arange(0, WAYS)[None, :], mask=there[:, None], other=0)
    alike = (entry != 0) & ((((entry >> 32) ^ tag[:, None]) & TAG) == 0)
    return tl.max(tl.where(alike, entry & LOW32, 0), axis=1).to(tl.int32)


@triton.jit
def _note(w, total, row, there, mask):
    """Write anchors, lanes. The entry with the same tag goes, else an empty entry, else one that the hash chooses."""
    bucket, tag = _bucket(w, total, mask)
    way = tl.arange(0, WAYS)[None, :]
    entry = tl.load(bucket[:, None] + way, mask=there[:, None], other=0)
    # Lanes of one bucket choose at the same time, so the hash also says which of the empty entries.
    score = way ^ ((tag >> 8) & (WAYS - 1))[:, None].to(tl.int32)
    score += tl.where(entry == 0, WAYS, 0)
    score = tl.where((entry != 0) & ((((entry >> 32) ^ tag[:, None]) & LOW32) == 0), 2 * WAYS, score)
    best = tl.argmax(score, axis=1)
    tl.store(bucket + best, ((tag & LOW32) << 32) | row, mask=there)


@triton.jit
def stand_on(s, row, at):
    """Return the rows on whose edges the path lengths `at` lie, from `row` or above it; 0 where that is no row. Lanes.

    A row that was cut since keeps its lower part, so the place may now lie on a row above. A dropped row is none: it
    still has its path, but no key leads there. The rows above a row that was not dropped were not dropped either.
    """
    parent = tl.load(s.parent + row, mask=row > 0, other=FREE)
    end = tl.load(s.end + row, mask=row > 0, other=0)
    length = tl.load(s.length + row, mask=row > 0, other=0)
    created = tl.load(s.created + row, mask=row > 0, other=0)
    row = tl.where((parent != FREE) & (end >= at) & (created >= 0), row, 0)
    beyond = (row > 0) & (end - length >= at)
    while tl.max(beyond.to(tl.int32)) > 0:
        row = tl.where(beyond, tl.maximum(parent, 0), row)
        beyond = beyond & (row > 0)
        parent = tl.load(s.parent + row, mask=beyond, other=0)
        end = tl.load(s.end + row, mask=beyond, other=0)
        length = tl.load(s.length + row, mask=beyond, other=0)
        beyond = beyond & (end - length >= at)
    return row


@triton.jit
def _mark_rows(s, w, words, row, first, last, CHUNK: tl.constexpr):
    """Store the row at the end of each of the chunks `first` to `last` - 1, all on the path up from a row; scalar."""
    path = tl.zeros([1], tl.int32) + row
    rows, after = hinted_group(w, path)
    going = (row > 0) & (first < last)
    while going:
        rows, after, _parent, end, length = check_group(s, w, rows, after)
        begin = end - length
        boundary = tl.where(rows > 0, tl.minimum(end // CHUNK, last), 0)
        lowest = tl.where(rows > 0, tl.maximum(begin // CHUNK, first), 0)
        while tl.max((boundary > lowest).to(tl.int32)) > 0:
            tl.store(words + NOTES + boundary - 1, rows.to(tl.int64), mask=boundary > lowest)
            boundary -= 1
        going = (tl.min(tl.where(rows > 0, begin, 0)) > first * CHUNK) & (tl.max(after) > 0)
        rows, after = next_group(w, after, path > 0)
    tl.debug_barrier()


@triton.jit
def note_anchors(s, w, words, row, first, last, code, epoch, mask, CHUNK: tl.constexpr):
    """Write the anchors of the chunks `first` to `last` - 1 of a key; `row`, scalar, is where the last of them ends."""
    _mark_rows(s, w, words, row, first, last, CHUNK)
    total = sum_before(words, first, code, epoch)
    while first < last:
        j = first + tl.arange(0, NOTED)
        there = j < last
        weight = tl.where(there, weight_of(await_words(words + HASHES + j, there, epoch), j), 0)
        noted = tl.load(words + NOTES + j, mask=there, other=0)
        _note(w, total + tl.cumsum(weight), noted, there & (noted > 0), mask)
        total += tl.sum(weight)
        first += NOTED

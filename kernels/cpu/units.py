"""Comparing, hashing, copying and checking units: tokens, or with bigrams pairs of neighbouring tokens.

`first` and `second` are the addresses of the first and second tokens of a run of units. `wide` says whether the tokens
are int64, as a caller's key may be, or int32, as a key may be and the pool is. Without bigrams `second` is never read.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper, int32_at, int64_at

# Tokens compared without a branch: 64 are 4 + 8 vectors of AVX-512. 131072 equal tokens of an int64 key take 15 us.
BLOCK = 64


@helper
def _common_wide(pool, key, count):
    """Return how many tokens are equal at the beginning of an int32 run and an int64 run."""
    i = 0
    while i + BLOCK <= count:
        a = int32_at(pool + 4 * i)
        b = int64_at(key + 8 * i)
        different = np.int64(0)
        for j in range(BLOCK):
            different |= a[j] ^ b[j]
        if different != 0:
            break
        i += BLOCK
    a = int32_at(pool)
    b = int64_at(key)
    while i < count and a[i] == b[i]:
        i += 1
    return i


@helper
def _common_narrow(pool, key, count):
    i = 0
    while i + BLOCK <= count:
        a = int32_at(pool + 4 * i)
        b = int32_at(key + 4 * i)
        different = np.int32(0)
        for j in range(BLOCK):
            different |= a[j] ^ b[j]
        if different != 0:
            break
        i += BLOCK
    a = int32_at(pool)
    b = int32_at(key)
    while i < count and a[i] == b[i]:
        i += 1
    return i


@helper
def common_tokens(pool, key, wide, count):
    if wide:
        return _common_wide(pool, key, count)
    return _common_narrow(pool, key, count)


@helper
def token_at(key, wide, position):
    if wide:
        return int64_at(key)[position]
    return np.int64(int32_at(key)[position])


@helper
def _weighted_sum(multipliers, offset, tokens, wide, count):
    total = np.int64(0)
    if wide:
        values = int64_at(tokens)
        for j in range(count):
            total += multipliers[offset + j] * values[j]
    else:
        narrow = int32_at(tokens)
        for j in range(count):
            total += multipliers[offset + j] * np.int64(narrow[j])
    return total


@helper
def page_sum(multipliers, first, second, wide, page, bigram):
    """Return the multilinear hash of one page, mod 2**64 (Carter and Wegman 1979). Its terms add up in any order.

    The multipliers are drawn anew for each tree, so nobody can prepare prompts that collide.
    """
    total = _weighted_sum(multipliers, 0, first, wide, page)
    if bigram:
        total += _weighted_sum(multipliers, page, second, wide, page)
    return total


@helper
def first_bad(values, wide, begin, end, limit):
    """Return the index in `values` of the first value of `values[begin:end]` outside [0, limit], or -1."""
    if not wide:
        narrow = int32_at(values + 4 * begin)
        lowest = np.int32(0)
        for j in range(end - begin):
            lowest |= narrow[j]
        if lowest >= 0 and limit >= 2**31 - 1:
            return -1
    else:
        broad = int64_at(values + 8 * begin)
        outside = np.int64(0)
        for j in range(end - begin):
            outside |= broad[j] | (limit - broad[j])
        if outside >= 0:
            return -1
    for j in range(begin, end):
        value = token_at(values, wide, j)
        if value < 0 or value > limit:
            return j
    return -1


@helper
def _copy_wide(source, target, count, limit):
    values = int64_at(source)
    out = int64_at(target)
    outside = np.int64(0)
    for j in range(count):
        out[j] = values[j]
        outside |= values[j] | (limit - values[j])
    return outside


@helper
def _copy_narrowing(source, target, count, limit):
    values = int64_at(source)
    out = int32_at(target)
    outside = np.int64(0)
    for j in range(count):
        out[j] = np.int32(values[j])
        outside |= values[j] | (limit - values[j])
    return outside


@helper
def _copy_narrow(source, target, count):
    values = int32_at(source)
    out = int32_at(target)
    outside = np.int32(0)
    for j in range(count):
        out[j] = values[j]
        outside |= values[j]
    return np.int64(outside)


@helper
def _copy_widening(source, target, count):
    values = int32_at(source)
    out = int64_at(target)
    outside = np.int32(0)
    for j in range(count):
        out[j] = values[j]
        outside |= values[j]
    return np.int64(outside)


@helper
def copy_checked(source, wide, target, target_wide, count, limit):
    """Copy `count` values, int32 or int64 on each side; return a negative number if one is outside [0, limit].

    int32 values are checked only for their sign: no limit is below 2**31 - 1. Checks in the same pass: an insert of
    131072 tokens takes 79 us, and 98 us with a second pass (bench/RESULTS.md).
    """
    if wide:
        if target_wide:
            return _copy_wide(source, target, count, limit)
        return _copy_narrowing(source, target, count, limit)
    if target_wide:
        return _copy_widening(source, target, count)
    return _copy_narrow(source, target, count)


@helper
def copy_slots(source, target, wide, count):
    """Copy `count` slots between arrays of the same dtype."""
    if wide:
        values, out = int64_at(source), int64_at(target)
        for j in range(count):
            out[j] = values[j]
    else:
        narrow, narrow_out = int32_at(source), int32_at(target)
        for j in range(count):
            narrow_out[j] = narrow[j]

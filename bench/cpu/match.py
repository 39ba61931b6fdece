"""Rows: matches of one key, and matches of a whole queue of keys."""

from __future__ import annotations

from array import array
from functools import partial

from bench.support.harness import Measured, Row, Setup, Side, compare
from bench.support.workloads import Both, random_key, read_prompts
from flatradix import Ragged

QUERIES, QUERY_TOKENS, TREE_REQUESTS, TRACE_PAGE = 1024, 4096, 2000, 64


def _match_sides(both: Both, key: array[int], expected: int) -> tuple[Side, Side | None]:
    """Return one match of `key` on each tree. SGLang's parameter object is built before the timed call."""
    assert both.ours.match(key).length == expected
    ours = Side(partial(both.ours.match, key))
    if both.theirs is None:
        return ours, None
    theirs = both.theirs
    params = theirs.classes.MatchPrefixParams(key=theirs.key(key))
    assert theirs.cache.match_prefix(params).device_prefix_len == expected
    return ours, Side(partial(theirs.cache.match_prefix, params))


def _full_hit(tokens: int, edge: int, setup: Setup) -> Measured:
    both = Both(setup, tokens, 1)
    key = random_key(tokens)
    both.insert_edges(key, [edge] * (tokens // edge))
    return compare(setup, *_match_sides(both, key, tokens))


def _miss(setup: Setup) -> Measured:
    both = Both(setup, 1 << 18, 1)
    both.insert(random_key(1 << 17))
    key = random_key(1 << 17, seed=2)
    return compare(setup, *_match_sides(both, key, 0))


def _queue(as_ragged: bool, setup: Setup) -> Measured:
    """Measure a queue of full hits. Such matches are the longest possible, so batching saves the least."""
    assert setup.trace is not None
    prompts = read_prompts(setup.trace, TREE_REQUESTS)
    both = Both(setup, sum(map(len, prompts)), TRACE_PAGE)
    for prompt in prompts:
        both.insert(prompt)
    queue = [prompt[:QUERY_TOKENS] for prompt in prompts if len(prompt) >= QUERY_TOKENS][:QUERIES]
    assert len(queue) == QUERIES
    assert both.ours.match(queue).lengths.tolist() == [QUERY_TOKENS] * QUERIES
    ours = Side(partial(both.ours.match, Ragged.from_sequences(queue) if as_ragged else queue))
    if both.theirs is None:
        return compare(setup, ours, None)
    cache = both.theirs.cache
    params = [both.theirs.classes.MatchPrefixParams(key=both.theirs.key(key)) for key in queue]

    def match_all() -> None:
        for one in params:
            cache.match_prefix(one)

    return compare(setup, ours, Side(match_all))


def _hit_row(tokens: int, edge: int, target: float) -> Row:
    shape = "one edge" if edge == tokens else f"an edge every {edge}"
    name = f"match-{tokens}" if edge == tokens else f"match-{tokens}-deep"
    return Row(name, f"match {tokens} tokens, full hit, {shape}", "us", target, partial(_full_hit, tokens, edge))


_QUEUE = f"match {QUERIES} x {QUERY_TOKENS} tokens on {TREE_REQUESTS} trace requests"

ROWS = [
    *(_hit_row(tokens, tokens, 0.5) for tokens in (32, 128, 512, 2048)),
    *(_hit_row(tokens, edge, 0.7) for tokens in (32768, 131072) for edge in (tokens, 512)),
    Row("queue-ragged", f"{_QUEUE}, a Ragged", "ms", 0.35, partial(_queue, True), needs_trace=True),
    Row("queue-arrays", f"{_QUEUE}, arrays", "ms", 0.35, partial(_queue, False), needs_trace=True),
    Row("miss-131072", "match 131072 tokens, a miss at the first page", "us", 0.1, _miss),
]

"""The calls of a PrefixCache, at the scale of an engine, by the wall clock from Python.

A cache holds conversations in pages of 16, each cut into eight edges. A row begins, commits, decodes or ends a batch of
requests on them. A call ends when it returns; with a device that works on its own, the time includes a wait for it
where the name of the row says so.

  python3 -m bench.requests                           index and KV in host memory
  python3 -m bench.requests --kv cuda                 index in host memory, KV on a GPU
  python3 -m bench.requests --kv cuda --device cuda   both on a GPU
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

import flatradix

PAGE, EDGES, TOKENS = 16, 8, 100_000
Row = tuple[str, float]


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def median(
    device: str, make: Callable[[], Any], call: Callable[[Any], Any], end: Callable[[Any], Any], rounds: int
) -> float:
    """Return the median time of `call`, in microseconds. make: its argument. end: what to do with its result."""
    found = []
    for _ in range(rounds):
        argument = make()
        wait(device)
        begun = time.perf_counter()
        result = call(argument)
        found.append((time.perf_counter() - begun) * 1e6)
        end(result)
    return statistics.median(found)


class World:
    """A cache with `count` cached conversations of `length` tokens."""

    def __init__(self, kv: str, device: str, count: int, length: int) -> None:
        self.random = np.random.default_rng(0)
        self.device = "cuda" if "cuda" in kv + device else "cpu"
        slots = int(2.2 * count * length) // PAGE * PAGE
        self.cache = flatradix.PrefixCache(slots, PAGE, count, 2 * length, kv, device)
        self.tokens = self.random.integers(0, TOKENS, (count, length))
        step = length // EDGES
        for end in range(step, length + 1, step):
            for part in np.array_split(self.tokens[:, :end], -(-count // 256)):
                self.cache.finish(self.cache.begin(list(part)))

    def new(self, tokens: int) -> flatradix.Requests:
        """Begin a request on each conversation, with so many tokens at its end that are not cached."""
        count, length = self.tokens.shape
        fresh = self.random.integers(0, TOKENS, (count, tokens + 1))
        return self.cache.begin(list(np.concatenate([self.tokens[:, : length - tokens], fresh], 1)))

    def committed(self, tokens: int) -> flatradix.Requests:
        requests = self.new(tokens)
        self.cache.commit(requests)
        return requests

    def rows(self, new: int, rounds: int) -> Iterator[Row]:
        cache, (count, length) = self.cache, self.tokens.shape
        prompts: dict[str, Any] = {"a list": list(self.tokens)}
        ragged = flatradix.Ragged.from_sequences(prompts["a list"])
        prompts["a Ragged on the host"] = ragged
        if cache.tree.device.type != "cpu":
            prompts["a Ragged on the device"] = ragged.to(cache.tree.device)
        median_of = partial(median, self.device, rounds=rounds)
        for form, tokens in prompts.items():
            yield f"begin {count} x {length}, {form}", median_of(lambda t=tokens: t, cache.begin, cache.abort)
        together = lambda requests: (cache.commit(requests), requests)[1]  # noqa: E731
        yield f"commit {count} x {new}", median_of(partial(self.new, new), together, cache.abort)
        yield f"finish {count}", median_of(partial(self.committed, new), cache.finish, lambda _: None)


def decode(kv: str, device: str, count: int) -> Row:
    """Decode `count` requests, which are at different positions in their pages."""
    random = np.random.default_rng(0)
    cache = flatradix.PrefixCache(count * 1024, PAGE, count, 1024, kv, device)
    requests = cache.begin([random.integers(0, TOKENS, 100 + at % PAGE) for at in range(count)])
    cache.commit(requests)
    cache.extend(requests)
    found = []
    for _ in range(300):
        tokens = random.integers(0, TOKENS, count)
        begun = time.perf_counter()
        cache.step(requests, tokens)
        found.append((time.perf_counter() - begun) * 1e6)
    return f"step of {count}", statistics.median(found[20:])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.requests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kv", default="cpu", help="device of the KV cache: cpu or cuda (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device of the index: cpu or cuda (default: %(default)s)")
    options = parser.parse_args()
    print(f"index on {options.device}, KV on {options.kv}; microseconds, median", flush=True)
    for count, length, new, rounds in ((1024, 4096, 512, 9), (32, 2048, 512, 31), (1, 4096, 512, 101)):
        for name, taken in World(options.kv, options.device, count, length).rows(new, rounds):
            print(f"  {name}: {taken:,.0f}", flush=True)
    for count in (1024, 256):
        print("  {}: {:,.0f}".format(*decode(options.kv, options.device, count)), flush=True)


if __name__ == "__main__":
    main()

"""An engine on a PrefixCache and its waiting queue, without a model: it begins, prefills, decodes, forks and ends."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

import flatradix
from bench.soak.conversations import VOCABULARY, Conversations
from bench.soak.times import Times

NAMES = (
    "add",
    "order",
    "begin",
    "begin a chunk",
    "probe",
    "commit",
    "extend",
    "step",
    "fork",
    "finish",
    "abort",
    "counts",
)
ORDERS = ("lpm", "fcfs", "aged", "shortest-prefill", "dfs-weight", "hrrn")


class Sizes(NamedTuple):
    """slots: of each pool. Conversations have several times as many tokens, so each pool is always full."""

    slots: int
    page: int
    requests: int
    longest: int
    conversations: int
    waiting: int


class CacheEngine:
    """The requests that run, and the prompts that wait. conversations of a request: the last row for a fork."""

    def __init__(self, random: np.random.Generator, device: str, sizes: Sizes, times: Times) -> None:
        self.random, self.sizes, self.timed = random, sizes, times.timed
        self.talks = Conversations(random, sizes.conversations, sizes.longest)
        kv = device if torch.cuda.is_available() else "cpu"
        self.cache = flatradix.PrefixCache(sizes.slots, sizes.page, sizes.requests, sizes.longest, kv, device)
        self.queue = self.cache.queue(keep=True)
        self.waiting: dict[int, int] = {}  # conversations by the id of their prompt
        self.requests = self.cache.running
        self.of = np.zeros(0, np.int64)  # the conversation of each request
        self.left = np.zeros(0, np.int64)  # how many more tokens each request generates
        self.steps = 0

    def step(self) -> None:
        """Do what an engine does between two forward passes."""
        self.steps += 1
        self.add()
        self.begin()
        if self.steps % 16 == 0:
            self.begin_in_chunks()
        if self.steps % 64 == 0:
            self.fork()
        if self.steps % 32 == 0:
            self.end(self.random.random(len(self.requests)) < 0.05, "abort")
        self.decode()
        self.timed("counts", self.cache.counts)

    def add(self) -> None:
        if (missing := self.sizes.waiting - len(self.queue)) <= 0:
            return
        chosen = self.talks.pick(missing)
        names = [self.talks.tenant(int(one)) for one in chosen]
        if len(chosen):
            ids = self.timed("add", self.queue.add, [self.talks.turn(one) for one in chosen], names)
            self.waiting.update(zip(ids.tolist(), chosen.tolist(), strict=True))

    def begin(self) -> None:
        order = ORDERS[self.steps // 100 % len(ORDERS)]
        ids = self.timed("order", self.queue.order, order)
        requests, begun = self.timed(
            "begin", self.queue.begin, ids, token_budget=8 * self.sizes.longest, max_requests=8,
            share=self.steps % 2 == 0,
        )  # fmt: skip
        if len(requests):
            self.timed("commit", self.cache.commit, requests)
            self.adopt(requests, np.array([self.waiting.pop(id) for id in begun.tolist()]))

    def begin_in_chunks(self) -> None:
        chosen = self.talks.pick(4)
        prompts, names = [self.talks.turn(one) for one in chosen], [self.talks.tenant(int(one)) for one in chosen]
        self.timed("probe", self.cache.probe, prompts, names)
        chunk = self.sizes.longest // 8
        requests = self.timed("begin a chunk", self.cache.begin, prompts, names, chunk=chunk)
        self.talks.busy[chosen[~requests.running]] = False
        requests, chosen = requests.only_running(), chosen[requests.running]
        while (left := requests.num_tokens - requests.lengths).any():
            self.timed("commit", self.cache.commit, requests)
            if self.timed("extend", self.cache.extend, requests, np.minimum(left, chunk).tolist()):
                self.timed("abort", self.cache.abort, requests)
                self.talks.busy[chosen] = False
                return
        if len(requests):
            self.timed("commit", self.cache.commit, requests)
            self.adopt(requests, chosen)

    def adopt(self, requests: flatradix.Requests, talks: np.ndarray) -> None:
        """Take new requests among those that decode."""
        self.timed("extend", self.cache.extend, requests)
        answers = self.random.integers(1, self.talks.answer, len(requests))
        at = {serial: at for at, serial in enumerate(self.requests.serials.tolist())}
        known = {serial: at for at, serial in enumerate(requests.serials.tolist())}
        self.requests = self.cache.running
        of, left = np.concatenate([self.of, talks]), np.concatenate([self.left, answers])
        old = len(at)
        where = [at[serial] if serial in at else old + known[serial] for serial in self.requests.serials.tolist()]
        self.of, self.left = of[where], left[where]

    def fork(self) -> None:
        if len(self.requests):
            one = self.requests[int(self.random.integers(len(self.requests)))]
            forks, _copies = self.timed("fork", self.cache.fork, one, 2)
            if forks := forks.only_running():
                self.adopt(forks, np.full(len(forks), self.talks.count))

    def decode(self) -> None:
        if not len(self.requests):
            return
        newest = self.random.integers(0, VOCABULARY, len(self.requests))
        short, _changed = self.timed("step", self.cache.step, self.requests, newest)
        self.talks.append(self.of, newest)
        self.left -= 1
        cut = {request.serial for request in short}
        self.end((self.left <= 0) | np.isin(self.requests.serials, list(cut)), "finish")

    def end(self, which: np.ndarray, how: str) -> None:
        if which.any():
            self.timed(how, getattr(self.cache, how), self.requests[which])
            self.talks.busy[self.of[which]] = False
            self.requests, self.of, self.left = self.requests[~which], self.of[~which], self.left[~which]

    @property
    def evicted(self) -> int:
        return self.cache.counts().evicted_tokens

    @property
    def occupancy(self) -> float:
        return self.cache.counts().occupancy

    def check(self) -> None:
        """Check the cache, and what the queue says of the prompts that wait. Raises AssertionError."""
        self.cache.check()
        ids = self.queue.ids().tolist()
        prompts = [self.queue.prompt(id)[:-1] for id in ids]
        names = [self.talks.tenant(self.waiting[id]) for id in ids]
        found = self.cache.tree.match(prompts, names, touch=False).lengths.tolist() if ids else []
        assert self.queue.cached_lengths().tolist() == found, "the queue's cached lengths are not those of a match"
        assert self.requests.serials.tolist() == self.cache.running.serials.tolist(), "requests that run"

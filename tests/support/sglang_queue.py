"""SGLang's scheduling policies with FLATRADIX_QUEUE=1, beside the same policies as SGLang has them."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.sglang_engine import Engine, Plan, Work, load_or_skip
from tests.support.sglang_home import Home

SGLANG = load_or_skip()
POLICIES = ("lpm", "dfs-weight", "hrrn", "shortest-prefill-first")


@contextmanager
def hooks(value: str | None = "1") -> Iterator[Any]:
    """Let SGLang's registry apply the hooks to the classes that import here; yield the registry. Undo it at the end."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from flatradix.integrations.sglang import waiting

    policy, request = SGLANG.policy.SchedulePolicy, SGLANG.requests.Req
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (policy, "calc_priority"), (policy, "waiting_queue_prefix_matched"), (request, "reset_for_retract"),
        ):  # fmt: skip
            patch.setattr(owner, name, getattr(owner, name))
        patch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
        patch.setattr(HookRegistry, "_patched", set())
        # The scheduler's module needs packages that the tests do not install.
        patch.setattr(waiting, "HOOKS", [hook for hook in waiting.HOOKS if ".Scheduler." not in hook[0]])
        if value is None:
            patch.delenv("FLATRADIX_QUEUE", raising=False)
        else:
            patch.setenv("FLATRADIX_QUEUE", value)
        waiting.register_if_asked()
        HookRegistry.apply_hooks()
        yield HookRegistry


def request(rid: str, prompt: Any, entered: float = 0.0, arrival: int = 0, **options: Any) -> Any:
    parameters = SGLANG.sampling.SamplingParams(max_new_tokens=4)
    parameters.normalize(None)
    req = SGLANG.requests.Req(rid, "", array("q", prompt), parameters, **options)
    req.time_stats.wait_queue_entry_time = entered
    req.arrival_processed_tokens = arrival
    return req


class Desk:
    """One cache; a list of requests that SGLang orders, and a list of their twins that the queue orders."""

    def __init__(self, policy: str, plan: Plan, seed: int = 0) -> None:
        from flatradix.integrations.sglang.waiting import WaitingRequests

        self.home = Home(plan)
        self.cache = self.home.cache
        self.rng = random.Random(seed)
        self.theirs: list[Any] = []
        self.ours: list[Any] = []
        self.processed = 0
        self._their_policy, self.policy = (
            SGLANG.policy.SchedulePolicy(policy, self.cache, False, False, False) for _ in range(2)
        )
        self.waiting = WaitingRequests(self.policy, self.cache, lambda: self.ours)
        self._came = 0

    def join(self, prompt: Any, **options: Any) -> None:
        self._came += 1
        rid = f"{self.rng.randrange(10**6)}-{self._came}"
        at = {"entered": float(self._came // 3), "arrival": self.processed - self.rng.randrange(3) * 10}
        for queue in (self.theirs, self.ours):
            queue.append(request(rid, prompt, **at, **options))

    def leave(self, rids: Any) -> None:
        self.theirs = [req for req in self.theirs if req.rid not in rids]
        self.ours = [req for req in self.ours if req.rid not in rids]

    def schedule(self) -> None:
        """Let both order their lists. SGLang goes first: it splits nodes where a match ends."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SGLANG.policy, "WAITING_QUEUE_PREFIX_MATCH_MAX", 10**6)
            self._their_policy.calc_priority(self.theirs, None, self.processed)
        self.policy.calc_priority(self.ours, None, self.processed)

    def compare(self) -> None:
        self.schedule()
        assert [req.rid for req in self.ours] == [req.rid for req in self.theirs]
        assert [req.num_matched_prefix_tokens for req in self.ours] == [
            req.num_matched_prefix_tokens for req in self.theirs
        ]

    def order(self) -> list[str]:
        self.policy.calc_priority(self.ours, None, self.processed)
        return [req.rid for req in self.ours]

    def fill(self, tokens: Any, **options: Any) -> None:
        """Cache tokens. The slots are any: nothing is freed into the allocator that it did not give out."""
        key = self.home.key(tokens, **options)
        slots = self.home.allocator.alloc(-(-len(key.token_ids) // self.home.plan.page_size) * self.home.plan.page_size)
        self.cache.insert(SGLANG.base.InsertParams(key=key, value=slots[: len(key.token_ids)]))

    def evict(self, tokens: int) -> int:
        found: int = self.cache.evict(SGLANG.base.EvictParams(num_tokens=tokens)).num_tokens_evicted
        return found

    def cached(self, tokens: Any) -> int:
        return int(self.cache.tree.match(array("q", tokens), touch=False).lengths[0])


class QueueEngine(Engine):
    """An engine whose waiting requests are followed, and compared with the queue after each pass."""

    def __init__(self, plan: Plan) -> None:
        from flatradix.integrations.sglang.cache import FlatRadixCache
        from flatradix.integrations.sglang.waiting import WaitingRequests

        super().__init__(SGLANG, plan, lambda params: FlatRadixCache(params, device="cpu"))
        self.follower = WaitingRequests(self.policy, self.cache, lambda: self.waiting)
        self.passes = 0
        ordered = self.policy.calc_priority
        self.policy.calc_priority = lambda *arguments: (ordered(*arguments), self.check_queue())

    def check_queue(self) -> None:
        self.passes += 1
        followed, tree = self.follower.followed, self.cache.tree
        assert len(followed) == len(followed.queue) == len(self.waiting)
        ids = followed.columns.id[followed.listed].tolist()
        cached = dict(zip(followed.queue.ids().tolist(), followed.queue.cached_lengths().tolist(), strict=True))
        for req, number in zip(self.waiting, ids, strict=True):
            tokens = req.origin_input_ids + req.output_ids
            assert followed.queue.prompt(number).tolist() == tokens.tolist()
            assert cached[number] == int(tree.match(tokens, _name(req), touch=False).lengths[0])
            if self.follower.orders:
                assert req.num_matched_prefix_tokens == min(cached[number], len(tokens) - 1)

    def run(self, work: list[Work]) -> None:
        coming, now = list(work), 0
        while coming or not self.is_idle:
            while coming and coming[0].arrives <= now:
                self.add(coming.pop(0))
            self.give_up(now)
            self.step()
            self.check()
            now += 1
            assert now < 5000, "requests that are never done"
        assert sorted(self.finished) == sorted(one.rid for one in work)


def _name(req: Any) -> str | bytes | None:
    from flatradix.integrations.sglang.cache import namespace_of

    return namespace_of(req)

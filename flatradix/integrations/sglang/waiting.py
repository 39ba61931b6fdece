"""FLATRADIX_QUEUE=1: SGLang's waiting requests beside the tree, so that a scheduling pass need not match them.

SGLang's hook registry (`sglang.srt.plugins`) gets the hooks. They do nothing until a scheduler is found that they
understand; then `SchedulePolicy.calc_priority` orders by a WaitingQueue, and evictions spare what the queue wants. If
anything fails, SGLang's own behaviour is back.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_disagg

from flatradix.integrations.sglang.cache import FlatRadixCache
from flatradix.integrations.sglang.followed import FollowedQueue
from flatradix.integrations.sglang.turns import turns

VARIABLE = "FLATRADIX_QUEUE"
_ATTRIBUTE = "flatradix_waiting"
_LOG_EVERY = 128  # passes between two of SGLang's lines about shortest-prefill-first

logger = logging.getLogger(__name__)
_active: weakref.WeakSet[WaitingRequests] = weakref.WeakSet()


class WaitingRequests:
    """What takes the place of matching in one SchedulePolicy of SGLang."""

    def __init__(self, policy: Any, cache: FlatRadixCache, source: Callable[[], list[Any]]) -> None:
        """source: returns the scheduler's list of waiting requests. Raises as FollowedQueue does."""
        from sglang.srt.managers import schedule_policy

        self._sglang = schedule_policy
        self._policy = policy
        self._cache = cache
        self._source = source
        self.followed = FollowedQueue(cache)
        setattr(policy, _ATTRIBUTE, self)
        cache.before_eviction = self.before_eviction
        _active.add(self)

    @property
    def orders(self) -> bool:
        """Whether the policy looks at the cache. The others sort by themselves, and are only followed."""
        return isinstance(self._policy.policy, self._sglang.CacheAwarePolicy)

    def calc_priority(self, waiting: list[Any], processed: int) -> bool:
        """Order the scheduler's list; return whether that was done."""
        return self._safely(lambda: self._order(waiting, processed))

    def _order(self, waiting: list[Any], processed: int) -> None:
        followed = self.followed
        followed.follow(waiting)
        if self.orders:
            followed.look()
            name = self._policy.policy.value
            followed.arrange(waiting, turns(name, followed, self._least_shared(), processed))
            if name == "shortest-prefill-first":
                self._log_shortest(waiting)

    def _least_shared(self) -> int | None:
        """Return SGLang's threshold of in-batch sharing; None if its check is switched off."""
        if self._sglang.IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD < 0:
            return None
        return int(self._sglang.IN_BATCH_PREFIX_CACHING_DEPRIORITIZE_THRESHOLD)

    def _log_shortest(self, waiting: list[Any]) -> None:
        """Write the line that SGLang writes for this policy."""
        policy = self._policy
        policy._shortest_prefill_calls += 1
        if waiting and policy._shortest_prefill_calls % _LOG_EVERY == 1:
            self._sglang.logger.info(
                "Experimental shortest-prefill-first: queue=%d shortest_uncached=%d",
                len(waiting),
                policy._shortest_prefill_work(waiting[0]),
            )

    def before_eviction(self) -> None:
        """Follow the scheduler's list before nodes are evicted: it may have changed since the last pass."""
        self._safely(self._follow_source)

    def _follow_source(self) -> None:
        self.followed.follow(self._source())
        self.followed.tell()

    def leave(self, req: Any) -> None:
        self._safely(lambda: self.followed.leave(req))

    def _safely(self, act: Callable[[], None]) -> bool:
        """Call, and return whether it succeeded. After a failure, SGLang's own behaviour is back."""
        try:
            act()
            return True
        except BaseException as error:
            self.stop()
            if not isinstance(error, Exception):
                raise
            logger.exception("%s=1 failed: SGLang orders its queue by itself from now on", VARIABLE)
            return False

    def stop(self) -> None:
        """Give SGLang's own behaviour back."""
        self._cache.before_eviction = None
        self._policy.__dict__.pop(_ATTRIBUTE, None)
        _active.discard(self)
        del self.followed  # with the queue, what it wants ends


def waiting_of(policy: Any) -> WaitingRequests | None:
    found: WaitingRequests | None = getattr(policy, _ATTRIBUTE, None)
    return found


# Hooks, as SGLang's registry calls them


def calc_priority(
    original: Any, policy: Any, waiting_queue: list[Any], running_batch: Any = None, processed_tokens: int = 0
) -> None:
    """Around SchedulePolicy.calc_priority."""
    ours = waiting_of(policy)
    if ours is None:
        original(policy, waiting_queue, running_batch, processed_tokens)
    elif not ours.orders:
        original(policy, waiting_queue, running_batch, processed_tokens)
        ours.calc_priority(waiting_queue, processed_tokens)
    elif not ours.calc_priority(waiting_queue, processed_tokens):
        original(policy, waiting_queue, running_batch, processed_tokens)


def prefix_matched(original: Any, policy: Any, waiting_queue: list[Any]) -> bool:
    """Around SchedulePolicy.waiting_queue_prefix_matched: a queue of any length is matched."""
    ours = waiting_of(policy)
    return (ours is not None and ours.orders) or bool(original(policy, waiting_queue))


def retracted(_: Any, req: Any) -> None:
    """After Req.reset_for_retract: a retracted or preempted request comes back with other tokens, or as a new one."""
    for ours in list(_active):
        ours.leave(req)


def scheduler_ready(_: Any, scheduler: Any) -> None:
    """After Scheduler.init_schedule_policy: take over the scheduler's queue, or say once why not."""
    reason = why_not(scheduler)
    if reason is None:
        try:
            WaitingRequests(scheduler.policy, scheduler.tree_cache, lambda: scheduler.waiting_queue)
        except Exception as error:
            reason = str(error)
    if reason is not None:
        logger.warning("%s=1 has no effect: %s. SGLang orders its queue by itself", VARIABLE, reason)
        return
    logger.info("%s=1: the waiting queue is ordered beside the prefix cache, which spares it", VARIABLE)


def why_not(scheduler: Any) -> str | None:
    """Return why a scheduler's queue is left to SGLang, or None."""
    cache, policy = scheduler.tree_cache, scheduler.policy
    if not isinstance(cache, FlatRadixCache):
        return f"the prefix cache is a {type(cache).__name__}, not a FlatRadixCache"
    if cache.tree.device.type != "cpu":
        return "the index is on a GPU; leave FLATRADIX_DEVICE out"
    mode = get_disagg().disaggregation_mode
    if mode not in (None, "null"):
        return f"the server does only the {mode} part of the work (--disaggregation-mode)"
    if policy.enable_hierarchical_cache:
        return "a hierarchical cache matches differently"
    if policy.enable_priority_scheduling and policy.policy.value not in ("fcfs", "lof"):
        return f"--enable-priority-scheduling goes with fcfs and lof, not with {policy.policy.value}"
    if getattr(scheduler, "dllm_config", None) is not None:
        return "diffusion models have queues of their own"
    if envs.SGLANG_RADIX_FORCE_MISS.get():
        return "SGLANG_RADIX_FORCE_MISS is set"
    return None


_POLICY = "sglang.srt.managers.schedule_policy.SchedulePolicy"
HOOKS: tuple[tuple[str, Callable[..., Any], HookType], ...] = (
    ("sglang.srt.managers.scheduler.Scheduler.init_schedule_policy", scheduler_ready, HookType.AFTER),
    ("sglang.srt.managers.schedule_batch.Req.reset_for_retract", retracted, HookType.AFTER),
    (f"{_POLICY}.calc_priority", calc_priority, HookType.AROUND),
    (f"{_POLICY}.waiting_queue_prefix_matched", prefix_matched, HookType.AROUND),
)


def register_if_asked() -> None:
    """Register the hooks if FLATRADIX_QUEUE is 1. A second call changes nothing."""
    asked = os.environ.get(VARIABLE, "").strip()
    if asked not in ("", "0", "1"):
        logger.warning("%s=%s is neither 0 nor 1: the queue is left to SGLang", VARIABLE, asked)
    if asked != "1":
        return
    for target, hook, kind in HOOKS:
        if all(known is not hook for _, known, _ in HookRegistry._hooks.get(target, ())):
            HookRegistry.register(target, hook, kind)

"""The settings of a simulation, and the names of its policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

ORDERS = ("fcfs", "lpm", "dfs-weight", "hrrn", "shortest-prefill", "aged", "k-lpm")
SGLANG_ORDERS = ("lpm", "fcfs", "dfs-weight")
SCHEDULERS = ("flatradix", "sglang")
DEFAULTS = {"flatradix": ("fcfs", "lpm", "fcfs+keep", "aged+keep"), "sglang": ("lpm",)}


class Policy(NamedTuple):
    """A scheduling policy. order: of `WaitingQueue.order`. keep: of the queue. defer: `defer_shared` of the order."""

    order: str
    keep: bool = False
    defer: bool = False

    @property
    def name(self) -> str:
        return self.order + "+keep" * self.keep + "+defer" * self.defer


@dataclass(frozen=True)
class Settings:
    """The servers of a simulation. All of them are equal.

    rate: prefilled tokens a second of one server; cached tokens cost nothing. capacity: KV slots of one server.
    chunk: prefilled tokens of one step, at most. tpot: seconds for each output token of a running request.
    max_running: requests that a server prefills and decodes at a time. patience: seconds, for aged. every: turns, for
    k-lpm.
    """

    rate: float
    capacity: int = 1_000_000
    page_size: int = 64
    chunk: int = 8192
    servers: int = 1
    tpot: float = 0.02
    max_running: int = 256
    patience: float = 300.0
    every: int = 4

    def validate(self) -> None:
        """Raise ValueError for settings that make no sense."""
        for name in ("page_size", "servers", "max_running", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be 1 or more")
        for name in ("rate", "patience"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} {getattr(self, name):g}: it must be more than 0")
        if not 0 <= self.tpot < float("inf"):
            raise ValueError(f"--tpot {self.tpot:g}: an output token takes 0 seconds or more")
        for name in ("capacity", "chunk"):
            if getattr(self, name) < self.page_size:
                raise ValueError(
                    f"--{name} {getattr(self, name)} is less than one page of {self.page_size} tokens (--page-size)"
                )


def read_policies(texts: list[str] | None, scheduler: str) -> list[Policy]:
    """Return the policies of a command line; without any, those of DEFAULTS. Raises ValueError for an unknown one."""
    if scheduler not in SCHEDULERS:
        raise ValueError(f"scheduler {scheduler!r} is unknown: one of {', '.join(SCHEDULERS)}")
    policies = [read_policy(text, scheduler) for text in texts or DEFAULTS[scheduler]]
    return list(dict.fromkeys(policies))


def read_policy(text: str, scheduler: str = "flatradix") -> Policy:
    """Return the policy of a name such as "aged+keep+defer". Raises ValueError."""
    order, *extras = text.strip().split("+")
    orders = SGLANG_ORDERS if scheduler == "sglang" else ORDERS
    if order not in orders:
        raise ValueError(f"policy {text!r} is unknown to {scheduler}: one of {', '.join(orders)}")
    for extra in extras:
        if scheduler == "sglang":
            raise ValueError(f"policy {text!r}: SGLang has no +{extra}")
        if extra not in ("keep", "defer"):
            raise ValueError(f"policy {text!r}: +{extra} is unknown, only +keep and +defer exist")
    return Policy(order, "keep" in extras, "defer" in extras)

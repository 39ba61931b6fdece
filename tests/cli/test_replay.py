"""The replay, compared with hand-computed figures, a brute-force model, and SGLang's figures for a real trace."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from flatradix.inspect import draw
from flatradix.replay import plot, traces, workload
from flatradix.replay import replay as replaying
from flatradix.replay.replay import SlotList, replay
from flatradix.replay.report import Settings
from flatradix.tree import RadixTree
from tests.support.devices import interpreted

TRACES = Path(__file__).parents[3] / "shared" / "traces"


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the warm-up of interpreted kernels: nothing is compiled, and it costs seconds."""
    if interpreted():
        monkeypatch.setattr(replaying, "warm_up", lambda *arguments: None)


def sha(hits: list[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(hits)}I", *hits)).hexdigest()


def arrays(*prompts: list[int]) -> list[np.ndarray]:
    return [np.array(prompt, np.int32) for prompt in prompts]


def test_hand_made(device: str) -> None:
    prompts = arrays(
        [1, 2, 3, 4, 5, 6, 7, 8],  # a miss; 8 tokens are cached
        [1, 2, 3, 4, 9, 9, 9, 9, 5],  # hits 4, adds 4 (the 9th token fills no page): 12 tokens, full
        [7, 7, 7, 7],  # evicts 5 6 7 8, the least recently used leaf
        [1, 2, 3, 4, 9, 9, 9, 9],  # a full hit
        list(range(100, 116)),  # 16 tokens never fit: all 12 are evicted, then the request is rejected
        [1, 2, 3],  # less than a page
        [1, 2, 3, 4],
    )
    report = replay(prompts, page_size=4, capacity=12, hold=0, device=device)
    hits = [0, 4, 0, 8, 0, 0, 0]
    assert report.hits.tolist() == hits
    assert report.cached.tolist() == [8, 12, 12, 12, 0, 0, 4]
    assert report.locked.tolist() == [8, 8, 4, 8, 0, 0, 4]
    figures = report.to_json()
    wanted = {
        "page": 4,
        "capacity": 12,
        "hold": 0,
        "policy": "lru",
        "requests": 7,
        "input_tokens": 52,
        "hit_tokens": 12,
        "hits_sha256": sha(hits),
        "evicted_tokens": 16,
        "rejected": 1,
        "final_tokens": 4,
        "nodes": 1,
        "hit_rate": 12 / 52,
    }
    assert {name: figures[name] for name in wanted} == wanted
    assert figures["device"].startswith("cuda:0 (" if device == "cuda" and not interpreted() else "cpu")
    calls = {name: row["calls"] for name, row in figures["operations"].items()}
    assert calls == {"match": 7, "lock": 13, "slots": 7, "evict": 2, "insert": 6, "unlock": 12}
    json.dumps(figures)


def test_held_paths_are_not_evicted(device: str) -> None:
    prompts = arrays([1] * 4, [2] * 4, [3] * 4, [1] * 4)
    assert replay(prompts, 4, 8, hold=0, device=device).hits.tolist() == [0, 0, 0, 0]
    held = replay(prompts, 4, 8, hold=2, device=device)
    assert held.rejected == 1  # the third finds the first two held; the fourth releases the first
    assert held.hits.tolist() == [0, 0, 0, 4]
    assert held.locked.tolist() == [4, 8, 8, 8]


def test_a_batch_takes_each_step_together(device: str) -> None:
    prompts = arrays([1] * 4, [1] * 4, [1] * 4, [2] * 8, [1] * 8, [3] * 3, [2] * 8)
    report = replay(prompts, 4, 16, hold=0, device=device, batch=2)
    assert report.hits.tolist() == [0, 0, 4, 0, 4, 0, 8], "no hit on what the same batch brought"
    assert report.cached.tolist() == [4, 4, 12, 12, 16, 16, 16]
    # A batch that does not fit is inserted request by request: the second one does not fit beside the first.
    report = replay(arrays([1] * 8, [2] * 8, [3] * 8, [4] * 8), 4, 12, hold=0, device=device, batch=2)
    assert (report.rejected, report.final_tokens) == (2, 8)


class Brute:
    """The replay with LRU, over a list of all nodes: [path, length at which its edge begins, tick, locks]."""

    def __init__(self, page: int, capacity: int, hold: int) -> None:
        self.page, self.capacity, self.hold = page, capacity, hold
        self.nodes: list[list] = []
        self.held: list[tuple[int, tuple]] = []
        self.clock = self.evicted = self.rejected = 0
        self.hits: list[int] = []

    def on_path(self, key: tuple) -> list[list]:
        return [n for n in self.nodes if self.shared(n, key) > n[1]]

    def shared(self, node: list, key: tuple) -> int:
        equal = 0
        while equal < min(len(node[0]), len(key)) and node[0][equal] == key[equal]:
            equal += 1
        return equal // self.page * self.page

    def split(self, key: tuple, tick: int | None) -> None:
        """Split the edge in which `key` ends or branches off. The lower part gets the tick; None keeps its own."""
        for node in self.on_path(key):
            at = self.shared(node, key)
            if at < len(node[0]):
                self.nodes.append([node[0][:at], node[1], node[2], node[3]])
                node[1] = at
                node[2] = node[2] if tick is None else tick

    def lock(self, key: tuple, change: int) -> None:
        for node in self.on_path(key):
            node[3] += change

    def total(self) -> int:
        return sum(len(n[0]) - n[1] for n in self.nodes)

    def evict(self, wanted: int) -> int:
        freed = 0
        while freed < wanted:
            leaves = [
                n
                for n in self.nodes
                if not n[3] and not any(len(m[0]) > len(n[0]) == self.shared(m, n[0]) for m in self.nodes)
            ]
            if not leaves:
                break
            victim = min(leaves, key=lambda n: (n[2], -len(n[0])))
            self.nodes.remove(victim)
            freed += len(victim[0]) - victim[1]
        return freed

    def step(self, prompt: tuple) -> None:
        now = len(self.hits)
        while self.held and now - self.held[0][0] > self.hold:
            self.lock(self.held.pop(0)[1], -1)
        self.clock += 2
        key = prompt[: len(prompt) // self.page * self.page]
        path = self.on_path(key)
        hit = max((self.shared(n, key) for n in path), default=0)
        for node in path:
            node[2] = self.clock
        self.split(key[:hit], None)
        self.lock(key[:hit], 1)
        self.hits.append(hit)
        excess = self.total() + len(key) - hit - self.capacity
        freed = self.evict(excess)
        self.evicted += freed
        if excess > freed:
            self.rejected += 1
        else:
            self.insert(key, hit)
            self.lock(key, 1)
            self.held.append((now, key))
        self.lock(key[:hit], -1)

    def insert(self, key: tuple, hit: int) -> None:
        self.clock += 2
        self.split(key[:hit], self.clock - 1)
        if hit < len(key):
            self.nodes.append([key, hit, self.clock, 0])
        for node in self.on_path(key):
            node[2] = self.clock


@pytest.mark.parametrize("page", [1, 2, 3])
@pytest.mark.parametrize("hold", [0, 1, 4])
def test_as_brute_force(page: int, hold: int, device: str) -> None:
    if interpreted(device) and (page, hold) != (2, 4):
        pytest.skip("too slow with kernels in Python: one case must do")
    rng = np.random.default_rng([page, hold])
    count = 30 if interpreted(device) else 400
    prompts = [rng.integers(0, 2, rng.integers(0, 25)).astype(np.int32) for _ in range(count)]
    brute = Brute(page, 60, hold)
    for prompt in prompts:
        brute.step(tuple(prompt.tolist()))
    report = replay(prompts, page, 60, hold, device=device)
    assert report.hits.tolist() == brute.hits
    assert report.evicted_tokens == brute.evicted > 0
    assert report.rejected == brute.rejected
    assert (report.rejected > 0) == (hold == 4)
    assert report.final_tokens == brute.total()
    assert report.nodes == len(brute.nodes)


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "fifo", "filo", "mru", "priority"])
@pytest.mark.parametrize("batch", [1, 8])
def test_every_policy_keeps_all_slots(policy: str, batch: int, device: str) -> None:
    if interpreted(device):
        pytest.skip("too slow with kernels in Python")
    report, host = (
        replay(workload.prompts("mix", 60), 16, 100_000, 4, policy, where, batch=batch) for where in (device, "cpu")
    )
    assert report.evicted_tokens > 0
    assert report.rejected == 0
    assert len(report.digest) == 32
    assert (report.digest, report.hits_sha256) == (host.digest, host.hits_sha256)


def test_lost_slots_are_found() -> None:
    run = replaying.Replay(Settings(4, 64, 0, "lru", "cpu"))
    run.step(np.arange(8, dtype=np.int32))
    run._slots.take(1)
    with pytest.raises(RuntimeError, match="slots were lost or doubled: 63 of 64 are free"):
        run.drain()


def test_slot_list() -> None:
    slots = SlotList(6)
    first, second = slots.take(2).copy(), slots.take(3).copy()
    assert sorted([*first, *second]) == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="2 are needed and should be free, but 1 are"):
        slots.take(2)
    slots.give(first.astype(np.int64))
    assert slots.free == 3
    assert not slots.is_whole()
    slots.give(second)
    assert slots.is_whole()
    with pytest.raises(RuntimeError, match="1 slots came back, but only 0 were out"):
        slots.give(first[:1])
    slots.take(6)
    slots.give(np.zeros(6, np.int64))
    assert not slots.is_whole()


def test_progress() -> None:
    seen: list[tuple[int, float]] = []
    report = replay(workload.prompts("chat", 20), device="cpu", progress=lambda done, rate: seen.append((done, rate)))
    assert seen[-1] == (20, report.hit_rate)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"page_size": 0}, "page size 0: it must be 1 token or more"),
        ({"capacity": 63}, "capacity 63 is less than one page of 64 tokens"),
        ({"hold": -1}, "hold -1: a request is held for 0 later requests or more"),
        ({"policy": "random"}, "policy 'random' is unknown"),
        ({"device": "tpu"}, "tpu"),
        ({"capacity": 10**12}, "too large"),
    ],
)
def test_refuses_nonsense(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replay([], **{"device": "cpu", **settings})


def test_nothing_to_replay(tmp_path: Path) -> None:
    report = replay([], device="cpu")
    assert report.to_json()["hit_rate"] == 0
    assert report.operations() == {}


def test_rates() -> None:
    report = replay(arrays([1] * 4, [1] * 4, [2] * 8, [1] * 4), 4, 100, 0, device="cpu")
    assert report.hits.tolist() == [0, 4, 0, 4]
    assert report.cumulative_hit_rate().tolist() == [0, 0.5, 0.25, 0.4]
    assert report.windowed_hit_rate(2).tolist() == [0, 0.5, 4 / 12, 4 / 12]


@pytest.mark.parametrize("requests", [0, 1, 200])
def test_plot(tmp_path: Path, requests: int) -> None:
    pytest.importorskip("matplotlib")
    report = replay(workload.prompts("mix", requests), device="cpu")
    plot.save(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(plot.PlotUnavailableError, match=r"pip install 'flatradix\[plot\]'"):
        plot.require("a.png")


def drawn_tree() -> RadixTree:
    tree = RadixTree(100, page_size=2, device="cpu")
    held = tree.insert([1, 2, 3, 4], [0, 1, 2, 3])
    tree.insert([1, 2, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9], priority=3)
    tree.insert([1, 2], [0, 1], namespace="tenant")
    tree.lock(held)
    return tree


def test_draw() -> None:
    assert draw.draw(drawn_tree().content()).splitlines() == [
        "10 of 100 tokens in 4 nodes, 4 locked; page size 2, policy lru",
        "namespace 'tenant'",
        "└── 0+2 [1 2]  tick 6",
        "no namespace",
        "└── 0+2 [1 2]  locks 1  tick 4",
        "    ├── 2+2 [3 4]  locks 1 (own 1)  tick 3",
        "    └── 2+4 [5 6 7 8]  tick 4",
    ]
    assert "└── 2+4 [5 6 7 8]  tick 4  created 4  hits 1  priority 3" in draw.draw(drawn_tree().content(), details=True)


def test_draw_leaves_out() -> None:
    lines = draw.draw(drawn_tree().content(), max_nodes=2).splitlines()
    assert lines[-1] == "    └── … 2 more"
    assert draw.draw(drawn_tree().content(), max_nodes=1).splitlines()[-1] == "└── … 3 more"
    with pytest.raises(ValueError, match="max_nodes 0: it must be 1 or more"):
        draw.draw(drawn_tree().content(), max_nodes=0)


def test_draw_deep_path_and_bigrams() -> None:
    tree = RadixTree(4000, device="cpu", bigram=True)
    for length in range(2, 1500):
        tree.insert(list(range(length)), list(range(length)))
    lines = draw.draw(tree.content(), max_nodes=5000).splitlines()
    assert len(lines) == 2 + 1498
    assert lines[2] == "└── 0+1 [(0,1)]  tick 2996"


def rows() -> list[dict]:
    """Return one reference row for each page size."""
    path = TRACES / "conversation_reference.json"
    found = json.loads(path.read_text()) if path.exists() else []
    return [
        row
        for row in found
        if (row["capacity"], row["hold"]) == ((4_000_000, 32) if row["page"] == 64 else (1_000_000, 32))
    ]


@pytest.mark.slow
@pytest.mark.skipif(not TRACES.is_dir(), reason="the conversation trace is not at ../shared/traces")
@pytest.mark.parametrize("row", rows(), ids=lambda row: f"page{row['page']}")
def test_conversation_reference(row: dict, device: str) -> None:
    """The figures are exactly those of SGLang 0.5.23."""
    if interpreted(device):
        pytest.skip("12,031 requests with kernels in Python would take days")
    requests = traces.read_trace(TRACES / "conversation_trace.jsonl")
    report = replay(traces.prompts(requests), row["page"], row["capacity"], row["hold"], device=device)
    figures = report.to_json()
    assert {name: figures[name] for name in row} == row

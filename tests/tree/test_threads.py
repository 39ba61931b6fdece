"""Several threads on one tree without a lock: each call either works or says that another thread is in a call."""

from __future__ import annotations

import dis
import inspect
import itertools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

import flatradix
from flatradix import BlockEvents, CapacityError, PrefixCache, QueryError, RadixTree, WaitingQueue
from flatradix.device.index import DeviceIndex
from flatradix.gate import CUT_SHORT, FREE, take_gate
from flatradix.host.index import HostIndex
from flatradix.host.paged import PagedIndex
from tests.support.depth import skip_unless_thorough
from tests.support.devices import interpreted
from tests.support.gates import with_gates
from tests.support.interrupts import Interrupt, interrupt_at

THREADS = 8
TOLD = "another thread is in a call of the same object"


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Switch threads a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


class Load:
    """Threads that make random calls at once. done: how often each call worked. refused: how often one was refused."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.wrong: list[BaseException] = []
        self.least = 200

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """Return what a call returns, or None if it was refused."""
        try:
            found = call()
        except RuntimeError as error:
            if isinstance(error, CapacityError):
                return None
            if TOLD not in str(error):
                raise
            self.refused[name] += 1
            return None
        except QueryError:  # as a place that another thread has evicted
            return None
        self.done[name] += 1
        return found

    def run(self, act: Callable[[Random], None]) -> None:
        """Let all threads act until the time is over, and longer if few calls have been refused by then."""

        def work(number: int) -> None:
            random = Random(number)
            try:
                while not self.wrong and (time.monotonic() < self.end or self.few()):
                    act(random)
            except BaseException as error:
                self.wrong.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.wrong:
            raise self.wrong[0]

    def few(self) -> bool:
        """Return whether too few calls were refused for a test, unless that is hopeless."""
        return self.refused.total() < self.least and time.monotonic() < self.end + 60


def keys_of(random: Random) -> list[list[int]]:
    return [[random.randint(0, 2) for _ in range(2 * random.randint(0, 12))] for _ in range(random.randint(1, 4))]


def use_tree(tree: RadixTree, load: Load, random: Random, new_slots: Callable[[int], list[int]]) -> None:
    """Make one random call; unlock what was locked, as soon as the tree lets us."""
    keys, name = keys_of(random), random.choice([None, "a", "b"])
    kind = random.random()
    if kind < 0.3:
        slots = [new_slots(len(key)) for key in keys]
        load.attempt("insert", lambda: tree.insert(keys, slots, namespace=name))
    elif kind < 0.4:
        load.attempt("insert one", lambda: tree.insert(keys[0], new_slots(len(keys[0])), namespace=name))
    elif kind < 0.5:
        load.attempt("match", lambda: tree.match(keys, name))
    elif kind < 0.6:
        load.attempt("match one", lambda: tree.match(keys[0], name))
    elif kind < 0.75:
        held = load.attempt("lock", lambda: tree.match(keys, name, lock=True))
        while held is not None and load.attempt("unlock", lambda: tree.unlock(held) or True) is None:
            time.sleep(0)
    elif kind < 0.9:
        load.attempt("evict", lambda: tree.evict(random.randint(0, 40)))
    else:
        call = random.choice([
            lambda: tree.total_tokens, lambda: tree.digest(), lambda: tree.compact(), lambda: tree.check(),
            lambda: tree.slots(tree.match(keys, name)), lambda: tree.split(tree.match(keys, name)),
            lambda: tree.changes(), lambda: tree.last_result, lambda: tree.evict(0),
        ])  # fmt: skip
        load.attempt("others", call)


@pytest.mark.parametrize("max_tokens", [600, None])
def test_threads_on_a_tree(max_tokens: int | None, device: str) -> None:
    skip_unless_thorough(device)
    if not interpreted(device):
        flatradix.warm_up(device, page_size=2)
    tree = RadixTree(max_tokens, page_size=2, device=device)
    load = Load(3)
    if interpreted(device):
        load.least = 1
    counter = iter(range(2**31 - 1))
    once = threading.Lock()

    def new_slots(count: int) -> list[int]:
        with once:
            return [next(counter) for _ in range(count)]

    load.run(lambda random: use_tree(tree, load, random, new_slots))
    tree.check()
    assert tree.protected_tokens == 0
    assert load.refused.total() >= load.least
    assert interpreted(device) or {"insert", "match", "lock", "unlock", "evict"} <= set(load.done)
    tree.evict(10**6)
    tree.check()
    assert tree.total_tokens == 0


def test_threads_with_a_lock_of_their_own(device: str) -> None:
    """A caller's lock around each call is enough, whatever thread holds it."""
    tree = RadixTree(600, page_size=2, device=device)
    load = Load(2)
    load.least = 0
    own = threading.RLock()
    counter = iter(range(2**31 - 1))

    def act(random: Random) -> None:
        with own:
            use_tree(tree, load, random, lambda count: [next(counter) for _ in range(count)])

    load.run(act)
    tree.check()
    assert load.refused.total() == 0
    assert load.done.total() > 8
    assert tree.protected_tokens == 0


def test_threads_on_a_queue_and_its_tree() -> None:
    tree = RadixTree(600, page_size=2, device="cpu")
    queue = WaitingQueue(tree, keep=True)
    load = Load(3)
    counter = iter(range(2**31 - 1))
    once = threading.Lock()

    def new_slots(count: int) -> list[int]:
        with once:
            return [next(counter) for _ in range(count)]

    def act(random: Random) -> None:
        if random.random() < 0.5:
            return use_tree(tree, load, random, new_slots)
        call: Any = random.choice([
            lambda: queue.add(keys_of(random), namespace=random.choice([None, "a"])),
            lambda: queue.add(keys_of(random)[0]),
            lambda: queue.remove(random.choice(queue.ids().tolist() or [0])),
            lambda: queue.cached_lengths(), lambda: queue.shared_lengths(),
            lambda: queue.order(random.choice(["lpm", "fcfs", "dfs-weight", "aged"])),
            lambda: queue.plan(token_budget=50), lambda: queue.turns(), lambda: 0 in queue,
        ])  # fmt: skip
        load.attempt("queue", call)
        if len(queue) > 200:
            load.attempt("queue", lambda: queue.remove(queue.ids()))
        return None

    load.run(act)
    tree.check()
    prompts = [queue.prompt(id).tolist() for id in queue.ids().tolist()]
    assert len(prompts) == len(queue)
    assert load.refused.total() >= load.least
    lengths = queue.cached_lengths().tolist()
    assert [max(0, length) for length in lengths] == lengths
    queue.remove(queue.ids())
    tree.evict(10**6)
    tree.check()
    assert tree.total_tokens == 0


def test_threads_on_a_prefix_cache() -> None:
    cache = PrefixCache(400, page_size=2, max_requests=32, max_length=64)
    load = Load(3)
    owned: dict[int, Any] = {}

    def act(random: Random) -> None:
        prompts = [key or [1] for key in keys_of(random)]
        requests = load.attempt("begin", lambda: cache.begin(prompts, random.choice([None, "a"])))
        if requests is None:
            return
        running = requests.only_running()
        for call in (lambda: cache.commit(running), lambda: cache.extend(running), lambda: cache.counts()):
            load.attempt("others", call)
        while load.attempt("finish", lambda: cache.finish(running) or True) is None:
            if not any(request.state == "running" for request in running):
                break  # QueryError: done by the call that was cut short
            time.sleep(0)

    load.run(act)
    cache.check()
    assert len(cache.running) == 0
    assert not owned
    assert load.refused.total() >= load.least
    counts = cache.counts()
    assert counts.free + counts.evictable == 400


def parked(tree: RadixTree, inside: threading.Event, leave: threading.Event) -> threading.Thread:
    """Return a thread that waits within a call of the tree."""

    def wait(content: Any) -> None:
        inside.set()
        leave.wait(60)

    thread = threading.Thread(target=lambda: tree._index.look_at(wait))
    thread.start()
    assert inside.wait(60)
    return thread


def test_a_replay_is_a_call(cuda: str) -> None:
    """It is refused within another call, and undoes one that was cut short."""
    tree = RadixTree(16, page_size=2, device=cuda)
    index: Any = tree._index
    tree.insert([1, 2], [3, 4])
    graph = SimpleNamespace(replay=lambda: tree.match([1, 2]))
    before = tree.changes()
    with pytest.raises(RuntimeError, match="within another call"):
        index.replay(graph, 0)
    assert tree.changes() == before + 1, "what ran of the graph is not known"
    graph.replay = lambda: None
    with pytest.raises(RuntimeError, match="within another call"):
        index.look_at(lambda content: index.replay(graph, 0))
    index.replay(graph, 0)
    assert tree.changes() == before + 2
    assert tree.match([1, 2]).length == 2
    tree.check()


def of_another_thread(call: Callable[[], Any]) -> BaseException | None:
    """Make a call in a thread of its own, and return what it raised: the traceback keeps the frames of the call."""
    raised: list[BaseException | None] = [None]

    def work() -> None:
        try:
            call()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return raised[0]


def raising(places: Any) -> Any:
    """Return a tree's policy function, or any other function that a call calls, that raises."""
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "call",
    [
        lambda tree: tree.match([[1, 2], "no key"]),
        lambda tree: tree.insert([1, 2], [3]),
        lambda tree: tree.evict(-1),
        lambda tree: tree._index.look_at(raising),
        lambda tree: WaitingQueue(tree).add([[1, -2]]),
        lambda tree: WaitingQueue(tree).prompt(5),
    ],
    ids=["match", "insert", "evict", "look", "add", "prompt"],
)
def test_a_call_that_raised_is_over(call: Callable[[RadixTree], Any], device: str) -> None:
    """Another thread goes on behind it, also while the exception and the thread still exist."""
    tree = RadixTree(16, page_size=2, device=device)
    tree.insert([1, 2], [3, 4])
    kept = of_another_thread(lambda: call(tree))
    assert kept is not None
    assert TOLD not in str(kept)
    assert tree.match([1, 2]).length == 2
    tree.check()


def test_a_call_that_was_cut_short_in_another_thread() -> None:
    """The next call undoes it, of whichever thread."""
    tree = RadixTree(16, page_size=2, device="cpu")
    tree.insert([1, 2], [3, 4])
    place = tree.match([1, 2])
    held, unnoticed = [], 0
    for at in itertools.count():
        kept = of_another_thread(lambda at=at: cut(lambda: tree.lock(place), at))
        if tree._index.busy not in (FREE, CUT_SHORT):  # cut at a NOP behind the store, where CPython cuts nobody
            tree._index.busy = CUT_SHORT
            unnoticed += 1
        assert tree.match([1, 2]).length == 2
        held.append(tree.protected_tokens)
        if held[-1]:
            tree.unlock(place)
        if kept is None:
            break
    assert held == sorted(held)
    assert (held[0], held[10], held[-1]) == (0, 0, 2)
    assert unnoticed <= 2
    tree.check()


def cut(call: Callable[[], Any], at: int) -> None:
    """Make a call that is cut short before a bytecode."""
    where = interrupt_at(at, call).where
    if where:
        raise Interrupt(where)


def test_a_call_within_a_call() -> None:
    """Refused in the thread of the outer call, which goes on."""
    tree = RadixTree(16, page_size=2, device="cpu")

    def work(content: Any) -> bool:
        with pytest.raises(RuntimeError, match="within another call"):
            tree.match([1, 2])
        with pytest.raises(RuntimeError, match="within another call"):
            WaitingQueue(tree).add([1, 2])
        return True

    assert tree._index.look_at(work)
    assert tree.match([1, 2]).length == 0


def test_a_thread_within_a_call() -> None:
    """Refused in all other threads, until the call returns."""
    tree = RadixTree(16, page_size=2, device="cpu")
    inside, leave = threading.Event(), threading.Event()
    thread = parked(tree, inside, leave)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=TOLD):
            tree.match([1, 2])
        with pytest.raises(RuntimeError, match=TOLD):
            WaitingQueue(tree).add([1, 2])
    leave.set()
    thread.join()
    assert tree.match([1, 2]).length == 0


HOMES = (HostIndex, PagedIndex, DeviceIndex, BlockEvents, WaitingQueue, PrefixCache)
GATED = {f"{kind.__name__}.{name}": method.__code__ for kind in HOMES for name, method in with_gates(kind).items()}


def test_which_calls_have_the_gate() -> None:
    """Of the methods that a tree calls, all that change something or take several steps."""
    assert {name.partition(".")[2] for name in GATED if name.startswith("DeviceIndex")} >= {
        "match",
        "match_array",
        "lock",
        "unlock",
        "split",
        "insert",
        "evict",
        "want",
        "unwant",
        "expire",
        "reset",
        "replay",
    }
    calls = {"begin", "extend", "commit", "step", "finish", "abort", "counts"}
    assert {f"PrefixCache.{name}" for name in calls} <= set(GATED)
    assert all(".busy = CUT_SHORT" in inspect.getsource(code) for code in GATED.values())


HARMLESS = (
    "CACHE", "NOP", "NOT_TAKEN", "TO_BOOL", "CONTAINS_OP", "LOAD_GLOBAL", "LOAD_DEREF", "LOAD_FAST", "LOAD_CONST",
    "LOAD_ATTR", "JUMP_FORWARD", "POP_JUMP_",
)  # fmt: skip


def way_to_the_store(code: Any) -> list[dis.Instruction]:
    """Return the instructions from the look at `busy` to its store, where the conditional jump is not taken."""
    found = list(dis.get_instructions(code))
    place = {at.offset: k for k, at in enumerate(found)}
    of_busy = [k for k, at in enumerate(found) if at.argval == "busy"]
    store = next(k for k in of_busy if found[k].opname == "STORE_ATTR")
    jump = max(k for k in range(store) if found[k].opname.startswith("POP_JUMP"))
    way, k = [], max(k for k in of_busy if k < jump)
    while not (found[k].opname == "STORE_ATTR" and found[k].argval == "busy"):
        way.append(found[k])
        k = place[found[k].argval] if found[k].opname == "JUMP_FORWARD" else k + 1
    return [*way, found[k]]


@pytest.mark.parametrize("code", [*GATED.values(), take_gate.__code__], ids=[*GATED, "take_gate"])
def test_the_gate_is_atomic(code: Any) -> None:
    """From the look at `busy` to its store, a call takes no conditional jump, calls nothing and stays on one line.

    CPython switches threads and runs signal handlers at calls, at jumps backwards, and before 3.11 at all conditional
    jumps that are taken; tracers of lines run at new lines. So nobody comes in between.
    """
    way = way_to_the_store(code)
    assert all(at.opname.startswith(HARMLESS) for at in way[:-1]), way
    assert not any(at.starts_line for at in way[1:]), way
    assert len([at for at in way if at.opname.startswith("POP_JUMP")]) == 1


def test_the_child_of_a_fork_within_a_call_of_another_thread() -> None:
    """The child has no other thread: what was under way there is undone."""
    tree = RadixTree(16, page_size=2, device="cpu")
    tree.insert([1, 2], [3, 4])
    inside, leave = threading.Event(), threading.Event()
    thread = parked(tree, inside, leave)
    child = os.fork()
    if child == 0:
        os._exit(7 if tree.match([1, 2]).length == 2 else 8)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert tree.match([1, 2]).length == 2


def test_an_error_at_the_limit_of_recursion_ends_the_call() -> None:
    """Another thread goes on, wherever within the call the stack was full."""
    tree = RadixTree(16, page_size=2, device="cpu")
    tree.insert([1, 2], [3, 4])
    place = tree.match([1, 2])
    kinds = Counter[str]()

    def deep(left: int) -> None:
        if left:
            deep(left - 1)
        else:
            tree.match([[1, 2], [1, "x"]]) if at % 2 else tree.lock(place)

    for at in range(120):
        left = sys.getrecursionlimit() - at
        error = of_another_thread(lambda left=left: deep(left))
        kinds[type(error).__name__] += 1
        assert tree.match([1, 2]).length == 2, (at, error)
    assert {"RecursionError", "NoneType"} <= set(kinds)
    tree.check()

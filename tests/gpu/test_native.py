"""Launches from machine code, with a driver of Python functions, and waits for words that no kernel writes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to launch")

from flatradix import RadixTree
from flatradix.device.mailbox import Mailbox
from flatradix.device.stages import Stages
from flatradix.kernels import gpu, native
from flatradix.kernels.gpu import launch
from flatradix.kernels.gpu.launch import Arrays, Kernel, arrays_of, no_arrays
from flatradix.layout import desk, mail
from flatradix.layout.queries import NO_PLACES, Desk, Output, PerQuery, PlaceAddresses, SlotTable, Values
from flatradix.layout.scratch import allocate_scratch, enlarge
from flatradix.layout.state import allocate_device, pool_units
from tests.support.devices import interpreted
from tests.support.fake_driver import STREAM, FakeDriver, interpret_launches, record_launches
from tests.support.pairs import Pair, ragged, shared_prefixes, use

CPU = torch.device("cpu")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver(monkeypatch)


@pytest.mark.parametrize("kernel", Kernel.all_kernels, ids=lambda kernel: kernel.function.__name__)
def test_the_driver_gets_what_the_kernel_is_called_with(kernel: Kernel, driver: FakeDriver) -> None:
    state = allocate_device(64, 1, False, 0, CPU)
    scratch = allocate_scratch(len(state.parent), 1000, torch.zeros(mail.SIZE, dtype=torch.int64), CPU)
    pool = torch.zeros(8, dtype=torch.int32)
    with_tree = kernel.function.arg_names[0] == "s"
    arrays = arrays_of(state, scratch, pool, 1, False) if with_tree else no_arrays(CPU)
    wide = (True,) * kernel.kinds.count("*w")
    variant = kernel.variant((1,), wide, 2)
    arrays.direct[variant] = driver.ready(arrays, kernel, variant)
    fixed = [tensor.data_ptr() for part in (state, scratch) for tensor in part] if with_tree else []
    for programs in (1, 2**31 - 1):
        arguments = [(-1) ** i * (2**62 + programs + i) for i in range(len(kernel.kinds))]
        kernel(arrays, programs, arguments, (1,), wide, 2)
        told = driver.launches.pop()
        assert told.function == 1000
        assert told.grid == (programs, 1, 1, 64, 1, 1, 77)
        assert told.stream == STREAM
        assert list(told.cells) == [*fixed, *arguments, 0, 0]
        assert told.extra == (None if kernel.cooperative and programs > 1 else 0)
    assert not driver.launches


def test_what_the_driver_refuses_is_raised(driver: FakeDriver) -> None:
    kernel = next(kernel for kernel in Kernel.all_kernels if kernel.kinds == ("i64",))
    arrays = no_arrays(CPU)
    arrays.direct[kernel.variant()] = driver.ready(arrays, kernel, kernel.variant())
    driver.code = 701
    with pytest.raises(RuntimeError, match="the CUDA driver refused to launch a kernel: error 701"):
        kernel(arrays, 1, (5,))


# One call of machine code for an operation starts the same kernels as Python, one by one, would


class Home(NamedTuple):
    """What the functions that launch kernels take, on a tree whose kernels never run."""

    arrays: Arrays
    stages: Stages
    box: Mailbox

    @property
    def desk(self) -> Desk:
        return self.stages.desk


def home_of(slot_dtype: torch.dtype) -> Home:
    box = Mailbox(CPU)
    state = allocate_device(10_000, 1, False, 0, CPU)
    scratch = enlarge(allocate_scratch(len(state.parent), 10_000, box.words, CPU), 64)
    pool = torch.zeros(2 * pool_units(10_000, 1), dtype=slot_dtype)
    return Home(arrays_of(state, scratch, pool, 1, False), Stages(CPU, box), box)


def on_host(values: np.ndarray) -> Values:
    return Values(values.ctypes.data, values.dtype == np.int64, 0, len(values), 1, None, values, on_host=True)


def there(wide: bool, batch: int = 0, total: int = 2000) -> Values:
    """Return addresses of values on a device: of a single sequence without `batch`."""
    return Values(1 << 40, wide, 2 << 40 if batch else 0, total, batch or 1, None, None)


KEY32, KEY64 = np.arange(3, 12, dtype=np.int32), np.arange(3, 12)
LONG32, LONG64 = np.arange(8192, dtype=np.int32), np.arange(8192)
PLACES, MANY = PlaceAddresses(5 << 40, 6 << 40, 1), PlaceAddresses(5 << 40, 6 << 40, 3)
OUT = Output(7 << 40, 8 << 40, 9 << 40, 77)
TABLE = SlotTable(4 << 40, True, 7, 8, 6)
ONE, EACH = PerQuery(0, -(2**40)), PerQuery(3 << 40, 0)
CASES: dict[str, Callable[[Home], object]] = {
    "lock": lambda home: gpu.lock_one(home.arrays, PLACES, 9, STREAM),
    "unlock": lambda home: gpu.unlock_one(home.arrays, PLACES, 9, STREAM),
    "slots": lambda home: gpu.gather(home.arrays, MANY, home.arrays.state.tokens, 3 << 40, 4 << 40, 9000, 9),
}
for kind in (False, True):
    CASES[f"write_slots {kind}"] = lambda home, pages=kind: gpu.write_slots(home.arrays, MANY, 3, TABLE, 9, pages)
    for touch in (False, True):
        for batch in (0, 3):
            keys = there(kind, batch)._replace(left_out=1)
            names, starts = (EACH, MANY) if batch else (ONE, NO_PLACES)
            CASES[f"match {kind} {touch} {batch}"] = lambda home, keys=keys, names=names, starts=starts, touch=touch: (
                gpu.match(home.arrays, keys, names, starts, OUT, 9, touch, not touch)
            )
        for key in (KEY64, LONG64) if kind else (KEY32, LONG32):
            one = (key.ctypes.data, len(key), kind, key)
            CASES[f"match one {kind} {touch} {len(key)}"] = lambda home, one=one, touch=touch: gpu.match_one(
                home.arrays, home.desk, one, -8, 6 << 40, 5 << 40, 9, touch, not touch, STREAM
            )


def insert(home: Home, keys: Values, slots: Values, may_compact: bool) -> None:
    gpu.insert(home.arrays, keys, slots, EACH, MANY, EACH, EACH, OUT, 9, may_compact)


def insert_one(home: Home, keys: Values, slots: Values) -> bool:
    return gpu.insert_one(home.arrays, home.desk, keys, slots, -8, PLACES, -(2**40), 2**40, OUT, 9)


for compacts in (False, True):
    CASES[f"insert {compacts}"] = partial(insert, keys=there(False, 3), slots=there(True, 3), may_compact=compacts)
for name, keys, slots in (
    ("on the device", there(True), there(False)),
    ("key on the host", on_host(KEY64), there(True, total=9)),
    ("narrow key on the host", on_host(KEY32), there(True, total=9)),
    ("slots on the host", there(True, total=9), on_host(KEY64)),
    ("both on the host", on_host(KEY32), on_host(KEY64)),
):
    CASES[f"insert one {name}"] = partial(insert_one, keys=keys, slots=slots)
LAUNCHES = {"insert False": 3, "insert True": 4}


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_one_call_of_machine_code(case: str, slot_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = record_launches(monkeypatch)
    monkeypatch.setattr(launch, "multi_processors", lambda device: 132)
    home, start = home_of(slot_dtype), CASES[case]
    home.stages.buffers.zero_()
    assert start(home) in (None, True)
    from_python, words, staged = driver.launches[:], home.stages.words.copy(), home.stages.buffers.clone()
    assert len(from_python) == LAUNCHES.get(case, 1)
    driver.launches.clear()
    home.stages.words[desk.NEXT :] = 0
    home.stages.buffers.zero_()
    monkeypatch.setattr(native.launch, "call", None)  # this would launch a single kernel
    assert start(home) in (None, True)
    assert driver.launches == from_python
    assert (home.stages.words == words).all()
    assert torch.equal(home.stages.buffers, staged)
    if "both on the host" in case:
        assert staged[:9].tolist() == staged[desk.STAGED_TOKENS :][:9].tolist() == list(range(3, 12))
        assert words[desk.NEXT] == 2


@pytest.mark.parametrize("good", range(4))
@pytest.mark.parametrize("case", CASES)
def test_each_launch_may_be_refused(case: str, good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch follows the one that the driver refuses, and the buffers count as free."""
    driver = record_launches(monkeypatch)
    home, start = home_of(torch.int32), CASES[case]
    start(home)
    if good >= len(driver.launches):
        return
    driver.launches.clear()
    home.stages.words[desk.NEXT :] = 0
    driver.code, driver.good = 701, good
    with pytest.raises(RuntimeError, match="refused to launch a kernel: error 701"):
        start(home)
    assert len(driver.launches) == good + 1
    assert not home.stages.words[desk.NEXT :].any()


@pytest.mark.parametrize("case", [case for case in CASES if "on the host" in case or "match one" in case])
def test_nothing_starts_without_a_free_buffer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = record_launches(monkeypatch)
    home, start = home_of(torch.int32), CASES[case]
    for _ in range(2):  # from Python, then from machine code
        for busy in (0, 1)[: 2 if "both" in case else 1]:
            home.stages.words[desk.NEXT :] = 0
            home.stages.words[desk.FIRST_CALL + busy] = 3
            assert start(home) is False
            with pytest.raises(RuntimeError, match="call 3 has not told its numbers"):
                home.stages.wait()
        assert not driver.launches
        home.stages.words[desk.NEXT :] = 0
        assert start(home) is True
        driver.launches.clear()
    home.stages.words[desk.NEXT :] = 0
    home.stages.words[desk.FIRST_CALL] = 3
    write(home.box, 3, [1, 2, 3, 4])
    home.stages.wait()
    assert start(home) is True


# A whole tree whose launches are direct, with interpreted kernels


@pytest.fixture
def direct(cuda: str, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    if not interpreted(cuda):
        pytest.skip("on a GPU, all other tests launch directly")
    return interpret_launches(monkeypatch)


@pytest.mark.gpu
def test_direct_launches_do_the_same(cuda: str, direct: FakeDriver) -> None:
    pair = Pair(cuda, 400)
    for seed in range(2):
        use(pair, shared_prefixes(6, seed))
    assert len(direct.launches) > 20


@pytest.mark.gpu
def test_single_keys(cuda: str, direct: FakeDriver) -> None:
    pair = Pair(cuda, 64)
    for tree in (pair.host, pair.tree):
        tree.insert([1, 2, 3, 4], [5, 6, 7, 8])
        tree.insert([1, 2, 9], [5, 6, 9], namespace="a")
    for key in ([1, 2, 3], [1, 2, 7], [1, 2, 9], [4], []):
        for options in ({}, {"namespace": "a"}, {"touch": False}, {"lock": True}):
            for dtype in (torch.int32, torch.int64):
                query = torch.tensor(key, dtype=dtype)
                host, tree = (one.match(query, **options) for one in (pair.host, pair.tree))
                assert tree.length == host.length
    pair.compare()
    assert [launched.grid[0] for launched in direct.launches[-2:]] == [1, 1]


@pytest.mark.gpu
def test_tokens_beyond_32_bits_are_refused(cuda: str, direct: FakeDriver) -> None:
    """A key in host memory reaches the device with 32 bits a token."""
    tree = RadixTree(64, device=cuda)
    tree.insert([1, 2, 3, 4], [5, 6, 7, 8])
    for bad in (-1, -(2**31), 2**31, 2**32 + 3, -(2**32) + 3, 2**63 - 1, -(2**63)):
        for call in (tree.match, partial(tree.insert, slots=[1, 2, 3])):
            with pytest.raises(ValueError, match=r"query 0: the token at position 2 is outside \[0, 2\*\*31 - 1\]"):
                _ = call([1, 2, bad]).length
    assert tree.match([1, 2, 2**31 - 1]).length == 2
    assert tree.insert([1, 2, 2**31 - 1], [1, 2, 3]).prefix_length == 2
    assert tree.match([1, 2, 2**31 - 1]).length == 3
    tree.check()


@pytest.mark.gpu
def test_a_refused_launch_has_no_effect(cuda: str, direct: FakeDriver) -> None:
    pair = Pair(cuda, 64)
    for tree in (pair.host, pair.tree):
        tree.insert([1, 2, 3, 4], [5, 6, 7, 8])
        for _ in range(2):
            tree.unlock(tree.match([1, 2], lock=True))
            tree.match([1, 2])
    direct.code = 2
    for lock in (False, True):
        with pytest.raises(RuntimeError, match="refused to launch a kernel: error 2"):
            pair.tree.match([1, 2, 3], lock=lock)
    direct.code = 0
    pair.compare()
    assert pair.tree.match([1, 2, 3], touch=False).length == 3


@pytest.mark.gpu
@pytest.mark.parametrize("good", range(3))
def test_an_insert_of_which_a_launch_was_refused(cuda: str, direct: FakeDriver, good: int) -> None:
    """The driver runs none, one or two of the three launches of a batch, and not the only one of a single key."""
    pair = Pair(cuda, 64)
    for tree in (pair.host, pair.tree):
        for key in range(4):
            assert tree.insert([key, 2, 3, 4], [5, 6, 7, 8]).prefix_length == 0
            assert tree.insert([[key, 2, 3]], [[5, 6, 7]]).prefix_lengths.tolist() == [3]
    for key, slots in (([[1, 2, 9, 9]], [[5, 6, 7, 8]]), *[([1, 2, 9, 9], [5, 6, 7, 8])] * (good == 0)):
        direct.code, direct.good = 2, good
        direct.launches.clear()
        with pytest.raises(RuntimeError, match="refused to launch a kernel: error 2"):
            pair.tree.insert(key, slots)
        assert len(direct.launches) == good + 1
        direct.code = 0
        pair.compare()
    for tree in (pair.host, pair.tree):
        assert tree.insert([1, 2, 9], [5, 6, 7]).prefix_length == 2
    pair.compare()


@pytest.mark.gpu
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
def test_slots_in_host_memory(cuda: str, direct: FakeDriver, slot_dtype: torch.dtype) -> None:
    tree = RadixTree(200, device=cuda, slot_dtype=slot_dtype)
    largest = int(torch.iinfo(slot_dtype).max)
    for first in range(4):
        for dtype in (np.int32, np.int64):
            key, slots = np.array([first, 1, 2], dtype), np.array([first, 8, 9], dtype)
            assert tree.insert(key, slots).length == 3
            assert tree.slots(tree.match(key)).to_list() == [[first, 8, 9]]
            for bad in (-1, -(2**31)) if dtype is np.int32 else (-1, -(2**63) + 7, *((2**32 + 3,) * (largest < 2**32))):
                with pytest.raises(ValueError, match="slot"):
                    _ = tree.insert([first, 7], np.array([4, bad], dtype)).length
    assert tree.insert([9, 9], [3, largest]).prefix_length == 0
    assert tree.slots(tree.match([9, 9])).to_list() == [[3, largest]]
    with pytest.raises(ValueError, match="2 tokens"):
        tree.insert([1, 2], [1, 2, 3])
    tree.check()


@pytest.mark.gpu
def test_more_keys_at_once_than_there_are_buffers(cuda: str, direct: FakeDriver) -> None:
    tree = RadixTree(64, device=cuda)
    tree.insert([1, 2, 3, 4], [5, 6, 7, 8])
    found = [tree.match([1, 2, 3, 4][: i % 5]) for i in range(2 * desk.COUNT + 1)]
    assert [one.length for one in found] == [i % 5 for i in range(len(found))]


# Waiting


@pytest.fixture
def box() -> Mailbox:
    return Mailbox(CPU)


def write(box: Mailbox, call: int, numbers: list[int]) -> None:
    place = mail.FIRST_ANSWER + call % mail.ANSWER_RING * mail.ANSWER_WORDS
    for index, number in enumerate(numbers):
        box.words[place + index] = call << 32 | number


def test_an_answer_is_read_whole(box: Mailbox) -> None:
    write(box, 3, [7, 0xFFFFFFFE, 5, 2])
    assert box.answer(3) == (7, 5 << 32 | 0xFFFFFFFE, 2)
    write(box, 3, [0xFFFFFFFF] * 4)
    assert box.answer(3) == (0xFFFFFFFF, -1, 0xFFFFFFFF)


@pytest.mark.parametrize("words", range(1, 5))
def test_an_answer_that_a_later_call_overwrites(box: Mailbox, words: int) -> None:
    write(box, 3, [7, 8, 0, 2])
    write(box, 3 + mail.ANSWER_RING, [1] * words)
    assert box.answer(3) is None


@pytest.mark.parametrize("words", range(4))
def test_an_answer_that_does_not_come(box: Mailbox, words: int) -> None:
    write(box, mail.CALL_MASK - (mail.CALL_MASK - 3) % mail.ANSWER_RING, [9] * 4)  # by a call long before
    write(box, 3, [7, 8, 0, 2][:words])
    with pytest.raises(RuntimeError, match="call 3 has not told its numbers"):
        box.answer(3)


def test_calls_begin_anew(box: Mailbox) -> None:
    box.words[mail.NODES] = mail.CALL_MASK << 32 | 5
    assert box.wait(mail.NODES, mail.CALL_MASK) == 5
    with pytest.raises(RuntimeError, match="call 2 has not told its numbers"):
        box.wait(mail.NODES, 2)
    box.last = box.last_change = mail.CALL_MASK - 3
    box.words[mail.ERRORS] = 2 << 32
    box.words[mail.NODES] = 2 << 32 | 6
    assert box.counter(mail.NODES) == 6


@pytest.fixture
def alarm() -> Iterator[None]:
    def ring(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_wait_can_be_interrupted(box: Mailbox, alarm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device never ends its work."""
    monkeypatch.setattr(box, "_is_idle", lambda: False)
    for wait in (lambda: box.answer(3), lambda: box.wait(mail.NODES, 3)):
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            wait()
        assert time.monotonic() - began < 5


def test_other_threads_run_while_one_waits(box: Mailbox) -> None:
    """A thread writes the word after another has begun to wait for it, all in one uninterrupted call."""
    native.await_word.call(box.words.data_ptr(), 0, False, 1)  # compiles
    thread = threading.Timer(0.05, write, (box, 3, [1, 2, 3, 4]))
    thread.start()
    assert native.await_answer.call(box.words.data_ptr(), 3, 1 << 40) == (1, 1, 2 | 3 << 32, 4)
    thread.join()


# The lengths of a batch in host memory


KEYS = [[1, 2, 3], [1, 2, 7], [], [4]]


def lengths_of(tree: RadixTree, keys: list[list[int]]) -> list[int]:
    found = tree.match(ragged(keys, tree))
    told = found.host_lengths
    assert (told.dtype, told.device) == (torch.int32, CPU)
    assert told.tolist() == found.lengths.tolist()
    return told.tolist()


@pytest.mark.gpu
def test_lengths_on_the_host(cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    assert lengths_of(tree, KEYS) == [0, 0, 0, 0]
    inserted = tree.insert([[1, 2, 3, 4]], [[1, 2, 3, 4]])
    assert inserted.host_lengths.tolist() == [4]
    assert lengths_of(tree, KEYS) == [3, 2, 0, 0]
    assert lengths_of(tree, []) == []
    assert tree.match([1, 2]).host_lengths.tolist() == [2]
    assert tree.match([1, 2]).host_lengths.dtype == torch.int32
    assert tree.rematch(KEYS, tree.match(KEYS)).host_lengths.tolist() == [3, 2, 0, 0]


@pytest.mark.gpu
def test_lengths_of_a_refused_call_on_the_host(cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    refused = [tree.match(ragged([[1], [-1]], tree)) for _ in range(2)]
    good = tree.match(ragged([[1, 2]], tree))
    assert [one.host_lengths.tolist() for one in (good, *refused)] == [[2], [-1, -1], [-1, -1]]
    with pytest.raises(ValueError, match="match: query 1"):
        tree.raise_pending()
    assert [one.host_lengths.tolist() for one in (good, *refused)] == [[2], [-1, -1], [-1, -1]]
    assert lengths_of(tree, KEYS) == [3, 2, 0, 0]
    with pytest.raises(ValueError, match="match: query 0"):
        _ = tree.match([-1]).host_lengths


@pytest.mark.gpu
def test_lengths_that_were_overwritten_come_from_the_device(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mail, "TOLD_RING", 8)
    monkeypatch.setattr(mail, "MOST_TOLD", 5)
    tree = RadixTree(64, device=cuda)
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    batches = [KEYS[:count] for count in (3, 1, 4, 2, 4, 1)] + [KEYS + KEYS]
    found = [tree.match(ragged(keys, tree)) for keys in batches]
    assert [one.host_lengths.tolist() for one in found] == [([3, 2, 0, 0] * 2)[: len(keys)] for keys in batches]


@pytest.mark.gpu
def test_large_batches_have_memory_of_their_own(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.device import results

    monkeypatch.setattr(results, "_CHUNK", 8)
    monkeypatch.setattr(results, "_MOST", 4)
    pair = Pair(cuda, 64)
    pair.insert(KEYS[:2], [[1, 2, 3], [1, 2, 4]])
    found = [pair.match((KEYS * 2)[:count]) for count in (3, 4, 1, 8, 5, 2)]
    for host, tree in found:
        pair.on_each("lock", (host, tree))
        assert tree.handles.tolist() != [0] * len(host)
    for host, tree in found:
        assert tree.lengths.tolist() == host.lengths.tolist()
        pair.on_each("unlock", (host, tree))
    pair.compare()
    assert pair.tree.protected_tokens == 0

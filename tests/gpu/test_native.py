"""Launches from machine code, with a driver of Python functions, and waits for words that no kernel writes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to launch")

from flatradix import RadixTree
from flatradix.device.mailbox import Mailbox
from flatradix.kernels import native
from flatradix.kernels.gpu.launch import Kernel, arrays_of, no_arrays
from flatradix.layout import desk, mail
from flatradix.layout.scratch import allocate_scratch
from flatradix.layout.state import allocate_device
from tests.support.devices import interpreted
from tests.support.fake_driver import STREAM, FakeDriver, interpret_launches
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

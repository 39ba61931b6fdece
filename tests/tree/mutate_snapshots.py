"""Load damaged and hostile snapshots: python3 -m tests.tree.mutate_snapshots --files 100000 --processes 2

File N of seed S is a good snapshot that Random("S/N") has changed, in one of three ways:

bytes   Bytes are flipped, zeroed, cut, inserted or exchanged. The file must be refused.
sealed  The same, but with the checksum that such a file should have. The file must be refused, or hold a tree.
values  Values of its arrays and settings are changed, or arrays grow, shrink or change places, with the right checksum.
        The file must be refused, or hold a tree.

A refusal is a ValueError that names the file. A tree must pass `check`, answer a short program of calls, and be equal
after `save` and `load`. A worker may take a little memory and some seconds for a file. At a fault, the program prints
how to repeat the file, and exits with 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import json
import multiprocessing
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix import RadixTree
from flatradix.inspect.array_file import read_arrays, read_head, write_arrays
from flatradix.inspect.snapshot import KIND, VERSION

FILES_A_ROUND = 250
SECONDS_A_FILE = 60
MEMORY_OF_A_FILE = 1 << 30
MOST_TOKENS = 1 << 20
WAYS = ("bytes", "sealed", "values")
SPECIAL = (
    0, 1, 2, 3, -1, -2, 7, 64, 1 << 16, 2**31 - 1, -(2**31), 2**31, 2**32, 2**35, 2**62, 2**63 - 1, -(2**63), 10**30,
)  # fmt: skip
STRANGE = (None, True, False, "", "lru", "mru", "no policy", [], {}, 1.5, -0.0, "torch.int64", "torch.int32", "page")
BASES = 8


@cache
def good(number: int) -> bytes:
    """Return a snapshot of one of a few trees with everything: namespaces, locks, free rows, bigrams, dropped nodes."""
    random = Random(number)
    page, bigram, wide = (1, 2, 4, 16)[number % 4], number % 3 == 1, number % 2 == 1
    tree = RadixTree(
        None if number % 4 == 3 else 4096, page, "cpu", ("lru", "lfu", "mru", "priority")[number % 4], bigram=bigram,
        slot_dtype=torch.int64 if wide else torch.int32, evict_by=("node", "page")[number % 2],
    )  # fmt: skip
    names = [None, "a", b"b", "\ud800", ""]
    for _ in range(3 if number % 5 == 4 else 12):
        keys = [[random.randint(0, 1) for _ in range(random.randint(1, 8 * page))] for _ in range(3)]
        spaces = random.choices(names, k=3)
        priorities = [random.randint(-2, 2) for _ in keys]
        tree.insert(keys, [[random.randint(0, 10**9) for _ in key] for key in keys], spaces, priorities)
        tree.match(keys, spaces, lock=random.random() < 0.3)
        tree.evict(random.choice((0, 0, page)))
        if number % 2 == 1 and random.random() < 0.3:
            tree.drop(namespace=random.choice(names))
    file = io.BytesIO()
    tree.save(file)
    settings, arrays = parts(file.getvalue())
    settings["generation"] = number  # else random
    return joined(json.dumps(settings), arrays)


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings and the arrays of a good file."""
    file = io.BytesIO(data)
    text, arrays = read_arrays(file, read_head(file, KIND)[0], whole=True)
    return json.loads(text), arrays


def joined(text: str, arrays: dict[str, np.ndarray], version: int = VERSION) -> bytes:
    """Return a file with the right checksum."""
    file = io.BytesIO()
    write_arrays(file, f"{KIND}{version}", text, arrays)
    return file.getvalue()


def changed_bytes(random: Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        if len(found) < 2:
            break
        # Half of the changes go to the header, which is a small part of the file.
        most = len(found) if random.random() < 0.5 else min(len(found), 2000)
        at = random.randrange(most)
        end = min(at + random.choice((1, 1, 4, 8, 100, 5000)), len(found))
        what = random.randrange(7)
        if what == 0:
            found[at] ^= 1 << random.randrange(8)
        elif what == 1:
            found[at:end] = bytes(end - at)
        elif what == 2:
            del found[random.choice((at, random.randrange(len(found)))) :]
        elif what == 3:
            del found[at:end]
        elif what == 4:
            found[at:at] = random.randbytes(end - at)
        elif what == 5:
            found[at:end] = random.randbytes(end - at)
        else:
            other = random.randrange(len(found))
            part = found[at:end]
            found[other : other + len(part)] = part
    return bytes(found)


def sealed(data: bytes) -> bytes:
    """Return a file with the checksum of its bytes at its end."""
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def changed_values(random: Random, data: bytes) -> bytes:
    settings, arrays = parts(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if random.random() < 0.15:
            change_settings(random, settings)
        else:
            change_array(random, arrays)
    text = json.dumps(settings)
    if random.random() < 0.01:
        text = text[: random.randrange(len(text))]
    return joined(text, arrays, VERSION + (random.random() < 0.01))


def change_settings(random: Random, settings: dict[str, Any]) -> None:
    name = random.choice([*settings, "other"])
    if random.random() < 0.1:
        settings.pop(name, None)
    elif isinstance(settings.get(name), int) and random.random() < 0.4:
        settings[name] += random.choice((-1, 1, -16, 16))
    else:
        settings[name] = random.choice(SPECIAL + STRANGE)


def change_array(random: Random, arrays: dict[str, np.ndarray]) -> None:
    name = random.choice(list(arrays))
    array = arrays[name]
    what = random.random()
    if what < 0.04:
        arrays[name] = array[: random.randint(0, len(array))]
    elif what < 0.08:
        arrays[name] = np.concatenate([array, np.zeros(random.choice((1, 2, 16, 10_000)), array.dtype)])
    elif what < 0.1:
        arrays[name] = array.astype(random.choice([np.int64, np.int32, np.uint8]))
    elif what < 0.12:
        other = random.choice(list(arrays))
        arrays[name], arrays[other] = arrays[other], array
    elif what < 0.13:
        arrays.pop(name)
        arrays[random.choice((name, "other", "sha256", "__metadata__"))] = array
    elif len(array):
        change_elements(random, array)


def change_elements(random: Random, array: np.ndarray) -> None:
    at, other = random.randrange(len(array)), random.randrange(len(array))
    what = random.random()
    if what < 0.3:
        array[at] = wrapped(random.choice(SPECIAL), array)
    elif what < 0.5:
        array[at] = wrapped(int(array[at]) + random.choice((-1, 1, -2, 2, -16, 16)), array)
    elif what < 0.65:
        array[at] = array[other]
    elif what < 0.8:
        array[[at, other]] = array[[other, at]]
    elif what < 0.9:
        array[at:] = wrapped(random.choice(SPECIAL), array)
    else:
        array[:] = array[::-1].copy()


def wrapped(value: int, array: np.ndarray) -> np.ndarray:
    return np.array([value & (2**64 - 1)], np.uint64).astype(array.dtype)[0]


class Result(NamedTuple):
    """What a round counted. fault: what to print if a file failed."""

    counts: Counter[str]
    fault: str = ""


def mutated(seed: int, number: int) -> tuple[str, bytes, bytes]:
    """Return the way in which a file was changed, the file, and the file before."""
    random = Random(f"{seed}/{number}")
    way, before = WAYS[number % len(WAYS)], good(random.randrange(BASES))
    if way == "values":
        return way, changed_values(random, before), before
    changed = changed_bytes(random, before)
    return way, sealed(changed) if way == "sealed" else changed, before


def load_one(seed: int, number: int, path: Path) -> str:
    """Write a file and load it. Return what came of it; raise AssertionError at a fault."""
    way, data, before = mutated(seed, number)
    path.write_bytes(data)
    try:
        tree = RadixTree.load(path, "cpu", most_tokens=MOST_TOKENS)
    except ValueError as error:
        if str(path) not in str(error) or data == before:
            raise AssertionError("a good file is refused, or the message does not name the file") from error
        return f"{way} refused"
    assert way != "bytes" or data == before, "a damaged file was loaded"
    use(tree)
    return f"{way} unchanged" if data == before else f"{way} loaded"


def check(tree: RadixTree) -> None:
    """Check a tree. A file may hold any slots, so also a slot twice on a path."""
    try:
        tree.check()
    except AssertionError as error:
        if "is twice on a path" not in str(error):
            raise


def use(tree: RadixTree) -> None:
    """Run every kind of call on a tree that was loaded."""
    check(tree)
    digest, page = tree.digest(), tree.page_size
    file = io.BytesIO()
    tree.save(file)
    file.seek(0)
    again = RadixTree.load(file, "cpu", most_tokens=MOST_TOKENS)
    assert again.digest() == digest
    key = [0, 1] * (2 * page)
    tree.slots(tree.match([key, key[1:]], ["a", None]))
    if tree.max_tokens is None or tree.total_tokens + 2 * len(key) <= tree.max_tokens:
        tree.lock(tree.insert([key, key[1:]], [key, key[1:]], ["a", None]))
        check(tree)
    total = tree.evictable_tokens
    assert tree.evict(page).num_tokens == 0 or total > 0
    assert tree.evict(tree.evictable_tokens).num_tokens >= 0
    check(tree)
    tree.reset()
    check(tree)


def run_round(seed: int, first: int, files: int) -> Result:
    counts: Counter[str] = Counter()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        for number in range(first, first + files):
            faulthandler.dump_traceback_later(SECONDS_A_FILE, exit=True)
            try:
                counts[load_one(seed, number, path)] += 1
            except Exception:
                again = f"python3 -m tests.tree.mutate_snapshots --seed {seed} --first {number} --files 1"
                return Result(counts, f"{traceback.format_exc()}FAULT with file {number}; again: {again}")
            finally:
                faulthandler.cancel_dump_traceback_later()
            counts["files"] += 1
    return Result(counts)


def start_worker() -> None:
    """Prepare a process for rounds: it ends where a file takes too long, and has memory for small trees only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    torch.set_num_threads(1)
    for number in range(BASES):
        use(RadixTree.load(io.BytesIO(good(number)), "cpu"))  # compiles all kernels
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_OF_A_FILE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_all(options: argparse.Namespace, progress: Callable[[int], None]) -> Result:
    """Run rounds in several processes, until all files were loaded, the time is up, or a file fails."""
    started, following = time.monotonic(), options.first
    end = options.first + options.files
    counts: Counter[str] = Counter()
    under_way: dict[Future[Result], int] = {}
    fault = ""
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            while True:
                in_time = time.monotonic() - started < options.seconds
                while len(under_way) < options.processes and following < end and in_time and not fault:
                    files = min(FILES_A_ROUND, end - following)
                    under_way[pool.submit(run_round, options.seed, following, files)] = following
                    following += files
                if not under_way:
                    return Result(counts, fault)
                ended, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in ended:
                    result = future.result()
                    counts, fault = counts + result.counts, fault or result.fault
                    del under_way[future]
                progress(counts["files"])
        except BrokenProcessPool:
            firsts = " or ".join(str(first) for first in under_way.values())
            again = f"python3 -m tests.tree.mutate_snapshots --seed {options.seed} --files {FILES_A_ROUND} --first N"
            return Result(counts, f"A PROCESS DIED in the round that begins with file {firsts}; again: {again}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.tree.mutate_snapshots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--files", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the file to begin with (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after so long")
    parser.add_argument("--processes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.files, options.processes) < 1:
        parser.error("--files and --processes must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the files. Return the exit code."""
    options, printed = parse(arguments), time.monotonic()
    started = printed

    def progress(done: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= 10:
            printed = time.monotonic()
            print(f"{printed - started:6.0f} s  {done:,} of {options.files:,} files", flush=True)

    counts, fault = run_all(options, progress)
    what = ", ".join(f"{counts[name]:,} {name}" for name in sorted(counts) if name != "files")
    what = f"{counts['files']:,} files of seed {options.seed} ({what}); {time.monotonic() - started:.0f} s"
    print(f"{fault}\nFAILED: {what}" if fault else f"ok: {what}", flush=True)
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())

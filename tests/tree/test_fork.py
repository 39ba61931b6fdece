"""A forked child works with trees, caches and queues of its own, whatever the parent did before.

The OpenMP threads of torch do not survive a fork: a child waits for them forever at its first operation on more than
32768 elements.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MANY = 40_000

BEGIN = f"""
import io, multiprocessing, sys
import numpy as np, torch
import flatradix
from flatradix.queue.orders import NAMES
torch.set_num_threads(2)
many = {MANY}
numbers = np.arange(many, dtype=np.int64)
one_each = flatradix.Ragged(numbers, np.arange(many + 1, dtype=np.int32))

class Every:
    def __init__(self, places):
        handles, lengths = np.zeros((2, many, 2), np.int64)
        handles[:, 0], lengths[:, 0] = places.handles.numpy(), places.lengths.numpy()
        self.handles, self.lengths = torch.from_numpy(handles)[:, 0], torch.from_numpy(lengths)[:, 0]
"""
WORK = {
    "tree": """
tree = flatradix.RadixTree(1_000_000, device="cpu")
tree.insert(numbers, numbers)
places = tree.insert(one_each, one_each, "a")
tree.lock(Every(places))
tree.unlock(Every(places))
table = torch.from_numpy(np.zeros((1, many), np.int64))
tree.write_slots(tree.match(numbers), table, [0])
tree.slots(places), tree.digest(), tree.evict(100)
file = io.BytesIO()
tree.save(file)
file.seek(0)
flatradix.RadixTree.load(file, device="cpu").digest()
""",
    "tree of other types": """
tree = flatradix.RadixTree(100_000, device="cpu", slot_dtype=torch.int64)
pairs = torch.from_numpy(np.arange(2 * many, dtype=np.int32))[::2]
tree.insert(pairs, pairs)
tree.match(torch.from_numpy(np.zeros(many, np.int16)))
""",
    "tree that grows": """
tree = flatradix.RadixTree(device="cpu")
tree.insert(numbers[:4000], numbers[:4000])
for name in "abc":
    tree.insert(numbers, numbers, name)
""",
    "mru": """
tree = flatradix.RadixTree(1_000_000, device="cpu", policy="mru")
tree.insert(one_each, one_each)
tree.evict(3)
""",
    "queue": """
tree = flatradix.RadixTree(1_000_000, device="cpu")
queue = flatradix.WaitingQueue(tree, keep=True)
queue.add(one_each)
queue.add(numbers)
for name in NAMES:
    queue.order(name, defer_shared=True)
queue.shared_lengths(), queue.plan()
queue.remove(queue.ids())
""",
    "cache": """
cache = flatradix.PrefixCache(1_000_000, page_size=2, max_requests=8, max_length=100_000)
cache.table
for _ in range(2):
    requests = cache.begin([numbers, numbers[::-1].copy()])
    cache.finish(requests)
requests = cache.begin([numbers, numbers + 5])
cache.fork(requests[0], 2)
cache.check()
""",
}
# The parent starts the threads first, and compiles what the children need: the time limit is for a child that hangs.
PARENT = """
def run(name):
    exec(compile(works[name], name, "exec"), dict(globals()))

for name in works:
    run(name)
torch.ones(1 << 20).add_(1)
for name in works:
    child = multiprocessing.get_context("fork").Process(target=run, args=(name,))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        sys.exit(f"{name}: the child hangs")
    if child.exitcode:
        sys.exit(f"{name}: exit code {child.exitcode}")
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_forked_children_do_not_hang() -> None:
    """One child for each of WORK, of one parent: a process imports for seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    code = f"{BEGIN}\nworks = {WORK!r}\n{PARENT}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

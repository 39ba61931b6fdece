"""Files of trees: replaced as a whole, private, and refused with a reason where they are not as `save` wrote them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch

from flatradix import RadixTree
from flatradix.inspect import convert, replace, snapshot
from flatradix.inspect.content import saved_of
from flatradix.layout.state import FREE_ROW
from tests.support.depth import examples
from tests.support.interrupts import bytecodes, interrupt_at
from tests.tree import mutate_snapshots
from tests.tree.mutate_snapshots import good, joined, parts, sealed


def tree_of(first: int, tokens: int = 3) -> RadixTree:
    tree = RadixTree(max(64, tokens), device="cpu")
    tree.insert([first] * tokens, list(range(tokens)))
    return tree


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_savers_to_one_path_do_not_meet(tmp_path: Path) -> None:
    trees = [tree_of(first, 50_000) for first in (1, 2)]
    digests = {tree.digest() for tree in trees}
    faults: list[BaseException] = []

    def save(tree: RadixTree) -> None:
        try:
            for _ in range(15):
                tree.save(tmp_path / "tree")
        except BaseException as error:
            faults.append(error)

    trees[0].save(tmp_path / "tree")
    threads = [threading.Thread(target=save, args=(tree,)) for tree in trees]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert RadixTree.load(tmp_path / "tree", "cpu").digest() in digests
    for thread in threads:
        thread.join()
    assert faults == []
    assert names_in(tmp_path) == ["tree"]


def kill_savers(path: str, kills: int) -> None:
    """Let processes save two trees in turn, and kill them. Verify the file after each. For a process of its own."""
    trees, draw = [tree_of(first, 20_000) for first in (1, 2)], random.Random(0)
    digests = {tree.digest() for tree in trees}
    for tree in trees:
        tree.save(path)
    for _ in range(kills):
        saver = os.fork()
        while saver == 0:
            for tree in trees:
                tree.save(path)
        time.sleep(draw.random() / 20)
        os.kill(saver, signal.SIGKILL)
        os.waitpid(saver, 0)
        assert RadixTree.load(path, "cpu").digest() in digests


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    call = f"kill_savers({str(tmp_path / 'tree')!r}, {examples(20, 100)})"
    code = f"from tests.tree.test_snapshot_files import kill_savers; {call}"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
    assert len(names_in(tmp_path)) > 1, "no process was killed in a save"


def refuse_to_sync(_file: int) -> None:
    raise OSError("no space left")


def test_a_failed_save_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree_of(1).save(tmp_path / "tree")
    before = (tmp_path / "tree").read_bytes()
    monkeypatch.setattr(os, "fsync", refuse_to_sync)
    with pytest.raises(OSError, match="no space left"):
        tree_of(2).save(tmp_path / "tree")
    with pytest.raises(OSError, match="no space left"):
        tree_of(2).save(tmp_path / "another")
    assert names_in(tmp_path) == ["tree"]
    assert (tmp_path / "tree").read_bytes() == before


def test_an_interrupted_save_leaves_a_whole_file(tmp_path: Path) -> None:
    trees = [tree_of(1), tree_of(2)]
    digests = {tree.digest() for tree in trees}
    trees[0].save(tmp_path / "tree")
    total = bytecodes(lambda: trees[1].save(tmp_path / "tree"), "inspect")
    for at in range(0, total, max(1, total // examples(30, 300))):
        cut = interrupt_at(at, lambda: trees[1].save(tmp_path / "tree"), "inspect")
        assert cut.where
        assert names_in(tmp_path) == ["tree"], cut.where
        assert RadixTree.load(tmp_path / "tree", "cpu").digest() in digests, cut.where


def test_the_new_file_is_on_disk_before_it_replaces_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        original = getattr(os, name)
        return lambda *arguments: (done.append(name), original(*arguments))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, note(name))
    tree_of(1).save(tmp_path / "tree")
    assert done == ["fsync", "replace", "fsync"]


def test_a_link_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(Path("there") / "tree")
    for first in (1, 2):
        tree_of(first).save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert RadixTree.load(tmp_path / "there" / "tree", "cpu").digest() == tree_of(first).digest()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o400])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "tree"
    before = os.umask(0o022)
    try:
        tree_of(1).save(path)
        assert stat.S_IMODE(path.stat().st_mode) == replace.MODE == 0o600
        path.chmod(mode)
        tree_of(2).save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    tree_of(1).save(pipe)
    reader.join()
    assert RadixTree.load(io.BytesIO(found[0]), "cpu").digest() == tree_of(1).digest()
    with pytest.raises(IsADirectoryError):
        tree_of(1).save(tmp_path)
    assert names_in(tmp_path) == ["pipe"]


class Slow(io.RawIOBase):
    """A file without a size, which takes and gives seven bytes at a time."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Any) -> int:
        self.data += bytes(data[:7])
        return min(7, len(data))

    def read(self, count: int = -1) -> bytes:
        found = bytes(self.data[: min(count, 7)])
        del self.data[: len(found)]
        return found


def test_trees_in_one_open_file(tmp_path: Path) -> None:
    files: list[IO[bytes]] = [io.BytesIO(), Slow(), (tmp_path / "trees").open("wb+", buffering=0)]  # type: ignore[list-item]
    for file in files:
        for first in (1, 2):
            tree_of(first).save(file)
        if not isinstance(file, Slow):
            file.seek(0)
        for first in (1, 2):
            assert RadixTree.load(file, "cpu").digest() == tree_of(first).digest()
        with pytest.raises(ValueError, match="no tree that flatradix saved"):
            RadixTree.load(file, "cpu")
        file.close()


def test_a_change_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tree_of(1)
    tree.save(tmp_path / "tree")
    before = (tmp_path / "tree").read_bytes()
    write = snapshot.write_arrays

    def write_and_change(*arguments: Any) -> None:
        write(*arguments)
        tree.insert([7], [7])

    monkeypatch.setattr(snapshot, "write_arrays", write_and_change)
    with pytest.raises(RuntimeError, match="changed while it was saved"):
        tree.save(tmp_path / "tree")
    assert (tmp_path / "tree").read_bytes() == before


def refused(path: Path, data: bytes, reason: str, **options: Any) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError, match=reason) as error:
        RadixTree.load(path, "cpu", **options)
    assert str(path) in str(error.value)


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    tree_of(1).save(tmp_path / "tree")
    data = (tmp_path / "tree").read_bytes()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        refused(tmp_path / "damaged", bytes(damaged), "damaged|reads 'flatradix tree 4'")
    for length in range(0, len(data), 13):
        refused(tmp_path / "damaged", data[:length], "damaged|no tree that flatradix saved")
    refused(tmp_path / "damaged", data + b"\0", "damaged: it has")


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"[1, 2]", b"PK\5\6" + bytes(18), bytes(range(256)) * 40])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path / "file", data, "is no tree that")


def test_newer_files_are_refused(tmp_path: Path) -> None:
    newer = good(0).replace(b"flatradix tree 4", b"flatradix tree 5")
    refused(tmp_path / "file", sealed(newer), "has the format 'flatradix tree 5', and this .* reads 'flatradix tree 4'")


def with_value(name: str, at: int, value: int) -> Callable[[dict, dict], None]:
    """Return a change of a value. at: of a column, the number of the node, those at the top of the tree first."""

    def change(_settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        ends = np.where(arrays["parent"] == FREE_ROW, 2**31 - 1, arrays["end"])
        is_column = len(arrays[name]) == len(ends)
        arrays[name][1 + np.argsort(ends[1:], kind="stable")[at] if is_column else at] = value

    return change


def with_setting(name: str, value: Any) -> Callable[[dict, dict], None]:
    return lambda settings, _arrays: settings.update({name: value})


def twins(_settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    arrays["tokens"][:] = 5


HOSTILE = {
    "no row": (with_value("parent", 2, 2**20), "its parent is no row"),
    "a circle": (with_value("parent", 0, 1), "its end is not its parent's end and its edge"),
    "the root": (with_value("parent", 2, 0), "its parent is the root"),
    "no namespace": (with_value("parent", 0, -1000), "in namespace 999 of"),
    "outside the pool": (with_value("start", 1, 2**30), "does not begin where the edge before it ends"),
    "no edge": (with_value("length", 1, 0), "not of whole pages"),
    "locks": (with_value("lock_ref", 1, 77), "lock_ref is not its own and its children's"),
    "the future": (with_value("tick", 1, 2**62), "tick is not between 0 and the clock"),
    "a negative token": (with_value("tokens", 0, -1), "a value of tokens is negative"),
    "a negative slot": (with_value("slots", 0, -1), "a value of slots is negative"),
    "a later node": (with_value("created", 1, 2**60), "created is not between 0 and the clock"),
    "a strange mark": (with_value("created", 1, -(2**62)), "created is none of a dropped node"),
    "a node that is found": (with_value("created", 0, -(2**60)), "it was dropped, but is not detached"),
    "a node below": (with_value("created", 0, -(2**61)), "its parent was dropped, but it was not"),
    "two twins": (twins, "another child of its parent begins with the same page"),
    "a huge page": (with_setting("page_size", 2**40), "damaged"),
    "a huge tree": (with_setting("max_tokens", 2**40), "too large"),
    "no number": (with_setting("max_tokens", True), "its max_tokens is True"),
    "no policy": (with_setting("policy", "best"), "its policy is 'best'"),
    "a threshold": (with_setting("policy", 10**30), "more than any node can count"),
    "a setting": (with_setting("code", "import os"), "settings cannot be read"),
    "too small": (with_setting("max_tokens", 2), "in a tree of 2"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_refused(tmp_path: Path, name: str) -> None:
    change, reason = HOSTILE[name]
    settings, arrays = parts(good(0))
    change(settings, arrays)
    refused(tmp_path / "file", joined(json.dumps(settings), arrays), reason)


def test_a_header_that_claims_much_takes_no_memory(tmp_path: Path) -> None:
    data = good(0)
    for hostile in (
        b"\xff" * 8 + data[8:],
        data.replace(b'"shape":[', b'"shape":[99999'),
        data[:8] + b'{"__metadata__":{"format":"flatradix tree 4","text":' + b"[" * 60_000,
    ):
        refused(tmp_path / "file", sealed(hostile), "damaged")


def test_a_small_file_with_a_large_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RadixTree(5000, device="cpu").save(tmp_path / "tree")
    data = (tmp_path / "tree").read_bytes()
    refused(tmp_path / "tree", data, "for 5000 tokens, and most_tokens is 4999", most_tokens=4999)
    assert RadixTree.load(tmp_path / "tree", "cpu", most_tokens=5000).max_tokens == 5000
    monkeypatch.setattr(snapshot, "_machine_memory", lambda: 10_000)
    refused(tmp_path / "tree", data, "this machine has 10000")
    assert RadixTree.load(tmp_path / "tree", "cpu", most_tokens=5000).max_tokens == 5000


def test_a_small_file_with_large_pages(tmp_path: Path) -> None:
    RadixTree(device="cpu").save(tmp_path / "tree")
    settings, arrays = parts((tmp_path / "tree").read_bytes())
    data = joined(json.dumps(settings | {"page_size": 1 << 29}), arrays)
    tracemalloc.start()
    refused(tmp_path / "tree", data, "for 536870912 tokens", most_tokens=1 << 20)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


def test_pages_of_a_file_cannot_be_made_to_collide(tmp_path: Path) -> None:
    """The multipliers of the page hash are no part of a file: two loads draw different ones."""
    path = tmp_path / "tree"
    tree_of(1).save(path)
    drawn = [RadixTree.load(path, "cpu").content().state.multipliers.tolist() for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_safetensors_opens_the_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    (tmp_path / "tree").write_bytes(good(1))
    with safetensors.safe_open(tmp_path / "tree", "np") as file:
        assert file.metadata()["format"] == "flatradix tree 4"
        arrays = parts(good(1))[1]
        assert {name: file.get_tensor(name).tolist() for name in arrays} == {
            name: array.tolist() for name, array in arrays.items()
        }
        assert file.get_tensor("sha256").tobytes() == hashlib.sha256(good(1)[:-32]).digest()


def old_file(tree: RadixTree, path: Path) -> None:
    """Write a file of format 3."""
    tree.compact()
    content = tree.content()
    names = [(code, {str: "str", bytes: "bytes"}.get(type(name), "none"), name) for code, name in content.names]
    written = [
        (code, kind, (name or b"").encode().hex() if kind == "str" else (name or b"").hex())
        for code, kind, name in names
    ]
    settings = {
        "max_tokens": tree.max_tokens, "page_size": tree.page_size, "policy": tree.policy, "bigram": tree.bigram,
        "slot_dtype": str(tree.slot_dtype), "evict_by": tree.evict_by,
    }  # fmt: skip
    torch.save(saved_of(content) | {"format": convert.FORMAT, "settings": settings, "names": written}, path)


def test_an_old_file_is_converted(tmp_path: Path) -> None:
    tree = RadixTree(64, 2, "cpu")
    tree.insert([[1, 2, 3, 4], [1, 2], [5, 6]], [[1, 2, 3, 4], [1, 2], [5, 6]], namespace=["a", b"b", None])
    held = tree.match([1, 2], namespace="a", lock=True)
    old_file(tree, tmp_path / "old")
    with pytest.raises(ValueError, match=r"python3 -m flatradix.inspect.convert"):
        RadixTree.load(tmp_path / "old", "cpu")
    assert convert.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    loaded = RadixTree.load(tmp_path / "new", "cpu")
    assert loaded.digest() == tree.digest()
    loaded.unlock(held)
    assert "has not the format" in convert.main([str(tmp_path / "new"), str(tmp_path / "newer")])
    assert "OLD NEW" in convert.main([])


@pytest.mark.slow
def test_mutated_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutate_snapshots.main(["--files", str(examples(100, 1000)), "--seed", "7"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"ok: {examples(100, 1000)} files of seed 7 (")


@pytest.mark.parametrize("fault", ["loads anything", "names nothing"])
def test_faults_of_load_are_found(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    load = RadixTree.load

    def careless(path: Any, *arguments: Any, **options: Any) -> RadixTree:
        try:
            return load(path, *arguments, **options)
        except ValueError:
            if fault == "loads anything":
                return tree_of(1)
            raise ValueError("damaged") from None

    monkeypatch.setattr(RadixTree, "load", staticmethod(careless))
    assert "FAULT with file 0; again: python3 -m tests.tree" in mutate_snapshots.run_round(0, 0, 3).fault

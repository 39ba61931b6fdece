"""Traces and the built-in workload: their requests, and the errors for a damaged trace."""

from __future__ import annotations

import gzip
import hashlib
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from flatradix.replay import traces, workload

GOOD = {"timestamp": 5, "input_length": 700, "output_length": 3, "hash_ids": [4, 9]}


def line(**changes: object) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def without(field: str) -> bytes:
    return json.dumps({name: value for name, value in GOOD.items() if name != field}).encode()


def test_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", line(), b"", b"  ", line(input_length=0, hash_ids=[], more="ignored"))
    assert traces.read_trace(path) == [(5, 700, 3, (4, 9)), (5, 0, 3, ())]
    assert traces.read_trace(str(path), limit=1) == [(5, 700, 3, (4, 9))]


def test_read_is_lenient_about_what_does_not_matter(tmp_path: Path) -> None:
    crlf = tmp_path / "crlf.jsonl"
    crlf.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n" + line(timestamp=6.5))  # byte order mark, no last newline
    assert [request.timestamp for request in traces.read_trace(crlf)] == [5, 6.5]
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(line() + b"\n" + line()))
    assert len(traces.read_trace(packed)) == 2


def test_expand_is_what_the_protocol_says() -> None:
    request = traces.Request(0, 700, 1, (46, 47))
    blocks = [np.random.default_rng(h).integers(0, 128000, 512) for h in (46, 47)]
    tokens = traces.expand(request)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == np.concatenate(blocks)[:700].tolist()
    assert traces.expand(traces.Request(0, 0, 1, ())).shape == (0,)
    tokens[:] = 0  # the caller may overwrite the array
    assert traces.expand(request).any()


def test_expand_keeps_few_blocks() -> None:
    assert traces._block.cache_info().maxsize == traces.CACHED_BLOCKS < 100_000


DAMAGED = {
    "truncated": (line()[:40], "the JSON is cut short: the line ends in column 40"),
    "truncated in a name": (line()[:5], "the JSON is cut short"),
    "not JSON": (b"{timestamp: 5}", "not JSON: Expecting property name"),
    "two on a line": (line() + line(), "not JSON: Extra data"),
    "NaN": (line().replace(b"700", b"NaN"), "not JSON that can be read: NaN is no JSON number"),
    "endless number": (line().replace(b"700", b"7" * 5000), "not JSON that can be read: "),
    "endless timestamp": (line().replace(b'"timestamp": 5', b'"timestamp": 1e999'), "timestamp is inf"),
    "nested": (b"[" * 100_000, "the JSON is "),
    "list": (b"[1, 2]", "a JSON object is expected, not a list ([1, 2])"),
    "number": (b"7", "a JSON object is expected, not an integer (7)"),
    "latin-1": (line(name="x").replace(b"x", b"\xe9"), "not UTF-8 text: byte 0xe9 in column"),
    "utf-16": (line().decode().encode("utf-16"), "not UTF-8 text: byte 0xff in column 1"),
    "no timestamp": (without("timestamp"), 'the field "timestamp" is missing'),
    "no input_length": (without("input_length"), 'the field "input_length" is missing'),
    "no output_length": (without("output_length"), 'the field "output_length" is missing'),
    "no hash_ids": (without("hash_ids"), 'the field "hash_ids" is missing'),
    "timestamp of a wrong type": (line(timestamp="5"), 'timestamp must be a number, not a string ("5")'),
    "timestamp negative": (line(timestamp=-1), "timestamp is -1; it must be 0 or more"),
    "length of a wrong type": (line(input_length="700"), 'input_length must be an integer, not a string ("700")'),
    "length with a fraction": (line(input_length=700.0), "input_length must be an integer, not a number with a frac"),
    "length null": (line(input_length=None), "input_length must be an integer, not null"),
    "length true": (line(output_length=True), "output_length must be an integer, not a boolean (true)"),
    "length negative": (line(input_length=-700), "input_length is negative: -700"),
    "output negative": (line(output_length=-1), "output_length is negative: -1"),
    "ids of a wrong type": (line(hash_ids="4 9"), 'hash_ids must be a list of integers, not a string ("4 9")'),
    "id of a wrong type": (line(hash_ids=[4, "9"]), 'hash_ids[1] must be an integer, not a string ("9")'),
    "id true": (line(hash_ids=[True, 9]), "hash_ids[0] must be an integer, not a boolean (true)"),
    "id negative": (line(hash_ids=[4, -9]), "hash_ids[1] is negative: -9"),
    "too few ids": (line(input_length=1025), "too few hash_ids: 2 for an input_length of 1025; at 512 tokens a block"),
    "too many ids": (line(input_length=512), "too many hash_ids: 2 for an input_length of 512; at 512 tokens a block"),
    "long value": (line(hash_ids={"a": "b" * 1000}), "not an object (" + '{"a": "' + "b" * 30 + "...)"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_line(tmp_path: Path, name: str) -> None:
    bad, reason = DAMAGED[name]
    path = write(tmp_path / "t.jsonl", line(), bad, line())
    with pytest.raises(traces.TraceError) as caught:
        traces.read_trace(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)
    assert len(caught.value.reason) < 200
    assert traces.read_trace(path, limit=1)


def test_no_request_in_the_file(tmp_path: Path) -> None:
    for contents in (b"", b"\n\n"):
        path = tmp_path / "empty"
        path.write_bytes(contents)
        with pytest.raises(traces.TraceError, match=r"empty:1: no request in the file"):
            traces.read_trace(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(traces.TraceError, match=r"none\.jsonl: no such file"):
        traces.read_trace(tmp_path / "none.jsonl")
    with pytest.raises(traces.TraceError, match="a directory, not a trace file"):
        traces.read_trace(tmp_path)


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"\n".join([line()] * 3))
    path = tmp_path / "t.gz"
    for contents in (whole[:-9], whole[:-20], whole[:-8] + bytes(8)):
        path.write_bytes(contents)
        with pytest.raises(traces.TraceError, match=r"t\.gz:\d: the gzip data is damaged or cut short"):
            traces.read_trace(path)


def digest(kind: str, requests: int, seed: int = 0) -> str:
    sha = hashlib.sha256()
    for tokens in workload.prompts(kind, requests, seed):
        assert tokens.dtype == np.int32
        assert 0 <= tokens.min() <= tokens.max() < traces.VOCABULARY
        sha.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("kind", workload.KINDS)
def test_workload_is_deterministic(kind: str) -> None:
    assert digest(kind, 60) == digest(kind, 60)
    assert digest(kind, 60) != digest(kind, 60, seed=1)


def test_workload_is_the_same_everywhere() -> None:
    assert digest("mix", 40)[:16] == "c24e39b50b9f1636"


def test_workload_begins_alike_for_any_number_of_requests() -> None:
    few, many = list(workload.prompts("mix", 10)), workload.prompts("mix", 1000)
    assert [p.tolist() for p in few] == [p.tolist() for p in islice(many, 10)]
    assert len(list(workload.prompts("chat", 0))) == 0


def test_workload_comes_back_to_prefixes() -> None:
    for kind, common in (("chat", 300), ("agents", 1500), ("documents", 2000)):
        heads = [tuple(p[:common]) for p in workload.prompts(kind, 300)]
        assert len(set(heads)) < 150
    lengths = [len(p) for p in workload.prompts("mix", 300)]
    assert min(lengths) > 300
    assert max(lengths) > 10_000


@pytest.mark.parametrize("arguments", [("songs", 1, 0), ("mix", -1, 0), ("mix", 1, -1)])
def test_workload_refuses(arguments: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError, match=r"unknown|0 or more"):
        workload.prompts(*arguments)

"""Traces and the built-in workload: their requests, and the errors for a damaged trace."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import json
import lzma
import sys
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
    assert traces.read_trace(path) == [(5, 700, 3, (4, 9), 512), (5, 0, 3, (), 512)]
    assert traces.read_trace(str(path), limit=1) == [(5, 700, 3, (4, 9), 512)]


def test_read_is_lenient_about_what_does_not_matter(tmp_path: Path) -> None:
    crlf = tmp_path / "crlf.jsonl"
    crlf.write_bytes(b"\xef\xbb\xbf" + line() + b"\r\n" + line(timestamp=6.5))  # byte order mark, no last newline
    assert [request.timestamp for request in traces.read_trace(crlf)] == [5, 6.5]


def zstd(content: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd").compress(content)
    return pytest.importorskip("zstandard").compress(content)


PACKERS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd}


@pytest.mark.parametrize("kind", PACKERS)
def test_packed(tmp_path: Path, kind: str) -> None:
    path, pack = tmp_path / "packed", PACKERS[kind]
    path.write_bytes(pack(line() + b"\n" + line() + b"\n"))
    assert len(traces.read_trace(path)) == 2
    path.write_bytes(path.read_bytes() + pack(line() + b"\n"))  # as `cat` of two files makes
    assert len(traces.read_trace(path)) == 3


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_and_damaged(tmp_path: Path, kind: str) -> None:
    whole = PACKERS[kind](b"\n".join(line(timestamp=at * at) for at in range(500)) + b"\n")
    path = tmp_path / "t"
    middle = len(whole) // 2
    for contents in (whole[:-9], whole[:middle]):
        path.write_bytes(contents)
        with pytest.raises(traces.TraceError, match=rf"t:\d+: the {kind} data is damaged or cut short"):
            traces.read_trace(path)
    path.write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
    with pytest.raises(traces.TraceError, match=r"t:\d+: "):
        traces.read_trace(path)


def test_zstd_without_a_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.version_info >= (3, 14):
        pytest.skip("this Python reads zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "t.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(traces.TraceError, match=r"t\.zst:1: a file packed with zstd needs .* pip install zstandard"):
        traces.read_trace(path)


def blocks(size: int, lengths: list[int]) -> list[bytes]:
    return [line(input_length=length, hash_ids=list(range(-(-length // size)))) for length in lengths]


@pytest.mark.parametrize("size", [16, 17, 100, 512, 1024])
def test_the_block_size_is_found(tmp_path: Path, size: int) -> None:
    lengths = [size * blocks + rest for blocks in (1, 40, 1200) for rest in (0, 1, size - 1)]
    requests = traces.read_trace(write(tmp_path / "t", *blocks(size, lengths)))
    assert {request.block_size for request in requests} == {size}
    assert [len(traces.expand(request)) for request in requests[:6]] == lengths[:6]
    assert traces.expand(requests[0]).tolist() == np.random.default_rng(0).integers(0, 128000, size).tolist()


def test_a_power_of_two_is_believed_if_many_requests_agree(tmp_path: Path) -> None:
    few = write(tmp_path / "few", *blocks(256, [700]))
    with pytest.raises(traces.TraceError, match=r"few:1: too many hash_ids: 3 .* 512 .*--block-size"):
        traces.read_trace(few)
    assert traces.read_trace(few, block_size=256)[0].block_size == 256
    many = write(tmp_path / "many", *blocks(256, [700] * 20))
    assert traces.read_trace(many)[0].block_size == 256
    with pytest.raises(traces.TraceError, match=r"many:1: too few hash_ids: 3 .* at 128 tokens a block it takes 6"):
        traces.read_trace(many, block_size=128)


def test_a_trace_without_timestamps(tmp_path: Path) -> None:
    path = write(tmp_path / "t", *[without("timestamp")] * 3)
    assert [request.timestamp for request in traces.read_trace(path)] == [None] * 3
    path = write(tmp_path / "some", without("timestamp"), line())
    with pytest.raises(traces.TraceError, match=r'some:2: the field "timestamp" is missing on earlier lines'):
        traces.read_trace(path)


def test_a_json_array_is_named(tmp_path: Path) -> None:
    for content in (b"[" + line() + b"]", b"\n [\n" + line() + b"\n]", b"\xef\xbb\xbf[]"):
        path = write(tmp_path / "t", content)
        with pytest.raises(traces.TraceError, match=r"t:\d: a JSON array; a trace has one JSON object a line"):
            traces.read_trace(path)


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
    "timestamp negative": (line(timestamp=-1), "timestamp is -1; it must be from 0 to 2**53"),
    "timestamp of 401 digits": (line(timestamp=10**400), "timestamp is 10000000000000000000... (401 digits); it must"),
    "length of 401 digits": (line(input_length=10**400), "input_length is 10000000000000000000... (401 digits); it"),
    "id of 401 digits": (line(hash_ids=[4, -(10**400)]), "hash_ids[1] is negative: -1000000000000000000... ("),
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


def test_a_block_is_made_as_far_as_its_prompt_goes() -> None:
    """A block size far above all prompts takes no memory, and changes no prompt."""
    short, long = (traces.Request(0.0, count, 1, (7,), size) for count, size in ((5, 10**12), (700, 10**12)))
    whole = traces.expand(traces.Request(0.0, 1024, 1, (7,), 1024))
    assert traces.expand(short).tolist() == whole[:5].tolist()
    assert traces.expand(long).tolist() == whole[:700].tolist()

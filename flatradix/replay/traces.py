"""Request traces in Mooncake's format: reading, checking, and expanding to tokens.

One JSON object a line: `timestamp` (ms; may be missing from all lines), `input_length` and `output_length` (tokens),
`hash_ids` (one for each block of prompt tokens; `input_length` may cut the last block). Blocks have 512 tokens, or as
many as all lines agree on. Such traces hold no tokens. Block h stands for
`numpy.random.default_rng(h).integers(0, 128000, 512)`, so every reader gets the same tokens.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from flatradix.replay.blocks import BLOCK_TOKENS, BlockSizes
from flatradix.replay.blocks import check as check_blocks
from flatradix.replay.unpack import Unpacked, UnpackError

VOCABULARY = 128_000
_LARGEST = 2**53  # of a time or a length: a float holds it exactly
# 32 MiB with 512 tokens each. On the conversation trace (289k blocks, 183k different), 86 % of the possible reuse.
CACHED_BLOCKS = 16_384

STANDARD_INPUT = "-"
_TYPE_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number with a fraction",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


class TraceError(ValueError):
    """A trace that cannot be read. The message is "FILE:LINE: reason", or "FILE: reason" if no line could be read."""

    def __init__(self, file: str | Path, line: int | None, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}" if line else f"{file}: {reason}")
        self.file = str(file)
        self.line = line
        self.reason = reason

    def __reduce__(self) -> tuple[type[TraceError], tuple[str, int | None, str]]:
        return type(self), (self.file, self.line, self.reason)


class Request(NamedTuple):
    """One line of a trace: a prompt of `input_length` tokens, given by its blocks of `block_size` tokens.

    timestamp: in ms, None in a trace without.
    """

    timestamp: float | None
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]
    block_size: int = BLOCK_TOKENS


def read_trace(path: str | Path, limit: int | None = None, block_size: int | None = None) -> list[Request]:
    """Read and check the requests of a trace, or only its first `limit` requests.

    path: "-" is standard input. A file packed with gzip, bzip2, xz or zstd is recognised by its contents. Blank lines
    are skipped. block_size: None finds it: 512 if all requests fit it, else the size that they tell. Raises TraceError.
    """
    requests: list[Request] = []
    numbers: list[int] = []
    sizes = BlockSizes()
    for number, line in _lines(path):
        if limit is not None and len(requests) >= limit:
            break
        if line.strip():
            try:
                request = _parse(line, array=not requests)
                _check_like(requests, request)
                if block_size is not None:
                    check_blocks(request.input_length, len(request.hash_ids), block_size)
            except ValueError as error:
                raise TraceError(path, number, str(error)) from None
            sizes.add(request.input_length, len(request.hash_ids))
            requests.append(request)
            numbers.append(number)
    if not requests and limit != 0:
        raise TraceError(path, 1, "no request in the file; one JSON object a line is expected")
    size = block_size or sizes.found()
    if size is None:
        _refuse_blocks(path, requests, numbers)
    return requests if size == BLOCK_TOKENS else [request._replace(block_size=size) for request in requests]


def _check_like(requests: list[Request], request: Request) -> None:
    """Raise ValueError unless a request has a timestamp if the requests before it have one, or none if they have."""
    if requests and (requests[0].timestamp is None) != (request.timestamp is None):
        odd = "is missing, but earlier lines have it" if request.timestamp is None else "is missing on earlier lines"
        raise ValueError(f'the field "timestamp" {odd}')


def _refuse_blocks(path: str | Path, requests: list[Request], numbers: list[int]) -> NoReturn:
    """Raise TraceError for the first request that has another number of ids than blocks of 512 tokens."""
    for request, number in zip(requests, numbers, strict=True):
        try:
            check_blocks(request.input_length, len(request.hash_ids), BLOCK_TOKENS)
        except ValueError as error:
            raise TraceError(path, number, str(error)) from None
    raise AssertionError("every request fits blocks of 512 tokens")


def expand(request: Request) -> np.ndarray:
    """Return the prompt of a request, int32 [input_length], in its own memory."""
    if not request.hash_ids:
        return np.empty(0, np.int32)
    size = min(request.block_size, request.input_length)  # a block of 1e9 tokens may hold a prompt of ten
    return np.concatenate([_block(h, size) for h in request.hash_ids])[: request.input_length]


def prompts(requests: Iterable[Request]) -> Iterator[np.ndarray]:
    """Return an iterator over the prompts of requests: int32 [input_length] each, made one at a time."""
    return map(expand, requests)


@lru_cache(maxsize=CACHED_BLOCKS)
def _block(hash_id: int, size: int) -> np.ndarray:
    return np.random.default_rng(hash_id).integers(0, VOCABULARY, size).astype(np.int32)


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, from 1, unpacked."""
    number = 0
    try:
        with _opened(path) as raw:
            for line in Unpacked(raw):
                number += 1
                yield number, line
    except FileNotFoundError:
        raise TraceError(path, None, "no such file") from None
    except IsADirectoryError:
        raise TraceError(path, None, "a directory, not a trace file") from None
    except UnpackError as error:
        raise TraceError(path, number + 1, str(error)) from None
    except OSError as error:
        raise TraceError(path, number + 1 if number else None, error.strerror or str(error)) from None


def _opened(path: str | Path) -> AbstractContextManager[io.BufferedReader]:
    if str(path) != STANDARD_INPUT:
        return open(path, "rb")
    found: Any = sys.stdin.buffer
    return nullcontext(found if isinstance(found, io.BufferedReader) else io.BufferedReader(found))


def _parse(line: bytes, array: bool) -> Request:
    """Parse one request. Raises ValueError with the reason. array: whether to look for a file that is a JSON array."""
    if array and line.lstrip(b" \t\xef\xbb\xbf").startswith(b"["):
        raise ValueError("a JSON array; a trace has one JSON object a line: jq -c '.[]' FILE makes such lines")
    record = _load(line)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is expected, not {_describe(record)}")
    for field in ("input_length", "output_length", "hash_ids"):
        if field not in record:
            raise ValueError(f'the field "{field}" is missing')
    return Request(
        _number("timestamp", record["timestamp"]) if "timestamp" in record else None,
        _length("input_length", record["input_length"]),
        _length("output_length", record["output_length"]),
        _ids(record["hash_ids"]),
    )


def _load(line: bytes) -> Any:
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte 0x{line[error.start]:02x} in column {error.start + 1}") from None
    text = text.rstrip()
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        if error.pos >= len(text) or error.msg.startswith("Unterminated string"):
            raise ValueError(f"the JSON is cut short: the line ends in column {len(text)}") from None
        raise ValueError(f"not JSON: {error.msg} in column {error.colno}") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply for a request") from None
    except ValueError as error:
        raise ValueError(f"not JSON that can be read: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _describe(value: Any) -> str:
    shown = json.dumps(value)
    return f"{_TYPE_NAMES[type(value)]} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def _number(field: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{field} must be a number, not {_describe(value)}")
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"{field} is {_short(value)}; it must be from 0 to 2**53")
    return float(value) if type(value) is float else int(value)


def _count(field: str, value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{field} must be an integer, not {_describe(value)}")
    if value < 0:
        raise ValueError(f"{field} is negative: {_short(value)}")
    return value


def _length(field: str, value: Any) -> int:
    if _count(field, value) > _LARGEST:
        raise ValueError(f"{field} is {_short(value)}; it must be at most 2**53")
    return int(value)


def _short(value: float) -> str:
    """Return the digits of a number that a line may hold: of an integer of hundreds of digits, the first."""
    text = str(value)
    return text if len(text) < 40 else f"{text[:20]}... ({len(text)} digits)"


def _ids(values: Any) -> tuple[int, ...]:
    if type(values) is not list:
        raise ValueError(f"hash_ids must be a list of integers, not {_describe(values)}")
    for position, value in enumerate(values):
        _count(f"hash_ids[{position}]", value)
    return tuple(values)

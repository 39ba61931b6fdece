"""Request traces in Mooncake's format: reading, checking, and expanding to tokens.

One JSON object a line: `timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids` (one for each block of
512 prompt tokens; `input_length` may cut the last block). Such traces hold no tokens. Block h stands for
`numpy.random.default_rng(h).integers(0, 128000, 512)`, so every reader gets the same tokens.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

BLOCK_TOKENS = 512
VOCABULARY = 128_000
# 32 MiB of blocks. On the conversation trace (289k blocks, 183k different) this gives 86 % of the possible reuse.
CACHED_BLOCKS = 16_384

_GZIP_MAGIC = b"\x1f\x8b"
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
    """One line of a trace: a prompt of `input_length` tokens, given by its blocks."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(path: str | Path, limit: int | None = None) -> list[Request]:
    """Read and check the requests of a trace, or only its first `limit` requests.

    A file compressed with gzip is recognised by its contents. Blank lines are skipped. Raises TraceError.
    """
    requests: list[Request] = []
    for number, line in _lines(path):
        if limit is not None and len(requests) >= limit:
            break
        if line.strip():
            try:
                requests.append(_parse(line))
            except ValueError as error:
                raise TraceError(path, number, str(error)) from None
    if not requests and limit != 0:
        raise TraceError(path, 1, "no request in the file; one JSON object a line is expected")
    return requests


def expand(request: Request) -> np.ndarray:
    """Return the prompt of a request, int32 [input_length], in its own memory."""
    if not request.hash_ids:
        return np.empty(0, np.int32)
    return np.concatenate([_block(h) for h in request.hash_ids])[: request.input_length]


def prompts(requests: Iterable[Request]) -> Iterator[np.ndarray]:
    """Return an iterator over the prompts of requests: int32 [input_length] each, made one at a time."""
    return map(expand, requests)


@lru_cache(maxsize=CACHED_BLOCKS)
def _block(hash_id: int) -> np.ndarray:
    return np.random.default_rng(hash_id).integers(0, VOCABULARY, BLOCK_TOKENS).astype(np.int32)


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, from 1. gzip files are unpacked."""
    number = 0
    try:
        with open(path, "rb") as raw, _unpacked(raw) as file:
            for line in file:
                number += 1
                yield number, line
    except FileNotFoundError:
        raise TraceError(path, None, "no such file") from None
    except IsADirectoryError:
        raise TraceError(path, None, "a directory, not a trace file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(path, number + 1, f"the gzip data is damaged or cut short ({error})") from None
    except OSError as error:
        raise TraceError(path, number + 1 if number else None, error.strerror or str(error)) from None


def _unpacked(raw: io.BufferedReader) -> BinaryIO:
    if raw.peek(2)[:2] == _GZIP_MAGIC:
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    return raw


def _parse(line: bytes) -> Request:
    """Parse one request. Raises ValueError with the reason."""
    record = _load(line)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is expected, not {_describe(record)}")
    for field in Request._fields:
        if field not in record:
            raise ValueError(f'the field "{field}" is missing')
    request = Request(
        _number("timestamp", record["timestamp"]),
        _count("input_length", record["input_length"]),
        _count("output_length", record["output_length"]),
        _ids(record["hash_ids"]),
    )
    blocks = -(-request.input_length // BLOCK_TOKENS)
    if len(request.hash_ids) != blocks:
        much = "few" if len(request.hash_ids) < blocks else "many"
        raise ValueError(
            f"too {much} hash_ids: {len(request.hash_ids)} for an input_length of {request.input_length}; "
            f"at {BLOCK_TOKENS} tokens a block it takes {blocks}"
        )
    return request


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
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{field} is {value}; it must be 0 or more")
    return float(value) if type(value) is float else int(value)


def _count(field: str, value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{field} must be an integer, not {_describe(value)}")
    if value < 0:
        raise ValueError(f"{field} is negative: {value}")
    return value


def _ids(values: Any) -> tuple[int, ...]:
    if type(values) is not list:
        raise ValueError(f"hash_ids must be a list of integers, not {_describe(values)}")
    for position, value in enumerate(values):
        _count(f"hash_ids[{position}]", value)
    return tuple(values)

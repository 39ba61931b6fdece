"""Saving a tree to a file and loading it. The file holds the rows and pool units in use; the rest is rebuilt.

A file may come from a stranger. It holds numbers and names, no code; every byte is under its checksum, which a stranger
can compute too; so `verify` checks every array before it becomes part of a tree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from flatradix.inputs.namespaces import Namespace, key_of
from flatradix.inputs.options import Options, read_options
from flatradix.inputs.policy import NAMES, Policy, Score, Slru, slru
from flatradix.inspect.array_file import NotArrays, read_arrays, read_head, write_arrays
from flatradix.inspect.content import Content, Saved, dense_codes, saved_of, tokens_for
from flatradix.inspect.replace import replacing
from flatradix.inspect.verify import COLUMNS_32, COLUMNS_64, OTHERS, Arrays, expected, saved_from
from flatradix.layout.growth import most_tokens as most_tokens_of
from flatradix.layout.handles import GENERATION_MASK
from flatradix.layout.state import pool_units

KIND = "flatradix tree "
VERSION = 4
TORCH_FILE = b"PK"  # how the files of the formats up to 3 begin
_BYTES, _STR, _INT = 0, 1, 2  # the kinds of names
File = str | os.PathLike[str] | IO[bytes]


class Settings(NamedTuple):
    """What a file says beside its arrays: the arguments of the tree, and two of its numbers.

    policy: its name, the threshold of an `Slru`, or None for a function.
    """

    max_tokens: int | None
    page_size: int
    policy: str | int | None
    bigram: bool
    slot_dtype: str
    evict_by: str
    generation: int
    clock: int


@contextmanager
def writing(path: File, content: Content) -> Iterator[None]:
    """Write a tree to a file, then run the body; if that raises, a file at a path stays as it was.

    The pools of the tree must just have been compacted.
    """
    options, saved = content.options, saved_of(content)
    generation, clock = saved["numbers"][:2]
    settings = Settings(
        None if options.grows else options.max_tokens, options.page_size, _written_policy(options.policy),
        options.bigram, str(options.slot_dtype), options.evict_by, generation, clock,
    )  # fmt: skip
    arrays = {name: saved[name].numpy() for name in (*COLUMNS_64, *COLUMNS_32, *OTHERS)}
    arrays["parent"] = dense_codes(arrays["parent"], [code for code, _ in content.names])
    arrays |= _written_names([name for _, name in content.names[1:]])
    with replacing(path) if isinstance(path, str | os.PathLike) else nullcontext(path) as file:
        write_arrays(file, f"{KIND}{VERSION}", json.dumps(settings._asdict()), arrays)
        yield


def _written_policy(policy: Policy) -> str | int | None:
    if isinstance(policy, Slru):
        return policy.protected_threshold
    return policy if isinstance(policy, str) else None


def _written_names(names: list[Namespace]) -> Arrays:
    """Return names other than None as arrays: the kind of each, where it ends among all bytes, and all bytes."""
    kinds = [_INT if isinstance(name, int) else _STR if isinstance(name, str) else _BYTES for name in names]
    data = [_name_bytes(name) for name in names]
    return {
        "name_kinds": np.array(kinds, np.uint8),
        "name_ends": np.cumsum([len(name) for name in data], dtype=np.int64),
        "name_bytes": np.frombuffer(b"".join(data), np.uint8),
    }


def _name_bytes(name: Namespace) -> bytes:
    if isinstance(name, int):
        return name.to_bytes(8, "little", signed=True)
    return name.encode("utf-8", "surrogatepass") if isinstance(name, str) else name or b""


def _read_names(a: Arrays) -> list[Namespace]:
    kinds, ends, data = a.pop("name_kinds"), a.pop("name_ends"), a.pop("name_bytes").tobytes()
    begins = np.concatenate([np.zeros(1, np.int64), ends])
    if len(kinds) != len(ends) or (np.diff(begins) < 0).any() or begins[-1] != len(data) or (kinds > _INT).any():
        raise ValueError("the names of its namespaces do not fit together")
    names: list[Namespace] = [None]
    for kind, begin, end in zip(kinds.tolist(), begins.tolist(), ends.tolist(), strict=False):
        names.append(_name_of(kind, data[begin:end]))
    if len({key_of(name) for name in names}) != len(names):
        raise ValueError("two of its namespaces have one name")
    return names


def _name_of(kind: int, data: bytes) -> Namespace:
    if kind == _INT:
        if len(data) != 8:
            raise ValueError("an integer among the names of its namespaces does not have 8 bytes")
        return int.from_bytes(data, "little", signed=True)
    return data.decode("utf-8", "surrogatepass") if kind == _STR else data


def read(path: File, policy: Score | None, most_tokens: int | None) -> tuple[dict[str, Any], Saved]:
    """Return the keyword arguments of the tree in a file, and the saved tree. Raises ValueError for a bad file.

    most_tokens: see `RadixTree.load`.
    """
    is_path = isinstance(path, str | os.PathLike)
    with open(path, "rb") if isinstance(path, str | os.PathLike) else nullcontext(path) as file:
        head = _read_head(path, file)
        with _damaged(path):
            text, arrays = read_arrays(file, head, whole=is_path)
            settings = _read_settings(text)
    found = _read_policy(path, settings.policy, policy)
    with _damaged(path):
        options = _options_of(settings, found)
        _verify_dtypes(arrays, options)
        names = _read_names(arrays)
        tokens = _tokens_of(arrays, names, options)
    _verify_memory(path, tokens, options, most_tokens)
    with _damaged(path):
        saved = saved_from(arrays, names, options, settings.clock, settings.generation)
    return {
        "max_tokens": settings.max_tokens,
        "page_size": options.page_size,
        "policy": found,
        "bigram": options.bigram,
        "slot_dtype": options.slot_dtype,
        "evict_by": options.evict_by,
    }, saved


@contextmanager
def _damaged(path: File) -> Iterator[None]:
    """Name the file in a ValueError of the body."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _read_head(path: File, file: IO[bytes]) -> bytes:
    try:
        head, form = read_head(file, KIND)
    except NotArrays as error:
        if error.head.startswith(TORCH_FILE):
            raise ValueError(
                f"{path} is no tree that this version of flatradix saved. If an older version did, and the file is "
                "your own, convert it: python3 -m flatradix.inspect.convert OLD NEW"
            ) from None
        raise ValueError(f"{path} is no tree that flatradix saved, or is damaged at its beginning") from None
    if form != f"{KIND}{VERSION}":
        raise ValueError(f"{path} has the format {form!r}, and this version of flatradix reads '{KIND}{VERSION}'")
    return head


def _read_settings(text: str) -> Settings:
    try:
        settings = Settings(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"its settings cannot be read ({error!r})") from None
    kinds = {
        "max_tokens": (int, type(None)), "page_size": (int,), "policy": (str, int, type(None)), "bigram": (bool,),
        "slot_dtype": (str,), "evict_by": (str,), "generation": (int,), "clock": (int,),
    }  # fmt: skip
    for name, value in settings._asdict().items():
        if type(value) not in kinds[name]:
            raise ValueError(f"its {name} is {value!r}")
    if not 0 <= settings.generation <= GENERATION_MASK:
        raise ValueError(f"its generation is {settings.generation}")
    return settings


def _options_of(settings: Settings, policy: Policy) -> Options:
    """Return the options of the tree, without a slot device. Raises ValueError for an option out of range."""
    dtypes = {str(dtype): dtype for dtype in (torch.int32, torch.int64)}
    if settings.slot_dtype not in dtypes:
        raise ValueError(f"its slot_dtype is {settings.slot_dtype!r}")
    return read_options(
        settings.max_tokens, settings.page_size, policy, None, settings.bigram, dtypes[settings.slot_dtype], True,
        settings.evict_by, None,
    )  # fmt: skip


def _verify_dtypes(arrays: Arrays, options: Options) -> None:
    found = {name: array.dtype for name, array in arrays.items()}
    if found != expected(options):
        raise ValueError(f"its arrays are {sorted(arrays)}, or have other dtypes than those of a tree")


def _tokens_of(arrays: Arrays, names: list[Namespace], options: Options) -> int:
    """Return the tokens for which the loaded tree takes memory."""
    if not options.grows:
        return options.max_tokens
    needed = tokens_for(arrays | {"namespace_children": names}, options.page_size)
    if needed > most_tokens_of(options.page_size):
        raise ValueError(f"it needs space for {needed} tokens")
    return max(needed, options.max_tokens)


def _verify_memory(path: File, tokens: int, options: Options, most_tokens: int | None) -> None:
    """Refuse a tree of more than `most_tokens` tokens. None: as many as this machine has memory for their pools."""
    if most_tokens is not None and tokens > most_tokens:
        raise ValueError(f"{path} holds a tree for {tokens} tokens, and most_tokens is {most_tokens}")
    size = pool_units(tokens, options.page_size) * (4 * (1 + options.bigram) + options.slot_dtype.itemsize)
    size += options.page_size * 8 * (1 + options.bigram)  # the multipliers of the page hash
    if most_tokens is None and size > (memory := _machine_memory()):
        raise ValueError(
            f"{path} holds a tree for {tokens} tokens: its pools take {size} bytes, and this machine has {memory}; "
            "give most_tokens to load it nevertheless"
        )


def _machine_memory() -> float:
    """Return the bytes of memory of this machine, or infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _read_policy(path: File, written: str | int | None, given: Score | None) -> Policy:
    if written is None and given is None:
        raise ValueError(f"{path} was saved with a policy function; give it again: load(path, policy=...)")
    if written is not None and given is not None:
        policy = f"slru(protected_threshold={written})" if isinstance(written, int) else written
        raise ValueError(f"{path} was saved with the policy {policy!r}; load it without one")
    if written is None:
        return given  # type: ignore[return-value]
    if isinstance(written, str) and written not in NAMES:
        raise ValueError(f"{path} is damaged: its policy is {written!r}")
    with _damaged(path):
        return slru(written) if isinstance(written, int) else written

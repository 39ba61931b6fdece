"""Saving a tree to a file and loading it. The file holds the rows and pool units in use; the rest is rebuilt."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch

from flatradix.errors import DeviceUnavailableError
from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.policy import Policy, Score, Slru
from flatradix.inspect.content import Content, Saved, saved_of

FORMAT = "flatradix tree 3"
File = str | os.PathLike[str] | IO[bytes]


def write(path: File, content: Content) -> None:
    """Write a tree to a file. Its pools must just have been compacted."""
    saved = saved_of(content)
    options = content.options
    file = saved | {
        "format": FORMAT,
        "settings": {
            "max_tokens": None if options.grows else options.max_tokens,
            "page_size": options.page_size,
            "policy": _written_policy(options.policy),
            "bigram": options.bigram,
            "slot_dtype": str(options.slot_dtype),
            "evict_by": options.evict_by,
        },
        "names": [(code, *_written_name(name)) for code, name in content.names],
    }
    if not isinstance(path, str | os.PathLike):
        torch.save(file, path)
        return
    # Write a second file first: if the process dies here, the old file is intact.
    aside = f"{os.fspath(path)}.part"
    torch.save(file, aside)
    os.replace(aside, path)


def _written_policy(policy: Policy) -> str | int | None:
    """Return the name of a policy, the threshold of an `Slru`, or None for a function."""
    if isinstance(policy, Slru):
        return policy.protected_threshold
    return policy if isinstance(policy, str) else None


def _written_name(name: Namespace) -> tuple[str, str]:
    """Return (kind, hex digits) of a name: plain text, which every reader of the file can load."""
    if name is None:
        return "none", ""
    if isinstance(name, str):
        return "str", name.encode("utf-8", "surrogatepass").hex()
    if isinstance(name, int):
        return "int", str(name).encode().hex()
    return "bytes", name.hex()


def _read_name(kind: str, digits: str) -> Namespace:
    data = bytes.fromhex(digits)
    if kind == "int":
        return int(data)
    return {"none": None, "str": data.decode("utf-8", "surrogatepass") if kind == "str" else "", "bytes": data}[kind]


def _read_file(path: File) -> dict[str, Any]:
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no tree that flatradix saved, or is damaged: {error}") from None
    if not isinstance(file, dict) or file.get("format") != FORMAT:
        raise ValueError(f"{path} is no tree that this version of flatradix saved (format {FORMAT!r} is wanted)")
    return file


def _read_policy(path: File, written: str | int | None, given: Score | None) -> Policy:
    if written is None and given is None:
        raise ValueError(f"{path} was saved with a policy function; give it again: load(path, policy=...)")
    if written is not None and given is not None:
        policy = f"slru(protected_threshold={written})" if isinstance(written, int) else written
        raise ValueError(f"{path} was saved with the policy {policy!r}; load it without one")
    if isinstance(written, int):
        return Slru(written)
    return written or given  # type: ignore[return-value]


def read(path: File, policy: Score | None) -> tuple[dict[str, Any], Saved]:
    """Return the keyword arguments of the tree in a file, and the saved tree. Raises ValueError for a bad file."""
    file = _read_file(path)
    with damaged(path):
        settings = dict(file["settings"])
        settings["policy"] = _read_policy(path, settings["policy"], policy)
        settings["slot_dtype"] = torch.int64 if settings["slot_dtype"] == "torch.int64" else torch.int32
        file["names"] = [(code, _read_name(kind, digits)) for code, kind, digits in file["names"]]
    return settings, file


@contextmanager
def damaged(path: File) -> Iterator[None]:
    """Raise ValueError for an error in the body, which uses the content of a file: the file is then damaged."""
    try:
        yield
    except (DeviceUnavailableError, torch.OutOfMemoryError):
        raise
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None

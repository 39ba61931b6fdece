"""Saving a tree to a file and loading it: the rows and pools in use; what can be derived is made anew."""

from __future__ import annotations

import os
import pickle
from typing import IO, TYPE_CHECKING, Any

import torch

from flatradix import meta
from flatradix.errors import DeviceUnavailableError
from flatradix.layout import COLUMNS
from flatradix.namespaces import Namespace
from flatradix.policy import Policy

if TYPE_CHECKING:
    from flatradix.tree import RadixTree

FORMAT = "flatradix tree 2"
# `queued` belongs to the eviction queue, which a tree on a GPU has not.
KEPT_COLUMNS = tuple(name for name in COLUMNS if name != "queued")
File = str | os.PathLike[str] | IO[bytes]
_KEPT_META = (meta.GENERATION, meta.CLOCK, meta.EVICTABLE, meta.PROTECTED, meta.NODES, meta.ROWS, meta.FREE_ROWS)


def save(tree: RadixTree, path: File) -> None:
    content = content_of(tree)
    if not isinstance(path, str | os.PathLike):
        torch.save(content, path)
        return
    # Written aside first: a process that dies here leaves the old file as it was.
    aside = f"{os.fspath(path)}.part"
    torch.save(content, aside)
    os.replace(aside, path)


def content_of(tree: RadixTree) -> dict[str, Any]:
    """All of a tree but its policy function, in host memory; the pools are compacted first."""
    tree.raise_pending()
    tree._compact()
    state = tree._state
    numbers = state.meta.cpu()
    rows, free = int(numbers[meta.ROWS]), int(numbers[meta.FREE_ROWS])
    units = tree.total_tokens
    first = tree._first_unit()
    content: dict[str, Any] = {name: getattr(state, name)[:rows].cpu().clone() for name in KEPT_COLUMNS}
    content["start"] -= first
    names = tree._namespaces.items()
    return content | {
        "format": FORMAT,
        "settings": {
            "max_tokens": tree.max_tokens,
            "page_size": tree.page_size,
            "policy": tree.policy if isinstance(tree.policy, str) else None,
            "bigram": tree.bigram,
            "slot_dtype": str(tree.slot_dtype),
        },
        "meta": [int(numbers[place]) for place in _KEPT_META],
        "namespaces": [(code, *_written(name)) for code, name in names],
        "namespace_children": state.namespace_children[: 1 + max(code for code, _ in names)].cpu().clone(),
        "free_rows": state.free_rows[:free].cpu().clone(),
        "multipliers": state.multipliers.cpu(),
        "tokens": state.tokens[first : first + units].cpu().clone(),
        "seconds": state.seconds[first : first + units].cpu().clone(),
        "slots": tree._pool[first : first + units].cpu().clone(),
    }


def copy_to(tree: RadixTree, device: torch.device) -> RadixTree:
    """The tree on another device."""
    return _restore(content_of(tree), device, tree.slot_device, tree.policy)


def _written(name: Namespace) -> tuple[str, str]:
    """A name as plain text, which any reader of the file takes."""
    if name is None:
        return "none", ""
    if isinstance(name, str):
        return "str", name.encode("utf-8", "surrogatepass").hex()
    return "bytes", name.hex()


def _name(kind: str, digits: str) -> Namespace:
    data = bytes.fromhex(digits)
    return {"none": None, "str": data.decode("utf-8", "surrogatepass") if kind == "str" else "", "bytes": data}[kind]


def _read(path: File) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no tree that flatradix saved, or is damaged: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no tree that this version of flatradix saved (format {FORMAT!r} is wanted)")
    return content


def _policy(path: File, name: str | None, given: Policy | None) -> str | Policy:
    if name is None and given is None:
        raise ValueError(f"{path} was saved with a policy function; give it again: load(path, policy=...)")
    if name is not None and given is not None:
        raise ValueError(f"{path} was saved with the policy {name!r}; load it without one")
    return name or given  # type: ignore[return-value]


def load(
    path: File,
    device: str | torch.device = "auto",
    slot_device: str | torch.device | None = None,
    policy: Policy | None = None,
) -> RadixTree:
    content = _read(path)
    try:
        return _restore(content, device, slot_device, _policy(path, content["settings"]["policy"], policy))
    except (DeviceUnavailableError, torch.OutOfMemoryError):
        raise
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None


def _restore(
    content: dict[str, Any],
    device: str | torch.device,
    slot_device: str | torch.device | None,
    policy: str | Policy,
) -> RadixTree:
    from flatradix.tree import RadixTree

    settings = content["settings"]
    tree = RadixTree(
        settings["max_tokens"],
        settings["page_size"],
        device,
        policy,
        slot_device,
        bigram=settings["bigram"],
        slot_dtype=torch.int64 if settings["slot_dtype"] == "torch.int64" else torch.int32,
    )
    state = tree._state
    for name in (*KEPT_COLUMNS, "free_rows", "namespace_children", "tokens", "seconds", "multipliers"):
        values = content[name]
        getattr(state, name)[: len(values)] = values.to(state.meta.device)
    tree._pool[: len(content["slots"])] = content["slots"].to(tree._pool.device)
    numbers = state.meta.cpu()
    for place, value in zip(_KEPT_META, content["meta"], strict=True):
        numbers[place] = value
    state.meta.copy_(numbers)
    tree._namespaces.restore([(code, _name(kind, digits)) for code, kind, digits in content["namespaces"]])
    tree._rebuild()
    return tree

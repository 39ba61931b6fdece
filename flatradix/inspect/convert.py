"""Convert a snapshot of an older version: python3 -m flatradix.inspect.convert OLD NEW

For your own files only. torch reads OLD, and a file made to harm may end the process or take all memory there. OLD has
no checksum, so a changed token or slot is not seen; the arrays are verified as those of any file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.options import read_options
from flatradix.inputs.policy import Policy, Score, slru
from flatradix.inspect.content import dense_codes
from flatradix.inspect.snapshot import TORCH_FILE
from flatradix.inspect.verify import COLUMNS_32, COLUMNS_64, OTHERS, Arrays, saved_from
from flatradix.tree import RadixTree

FORMAT = "flatradix tree 3"


def load_old(path: str, policy: Score | None = None) -> RadixTree:
    """Return the tree of a file of format 3, on the CPU. policy: as for `RadixTree.load`.

    Raises ValueError for a file of another format, or arrays that are no tree.
    """
    with open(path, "rb") as begin:
        is_old = begin.read(2) == TORCH_FILE
    file = torch.load(path, map_location="cpu", weights_only=True) if is_old else None
    if not isinstance(file, dict) or file.get("format") != FORMAT:
        raise ValueError(f"{path} has not the format {FORMAT!r}")
    settings = dict(file["settings"])
    settings["policy"] = _policy_of(settings["policy"], policy)
    settings["slot_dtype"] = torch.int64 if settings["slot_dtype"] == "torch.int64" else torch.int32
    names = {code: _name_of(kind, bytes.fromhex(digits)) for code, kind, digits in file["names"]}
    codes = sorted(names)
    arrays: Arrays = {name: file[name].numpy() for name in (*COLUMNS_64, *COLUMNS_32, *OTHERS)}
    arrays["parent"] = dense_codes(arrays["parent"], codes)
    generation, clock = file["numbers"][:2]
    options = read_options(slot_device=None, check_slots=True, on_evict=None, **settings)
    saved = saved_from(arrays, [names[code] for code in codes], options, clock, generation)
    tree = RadixTree(device="cpu", **settings)
    tree.index.restore(saved)
    return tree


def _policy_of(written: str | int | None, given: Score | None) -> Policy:
    if written is None:
        if given is None:
            raise ValueError("the tree has a policy function: call load_old(path, policy) and save the tree")
        return given
    return slru(written) if isinstance(written, int) else written


def _name_of(kind: str, data: bytes) -> Namespace:
    return {"none": None, "str": data.decode("utf-8", "surrogatepass") if kind == "str" else "", "bytes": data}[kind]


def main(arguments: Sequence[str] | None = None) -> Any:
    """Convert a file. Return the exit code or message."""
    paths = sys.argv[1:] if arguments is None else arguments
    if len(paths) != 2:
        return __doc__
    try:
        load_old(paths[0]).save(paths[1])
    except ValueError as error:
        return str(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

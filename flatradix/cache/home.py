"""Home: where the pages of a cache are kept, by the device of its index."""

from __future__ import annotations

import torch

from flatradix.cache.columns import Columns
from flatradix.cache.host_pages import HostPages
from flatradix.cache.pages import Pages
from flatradix.host.paged import PagedIndex
from flatradix.inputs import devices
from flatradix.tree import RadixTree


def apart(kv: torch.device) -> bool:
    """Return whether the tables of the KV cache are copies of tables in host memory."""
    return kv.type != "cpu"


def make_pages(tree: RadixTree, slots: int, columns: Columns, kv: torch.device) -> Pages:
    """Return the pages for a cache of so many slots, and complete its columns.

    Raises ValueError for an index and a KV cache on two GPUs.
    """
    index, pages = tree.index, slots // tree.page_size
    if isinstance(index, PagedIndex):
        return HostPages(index, pages, columns, kv, apart(kv))
    if index.device != kv and not devices.interpreted():
        raise ValueError(f"with its index on {index.device} a PrefixCache needs the KV cache there, not on {kv}")
    from flatradix.cache.device_pages import DevicePages  # needs Triton
    from flatradix.device.index import DeviceIndex

    assert isinstance(index, DeviceIndex)
    return DevicePages(index, pages, columns)

"""The KV events that a server publishes, as a router receives them."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import zmq


class BlockStored(msgspec.Struct, tag=True):
    """Blocks that follow one another, as in sglang.srt.disaggregation.kv_events."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """Blocks that are no longer cached."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """Nothing is cached any more."""


class _Batch(msgspec.Struct, array_like=True):
    timestamp: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


class Listener:
    """Receives the KV events of a server on a thread, from before the server starts until `close`."""

    def __init__(self, port: int) -> None:
        self._numbers: list[int] = []
        self._events: list[Any] = []
        self._ends = threading.Event()
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://127.0.0.1:{port}")
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(_Batch)
        while not self._ends.is_set():
            if self._socket.poll(100):
                _, number, payload = self._socket.recv_multipart()
                self._events += decoder.decode(payload).events
                self._numbers.append(int.from_bytes(number, "big"))

    def settled(self, seconds: float = 1.0) -> list[Any]:
        """Return all events, once nothing has come for some time."""
        seen = -1
        while seen != len(self._numbers):
            seen = len(self._numbers)
            time.sleep(seconds)
        return list(self._events)

    @property
    def is_complete(self) -> bool:
        """Whether no batch is missing between the first and the last. A server's first may come before it listens."""
        return bool(self._numbers) and len(self._numbers) == self._numbers[-1] - self._numbers[0] + 1

    def close(self) -> None:
        if not self._ends.is_set():
            self._ends.set()
            self._thread.join()
            self._socket.close()

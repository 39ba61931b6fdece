"""Limits of a worker: a case that takes too long ends the process, and a case has memory for small trees only."""

from __future__ import annotations

import faulthandler
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WAITS = 20  # how often longer than its processor time a case may take, on a machine that does other work too


@contextmanager
def seconds(limit: float) -> Iterator[None]:
    """End the process, with all stacks on stderr, if this block takes more processor time, or waits far longer."""
    faulthandler.register(signal.SIGPROF, chain=True)  # behind it, the default action ends the process
    faulthandler.dump_traceback_later(_WAITS * limit, exit=True)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def memory(more: int) -> Iterator[None]:
    """Let the process take so many bytes of address space in addition, and no more, within this block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

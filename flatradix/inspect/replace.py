"""Replacing a file as a whole: whoever opens it finds the old file or the new one, also after a crash."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

MODE = 0o600  # of a new file, less what the umask takes away: prompts are private


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a new file, which takes the place of the file at `path` when the body ends, and is removed if it raises.

    A symbolic link stays, and the file that it leads to is replaced. The new file has the mode and the owner of the old
    one, as far as this process may give them; without an old file it has `MODE`. It is on disk when this returns. What
    is no regular file, such as a pipe, is written to instead. Several processes may replace one file: the last wins. A
    process that is killed leaves the new file behind, under the name `.NAME.*.part`.
    """
    target = os.path.realpath(path)
    try:
        old = os.stat(target)
    except FileNotFoundError:
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        with open(target, "wb") as there:  # raises for a folder
            yield there
        return
    folder, name = os.path.split(target)
    aside = os.path.join(folder, f".{name[:200]}.{secrets.token_hex(8)}.part")
    try:
        with open(aside, "xb", opener=lambda file, flags: os.open(file, flags, MODE)) as new:
            if old is not None:
                _take_after(new.fileno(), old)
            yield new
            new.flush()
            os.fsync(new.fileno())
        os.replace(aside, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(aside)
        raise
    _sync_folder(folder)


def _take_after(file: int, old: os.stat_result) -> None:
    """Give an open file the owner and the mode of another. A group other than the old one gets no rights."""
    if not hasattr(os, "fchown"):
        return
    mode = stat.S_IMODE(old.st_mode) & 0o777
    try:
        os.fchown(file, -1, old.st_gid)
    except OSError:
        mode &= ~0o070
    with suppress(OSError):  # only root gives files away
        os.fchown(file, old.st_uid, -1)
    os.fchmod(file, mode)


def _sync_folder(folder: str) -> None:
    """Write the entries of a folder to disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with suppress(OSError):  # a folder that cannot be read, or a file system without fsync of folders
        there = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(there)
        finally:
            os.close(there)

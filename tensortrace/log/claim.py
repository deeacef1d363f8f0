"""Whose file a log is: claiming a name for a new one, and the lock that its writer holds."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from pathlib import Path

from tensortrace.errors import UsageError
from tensortrace.log import zstd
from tensortrace.log.codec import decode, is_ours
from tensortrace.log.files import check_platform
from tensortrace.records import Header
from tensortrace.text import escape

_IMPORTED_NS = time.time_ns()


def ranks_of_environment() -> tuple[int, int]:
    """The rank of this process and how many there are, as torchrun and its like say it."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1


def split_name(path: Path) -> tuple[str, str]:
    """Part a name into stem and suffix; ``.jsonl.zst`` is one suffix."""
    inner = Path(path.stem).suffix if path.suffix in (".zst", ".gz") else ""
    suffix = inner + path.suffix if inner == ".jsonl" else path.suffix
    return path.name.removesuffix(suffix), suffix


def claim(path: Path) -> int | None:
    """Open an empty log for appending and lock it; None if the name is taken.

    It is taken by a log that another writer holds, and by one that this process wrote before.
    """
    check_platform()
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not stat.S_ISREG(path.stat().st_mode):  # /dev/null, a pipe
            return os.open(path, os.O_WRONLY | os.O_APPEND)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        keep = False
        try:
            if not _lock(fd):
                return None
            if not _same_file(path, fd):  # another process renamed it before we had the lock
                continue
            start = _beginning(fd, 4096)
            keep = not start
            if keep:
                return fd
            if not is_ours(start):
                raise UsageError(
                    f"{escape(str(path))} is not a tensortrace log, so it is not overwritten: "
                    "move it away or write elsewhere"
                )
            if _is_of_this_process(fd):
                return None
            stem, suffix = split_name(path)
            path.replace(path.with_name(f"{stem}.prev{suffix}"))
        finally:
            if not keep:
                os.close(fd)


def above_standard(fd: int) -> int:
    """Move off the descriptor of a closed standard stream: what others print there is no record."""
    if fd > 2:
        return fd
    import fcntl

    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _beginning(fd: int, nbytes: int) -> bytes:
    """The first bytes of a log; of a compressed one, unpacked, or as they are if that fails."""
    start = os.pread(fd, nbytes, 0)
    if not start.startswith(zstd.MAGIC):
        return start
    try:
        return zstd.decoder().decompress(start) or start
    except ImportError:
        return start
    except zstd.errors():
        return start


def _same_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _lock(fd: int) -> bool:
    """Hold the file as its writer; True also on a file system that has no locks."""
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        return err.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _is_of_this_process(fd: int) -> bool:
    """Tell a log that an earlier trace of this very process wrote; its number may be used again."""
    header = decode(_beginning(fd, 1 << 20).partition(b"\n")[0])
    return (
        isinstance(header, Header)
        and header.pid == os.getpid()
        and header.hostname == socket.gethostname()
        and header.time_ns >= _IMPORTED_NS
    )

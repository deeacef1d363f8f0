"""Reading the bytes of a log by position.

The file belongs to another process, so it is read with `os.pread`, never mapped: a mapped file that
is truncated kills its reader.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tensortrace.errors import UsageError

CHUNK = 1 << 20


def check_platform() -> None:
    """Say before anything is opened that logs need POSIX: reads by position, locks, renames.

    Raises:
        UsageError: on Windows.
    """
    if not hasattr(os, "pread"):
        raise UsageError(
            "tensortrace writes and reads logs on Linux and macOS; on Windows use it inside WSL"
        )


class LogFile:
    """Bytes of a log, read by position; `growing` if they are the file that its writer adds to."""

    def __init__(self, fd: int, path: Path, growing: bool) -> None:
        self.fd = fd
        self.path = path
        self.growing = growing

    # ---- what is different of a file that had to be unpacked

    @property
    def notice(self) -> str | None:
        """What was lost in unpacking, if anything was."""
        return None

    @property
    def followed(self) -> bool:
        """Whether a writer may still add to it."""
        return self.growing

    @property
    def unpacked(self) -> float:
        """The share that is there to be read, 0 to 1."""
        return 1.0

    def look(self) -> None:
        """Fetch what its writer has added since."""

    def renewed(self) -> bool:
        """Whether another file has its name now."""
        return self._renewed(self.fd)

    def _renewed(self, fd: int) -> bool:
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(fd))
        except OSError:
            return False  # moved away: what is open can be read on

    def changed_at(self) -> float:
        """When it was written to last, in seconds since the epoch."""
        return os.fstat(self.fd).st_mtime

    # ---- reading

    def read(self, start: int, length: int) -> bytes:
        """Read up to `length` bytes; fewer at the end of the file, or where it was truncated."""
        parts = []
        while length > 0:
            try:
                part = os.pread(self.fd, length, start)
            except OSError:  # a stale network file reads as a short one
                break
            if not part:
                break
            parts.append(part)
            start += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self) -> int:
        """Bytes in the file now."""
        try:
            return os.fstat(self.fd).st_size
        except OSError:
            return 0

    def complete(self, size: int, start: int = 0) -> int:
        """Where the last complete line before `size` ends: after its newline."""
        while size > start:
            low = max(start, size - CHUNK)
            at = self.read(low, size - low).rfind(b"\n")
            if at >= 0:
                return low + at + 1
            size = low
        return start

    def close(self) -> None:
        """Close the descriptor; closing again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.close()

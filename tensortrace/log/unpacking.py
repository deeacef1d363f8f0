"""Logs that are compressed or come through a pipe, copied to a file without a name.

A thread does it, so that the beginning can be read while the rest is unpacked. What is cut or
damaged is copied as far as it can be had.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from tensortrace.errors import LogError
from tensortrace.log import zstd
from tensortrace.log.files import LogFile
from tensortrace.text import escape

GZIP = b"\x1f\x8b"
READ = 1 << 16
# So little is unpacked at once: it can become 64 MB, of gzip 1,032 times as much, of zstd 32,768.
MORSELS = {"gzip": 1 << 16, "zstd": 1 << 11}
ENOUGH = 1 << 20


class Unpacked(LogFile):
    """A log in a file without a name that a thread still fills.

    Args:
        source: descriptor of what is copied; it is closed in the end.
        path: what the user named.
    """

    def __init__(self, source: int, path: Path) -> None:
        with tempfile.TemporaryFile(prefix="tensortrace-") as spool:
            super().__init__(os.dup(spool.fileno()), path, growing=False)
            self._copy = _Copy(source, os.dup(spool.fileno()), escape(str(path)))
        self._thread: threading.Thread | None = None
        self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._copy.run, daemon=True)
        self._thread.start()

    @property
    def notice(self) -> str | None:
        """What was lost in unpacking, if anything was."""
        return self._copy.lost

    @property
    def followed(self) -> bool:
        """Whether a writer may still add to it: a compressed file, not a pipe."""
        return self._copy.regular and self._copy.kind == "zstd"

    @property
    def unpacked(self) -> float:
        """The share that is unpacked, 0 to 1; of a pipe 0 until it has ended."""
        if not self._working:
            return 1.0
        total = self._copy.total()
        return min(self._copy.consumed / total, 0.999) if total else 0.0

    @property
    def _working(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self) -> None:
        """Wait for the first line.

        Raises:
            LogError: it does not begin like a log.
        """
        self._copy.begun.wait()
        if self._copy.failure is not None:
            raise self._copy.failure

    def wait(self, progress: Callable[[float], object] | None = None) -> None:
        """Wait for all of it; `progress` is told the share that is there.

        Raises:
            LogError: it does not begin like a log.
        """
        while self._thread is not None and self._working:
            self._thread.join(0.1 if progress else None)
            if progress:
                progress(self.unpacked)
        self.begin()

    def look(self) -> None:
        """Go on with what its writer has added since."""
        if self.followed and not self._working and self._copy.total() > self._copy.consumed:
            self._start()

    def renewed(self) -> bool:
        """Whether another file has its name now, or it was cut."""
        if not self.followed:
            return False
        cut = self._copy.total() < self._copy.consumed
        return cut or self._copy.spoilt or self._renewed(self._copy.source)

    def changed_at(self) -> float:
        """When it was written to last, in seconds since the epoch."""
        return os.fstat(self._copy.source).st_mtime

    def close(self) -> None:
        """Stop unpacking and let go."""
        if hasattr(self, "_copy"):
            self._copy.stopped = True
            if not self._working:
                self._copy.close()
        super().close()


class _Copy:
    """What the thread does; it holds no reference to the `Unpacked`, which can so be dropped."""

    def __init__(self, source: int, spool: int, name: str) -> None:
        self.source, self._spool, self._name = source, spool, name
        self.regular = stat.S_ISREG(os.fstat(source).st_mode)
        self.kind: str | None = None
        self.consumed = self._written = self._damaged = 0
        self.lost: str | None = None
        self.failure: LogError | None = None
        self.stopped = False
        # Whether its writer took back what was read already, to write something else there.
        self.spoilt = False
        self._ends = 0
        self.begun = threading.Event()
        self._head = b""  # what is too short yet to tell its kind
        self._decoder: zstd.Decoder | None = None
        self._seeking = False
        self._last = b""

    def total(self) -> int:
        """Bytes of the file as it is now; 0 for a pipe."""
        try:
            return os.fstat(self.source).st_size if self.regular else 0
        except OSError:
            return 0

    def run(self) -> None:
        """Copy to the end, or until it is stopped."""
        try:
            while not self.stopped and (data := os.read(self.source, READ)):
                self.consumed += len(data)
                self._take(data)
            self._settle()
        except LogError as err:
            self.failure = err
        except Exception as err:  # zlib.error, ZstdError, OSError: a full disk, too
            self._give_up(err)
        finally:
            if self.stopped or self.failure is not None:
                self.close()
            self.begun.set()

    def close(self) -> None:
        """Close both descriptors."""
        for fd in (self.source, self._spool):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.source = self._spool = -1

    def _take(self, data: bytes) -> None:
        if self.kind is None:
            self._head += data
            if len(self._head) < len(zstd.MAGIC):
                return
            data, self._head = self._head, b""
            self.kind = self._kind_of(data)
        if self.kind == "plain":
            self._put(data)
            return
        size = MORSELS[self.kind]
        for at in range(0, len(data), size):
            self._unpack(data[at : at + size])

    def _kind_of(self, data: bytes) -> str:
        if data.startswith(GZIP):
            return "gzip"
        if not data.startswith(zstd.MAGIC):
            return "plain"
        if not zstd.available():
            raise LogError(f"{self._name} is compressed with zstd: {zstd.INSTALL} reads it")
        return "zstd"

    def _unpack(self, data: bytes) -> None:
        while data:
            if self._seeking:
                data = self._sought(data)
                continue
            if self._decoder is None:
                data = data.lstrip(b"\0") if self.kind == "gzip" else data  # padding
                if not data:
                    return
                self._decoder = zlib.decompressobj(31) if self.kind == "gzip" else zstd.decoder()
            try:
                self._put(self._decoder.decompress(data))
            except LogError:
                raise
            except Exception:
                if self.kind == "gzip" or not self._written:
                    raise
                self._seeking, self._decoder = True, None
                self.spoilt = bool(self._ends)
                self._put(b"" if self._last == b"\n" else b"\n")  # what is broken off ends here
                data = data[1:]
                self._damaged += 1
                continue
            ended = self._decoder.eof
            data = self._decoder.unused_data if ended else b""
            if ended:
                self._decoder = None

    def _sought(self, data: bytes) -> bytes:
        """Skip damage up to where a frame begins."""
        data, self._head = self._head + data, b""
        at = data.find(zstd.MAGIC)
        if at < 0:
            kept = len(zstd.MAGIC) - 1
            self._head = data[-kept:]
            self._damaged += max(0, len(data) - kept)
            return b""
        self._seeking = False
        self._damaged += at
        return data[at:]

    def _put(self, data: bytes) -> None:
        if not data:
            return
        if not self._written and not data.startswith(b"{"):
            raise LogError(f"{self._name} is not a tensortrace log")
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._spool, rest) :]
        self._written += len(data)
        self._last = data[-1:]
        if b"\n" in data or self._written > ENOUGH:
            self.begun.set()

    def _settle(self) -> None:
        """The end, for now: say what is missing."""
        self._ends += 1
        if self.kind is None and self._head:
            self.kind = "plain"
            self._put(self._head)
        # Of a log that is being written, or whose writer was killed, the last frame is open.
        open_frame = self._decoder is not None and (self.kind == "gzip" or self._last != b"\n")
        if self._damaged:
            self.lost = f"{self._name} is damaged: {self._damaged} bytes cannot be unpacked"
        elif open_frame:
            self._say_cut()
        else:
            self.lost = None

    def _give_up(self, err: Exception) -> None:
        if self._written:
            self._say_cut()
        else:
            reason = getattr(err, "strerror", None) or str(err)
            self.failure = LogError(f"{self._name} cannot be unpacked: {escape(reason)}")

    def _say_cut(self) -> None:
        self.lost = (
            f"{self._name} is cut or damaged: the first {self._written} bytes of it are shown"
        )

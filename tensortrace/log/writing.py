"""Writing a log: lines are buffered here and handed to a raw descriptor in large pieces."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from tensortrace.errors import LogError, UsageError
from tensortrace.log.claim import above_standard, claim, ranks_of_environment, split_name
from tensortrace.log.codec import encode
from tensortrace.records import Record
from tensortrace.signal_handlers import is_of_handler
from tensortrace.text import escape

BUFFER = 1 << 18
_LOGS = 10_000


class Sink(Protocol):
    """Where records go. Every method raises only `LogError`; after one, the sink is dead.

    `nbytes` counts what was written so far, buffered bytes included (0 for a callable).
    """

    nbytes: int

    def write(self, record: Record) -> None:
        """Take one record, in log order."""

    @property
    def write_raw(self) -> Callable[[bytes], None] | None:
        """Take whole lines that `encode` made earlier; None where records do not end as lines."""

    def flush(self) -> None:
        """Hand everything taken so far to the system."""

    def close(self) -> None:
        """Flush and let go; closing again does nothing."""


class _Buffered:
    """Buffer lines and hand them on in large pieces; inert in a forked child.

    The buffer is ours because a child that inherits a Python file flushes it a second time.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.nbytes = 0
        self._buffer = bytearray()
        self._pid = os.getpid()
        self._closed = False

    def write(self, record: Record) -> None:
        self.write_raw(encode(record))

    def write_raw(self, lines: bytes) -> None:
        # Hot. Whose process this is, is asked when it matters: that takes the system 2 us.
        if self._closed:
            if os.getpid() != self._pid:
                return
            raise LogError(f"{self._name} is closed: nothing more can be written to it")
        self._buffer += lines
        self.nbytes += len(lines)
        if len(self._buffer) >= BUFFER:
            self.flush()

    def flush(self) -> None:
        if os.getpid() != self._pid:
            self._buffer.clear()
            return
        while not self._closed and self._buffer:
            data = bytes(self._buffer)
            try:
                taken = self._hand_on(memoryview(data))
            except Exception as err:
                if is_of_handler(err):
                    raise
                self._closed = True
                self._release()
                reason = getattr(err, "strerror", None) or str(err) or type(err).__name__
                raise LogError(f"cannot write to {self._name}: {escape(reason)}") from err
            # Only now, so that a KeyboardInterrupt while writing loses nothing.
            del self._buffer[:taken]

    def close(self) -> None:
        if os.getpid() != self._pid or self._closed:
            return
        self.flush()
        self._closed = True
        self._release()

    @property
    def _name(self) -> str:
        return escape(str(self.path)) if self.path else "the file"

    def _hand_on(self, data: memoryview) -> int:
        """Write the first lines of `data`; returns how many bytes those are."""
        raise NotImplementedError

    def _release(self) -> None:
        pass


class LogWriter(_Buffered):
    """Writes a log file of its own; made by `LogWriter.open`."""

    def __init__(self, path: Path, fd: int) -> None:
        super().__init__(path)
        self._place = path.absolute()  # a program may go to another folder
        self._fd = fd
        self._flushed = 0
        self._interrupted = False
        self._begun = os.fstat(fd)
        self._regular = stat.S_ISREG(self._begun.st_mode)
        self._linked = self._begun.st_nlink > 0  # some network file systems count no links

    @classmethod
    def open(cls, path: str | Path, ranks: tuple[int, int] | None = None) -> LogWriter:
        """Create the log, and its folder if there is none.

        One of several ranks has its number in the name (``log.rank3.jsonl``). A log of that name is
        kept as ``<stem>.prev.jsonl``; if this process wrote it, or another is still writing it, the
        new one is ``log-2.jsonl``. A name that ends in ``.zst`` is written compressed.

        Args:
            path: what the name is made of.
            ranks: the rank, and how many there are; as the environment says by default.
        Raises:
            UsageError: the file is not a log of ours, or cannot be created there.
        """
        wanted = Path(path)
        writer = _writer_for(wanted) if cls is LogWriter else cls
        first, suffix = split_name(wanted)
        rank, count = ranks_of_environment() if ranks is None else ranks
        mark = f".rank{rank}" if count > 1 else ""
        try:
            for number in range(1, _LOGS + 1):
                stem = first if number == 1 else f"{first}-{number}"
                name = wanted.with_name(f"{stem}{mark}{suffix}")
                fd = claim(name)
                if fd is not None:
                    return writer(name, above_standard(fd))
        except (OSError, ValueError) as err:
            reason = getattr(err, "strerror", None) or str(err)
            raise UsageError(f"cannot write a log to {escape(str(path))}: {reason}") from err
        raise UsageError(
            f"{escape(str(path))} and {_LOGS - 1} more like it are of this process or are being "
            "written: give each its own name"
        )

    def found_at(self) -> Path:
        """The path of the log as it was given, if that leads there from the folder of the process.

        Else the absolute one that it was begun with.
        """
        with contextlib.suppress(OSError):  # no file of that name is there
            if self.path is not None and os.path.samestat(self.path.stat(), self._begun):
                return self.path
        return self._place

    def _hand_on(self, data: memoryview) -> int:
        if self._regular:
            self._look_for_loss()
        # After a KeyboardInterrupt below, and then alone, some of it may be there already.
        written = self._written_of(data) if self._interrupted else 0
        self._interrupted = True
        nbytes = len(data)
        while written < nbytes:
            try:
                written += os.write(self._fd, data[written:])
            except BlockingIOError:
                _wait_writable(self._fd)
        self._flushed += nbytes
        self._interrupted = False
        return nbytes

    def _look_for_loss(self) -> None:
        """Notice that what was written is gone; a log that was only moved away is whole."""
        now = os.fstat(self._fd)
        if self._linked and not now.st_nlink:
            raise OSError(errno.ENOENT, "it was deleted or replaced while it was being written")
        if now.st_size < self._flushed:
            what = f"it was cut from {self._flushed:,} to {now.st_size:,} bytes by another program"
            raise OSError(errno.ESTALE, what)

    def _written_of(self, data: memoryview) -> int:
        """How much of `data` an interrupted flush has left in the file already."""
        try:
            return min(max(os.lseek(self._fd, 0, os.SEEK_CUR) - self._flushed, 0), len(data))
        except OSError:  # a pipe
            return 0

    def truncate(self, nbytes: int) -> None:
        """Take back all but the first `nbytes` written: the end line of a run that goes on.

        Raises:
            LogError: the file cannot be cut, such as a pipe, or it is closed.
        """
        if os.getpid() != self._pid:
            return
        if self._closed:  # its descriptor may be somebody else's file by now
            raise LogError(f"{self._name} is closed: it cannot go on")
        self.flush()
        self._cut_file(nbytes)
        self.nbytes = nbytes

    def _cut_file(self, nbytes: int) -> None:
        try:
            os.ftruncate(self._fd, nbytes)
            os.lseek(self._fd, nbytes, os.SEEK_SET)  # where `_written_of` looks
        except OSError as err:
            raise LogError(f"cannot go on with {self._name}: {err.strerror or err}") from err
        self._flushed = nbytes

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            with contextlib.suppress(Exception):
                self.close()


def _writer_for(path: Path) -> type[LogWriter]:
    """Choose how to write by the name; compressed needs a package."""
    if path.suffix == ".gz":
        raise UsageError(
            f"a log is not written as gzip: name {escape(path.name)} .jsonl, or .jsonl.zst"
        )
    if path.suffix != ".zst":
        return LogWriter
    from tensortrace.log.packed import PackedWriter
    from tensortrace.log.zstd import INSTALL, available

    if not available():
        raise UsageError(f"writing {escape(path.name)} needs zstd: {INSTALL}")
    return PackedWriter


def _wait_writable(fd: int) -> None:
    import select

    select.select([], [fd], [])


class _FileSink(_Buffered):
    """Writes to a binary file of the user's; flushes it, never closes it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(None)
        self._file = file

    def _hand_on(self, data: memoryview) -> int:
        rest = data
        while rest:
            # A raw file may take less than it is given; others return nothing, or the whole.
            taken = self._file.write(rest)
            rest = rest[len(rest) if taken is None else taken :]
        flush = getattr(self._file, "flush", None)
        if flush is not None:
            flush()
        return len(data)


class _CallableSink:
    """Hands every record to a callable of the user's."""

    write_raw = None

    def __init__(self, take: Callable[[Record], object]) -> None:
        self.nbytes = 0
        self._take = take
        self._pid = os.getpid()

    def write(self, record: Record) -> None:
        if os.getpid() != self._pid:
            return
        try:
            self._take(record)
        except Exception as err:
            if is_of_handler(err):
                raise
            name = escape(getattr(self._take, "__qualname__", type(self._take).__name__))
            text = escape(f"{type(err).__name__}: {err}")
            raise LogError(f"{name}, which receives the records, raised {text}") from err

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_sink(
    out: str | os.PathLike[str] | BinaryIO | Callable[[Record], object],
    ranks: tuple[int, int] | None = None,
) -> Sink:
    """Open what `trace(out=...)` names: a path, a binary file, or a callable that takes records.

    Args:
        out: that.
        ranks: as `LogWriter.open` takes them.
    Raises:
        UsageError: it is none of these, or a path that cannot be written.
    """
    if isinstance(out, str | os.PathLike):
        return LogWriter.open(Path(out), ranks)
    if isinstance(out, io.TextIOBase):
        raise UsageError("out is a text file: open it with mode 'wb', or give its .buffer")
    if hasattr(out, "write"):
        return _FileSink(cast(BinaryIO, out))
    if callable(out):
        return _CallableSink(out)
    raise UsageError(
        f"out={escape(repr(out))} is none of: a path, a binary file, a callable that takes a record"
    )

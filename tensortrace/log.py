"""The log: strict JSON, one record a line; encode, write, open, scan, seek to a step.

The writing half buffers bytes itself and hands them to a raw descriptor. The reading half never
parses what it does not need: lines are found by their newline, told apart by the bytes after
``{"kind":"``, and a step is found by bisecting the file. The file belongs to another process, so it
is read with `os.pread`, never mapped: a mapped file that is truncated kills its reader.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import io
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

import msgspec

from tensortrace.errors import LogError, UsageError
from tensortrace.records import FORMAT, FORMAT_VERSION, AnyRecord, Header, Record
from tensortrace.text import escape

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_LINE = 16 << 20
CHUNK = 1 << 20
BUFFER = 1 << 18
# Larger whole numbers are no step of anybody's, and would not fit the arrays of a reader.
MAX_STEP = 1 << 53
_LOGS = 10_000
_IMPORTED_NS = time.time_ns()
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_HEADER_PREFIX = b'{"kind":"header"'

# ---- one line -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Unknown:
    """A line that is a record of a kind this version does not know."""

    kind: str
    step: int | None


@dataclass(frozen=True, slots=True)
class Damaged:
    """A line that is no record; `reason` says why."""

    reason: str


class _Any(msgspec.Struct):
    kind: str
    step: int | None = None


def _plain(value: Any) -> Any:
    """What msgspec cannot encode: numpy scalars as numbers, the rest as text."""
    item = getattr(value, "item", None)
    if item is not None and not getattr(value, "shape", ()):
        plain = item()
        if isinstance(plain, int | float | str | None):
            return plain
    try:
        return _clean(str(value), 0)
    except Exception:  # a __str__ of the user's
        return f"<{type(value).__name__}>"


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)
_DECODER: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(AnyRecord)
_ANY_DECODER = msgspec.json.Decoder(_Any)
_KEYS_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])


def encode(record: Record) -> bytes:
    r"""Write a record as its log line, ``\n`` included; never raises on what a record holds.

    A NaN or infinite float is written as ``null`` (a scalar that may be one is a `Scalar`, so a
    string); half a surrogate pair becomes ``\ud83d`` in plain characters; an object that JSON has
    no form for becomes its text.
    """
    try:
        return _ENCODER.encode(record) + b"\n"
    except (ValueError, TypeError, OverflowError, RecursionError):
        return _ENCODER.encode(_clean(record, 0)) + b"\n"


def _clean(value: Any, depth: int) -> Any:
    if depth > 32:
        return "..."
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"<an integer of {value.bit_length()} bits>"  # Python refuses to write it out
    if isinstance(value, dict):
        return {_clean(str(k), 0): _clean(v, depth + 1) for k, v in list(value.items())}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(v, depth + 1) for v in value]
    if isinstance(value, msgspec.Struct):
        fields = {f: _clean(getattr(value, f), depth + 1) for f in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    return value


def decode(line: bytes) -> Record | Unknown | Damaged:
    """Read one line; never raises. Unknown keys are skipped, an unknown kind is an `Unknown`."""
    if len(line) > MAX_LINE:
        return Damaged(f"a line of {len(line)} bytes")
    try:
        record: Record = _DECODER.decode(line)
    except (ValueError, RecursionError, OverflowError, MemoryError) as err:
        return _undecoded(line, err)
    return record if 0 <= record.step <= MAX_STEP else Damaged(f"step {record.step}")


def _undecoded(line: bytes, err: Exception) -> Unknown | Damaged:
    if "$.kind" in str(err):
        with contextlib.suppress(ValueError, RecursionError, OverflowError, MemoryError):
            found = _ANY_DECODER.decode(line)
            return Unknown(found.kind, found.step)
    return Damaged(str(err) or type(err).__name__)


def unknown_keys(line: bytes, record: Record) -> list[str]:
    """List the top-level keys of a line that this version has no field for, as ``kind.key``."""
    try:
        keys = _KEYS_DECODER.decode(line)
    except (ValueError, RecursionError, OverflowError, MemoryError):
        return []
    known = {"kind", *record.__struct_fields__}
    kind = record.__struct_config__.tag
    return [f"{kind}.{key}" for key in keys if key not in known]


# ---- writing ------------------------------------------------------------------------------------


class Sink(Protocol):
    """Where records go. Every method raises only `LogError`; after one, the sink is dead.

    `nbytes` counts what was written so far, buffered bytes included (0 for a callable); `path` is
    None where there is no file of ours.
    """

    nbytes: int
    path: Path | None

    def write(self, record: Record) -> None:
        """Take one record, in log order."""

    def write_raw(self, lines: bytes) -> None:
        """Take whole lines that `encode` made earlier."""

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
        if os.getpid() != self._pid:
            return
        if self._closed:
            raise LogError(f"{self._name} is closed: nothing more can be written to it")
        self._buffer += lines
        self.nbytes += len(lines)
        if len(self._buffer) >= BUFFER:
            self.flush()

    def flush(self) -> None:
        if os.getpid() != self._pid or self._closed or not self._buffer:
            return
        data = bytes(self._buffer)
        try:
            self._hand_on(memoryview(data))
        except Exception as err:
            self._closed = True
            self._release()
            reason = getattr(err, "strerror", None) or str(err) or type(err).__name__
            raise LogError(f"cannot write to {self._name}: {escape(reason)}") from err
        # Only now, so that a KeyboardInterrupt while writing loses nothing.
        del self._buffer[: len(data)]

    def close(self) -> None:
        if os.getpid() != self._pid or self._closed:
            return
        self.flush()
        self._closed = True
        self._release()

    @property
    def _name(self) -> str:
        return escape(str(self.path)) if self.path else "the file"

    def _hand_on(self, data: memoryview) -> None:
        raise NotImplementedError

    def _release(self) -> None:
        pass


class LogWriter(_Buffered):
    """Writes a log file of its own; made by `LogWriter.open`."""

    def __init__(self, path: Path, fd: int) -> None:
        super().__init__(path)
        self._fd = fd
        self._flushed = 0
        self._linked = os.fstat(fd).st_nlink > 0  # some network file systems count no links

    @classmethod
    def open(cls, path: str | Path) -> LogWriter:
        """Create the log, and its folder if there is none.

        With ``WORLD_SIZE`` > 1 in the environment the name gets the rank (``log.rank3.jsonl``). A
        log of that name is kept as ``<stem>.prev.jsonl``; if this process wrote it, or another is
        still writing it, the new one is ``log-2.jsonl``.

        Raises:
            UsageError: the file is not a log of ours, or cannot be created there.
        """
        wanted = Path(path)
        try:
            for number in range(1, _LOGS + 1):
                stem = wanted.stem if number == 1 else f"{wanted.stem}-{number}"
                name = wanted.with_name(f"{stem}{_rank_suffix()}{wanted.suffix}")
                fd = _claim(name)
                if fd is not None:
                    return cls(name, _above_standard(fd))
        except (OSError, ValueError) as err:
            reason = getattr(err, "strerror", None) or str(err)
            raise UsageError(f"cannot write a log to {escape(str(path))}: {reason}") from err
        raise UsageError(
            f"{escape(str(path))} and {_LOGS - 1} more like it are of this process or are being "
            "written: give each its own name"
        )

    def _hand_on(self, data: memoryview) -> None:
        self._look_for_loss()
        rest = data[self._written_of(data) :]
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                _wait_writable(self._fd)
        self._flushed += len(data)

    def _look_for_loss(self) -> None:
        """Notice that what was written is gone; a log that was only moved away is whole."""
        now = os.fstat(self._fd)
        if not stat.S_ISREG(now.st_mode):
            return
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
        try:
            os.ftruncate(self._fd, nbytes)
            os.lseek(self._fd, nbytes, os.SEEK_SET)  # where `_written_of` looks
        except OSError as err:
            raise LogError(f"cannot go on with {self._name}: {err.strerror or err}") from err
        self.nbytes = self._flushed = nbytes

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            with contextlib.suppress(Exception):
                self.close()


def _wait_writable(fd: int) -> None:
    import select

    select.select([], [fd], [])


def _rank_suffix() -> str:
    try:
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    except ValueError:
        return ""
    return f".rank{rank}" if world > 1 else ""


def _claim(path: Path) -> int | None:
    """Open an empty log for appending and lock it; None if the name is taken.

    It is taken by a log that another writer holds, and by one that this process wrote before.
    """
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
            start = os.read(fd, 4096)
            keep = not start
            if keep:
                return fd
            if not _is_ours(start):
                raise UsageError(
                    f"{escape(str(path))} is not a tensortrace log, so it is not overwritten: "
                    "move it away or write elsewhere"
                )
            if _is_of_this_process(fd):
                return None
            path.replace(path.with_name(f"{path.stem}.prev{path.suffix}"))
        finally:
            if not keep:
                os.close(fd)


def _above_standard(fd: int) -> int:
    """Move off the descriptor of a closed standard stream: what others print there is no record."""
    if fd > 2:
        return fd
    import fcntl

    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


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


def _is_ours(start: bytes) -> bool:
    """Tell a log by its first bytes, also one that was killed while it wrote them."""
    ours = start.startswith(_HEADER_PREFIX) and f'"format":"{FORMAT}"'.encode() in start
    return ours or (len(start) > 8 and _HEADER_PREFIX.startswith(start))


def _is_of_this_process(fd: int) -> bool:
    """Tell a log that an earlier trace of this very process wrote; its number may be used again."""
    header = decode(os.pread(fd, CHUNK, 0).partition(b"\n")[0])
    return (
        isinstance(header, Header)
        and header.pid == os.getpid()
        and header.hostname == socket.gethostname()
        and header.time_ns >= _IMPORTED_NS
    )


class _FileSink(_Buffered):
    """Writes to a binary file of the user's; flushes it, never closes it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(None)
        self._file = file

    def _hand_on(self, data: memoryview) -> None:
        while data:
            # A raw file may take less than it is given; others return nothing, or the whole.
            taken = self._file.write(data)
            data = data[len(data) if taken is None else taken :]
        flush = getattr(self._file, "flush", None)
        if flush is not None:
            flush()


class _CallableSink:
    """Hands every record to a callable of the user's."""

    def __init__(self, take: Callable[[Record], object]) -> None:
        self.path: Path | None = None
        self.nbytes = 0
        self._take = take
        self._pid = os.getpid()

    def write(self, record: Record) -> None:
        if os.getpid() != self._pid:
            return
        try:
            self._take(record)
        except Exception as err:
            name = escape(getattr(self._take, "__qualname__", type(self._take).__name__))
            text = escape(f"{type(err).__name__}: {err}")
            raise LogError(f"{name}, which receives the records, raised {text}") from err

    def write_raw(self, lines: bytes) -> None:
        for line in lines.splitlines():
            record = decode(line)
            if isinstance(record, Record):
                self.write(record)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def open_sink(out: str | os.PathLike[str] | BinaryIO | Callable[[Record], object]) -> Sink:
    """Open what `trace(out=...)` names: a path, a binary file, or a callable that takes records.

    Raises:
        UsageError: it is none of these, or a path that cannot be written.
    """
    if isinstance(out, str | os.PathLike):
        return LogWriter.open(Path(out))
    if isinstance(out, io.TextIOBase):
        raise UsageError("out is a text file: open it with mode 'wb', or give its .buffer")
    if hasattr(out, "write"):
        return _FileSink(cast(BinaryIO, out))
    if callable(out):
        return _CallableSink(out)
    raise UsageError(
        f"out={escape(repr(out))} is none of: a path, a binary file, a callable that takes a record"
    )


# ---- opening for reading ------------------------------------------------------------------------


class LogFile:
    """Bytes of a log, read by position; `growing` if another process may still add to them.

    `notice` says what was lost in unpacking, if anything was.
    """

    def __init__(self, fd: int, path: Path, growing: bool, notice: str | None = None) -> None:
        self.fd = fd
        self.path = path
        self.growing = growing
        self.notice = notice

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


def open_log(path: str | Path) -> tuple[LogFile, Header]:
    """Open what ought to be a log: plain, ``.gz``, ``.zst``, a pipe, or ``-`` for standard input.

    Raises:
        LogError: one sentence that says what it is instead.
    """
    name = escape(str(path))
    try:
        file = _open_bytes(Path(path), name)
        return file, _read_header(file, name)
    except IsADirectoryError as err:
        raise LogError(f"{name} is a folder, not a log") from err
    except FileNotFoundError as err:
        raise LogError(f"there is no file {name}") from err
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise LogError(f"cannot read {name}: {escape(reason)}") from err


def _open_bytes(path: Path, name: str) -> LogFile:
    if str(path) == "-":
        return _plain_file(_spool(os.fdopen(os.dup(0), "rb"), path, name), name)
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise LogError(f"{name} is a device or socket, not a log")
    fd = os.open(path, os.O_RDONLY)
    if stat.S_ISREG(mode):
        return _plain_file(LogFile(fd, path, growing=True), name)
    return _plain_file(_spool(os.fdopen(fd, "rb"), path, name), name)


def _plain_file(file: LogFile, name: str) -> LogFile:
    """Unpack a compressed file, told by its first bytes since a name may lie."""
    magic = file.read(0, 4)
    if not magic.startswith((_GZIP, _ZSTD)):
        return file
    with os.fdopen(os.dup(file.fd), "rb") as packed:
        packed.seek(0)
        if magic.startswith(_GZIP):
            return _spool(cast(BinaryIO, gzip.GzipFile(fileobj=packed)), file.path, name)
        try:
            import zstandard
        except ImportError as err:
            raise LogError(
                f"{name} is compressed with zstd: pip install 'tensortrace[zstd]' reads it"
            ) from err
        reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        return _spool(reader, file.path, name)


def _spool(reader: BinaryIO, path: Path, name: str) -> LogFile:
    """Copy a stream to a file without a name: as much as can be had if it is cut or damaged.

    Stops early at what does not even begin like a log (``yes | tensortrace view -``).
    """
    lost = None
    nbytes = 0
    with reader, tempfile.TemporaryFile(prefix="tensortrace-") as spool:
        while True:
            try:
                data = reader.read(CHUNK >> 4)
            except Exception as err:  # EOFError, zlib.error, zstandard.ZstdError, OSError
                lost = f"{name} is cut or damaged: the first {nbytes} bytes of it are shown"
                if not nbytes:
                    raise LogError(f"{name} cannot be unpacked: {escape(str(err))}") from err
                break
            if not data:
                break
            if not nbytes and not data.startswith((b"{", _GZIP, _ZSTD)):
                raise LogError(f"{name} is not a tensortrace log")
            spool.write(data)
            nbytes += len(data)
        spool.flush()
        return LogFile(os.dup(spool.fileno()), path, growing=False, notice=lost)


def _read_header(file: LogFile, name: str) -> Header:
    start = file.read(0, 1 << 16)
    if not start:
        raise LogError(f"{name} is empty: nothing was recorded in it yet")
    if b"\n" not in start and start.startswith(b"{"):
        start = file.read(0, CHUNK)
    line, newline, _ = start.partition(b"\n")
    if not line.startswith((b"{", b"[")):
        what = "a binary file" if b"\0" in start[:1024] else "not JSON"
        raise LogError(f"{name} is not a tensortrace log: it is {what}")
    if not newline and _HEADER_PREFIX.startswith(line[:16]):
        raise LogError(f"{name} has no complete first line yet: nothing was recorded in it")
    _check_version(line, name)
    record = decode(line)
    if not isinstance(record, Header) or record.format != FORMAT:
        what = "its first line is damaged" if _is_ours(line) else "it is another program's JSON"
        raise LogError(f"{name} is not a tensortrace log: {what}")
    return record


class _Version(msgspec.Struct):
    format: str
    version: int
    tensortrace: str = "?"


def _check_version(line: bytes, name: str) -> None:
    """Tell a newer format apart before its header fails to decode as ours."""
    try:
        found = msgspec.json.decode(line, type=_Version)
    except (ValueError, RecursionError, OverflowError, MemoryError):
        return
    if found.format == FORMAT and found.version > FORMAT_VERSION:
        raise LogError(
            f"{name} is in format {found.version} of tensortrace {escape(found.tensortrace[:40])}, "
            f"this one reads up to format {FORMAT_VERSION}: pip install -U tensortrace"
        )


def starts_like_a_log(path: Path) -> bool:
    """Tell a log (plain or compressed by name) by its first bytes, without reading on."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    return _is_ours(start) or (start.startswith((_GZIP, _ZSTD)) and ".jsonl" in path.name)


# ---- finding lines ------------------------------------------------------------------------------

KINDS = (
    "header", "module", "source", "call", "param", "optimizer", "line", "action", "finding", "step",
    "end",
)  # fmt: skip
OTHER, DAMAGED = len(KINDS), len(KINDS) + 1
_BY_NAME = {kind.encode(): i for i, kind in enumerate(KINDS)}
_AT = len(b'{"kind":"')
# What our own encoder writes, and what it becomes when another program has rewritten the lines.
_STEP = re.compile(rb'\{"kind": ?"[a-z_]{1,40}", ?"step": ?(\d{1,16})[,}]')
_KIND = re.compile(rb'\s*\{\s*"kind"\s*:\s*"([a-z_]{1,40})"')


@dataclass(frozen=True, slots=True)
class Chunk:
    """Complete lines of a piece of the log that starts at byte `start` and ends before `end`.

    `starts` int64 ``(n,)`` absolute; `kinds` uint8 ``(n,)`` index into `KINDS`, or OTHER, or
    DAMAGED; `data` holds the bytes (empty for one line too long to hold).
    """

    start: int
    end: int
    starts: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]
    data: bytes

    def line(self, i: int) -> bytes:
        """The bytes of line `i`, without newline."""
        low = int(self.starts[i]) - self.start
        high = int(self.starts[i + 1]) - self.start if i + 1 < len(self.starts) else len(self.data)
        return self.data[low : max(low, high - 1)]


def scan_chunk(file: LogFile, start: int, stop: int, length: int = CHUNK) -> Chunk | None:
    """Find the lines that begin at `start`, about `length` bytes of them; None if there is none.

    Args:
        file: what to read.
        start: where a line begins.
        stop: where the last complete line ends.
        length: grows by itself to hold at least one line.
    """
    import numpy as np

    while start < stop:
        data = file.read(start, min(length, stop - start))
        cut = data.rfind(b"\n") + 1
        if cut:
            return _classify(start, data[:cut])
        if len(data) < min(length, stop - start):
            return None  # truncated under our hands
        if length >= MAX_LINE:
            break
        length = min(length * 8, MAX_LINE)
    position = start + length
    while position < stop:
        data = file.read(position, CHUNK)
        if not data:
            return None
        at = data.find(b"\n")
        if at >= 0:
            one = np.array([start], np.int64)
            return Chunk(start, position + at + 1, one, np.array([DAMAGED], np.uint8), b"")
        position += len(data)
    return None


def _classify(start: int, data: bytes) -> Chunk:
    import numpy as np

    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw == 10)
    begins = np.empty_like(ends)
    begins[0] = 0
    begins[1:] = ends[:-1] + 1
    last = len(raw) - 1
    two, lengths = _tables()
    first = raw[np.minimum(begins + _AT, last)].astype(np.intp)
    kinds = two[first << 8 | raw[np.minimum(begins + _AT + 1, last)]]
    # The two letters decide among our own kinds; the closing quote rules out a longer name.
    ours = raw[np.minimum(begins + _AT + lengths[kinds], last)] == ord('"')
    ours &= raw[np.minimum(begins + _AT - 1, last)] == ord('"')
    ours &= (raw[begins] == ord("{")) & (raw[np.maximum(ends - 1, 0)] == ord("}"))
    kinds = np.where(ours, kinds, np.uint8(OTHER)).astype(np.uint8)
    for i in np.flatnonzero(kinds == OTHER).tolist():
        found = _KIND.match(data, begins[i], ends[i])
        if found and data[begins[i] : ends[i]].rstrip().endswith(b"}"):
            kinds[i] = _BY_NAME.get(found[1], OTHER)
        else:
            kinds[i] = DAMAGED
    return Chunk(start, start + len(data), begins + start, kinds, data)


@functools.cache
def _tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Kind by the first two letters of its name, and the length of each name."""
    import numpy as np

    two = np.full(1 << 16, OTHER, np.uint8)
    for i, kind in enumerate(KINDS):
        two[ord(kind[0]) << 8 | ord(kind[1])] = i
    return two, np.array([*map(len, KINDS), 0, 0], np.int64)


def read_step(line: bytes) -> int | None:
    """Read the step of a line, or of its first bytes, without decoding it; None if damaged."""
    found = _STEP.match(line)
    if found:
        step: int | None = int(found[1])
    else:
        record = decode(line) if line.rstrip().endswith(b"}") else Damaged("cut")
        step = None if isinstance(record, Damaged) else record.step
    return step if step is not None and 0 <= step <= MAX_STEP else None


def seek_step(file: LogFile, stop: int, step: int) -> int:
    """Find where the first line of `step`, or of a later one, begins; `stop` if there is none.

    Bisects bytes, since steps never decrease: some 14 reads on 1 GB. Each probe takes the median of
    three lines, so that a damaged number does not mislead it.
    """
    low, high = 0, stop
    while high - low > (1 << 17):
        middle = (low + high) // 2
        near = _steps_after(file, middle, high)
        if not near:
            high = middle
        elif sorted(s for _, s in near)[len(near) // 2] < step:
            low = near[0][0]
        else:
            high = middle
    return _first_at_least(file, low, stop, step)


def _steps_after(file: LogFile, position: int, stop: int) -> list[tuple[int, int]]:
    """Up to three (offset, step) of lines that begin after `position` and before `stop`."""
    found: list[tuple[int, int]] = []
    length = 1 << 16
    while position < stop and len(found) < 3:
        data = file.read(position, min(length, stop - position))
        if not data:
            break
        at = data.find(b"\n") + 1
        while 0 < at < len(data) and len(found) < 3:
            end = data.find(b"\n", at)
            number = read_step(data[at : end if end >= 0 else at + 200])
            if number is not None and (end >= 0 or at + 200 <= len(data)):
                found.append((position + at, number))
            at = end + 1
        newline = data.rfind(b"\n")
        if newline < 0:
            length = min(length * 8, CHUNK)
        position += newline if newline > 0 else len(data)
    return found


def _first_at_least(file: LogFile, start: int, stop: int, step: int) -> int:
    """Walk lines from `start`, where a line begins (or the first after it)."""
    candidate = None
    while (chunk := scan_chunk(file, start, stop, 1 << 17)) is not None:
        for i in range(len(chunk.starts)):
            number = read_step(chunk.line(i))
            if number is None:
                continue
            if number < step:
                candidate = None
            elif candidate is not None:
                return candidate
            else:
                candidate = int(chunk.starts[i])
        start = chunk.end
    return stop if candidate is None else candidate


def iterate(file: LogFile, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of the complete lines in a range that begins at a line."""
    while (chunk := scan_chunk(file, start, stop)) is not None:
        for i in range(len(chunk.starts)):
            yield int(chunk.starts[i]), chunk.line(i)
        start = chunk.end

"""Opening what ought to be a log, and reading its bytes by position.

The file belongs to another process, so it is read with `os.pread`, never mapped: a mapped file that
is truncated kills its reader.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from tensortrace.errors import LogError
from tensortrace.log.codec import HEADER_PREFIX, decode, is_ours
from tensortrace.records import FORMAT, FORMAT_VERSION, Header
from tensortrace.text import escape

CHUNK = 1 << 20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


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
    if not newline and HEADER_PREFIX.startswith(line[:16]):
        raise LogError(f"{name} has no complete first line yet: nothing was recorded in it")
    _check_version(line, name)
    record = decode(line)
    if not isinstance(record, Header) or record.format != FORMAT:
        what = "its first line is damaged" if is_ours(line) else "it is another program's JSON"
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
    return is_ours(start) or (start.startswith((_GZIP, _ZSTD)) and ".jsonl" in path.name)

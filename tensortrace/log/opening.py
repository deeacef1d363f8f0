"""Opening what ought to be a log, and saying in one sentence what it is instead."""

from __future__ import annotations

import os
import stat
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path

import msgspec

from tensortrace.errors import LogError, NoLogYetError
from tensortrace.log.codec import HEADER_PREFIX, decode, is_ours
from tensortrace.log.files import CHUNK, LogFile, check_platform
from tensortrace.log.unpacking import GZIP, Unpacked
from tensortrace.log.zstd import MAGIC
from tensortrace.records import FORMAT, FORMAT_VERSION, Header, Record
from tensortrace.text import escape


def open_log(
    path: str | Path, progress: Callable[[float], object] | None = None
) -> tuple[LogFile, Header]:
    """Open what ought to be a log: plain, ``.gz``, ``.zst``, a pipe, or ``-`` for standard input.

    Args:
        path: a file, or ``-``.
        progress: told the share of a compressed log that is unpacked, while it is waited for.

    Raises:
        LogError: one sentence that says what it is instead.
    """
    file, header = start_log(path)
    if isinstance(file, Unpacked):
        file.wait(progress)
    return file, header


def start_log(path: str | Path) -> tuple[LogFile, Header]:
    """As `open_log`, but what has to be unpacked is not waited for: `LogFile.unpacked` grows."""
    check_platform()
    name = escape(str(path))
    try:
        file = _open_bytes(Path(path), name)
        return file, _read_header(file, name)
    except IsADirectoryError as err:
        raise LogError(f"{name} is a folder, not a log") from err
    except FileNotFoundError as err:
        raise NoLogYetError(f"there is no file {name}") from err
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise LogError(f"cannot read {name}: {escape(reason)}") from err


def _open_bytes(path: Path, name: str) -> LogFile:
    if str(path) == "-":
        return _begun(Unpacked(os.dup(0), path))
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise LogError(f"{name} is a device or socket, not a log")
    fd = os.open(path, os.O_RDONLY)
    # A compressed file is told by its first bytes, since a name may lie.
    if stat.S_ISREG(mode) and not os.pread(fd, 4, 0).startswith((GZIP, MAGIC)):
        return LogFile(fd, path, growing=True)
    return _begun(Unpacked(fd, path))


def _begun(file: Unpacked) -> Unpacked:
    file.begin()
    return file


def _read_header(file: LogFile, name: str) -> Header:
    start = file.read(0, 1 << 16)
    if not start:
        raise NoLogYetError(f"{name} is empty: nothing was recorded in it yet")
    if b"\n" not in start and start.startswith(b"{"):
        start = file.read(0, CHUNK)
    line, newline, _ = start.partition(b"\n")
    if not line.startswith((b"{", b"[")):
        what = "it is a binary file" if b"\0" in start[:1024] else "it is not JSON"
        if is_ours(line.removeprefix(BOM_UTF8)):
            what = "an editor has put a byte order mark before it; save it as UTF-8 without one"
        raise LogError(f"{name} is not a tensortrace log: {what}")
    if not newline and HEADER_PREFIX.startswith(line[:16]):
        raise NoLogYetError(f"{name} has no complete first line yet: nothing was recorded in it")
    _check_version(line, name)
    record = decode(line)
    if not isinstance(record, Header) or record.format != FORMAT:
        what = "its first line is damaged" if is_ours(line) else "it is another program's JSON"
        if isinstance(record, Record) and not isinstance(record, Header):
            what = "its first line, the header, is missing"
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
    return is_ours(start) or (start.startswith((GZIP, MAGIC)) and ".jsonl" in path.name)

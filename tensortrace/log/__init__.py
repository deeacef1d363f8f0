"""The log: strict JSON, one record a line; encode, write, open, scan, seek to a step.

`codec` is one line and back; `claim` whose file a log is; `writing` buffers lines and hands them to
a raw descriptor; `opening` reads bytes by position; `scanning` finds lines and steps in them.
"""

from __future__ import annotations

from tensortrace.log.codec import (
    MAX_LINE,
    MAX_STEP,
    Damaged,
    Unknown,
    decode,
    encode,
    unknown_keys,
)
from tensortrace.log.opening import CHUNK, LogFile, open_log, starts_like_a_log
from tensortrace.log.scanning import (
    DAMAGED,
    KINDS,
    OTHER,
    Chunk,
    iterate,
    read_step,
    scan_chunk,
    seek_step,
)
from tensortrace.log.writing import BUFFER, LogWriter, Sink, open_sink

__all__ = [
    "BUFFER",
    "CHUNK",
    "DAMAGED",
    "KINDS",
    "MAX_LINE",
    "MAX_STEP",
    "OTHER",
    "Chunk",
    "Damaged",
    "LogFile",
    "LogWriter",
    "Sink",
    "Unknown",
    "decode",
    "encode",
    "iterate",
    "open_log",
    "open_sink",
    "read_step",
    "scan_chunk",
    "seek_step",
    "starts_like_a_log",
    "unknown_keys",
]

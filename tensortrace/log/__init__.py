"""The log: strict JSON, one record a line; encode, write, open, scan, seek to a step.

`codec` is one line and back; `claim` whose file a log is; `writing` buffers lines and hands them to
a raw descriptor, `packed` compresses them on the way; `files` reads bytes by position, `unpacking`
first copies what is compressed or a pipe, `opening` tells a log from what is none; `scanning` finds
lines and steps.
"""

from __future__ import annotations

from tensortrace.log.claim import ranks_of_environment
from tensortrace.log.codec import (
    MAX_LINE,
    MAX_STEP,
    Damaged,
    Unknown,
    decode,
    decode_head,
    encode,
    encode_all,
    unknown_keys,
)
from tensortrace.log.files import CHUNK, LogFile
from tensortrace.log.opening import open_log, start_log, starts_like_a_log
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
    "decode_head",
    "encode",
    "encode_all",
    "iterate",
    "open_log",
    "open_sink",
    "ranks_of_environment",
    "read_step",
    "scan_chunk",
    "seek_step",
    "start_log",
    "starts_like_a_log",
    "unknown_keys",
]

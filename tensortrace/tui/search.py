"""Search the bytes of a log: 1 MB at a time, decoding only the lines that hold the text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from tensortrace.log import CHUNK, MAX_LINE, LogFile, decode
from tensortrace.records import Call, Finding, Module, Record
from tensortrace.text import escape, location_text
from tensortrace.tui.cells import name_of
from tensortrace.tui.row import Row

# Every chunk asks this, so that a search ends soon after the user gave it up.
Cancelled = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Hit:
    """A line that holds the text: its record and where it begins in the log, in bytes."""

    offset: int
    record: Record


def find_next(file: LogFile, term: str, start: int, stop: int, cancelled: Cancelled) -> Hit | None:
    """Find the first line with the text that begins in ``[start, stop)``; `start` begins a line."""
    needle = needle_of(term)
    length = CHUNK
    while start < stop and not cancelled():
        data = file.read(start, min(length, stop - start))
        cut = data.rfind(b"\n") + 1
        if not cut:
            if len(data) < min(length, stop - start) or length > MAX_LINE:
                return None
            length *= 8
            continue
        low, folded = 0, data.lower()
        while (at := folded.find(needle, low, cut)) >= 0:
            begin, low = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at) + 1
            record = confirmed(data[begin : low - 1], term)
            if record is not None:
                return Hit(start + begin, record)
        start, length = start + cut, CHUNK
    return None


def find_previous(
    file: LogFile, term: str, start: int, stop: int, cancelled: Cancelled
) -> Hit | None:
    """Find the last line with the text that begins in ``[start, stop)``; both begin a line."""
    needle = needle_of(term)
    length = CHUNK
    while start < stop and not cancelled():
        low = max(start, stop - length)
        data = file.read(low, stop - low)
        # The first line is only whole if the piece begins with it.
        skip = 0 if low == start else data.find(b"\n") + 1
        if skip in (0, len(data)) and low != start:
            if length > MAX_LINE:
                return None
            length *= 8
            continue
        high, folded = len(data), data.lower()
        while (at := folded.rfind(needle, skip, high)) >= 0:
            high = data.rfind(b"\n", 0, at) + 1
            record = confirmed(data[high : data.find(b"\n", at)], term)
            if record is not None:
                return Hit(low + high, record)
        stop, length = low + skip, CHUNK
    return None


def needle_of(term: str) -> bytes:
    """The text as it stands in a line of JSON, in lower case."""
    return json.dumps(term, ensure_ascii=False)[1:-1].encode("utf-8", "replace").lower()


def confirmed(line: bytes, term: str) -> Record | None:
    """Decode a line that has the text in it; None if nothing that a person sees has it."""
    record = decode(line)
    if not isinstance(record, Record):
        return None
    return record if term.lower() in seen_text(record).lower() else None


def seen_text(record: Record) -> str:
    """All that a person may look for in a record: names, path, class, code, message."""
    match record:
        case Module():
            return escape(f"{record.path}\n{record.cls}")
        case Finding():
            told = [record.code, record.check, record.message, record.module, record.op]
            return "\n".join(escape(text) for text in told if text)
    texts = list(name_of(Row(record, ""), {}))
    if isinstance(record, Call):
        texts.append(escape(record.module or ""))
    location = getattr(record, "location", None)
    if location is not None:
        texts += [location_text(location), escape(location.code or "")]
    return "\n".join(texts)

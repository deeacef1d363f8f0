"""Search the bytes of a log: 1 MB at a time, decoding only the lines that may show the text.

What stands on the screen is not always what stands in the log: a place is ``"file":…,"line":8``
there, a shape has no spaces, and the text of a line of code is in the record of its function alone.
So a term has a few needles, each of which is looked for as bytes, and what a line shows decides.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tensortrace.log import CHUNK, MAX_LINE, LogFile, decode
from tensortrace.records import Call, End, Finding, Header, Line, Module, Param, Record, Source
from tensortrace.text import escape, location_text, shape_text
from tensortrace.tui.step.cells import name_of
from tensortrace.tui.step.row import Row

# Every chunk asks this, so that a search ends soon after the user gave it up.
Cancelled = Callable[[], bool]
# Words that rows show and no record has, and what the lines of such records have.
_WORDS = (
    ("end of step ", b'{"kind":"step"'),
    ("grad norm ", b'{"kind":"step"'), ("grad norm ", b'{"kind":"optimizer"'),
    ("lr ", b'{"kind":"step"'), ("lr ", b'{"kind":"optimizer"'),
    ("loss ", b'{"kind":"step"'), (" more of ", b'{"kind":"step"'),
    ("loss ", b'"action":"loss"'), ("norm ", b'"action":"clip"'), ("limit ", b'"action":"clip"'),
    ("update ", b'{"kind":"param"'), ("no gradient ", b'{"kind":"param"'),
    ("not written ", b'{"kind":"param"'), ("(root) ", b'"module":""'),
    ("replayed ", b'"replay":true'), ("recomputed ", b'"recompute":true'),
    ("raised ", b'"exception":"'), (" = ", b'{"kind":"line"'),
)  # fmt: skip
# A part of a word this short is in too many of them.
_SHORTEST = 3
# Source lines and modules that are looked for one by one; of more, all that have one are decoded.
_MOST_LINES = 8


@dataclass(frozen=True, slots=True)
class Hit:
    """A line that holds the text: its record and where it begins in the log, in bytes."""

    offset: int
    record: Record


@dataclass(frozen=True, slots=True)
class Sought:
    """A term, as lines of a log may have it.

    `places` are the source lines whose code has it: a record that was made there shows it. A call
    shows the class of its module, which only `modules` have.
    """

    term: str
    needles: tuple[bytes, ...]
    places: frozenset[tuple[str, int]]
    modules: Mapping[str, Module]


def sought(
    term: str, sources: Sequence[Source] = (), modules: Mapping[str, Module] | None = None
) -> Sought:
    """Say what to look for: the term itself, and what is shown as it.

    Args:
        term: as it was typed.
        sources: the functions that the log has the text of.
        modules: those of the log, by path.
    """
    modules = modules or {}
    places = places_of(term, sources)
    needles = [_in_json(term), *_as_written(term)]
    if len(places) > _MOST_LINES:
        needles += {_in_json(file) + b'","line":' for file, _ in places}
    else:
        needles += [_in_json(file) + b'","line":%d,' % line for file, line in places]
    of_class = [path for path, module in modules.items() if term.lower() in module.cls.lower()]
    if len(of_class) > _MOST_LINES:
        needles.append(b'"module":"')
    else:
        needles += [b'"module":"%s"' % _in_json(path) for path in of_class]
    low = f"{term.lower()} "
    for word, kind in _WORDS:
        if word in low or (len(term) >= _SHORTEST and term.lower() in word):
            needles.append(kind)
    return Sought(term, tuple(dict.fromkeys(needles)), places, modules)


def places_of(term: str, sources: Sequence[Source]) -> frozenset[tuple[str, int]]:
    """Give the source lines whose code has the term, as file and line."""
    low = term.lower()
    return frozenset(
        (source.file, source.first_line + i)
        for source in sources
        for i, line in enumerate(source.lines)
        if low in escape(line).lower()
    )


def _as_written(term: str) -> Iterator[bytes]:
    """The bytes of what a row writes otherwise than the log."""
    file, colon, line = term.rpartition(":")
    if colon and file and (line.isdecimal() or not line):  # model.py:8
        yield _in_json(file) + b'","line":' + line.encode()
    name, dot, rest = term.rpartition(".")
    if dot and rest and "step".startswith(rest.lower()):  # AdamW.step
        yield _in_json(name) + b'","lr":'
    if re.search(r"\d, \d", term):  # [32, 12]
        yield _in_json(re.sub(r"(?<=\d), (?=\d)", ",", term))
    key, space, value = term.partition(" ")
    if space and key and value:  # set_to_none True
        yield _in_json(key) + b'":' + _in_json(value)


def _in_json(text: str) -> bytes:
    """The text as it stands in a line of JSON, in lower case."""
    return json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "replace").lower()


def find_next(
    file: LogFile, what: Sought, start: int, stop: int, cancelled: Cancelled
) -> Hit | None:
    """Find the first line with the text that begins in ``[start, stop)``; `start` begins a line."""
    length = CHUNK
    while start < stop and not cancelled():
        data = file.read(start, min(length, stop - start))
        cut = data.rfind(b"\n") + 1
        if not cut:
            if len(data) < min(length, stop - start) or length > MAX_LINE:
                return None
            length *= 8
            continue
        folded = data.lower()
        for begin in _merged(partial(_forwards, folded, 0, cut), what.needles):
            record = confirmed(data[begin : data.find(b"\n", begin)], what)
            if record is not None:
                return Hit(start + begin, record)
        start, length = start + cut, CHUNK
    return None


def find_previous(
    file: LogFile, what: Sought, start: int, stop: int, cancelled: Cancelled
) -> Hit | None:
    """Find the last line with the text that begins in ``[start, stop)``; both begin a line."""
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
        folded = data.lower()
        for begin in _merged(partial(_backwards, folded, skip, len(data)), what.needles, -1):
            record = confirmed(data[begin : data.find(b"\n", begin)], what)
            if record is not None:
                return Hit(low + begin, record)
        stop, length = low + skip, CHUNK
    return None


def _merged(
    lines_with: Callable[[bytes], Iterator[int]], needles: Sequence[bytes], direction: int = 1
) -> Iterator[int]:
    """Where the lines begin that have one of the needles, each once, in order."""
    last = None
    for begin in heapq.merge(*map(lines_with, needles), reverse=direction < 0):
        if begin != last:
            yield begin
        last = begin


def _forwards(data: bytes, low: int, high: int, needle: bytes) -> Iterator[int]:
    while (at := data.find(needle, low, high)) >= 0:
        yield data.rfind(b"\n", 0, at) + 1
        low = data.find(b"\n", at) + 1


def _backwards(data: bytes, low: int, high: int, needle: bytes) -> Iterator[int]:
    while (at := data.rfind(needle, low, high)) >= 0:
        high = data.rfind(b"\n", 0, at) + 1
        yield high


def confirmed(line: bytes, what: Sought) -> Record | None:
    """Decode a line that may have the text; None if nothing that a person sees has it."""
    record = decode(line)
    if not isinstance(record, Record):
        return None
    location = getattr(record, "location", None)
    if location is not None and (location.file, location.line) in what.places:
        return record
    low = what.term.lower()
    if low in seen_text(record, what.modules).lower():
        return record
    # Written for what may be a shape only: it is more than all the other text of a record.
    return record if re.search(r"\[\d|\d, \d|\d\]", low) and low in shapes_text(record) else None


def seen_text(record: Record, modules: Mapping[str, Module]) -> str:
    """All that a person may look for in a record but shapes: names, class, code, message."""
    match record:
        case Module():
            return escape(f"{record.path}\n{record.cls}")
        case Header() | Source() | End():
            return ""
        case Finding():
            told = [record.code, record.check, record.message, record.module, record.op]
            told += [record.param, record.explanation, record.fix]
            texts = [escape(text) for text in told if text]
        case _:
            texts = list(name_of(Row(record, ""), modules))
    if isinstance(record, Call):
        texts.append(escape(record.module or ""))
    location = getattr(record, "location", None)
    if location is not None:
        texts += [location_text(location), escape(location.code or "")]
    return "\n".join(texts)


def shapes_text(record: Record) -> str:
    """The shapes of the tensors that a record describes."""
    match record:
        case Call(tensors=tensors) | Line(tensors=tensors):
            return "\n".join(shape_text(tensor.shape) for tensor in tensors)
        case Param(value=value):
            return shape_text(value.shape)
    return ""

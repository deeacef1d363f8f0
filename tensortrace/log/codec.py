"""One line of the log: a record as strict JSON, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tensortrace.details import well_typed
from tensortrace.records import FORMAT, Action, AnyRecord, Record

MAX_LINE = 16 << 20
# Larger whole numbers are no step of anybody's, and would not fit the arrays of a reader.
MAX_STEP = 1 << 53
HEADER_PREFIX = b'{"kind":"header"'


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


_MODULES = b',"modules":{'
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


def encode_all(records: Sequence[Record]) -> bytes:
    """Write records as `encode` does, at a third of its cost for each."""
    try:
        return _ENCODER.encode_lines(records)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return b"".join(map(encode, records))


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
    """Read one line; never raises. Unknown keys are skipped, an unknown kind is an `Unknown`.

    A key of an action's detail that has another type than `details` says is left out.
    """
    if len(line) > MAX_LINE:
        return Damaged(f"a line of {len(line)} bytes")
    try:
        record: Record = _DECODER.decode(line)
    except (ValueError, RecursionError, OverflowError, MemoryError) as err:
        return _undecoded(line, err)
    if not 0 <= record.step <= MAX_STEP:
        return Damaged(f"step {record.step}")
    return well_typed(record) if isinstance(record, Action) else record


def decode_head(line: bytes) -> Record | Unknown | Damaged:
    """Read a step line without its `modules`, the long part of it, if they come last."""
    at = line.rfind(_MODULES)
    if at > 0 and line.endswith(b"}}"):
        record = decode(line[:at] + b"}")
        if isinstance(record, Record):
            return record
    return decode(line)


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


def is_ours(start: bytes) -> bool:
    """Tell a log by its first bytes, also one that was killed while it wrote them."""
    ours = start.startswith(HEADER_PREFIX) and f'"format":"{FORMAT}"'.encode() in start
    return ours or (len(start) > 8 and HEADER_PREFIX.startswith(start))

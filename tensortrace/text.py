"""Words for people: what a log holds, as short safe text for a terminal.

Module names, exception texts and source lines are data: `escape` makes every control character
visible, so that none of them reaches a terminal.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import PurePath

from tensortrace.records import Finding, Location, Scalar, Severity

# C0, DEL and C1; every format character of Unicode (category Cf: bidirectional controls as in
# CVE-2021-42574, zero widths, tags, annotations); line and paragraph separators; lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]"
)

# Where an object lies in memory, as a repr says it.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")

# The folders that pip, and what Debian makes of it, installs into.
_INSTALLED = frozenset({"site-packages", "dist-packages"})

# Of a name that the program made (module, class, parameter, key); generated ones reach megabytes.
LONGEST_NAME = 1000
# What a log keeps of the text of one function.
LONGEST_SOURCE = 100_000

# What three digits make 1000 of is one of the next unit, and no 1e+03 of this one.
_ROUNDED = 0.9995

# Before a finding, on every screen.
SEVERITY_SIGN: dict[Severity, str] = {"error": "x", "warning": "!", "note": "i"}

_SHORT_DTYPES = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64",
    "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "uint16": "u16", "uint32": "u32",
    "uint64": "u64", "bool": "b8", "complex32": "c32", "complex64": "c64", "complex128": "c128",
    "float8_e4m3fn": "f8e4m3fn", "float8_e5m2": "f8e5m2", "float8_e4m3fnuz": "f8e4m3fnuz",
    "float8_e5m2fnuz": "f8e5m2fnuz", "float8_e8m0fnu": "f8e8m0fnu",
}  # fmt: skip


def escape(text: str) -> str:
    r"""Make control characters visible as ``\x1b`` or ``\u202e``; tabs become four spaces."""
    if text.isascii() and text.isprintable():
        return text
    return _CONTROL.sub(_visible, text.replace("\t", "    "))


def pasted(text: str) -> str:
    r"""Make a text safe to paste into a terminal: controls as ``\u009b``, which JSON reads back.

    Lines and tabs stay.
    """
    return _CONTROL.sub(_as_json, text)


def _as_json(match: re.Match[str]) -> str:
    if match[0] in "\n\t":
        return match[0]
    return json.dumps(match[0])[1:-1] if ord(match[0]) != 0x7F else "\\u007f"


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 256:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 65_536 else f"\\U{code:08x}"


def shorten(text: str, limit: int = LONGEST_NAME) -> str:
    """Cut a text that nobody can mean to read in full; its two ends stay, around an ellipsis."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def carries(encoding: str | None, text: str) -> bool:
    """Tell whether an encoding has all characters of a text; of one not known, only ASCII."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def without_address(text: str) -> str:
    """Leave out where objects lie in memory: it differs from run to run and is no news."""
    return _ADDRESS.sub("", text)


def short_dtype(dtype: str) -> str:
    """Abbreviate a dtype as PyTorch's own trackers do: ``f32``, ``bf16``, ``i64``."""
    return _SHORT_DTYPES.get(dtype, escape(dtype))


def shape_text(shape: tuple[int, ...] | None) -> str:
    """Write a shape as ``[8, 128, 768]``; ``[?]`` for a tensor that has none."""
    return "[?]" if shape is None else "[" + ", ".join(map(str, shape)) + "]"


def number_text(x: Scalar | None) -> str:
    """Write a number with three significant digits: ``0.0312``, ``5.1e+03``, ``NaN``, ``-``."""
    if x is None:
        return "-"
    value = float(x)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 10_000:
        return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.2g}" if abs(value) < 0.001 else f"{value:.1e}"


def duration_text(ns: float) -> str:
    """Write a time: ``12 µs``, ``3.1 ms``, ``1.2 s``."""
    for unit, scale in (("s", 1e9), ("ms", 1e6)):
        if ns >= _ROUNDED * scale:
            return f"{ns / scale:.3g} {unit}"
    return f"{ns / 1e3:.0f} µs"


def nbytes_text(nbytes: float) -> str:
    """Write a number of bytes: ``3.1 GB``, ``12 kB``, ``96 bytes``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= _ROUNDED * scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:g} bytes"


def module_text(path: str | None, cls: str | None = None) -> str:
    """Name a module for a person: its path, the class for the root, ``-`` outside every module.

    A path of numbers alone, as the children of a Sequential have them, says what it is: what would
    be read as a number becomes ``module 0.2``.
    """
    if path is None:
        return "-"
    text = escape(path or cls or "(root)")
    return f"module {text}" if text.replace(".", "").isdecimal() else text


def location_text(location: Location | None) -> str:
    """Write a location as ``file:line``, ``-`` if there is none."""
    return "-" if location is None else f"{escape(location.file)}:{location.line}"


def located_text(location: Location) -> str:
    """Write where a line is, its function, and its text if that is known."""
    where = f"{location_text(location)} in {escape(location.function)}"
    code = escape((location.code or "").strip())
    return f"{where}: {code}" if code else where


def is_installed(file: str) -> bool:
    """Whether a file belongs to an installed package, which is not the user's own code."""
    return not _INSTALLED.isdisjoint(PurePath(file).parts)


def step_text(finding: Finding) -> str:
    """Say in which step it was found, and after how many updates where steps do not count those.

    A validation batch, a micro-batch, a call of a policy is a step without an update.
    """
    each = finding.update in (0, finding.step, finding.step + 1)
    return f"step {finding.step}" + ("" if each else f" (update {finding.update})")


def finding_text(finding: Finding) -> str:
    """Tell a finding in a few plain lines: headline, place, line of code, reason, repair."""
    place = [step_text(finding)]
    if finding.module is not None:
        place.append(module_text(finding.module))
    if finding.op:
        place.append(escape(finding.op))
    if finding.param:
        place.append(escape(finding.param))
    lines = [
        f"{finding.severity} {finding.code} {escape(finding.check)}: {escape(finding.message)}",
        "  at " + ", ".join(place),
    ]
    if finding.location:
        lines.append(f"  {located_text(finding.location)}")
        if finding.location.caller:
            lines.append(f"  called at {located_text(finding.location.caller)}")
    lines += [f"  why: {escape(line)}" for line in finding.explanation.splitlines()[:1]]
    lines += [f"  fix: {escape(line)}" for line in finding.fix.splitlines()[:1]]
    return "\n".join(lines)

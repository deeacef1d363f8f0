"""Compare what an exporter writes with what lies in `golden/`, byte by byte."""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
REWRITE = "TENSORTRACE_REWRITE_GOLDEN"


def assert_golden(name: str, text: str) -> None:
    """Compare with `golden/<name>`; TENSORTRACE_REWRITE_GOLDEN=1 writes it instead.

    A name without a suffix means a ``.txt`` file.
    """
    file = GOLDEN / (name if "." in name else f"{name}.txt")
    if os.environ.get(REWRITE) == "1":
        file.write_bytes(text.encode())
    assert text.encode() == file.read_bytes()

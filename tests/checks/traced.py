"""Faulty programs are traced for real, and read again as a log would be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tensortrace import trace
from tensortrace.checks import select
from tensortrace.engine import Engine
from tensortrace.records import Finding
from tests.capture import Recorded
from tests.neutral import one_thread


def find_live(
    program: Callable[[], Any], *codes: str, ends: type[Exception] | None = None, **options: Any
) -> list[Finding]:
    """Run a program from a fixed seed under the checks named; a saved log must say the same.

    Args:
        ends: the exception that it ends with.
    """
    records = Recorded()
    expected = contextlib.nullcontext() if ends is None else pytest.raises(ends)
    with (
        expected,
        one_thread(),
        trace(out=records.append, checks=list(codes) or None, **options),
    ):
        torch.manual_seed(0)
        program()
    assert [a.detail for a in records.actions("tracer_error")] == []
    engine = Engine(select(codes or None))
    again = [finding for record in records for finding in engine.feed(record)]
    assert engine.problems == []
    assert again == records.of(Finding)
    return again

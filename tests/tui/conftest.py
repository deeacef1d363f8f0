"""What every test of the viewer runs under."""

from __future__ import annotations

import pytest

from tensortrace.tui import frame


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages stay until they are taken away: a busy machine may look for one seconds later."""
    monkeypatch.setattr(frame, "TOLD_S", 600)

"""What every test runs under: Hypothesis draws the same examples each time.

A landing must not hang on the luck of a draw; `pytest --hypothesis-profile=default` draws new ones.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.load_profile("same")

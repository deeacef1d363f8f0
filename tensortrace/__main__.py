"""`python -m tensortrace` is the same as `tensortrace`."""

from __future__ import annotations

import sys

from tensortrace.cli import main

if __name__ == "__main__":
    sys.exit(main())

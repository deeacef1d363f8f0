"""The Triton kernels, read by Triton's interpreter on the CPU.

Triton comes with the CUDA builds of torch and is installed nowhere else: without it this is skipped
(``pip install triton``; its interpreter needs a NumPy before 2.4).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent / "interpreted_kernel.py"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_agree_with_the_oracle_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "--no-header", str(_TESTS)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:]

"""The Triton kernels, read by Triton's interpreter on the CPU.

Triton comes with the CUDA builds of torch and is installed nowhere else: without it this is skipped
(``pip install triton``; its interpreter needs a NumPy before 2.4).
"""

from __future__ import annotations

import importlib.util
import inspect
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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.filterwarnings("ignore::UserWarning:triton")  # of the compiler's own plans
@pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")  # of its parser, Python 3.13
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_a_gpu_that_is_not_there(architecture: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tensortrace.capture.stats.cuda import kernel as cuda_kernel

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("Triton before 3.3 is asked in another way")
    whole = dict.fromkeys(("n", "tiles", "first", "parts", "pitch", "sampled"), "i32")
    flags = dict.fromkeys(("WIDE", "SCALED", "BLOCK"), "constexpr")
    aligned = {(0,): [["tt.divisibility", 16]]}
    for dtype, wide in (("fp32", False), ("bf16", False), ("fp64", True), ("i64", True)):
        source = ASTSource(
            fn=cuda_kernel.reduce,
            signature={"source": f"*{dtype}", "rows": "*fp64", **whole, **flags},
            constexprs={"WIDE": wide, "SCALED": dtype == "fp64", "BLOCK": 1024},
            attrs=aligned,
        )
        target = GPUTarget("cuda", architecture, 32)
        ptx = triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]
        # Whole blocks are read by 16 bytes or a row of them at a time.
        assert "ld.global.v" in ptx

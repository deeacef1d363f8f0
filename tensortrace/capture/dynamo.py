"""What Dynamo leaves to Python: code of ours that runs where the program's is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_eval_frame: Any = torch._C._dynamo.eval_frame


def leave_to_python(function: F) -> F:
    """Have Dynamo compile no frame of a function, nor what is called in it.

    In code of torch's own layers that it leaves alone, ours would be the first frame that it
    takes: each op would be compiled by itself, and round otherwise; and so would what our trace
    function calls while Dynamo traces.
    """
    strategy = getattr(_eval_frame, "_FrameExecStrategy", None)
    if strategy is not None and hasattr(_eval_frame, "set_code_exec_strategy"):
        skip = _eval_frame._FrameAction.SKIP
        _eval_frame.set_code_exec_strategy(function.__code__, strategy(skip, skip))
    return function  # of another torch version as it is

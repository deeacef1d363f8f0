"""The first line of a log: what runs, where, with which versions and settings."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import torch

from tensortrace.capture.compiled import kernel_name
from tensortrace.log import ranks_of_environment
from tensortrace.records import FORMAT, FORMAT_VERSION, Header
from tensortrace.text import shorten
from tensortrace.version import __version__

# A shell can expand one star to a hundred thousand names.
_ARGUMENTS = 200


def ranks() -> tuple[int, int]:
    """The rank of this process and how many there are: of the process group, or as torchrun says.

    A program may tell both to `init_process_group` alone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ranks_of_environment()


def make_header(options: dict[str, Any], rank: int, count: int) -> Header:
    """Describe the process, one of `count`, as it is now; changes nothing and starts no device."""
    return Header(
        step=0,
        format=FORMAT,
        version=FORMAT_VERSION,
        run_id=uuid.uuid4().hex,
        time_ns=time.time_ns(),
        argv=[shorten(argument, 4096) for argument in sys.argv[:_ARGUMENTS]],
        python=platform.python_version(),
        torch=str(torch.__version__),
        tensortrace=__version__,
        hostname=socket.gethostname(),
        pid=os.getpid(),
        cwd=_folder(),
        rank=rank,
        world_size=count,
        seed=torch.initial_seed(),
        deterministic={
            "algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn": bool(torch.backends.cudnn.deterministic),
            "cudnn_benchmark": bool(torch.backends.cudnn.benchmark),
            "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
        },
        kernel=kernel_name(),
        options=options,
    )


def _folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return ""  # it was removed

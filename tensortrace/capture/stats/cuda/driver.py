"""What is asked of CUDA besides kernels: streams, pinned memory, capture. Tests answer instead."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["Driver"]


class Driver:
    """Streams and host memory, as `torch.cuda` has them."""

    def current(self, device: torch.device) -> Any:
        """The current stream of a device: what kernels of this thread run on."""
        return torch.cuda.current_stream(device)

    def at(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make a device the current one: kernels that torch does not start run there."""
        if torch.cuda.current_device() == device.index:
            return nullcontext()
        return torch.cuda.device(device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream, and its device, the current ones."""
        return torch.cuda.stream(stream)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]

    def is_capturing(self) -> bool:
        """Whether what the current stream is given goes into a CUDA graph instead of running."""
        return torch.cuda.is_current_stream_capturing()

    def hold(self, tensor: torch.Tensor, stream: Any) -> None:
        """Keep the allocator from giving memory away that a stream still reads.

        Costs nothing for memory that was allocated on that stream.
        """
        tensor.record_stream(stream)

    def pinned(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory that a device copies from and to while the host goes on."""
        return torch.empty((rows, columns), dtype=dtype, device="cpu", pin_memory=True)

    def wait(self, streams: Iterable[Any]) -> None:
        """Let the host wait for all that was given to some streams: one wait for each device."""
        last: dict[Any, Any] = {}
        for stream in streams:
            known = last.setdefault(stream.device, stream)
            if known != stream:
                # The host waits for both anyway.
                known.wait_stream(stream)
        for stream in last.values():
            stream.synchronize()

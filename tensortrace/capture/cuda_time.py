"""How long a GPU works on what a module starts, by CUDA events around its calls.

Recording an event waits for nothing; the time between two is read at the gate, which waits for the
device anyway. A hot path of full steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from tensortrace.signal_handlers import let_through

__all__ = ["DeviceTimes"]

# Calls that are timed between two gates, at most.
MOST = 2048


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class DeviceTimes:
    """Times calls on the device; the events are used again.

    Args:
        event: makes an event, of the device on whose stream it is first recorded.
    """

    def __init__(self, event: Callable[[], Any] = _event) -> None:
        self._event = event
        # An event belongs to one device.
        self._free: dict[int, list[Any]] = {}
        self._kept: list[tuple[int, Any, Any, dict[str, Any]]] = []
        self._works = True

    def begin(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[int, Any] | None:
        """Note that a call begins.

        Args:
            tensors: what it is given, by name: it runs on the device of the first that is on one.
        Returns:
            What `end` takes; None if it is not timed.
        """
        if not self._works or len(self._kept) >= MOST:
            return None
        try:
            if torch.cuda.is_current_stream_capturing():
                return None
            where = next((t.device.index for _, t in tensors if t.is_cuda), None)
            device = torch.cuda.current_device() if where is None else where
            return device, self._record(device)
        except Exception as error:
            let_through(error)
            self._works = False
            return None

    def end(self, begun: tuple[int, Any], fields: dict[str, Any]) -> None:
        """Note that a call is over; `device_ns` of its fields is filled in with the next `read`."""
        device, began = begun
        try:
            if self._works and not torch.cuda.is_current_stream_capturing():
                self._kept.append((device, began, self._record(device), fields))
        except Exception as error:
            let_through(error)
            self._works = False

    def read(self) -> None:
        """Read what is over by now; call it after a wait for the device, and wait for nothing.

        A call that the device still works on has no time: its stream was not waited for.
        """
        kept, self._kept = self._kept, []
        if not kept or not self._works:
            return
        try:
            if torch.cuda.is_current_stream_capturing():
                return
            for device, began, ended, fields in kept:
                if began.query() and ended.query():
                    passed = round(began.elapsed_time(ended) * 1e6)
                    if passed >= 0:
                        fields["device_ns"] = passed
                    self._free.setdefault(device, []).extend((began, ended))
        except Exception as error:
            let_through(error)
            self._works = False

    def _record(self, device: int) -> Any:
        free = self._free.get(device)
        event = free.pop() if free else self._event()
        event.record(torch.cuda.current_stream(device))
        return event

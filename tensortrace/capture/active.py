"""The one slot that names the recorder at work, and what each thread remembers.

The hooks themselves are stateless functions: they look the recorder up here. A hook object with
attributes of its own would make Dynamo recompile (mechanism: guards on mutating attributes).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch

from tensortrace.errors import TraceStoppedError

if TYPE_CHECKING:
    from tensortrace.capture.lines.frames import FrameTrace
    from tensortrace.capture.modules import OpenCall
    from tensortrace.capture.receiver import Receiver
    from tensortrace.capture.recorder import Recorder
    from tensortrace.capture.tracer import Trace

_PATIENCE_S = 10.0


class Slot:
    """Holds the recorder that hooks report to; None makes every hook a no-op.

    `hooks` are those in place, once however many traces use them: registered twice, they would
    report everything twice. `running` is the trace whose run is in flight, also while a replay has
    put a recorder of its own here. Whoever begins or ends a run holds `lock`. `training` are the
    threads that have run backward or stepped an optimizer since; `called` those, by number, that
    did not enter the run and have called a module with gradients enabled: they may only predict.
    """

    __slots__ = ("called", "hooks", "lock", "recorder", "running", "training", "users")

    def __init__(self) -> None:
        self.recorder: Receiver | None = None
        self.running: Trace | None = None
        self.hooks: list[Any] = []
        self.users = 0
        # Taken again by its own thread where the end of a block is met by garbage collection.
        self.lock = threading.RLock()
        self.training: set[threading.Thread] = set()
        self.called: set[int] = set()

    def followed(self) -> Recorder | None:
        """Who is told of what the loop does: nobody while a replay runs."""
        recorder = self.recorder
        return None if recorder is None or recorder.replaying else cast("Recorder", recorder)

    def note_training(self) -> None:
        """Note that this thread trains. Hot."""
        self.training.add(threading.current_thread())

    def note_gradient(self) -> bool:
        """Note that a gradient has come in this thread, or in one of autograd's own.

        Returns:
            Whether the thread has only called modules before.
        """
        thread = threading.get_ident()
        if thread not in self.called:
            return False
        self.called.discard(thread)
        self.note_training()
        return True

    def several_train(self) -> bool:
        """Whether several living threads train: then what one asks may be another's. Hot."""
        if len(self.training) < 2:
            return False
        # Those of DataParallel have ended when backward begins.
        self.training = {thread for thread in list(self.training) if thread.is_alive()}
        return len(self.training) > 1


class ThreadState(threading.local):
    """What one thread is inside of.

    `stack` are the module calls it is in. While `busy` is positive our own code runs and nothing is
    recorded. `synced` counts, in one step of one recorder, the waits for a device. `line` is the
    innermost frame whose source lines are recorded. Between `rest` and `go_on`, which are called
    around our own code, Python's trace function is not called; they do nothing unless source lines
    are followed in this thread.
    """

    def __init__(self) -> None:
        self.stack: list[OpenCall] = []
        self.busy = 0
        self.synced = ((0, 0), 0)
        self.line: FrameTrace | None = None
        # `bool` is the cheapest callable that does nothing.
        self.rest: Callable[[], object] = bool
        self.go_on: Callable[[], object] = bool


slot = Slot()
here = ThreadState()


class Alone:
    """No other thread begins or ends a run meanwhile.

    It is not waited for without end: the end of a run may call the user's own code, and that may
    wait for a thread which is about to enter a block.
    """

    __slots__ = ("_lock", "_taken")

    def __enter__(self) -> None:
        self._lock = slot.lock
        self._taken = self._lock.acquire(timeout=_PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        if self._taken:
            self._lock.release()


class Ours:
    """Our own code runs: nothing in it is recorded, and its failure is a fault, not the user's.

    What runs for every call or op writes this out, since a ``with`` of its own costs a microsecond.

    Args:
        recorder: is told of a failure; None where there is none yet.
        part: of the tracing, that stops then.
    """

    __slots__ = ("_guard", "_part", "_recorder")

    def __init__(self, recorder: Receiver | None, part: str) -> None:
        self._recorder, self._part = recorder, part

    def __enter__(self) -> None:
        self._guard = torch._C.DisableTorchFunction()
        here.busy += 1
        try:
            self._guard.__enter__()
            here.rest()
        except BaseException:  # of a signal handler: then nobody calls `__exit__`
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        try:
            if not isinstance(error, Exception) or isinstance(error, TraceStoppedError):
                return False
            if self._recorder is not None:
                self._recorder.fault(self._part, error)
            return True
        finally:
            here.busy -= 1
            try:
                here.go_on()
            finally:
                self._guard.__exit__(None, None, None)


def _forget() -> None:
    slot.recorder = slot.running = None
    slot.lock = threading.RLock()  # another thread may have held it, which is not in the child


# A forked child (a DataLoader worker) must neither record nor write.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

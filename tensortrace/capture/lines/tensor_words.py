"""Words for a tensor, as TorchSnooper has them: ``tensor<(8, 10), float32, cpu, grad, has_nan>``.

Built on its `TensorFormat`, and on the statistics that the log has: nothing is computed for it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tensortrace.records import Tensor
from tensortrace.text import number_text

if TYPE_CHECKING:
    from tensortrace.capture.tensors import TensorDraft

_STAND_IN = "pkg_resources"
# Why there are no statistics, where that says nothing about the tensor.
_OURS = ("off", "not asked")


def import_torchsnooper() -> Any:
    """TorchSnooper, also where setuptools has no `pkg_resources` any more.

    It asks `pkg_resources` for its own version only. While it is imported, and no longer, a module
    with the two names that it asks for stands there.
    """
    if "torchsnooper" in sys.modules:
        return sys.modules["torchsnooper"]
    before = sys.modules.get(_STAND_IN)
    sys.modules[_STAND_IN] = _stand_in()
    try:
        import torchsnooper
    finally:
        if before is None:
            del sys.modules[_STAND_IN]
        else:
            sys.modules[_STAND_IN] = before
    return torchsnooper


def _stand_in() -> types.ModuleType:
    class DistributionNotFound(Exception):  # noqa: N818 the name that TorchSnooper imports
        pass

    def get_distribution(name: str) -> Any:
        raise DistributionNotFound(name)

    module: Any = types.ModuleType(_STAND_IN)
    module.get_distribution, module.DistributionNotFound = get_distribution, DistributionNotFound
    return module  # type: ignore[no-any-return]


def make_tensor_words(statistics: bool) -> TensorWords:
    """What puts a described tensor into words, with its mean and std if they are wanted."""
    base: Any = import_torchsnooper().TensorFormat

    class Format(base):  # type: ignore[misc] # TorchSnooper has no types
        """`TensorFormat` of a tensor's description, with what it does not know."""

        def repr_shape(self, tensor: Tensor) -> str:
            return "(?)" if tensor.shape is None else str(tensor.shape)

        def repr_dtype(self, tensor: Tensor) -> str:
            return tensor.dtype

        def repr_has_nan(self, tensor: Tensor) -> str:
            return "has_nan" if tensor.nan else ""

        def repr_has_inf(self, tensor: Tensor) -> str:
            return "has_inf" if tensor.posinf or tensor.neginf else ""

        def repr_statistics(self, tensor: Tensor) -> str:
            if tensor.mean is None:
                return ""
            return f"mean={number_text(tensor.mean)}, std={number_text(tensor.std)}"

        def repr_unmeasured(self, tensor: Tensor) -> str:
            why = tensor.unmeasured
            return "" if why is None or why.startswith(_OURS) or why == tensor.device else why

    properties = ("shape", "dtype", "device", "requires_grad", "has_nan", "has_inf", "unmeasured")
    words = Format(properties=(*properties, "statistics") if statistics else properties)
    return TensorWords(words, statistics)


# Words for tensors that are not worth to be kept for their own sake.
_MOST = 1000


class TensorWords:
    """Puts described tensors into words.

    Args:
        format: makes the words.
        statistics: whether they hold numbers, so that few tensors share them.
    """

    def __init__(self, format: Callable[[Tensor], str], statistics: bool = False) -> None:
        self._format, self._statistics = format, statistics
        self._words: dict[tuple[Any, ...], str] = {}

    def say(self, draft: TensorDraft) -> str:
        """Words for a tensor whose description is finished with this."""
        return self._say(draft.record())

    def say_now(self, draft: TensorDraft) -> str:
        """The same while its description may still grow."""
        return self._say(draft.peek())

    def _say(self, tensor: Tensor) -> str:
        if self._statistics:
            return self._format(tensor)
        known_by = (
            tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, tensor.nan > 0,
            tensor.posinf > 0, tensor.neginf > 0, tensor.unmeasured,
        )  # fmt: skip
        words = self._words.get(known_by)
        if words is None:
            if len(self._words) >= _MOST:
                self._words.clear()
            words = self._words[known_by] = self._format(tensor)
        return words

"""What of a tensor can be measured, and how to look at it unseen.

A hot path: `plain` is called for every traced tensor.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch._C import DispatchKey, DispatchKeySet

__all__ = ["is_dense_cpu", "plain", "quiet"]

_functorch = torch._C._functorch  # type: ignore[attr-defined]
_dispatch_keys = torch._C._dispatch_keys


def _hidden_keys() -> DispatchKeySet:
    """Everything above the kernels that a user may have switched on, but for autograd."""
    keys = DispatchKeySet(DispatchKey.Python)
    for name in (
        "PythonTLSSnapshot", "PythonDispatcher", "PreDispatch", "Functionalize", "FuncTorchBatched",
        "FuncTorchGradWrapper", "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode",
        "FuncTorchVmapMode", "FuncTorchBatchedDecomposition", "VmapMode", "AutocastCPU",
        "AutocastCUDA", "AutocastMPS", "AutocastXPU", "AutocastHPU", "AutocastXLA",
        "AutocastPrivateUse1",
    ):  # fmt: skip
        key = getattr(DispatchKey, name, None)
        if key is not None:
            keys = keys | DispatchKeySet(key)
    return keys


_HIDDEN = _hidden_keys()
# The dispatch keys of an ordinary dense tensor: whoever has another one (functorch, Python, sparse,
# quantized, nested, meta, negative or conjugate view, zero tensor, functional) is looked at closer.
_DENSE_CPU = _dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
_DEVICES = {"cpu", "cuda", "mps", "xpu"}


class quiet:
    """Run our own kernels unseen: no user mode, functorch level, autograd or autocast takes part.

    Thread-local, so one object serves one ``with`` of one thread; blocks may be nested.
    """

    __slots__ = ("_function", "_grad", "_keys")

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._function = torch._C.DisableTorchFunction()
        self._keys = torch._C._ExcludeDispatchKeyGuard(_HIDDEN)
        self._function.__enter__()
        self._keys.__enter__()
        torch._C._set_grad_enabled(False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        torch._C._set_grad_enabled(self._grad)
        self._keys.__exit__(kind, error, trace)
        self._function.__exit__(kind, error, trace)


def is_dense_cpu(tensor: torch.Tensor) -> bool:
    """Say whether this is an ordinary strided CPU tensor with nothing wrapped around its memory."""
    return not _dispatch_keys(tensor).raw_repr() & ~_DENSE_CPU


def plain(tensor: torch.Tensor) -> torch.Tensor | str:
    """Find the dense tensor to measure behind wrappers, or say why there is none.

    Call it inside `quiet`. Sparse tensors give the values that they store, as they are (an
    uncoalesced one is not coalesced), DTensor its local shard, jagged tensors all their values.

    Args:
        tensor: any shape, dtype, layout or subclass; not modified.
    Returns:
        A strided tensor with memory of its own, or one of "capturing", "fake", "functional",
        "functorch", "meta", "mkldnn", "nested", "no storage", "quantized", "subclass X".
    """
    if is_dense_cpu(tensor):
        return tensor if _is_backed(tensor) else "no storage"
    if _functorch.is_legacy_batchedtensor(tensor):
        return "functorch"
    if _functorch.is_functorch_wrapped_tensor(tensor):
        return plain(_functorch.get_unwrapped(tensor))
    if _dispatch_keys(tensor).has(DispatchKey.Python):
        return _inside_subclass(tensor)
    if torch._is_functional_tensor(tensor):  # type: ignore[attr-defined]
        return "functional"
    return _dense(tensor)


def _inside_subclass(tensor: torch.Tensor) -> torch.Tensor | str:
    kind = type(tensor)
    if kind.__name__ in ("FakeTensor", "FunctionalTensor"):
        return "fake" if kind.__name__ == "FakeTensor" else "functional"
    # A DTensor, and a jagged nested tensor: both keep one dense tensor inside.
    name = "_values" if tensor.is_nested else "_local_tensor"
    inner = getattr(tensor, name, None)
    return plain(inner) if isinstance(inner, torch.Tensor) else f"subclass {kind.__name__}"


def _dense(tensor: torch.Tensor) -> torch.Tensor | str:
    why = _unreadable(tensor)
    if why:
        return why
    if tensor.layout is torch.sparse_coo:
        return plain(tensor._values())
    if tensor.layout is not torch.strided:
        return plain(tensor.values())
    if tensor._is_zerotensor():
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return tensor if _is_backed(tensor) else "no storage"


def _unreadable(tensor: torch.Tensor) -> str | None:
    """Name what has no numbers that we could read."""
    for name in ("nested", "quantized", "meta", "mkldnn"):
        if getattr(tensor, f"is_{name}"):
            return name
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        # A kernel of ours would become part of the user's graph.
        return "capturing"
    return None


def _is_backed(tensor: torch.Tensor) -> bool:
    """FSDP frees a parameter by shrinking its storage to nothing; reading it would crash."""
    if tensor.numel() == 0:
        return True
    last = tensor.storage_offset()
    if tensor.is_contiguous():
        last += tensor.numel()
    else:
        last += 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return last * tensor.element_size() <= tensor.untyped_storage().nbytes()

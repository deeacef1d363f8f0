"""What of a tensor can be measured, and how to look at it unseen.

A hot path: `plain` is called for every traced tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch._C import DispatchKey, DispatchKeySet

if TYPE_CHECKING:
    from torch.autograd.graph import Node

__all__ = [
    "DENSE_CPU", "HAS_DOUBLE", "blocks", "dispatch_keys", "distinct", "extent", "is_backed",
    "is_dense_cpu", "is_wrapped", "node_of", "plain", "quiet",
]  # fmt: skip

HAS_DOUBLE = {"cpu", "cuda"}
_WIDE = {torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64}

_functorch = torch._C._functorch
dispatch_keys = torch._C._dispatch_keys


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
DENSE_CPU = dispatch_keys(torch.empty(0, device="cpu")).raw_repr()


class quiet:
    """Run our own kernels unseen: no user mode, functorch level, autograd or autocast takes part.

    Thread-local, so one object serves one ``with`` of one thread; blocks may be nested.
    """

    __slots__ = ("_function", "_grad", "_keys")

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._function = torch._C.DisableTorchFunction()
        self._keys = torch._C._ExcludeDispatchKeyGuard(_HIDDEN)
        try:
            self._function.__enter__()
            self._keys.__enter__()  # type: ignore[no-untyped-call]
            torch._C._set_grad_enabled(False)
        except BaseException as error:  # of a signal handler: then nobody calls `__exit__`
            self.__exit__(type(error), error, None)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            torch._C._set_grad_enabled(self._grad)
        finally:
            try:
                self._keys.__exit__(kind, error, trace)
            finally:
                self._function.__exit__(kind, error, trace)


def is_dense_cpu(tensor: torch.Tensor) -> bool:
    """Say whether this is an ordinary strided CPU tensor with nothing wrapped around its memory."""
    return not dispatch_keys(tensor).raw_repr() & ~DENSE_CPU


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Say whether operators on a tensor are code in Python: of DTensor, MaskedTensor, jagged ones.

    Such a tensor has no memory of its own. Inside `quiet` an operator takes it for one that has,
    and reading what that returns ends the process.
    """
    return bool(dispatch_keys(tensor).has(DispatchKey.Python))


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
        return tensor if not tensor.numel() or is_backed(tensor) else "no storage"
    if _functorch.is_legacy_batchedtensor(tensor):
        return "functorch"
    if _functorch.is_functorch_wrapped_tensor(tensor):
        return plain(_functorch.get_unwrapped(tensor))
    if is_wrapped(tensor):
        return _inside_subclass(tensor)
    if torch._is_functional_tensor(tensor):
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
    return tensor if not tensor.numel() or is_backed(tensor) else "no storage"


def _unreadable(tensor: torch.Tensor) -> str | None:
    """Name what has no numbers that we could read."""
    for name in ("nested", "quantized", "meta", "mkldnn"):
        if getattr(tensor, f"is_{name}"):
            return name
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        # A kernel of ours would become part of the user's graph.
        return "capturing"
    return None


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Count the elements of memory from the first that is used to the last; none of them empty."""
    end = 1
    for n, stride in zip(shape, strides, strict=True):
        end += (n - 1) * stride
    return end


def is_backed(tensor: torch.Tensor) -> bool:
    """Say whether the memory of a non-empty tensor is there.

    FSDP frees a parameter by shrinking its storage to nothing; to read it would crash the process.
    """
    whole = tensor.is_contiguous()
    used = tensor.numel() if whole else extent(tensor.shape, tensor.stride())
    end = tensor.storage_offset() + used
    return end * tensor.element_size() <= tensor.untyped_storage().nbytes()


def distinct(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Take one of each expanded dim: the tensor that is really there, and how many times it is."""
    times = 1
    if 0 in tensor.stride():
        for dim in reversed(range(tensor.ndim)):
            if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
                times *= tensor.shape[dim]
                tensor = tensor.select(dim, 0)
    return tensor, times


def blocks(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Cut a tensor into flat contiguous pieces of f32 or f64, in whatever order is cheapest."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    n = tensor.numel()
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        for start in range(0, n, limit):
            yield _real(flat if n <= limit else flat.narrow(0, start, min(limit, n - start)))
    elif n <= limit:
        yield _real(tensor.contiguous().view(-1))
    else:
        # Cut along the outermost dim; where one slice of it is still too large, cut that.
        inner = n // tensor.shape[0]
        for part in torch.split(tensor, max(1, limit // inner)):
            yield from blocks(part if inner <= limit else part[0], limit)


def _real(block: torch.Tensor) -> torch.Tensor:
    dtype = block.dtype
    if dtype is torch.float32 or dtype is torch.float64:
        return block.resolve_neg()
    if not dtype.is_complex:
        wide = dtype in _WIDE and block.device.type in HAS_DOUBLE
        return block.to(torch.float64 if wide else torch.float32)
    pairs = torch.view_as_real(block.resolve_conj().resolve_neg())
    if dtype is torch.complex32:
        pairs = pairs.float()
    real, imag = pairs.unbind(-1)
    # The modulus of (nan, inf) is inf by C's hypot; what the user has is a NaN.
    return torch.hypot(real, imag).masked_fill_(real.isnan() | imag.isnan(), math.nan)


def node_of(tensor: torch.Tensor) -> Node | None:
    """The node that made a tensor; None for a leaf, and where asking would do more than tell. Hot.

    Of a view whose base was changed in place it would build a node that the graph does not use.
    """
    try:
        return None if tensor._is_view() and tensor._version else tensor.grad_fn
    except RuntimeError:
        return None  # a view made in no_grad whose base was then modified in place

"""How functions of torch's are called in records, which are no ops, and their arguments."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tensortrace.records import to_scalar
from tensortrace.text import shorten

__all__ = ["BACKWARD", "HOOKS", "SYNCS", "arguments_of", "op_of"]

# Calls that compute nothing worth a record, by name.
_SILENT = frozenset({
    "__get__", "__set__", "__len__", "__repr__", "__str__", "__format__", "__hash__", "__bool__",
    "__int__", "__float__", "__index__", "__iter__", "__deepcopy__", "__reduce_ex__", "__dir__",
    "__contains__", "__array__", "__dlpack__", "__dlpack_device__", "__setstate__", "size", "dim",
    "ndimension", "stride", "numel", "nelement", "is_floating_point", "is_complex",
    "is_contiguous", "is_same_size", "is_pinned", "is_inference", "is_shared", "is_tensor",
    "is_storage", "requires_grad_", "data_ptr", "get_device", "item", "tolist", "numpy",
    "storage", "storage_offset", "untyped_storage", "element_size", "detach", "detach_",
    "register_hook", "retain_grad", "_is_view", "_set_grad_enabled", "has_names",
    "register_post_accumulate_grad_hook", "_is_zerotensor", "is_conj", "is_neg", "is_set_to",
    "share_memory_", "pin_memory", "record_stream", "manual_seed", "set_printoptions",
    "broadcast_shapes", "result_type", "can_cast", "promote_types", "is_grad_enabled",
    "get_default_dtype",
})  # fmt: skip
# Of these, those that wait until a device has computed what is asked for.
SYNCS = frozenset({
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__repr__",
    "__format__", "__array__", "__contains__",
})  # fmt: skip
_SILENT_PREFIXES = ("_foreach", "_amp", "_record_function", "_fused", "__torch", "is_autocast")
HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
BACKWARD = frozenset({"backward", "grad"})
# Python's operators under the names of the functions that they call.
_OPERATORS = {
    "__rdiv__": "div", "__rtruediv__": "div", "__truediv__": "div", "__rsub__": "sub",
    "__rpow__": "pow", "__pow__": "pow", "__rmatmul__": "matmul", "__matmul__": "matmul",
    "__radd__": "add", "__rmul__": "mul", "__getitem__": "getitem", "__setitem__": "setitem",
    "__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__gt__": "gt", "__le__": "le", "__ge__": "ge",
    "__and__": "and", "__or__": "or", "__xor__": "xor", "__invert__": "invert",
    "__rfloordiv__": "floor_divide", "__floordiv__": "floor_divide", "__rmod__": "remainder",
    "__lshift__": "bitwise_left_shift", "__rshift__": "bitwise_right_shift", "__iand__": "and_",
    "__ior__": "or_", "__ixor__": "xor_", "linalg_vector_norm": "norm",
}  # fmt: skip
# How the arguments after the first are called, where Python gives positions only.
_POSITIONS = {
    "softmax": ("dim", "dtype"), "log_softmax": ("dim", "dtype"), "sum": ("dim", "keepdim"),
    "mean": ("dim", "keepdim"), "std": ("dim", "correction"), "var": ("dim", "correction"),
    "norm": ("p", "dim"), "pow": ("exponent",), "clamp": ("min", "max"), "clip": ("min", "max"),
    "clamp_min": ("min",), "clamp_max": ("max",), "masked_fill": ("mask", "value"),
    "view": ("shape",), "reshape": ("shape",), "transpose": ("dim0", "dim1"), "permute": ("dims",),
    "unsqueeze": ("dim",), "squeeze": ("dim",), "max": ("dim",), "min": ("dim",),
    "argmax": ("dim",), "prod": ("dim",), "cumsum": ("dim",), "cumprod": ("dim",),
    "logsumexp": ("dim",), "chunk": ("chunks", "dim"), "split": ("split_size", "dim"),
    "normalize": ("p", "dim", "eps"), "add": ("other",), "sub": ("other",), "mul": ("other",),
    "div": ("other",), "to": ("dtype",), "dropout": ("p", "training"),
}  # fmt: skip


@functools.lru_cache(4096)
def op_of(name: str) -> str | None:
    """What an op is called in a record, by the name of its function; None if it gets none."""
    if name in _SILENT or name.startswith(_SILENT_PREFIXES):
        return None
    return _OPERATORS.get(name, name)


def arguments_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are no tensors and say what an op does: dim, eps, p, dtype, alpha."""
    found: dict[str, Any] = {}
    names = _POSITIONS.get(name.rstrip("_"), ())
    for i, value in enumerate(args[1:]):
        text = _argument(value)
        if text is not None:
            found[names[i] if i < len(names) else str(i + 1)] = text
    for key, value in kwargs.items():
        text = _argument(value)
        if text is not None:
            found[shorten(key)] = text
    return found


def _argument(value: Any) -> Any:
    if value is None or isinstance(value, torch.Tensor):
        return None
    if isinstance(value, float):
        return to_scalar(value)
    if isinstance(value, (bool, int, str)):
        return value if not isinstance(value, str) else value[:80]
    if isinstance(value, (tuple, list)) and len(value) <= 8:
        parts = []
        for part in value:
            found = _argument(part)
            if found is None:
                return None
            parts.append(found)
        return parts
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    return None

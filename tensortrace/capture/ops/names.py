"""How functions of torch's are called in records, which are no ops, and their arguments."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tensortrace.records import to_scalar
from tensortrace.text import shorten

__all__ = ["BACKWARD", "HOOKS", "REVERSED", "SYNCS", "arguments_of", "op_of"]

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
# Of these, those that get their right operand first: `2 - w` calls `w.__rsub__(2)`.
REVERSED = frozenset({
    "__rdiv__", "__rtruediv__", "__rsub__", "__rpow__", "__rmatmul__", "__rfloordiv__", "__rmod__",
    "__rlshift__", "__rrshift__",
})  # fmt: skip
# How the first argument is called where it is no tensor.
_FIRST = {
    "pow": "base", "float_power": "base", "sub": "self", "div": "self", "floor_divide": "self",
    "remainder": "self", "full": "shape", "einsum": "equation", "eye": "n", "randperm": "n",
    "linspace": "start", "logspace": "start", "normal": "mean",
}  # fmt: skip
# Those that take a shape or dims as one argument or as several: where they begin, what they are.
_SEVERAL = {
    "view": (1, "shape"), "reshape": (1, "shape"), "expand": (1, "shape"), "permute": (1, "dims"),
    "flip": (1, "dims"), "repeat": (1, "repeats"), "tile": (1, "dims"), "randn": (0, "shape"),
    "rand": (0, "shape"), "zeros": (0, "shape"), "ones": (0, "shape"), "empty": (0, "shape"),
    "new_zeros": (1, "shape"), "new_ones": (1, "shape"), "new_empty": (1, "shape"),
}  # fmt: skip
# What they are given is what comes out, and that is described.
_DATA = frozenset({"tensor", "as_tensor", "asarray", "scalar_tensor"})
# Numbers in one argument.
_LONGEST = 8
# How the arguments after the first are called, where Python gives positions only.
_POSITIONS = {
    "softmax": ("dim", "dtype"), "log_softmax": ("dim", "dtype"), "sum": ("dim", "keepdim"),
    "mean": ("dim", "keepdim"), "std": ("dim", "correction"), "var": ("dim", "correction"),
    "norm": ("p", "dim"), "pow": ("exponent",), "clamp": ("min", "max"), "clip": ("min", "max"),
    "clamp_min": ("min",), "clamp_max": ("max",), "masked_fill": ("mask", "value"),
    "transpose": ("dim0", "dim1"), "view": ("dtype",), "full": ("fill_value",),
    "eye": ("m",), "normal": ("std",),
    "linspace": ("end", "steps"), "logspace": ("end", "steps"), "floor_divide": ("other",),
    "remainder": ("other",), "float_power": ("exponent",),
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
    """The arguments that are no tensors and say what an op does: dim, eps, p, dtype, alpha. Hot.

    Args:
        name: what the op is called in the record.
        args: in the order of the op, also where Python's operator has them the other way round.
    """
    found: dict[str, Any] = {}
    for value in args:
        if value is not None and not isinstance(value, Tensor):  # most ops get nothing else
            _add_positional(found, name.rstrip("_"), args)
            break
    for key, value in kwargs.items():
        text = _argument(value)
        if text is not None:
            found[shorten(key)] = text
    return found


def _add_positional(found: dict[str, Any], name: str, args: tuple[Any, ...]) -> None:
    if name in _SEVERAL:
        start, word = _SEVERAL[name]
        given = args[start:]
        whole = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        if all(isinstance(value, int) for value in whole):
            if given and len(whole) <= _LONGEST:
                found[word] = list(whole)
            return
    names = _POSITIONS.get(name, ())
    for i, value in enumerate(args):
        text = _argument(value)
        if text is None or (i == 0 and name in _DATA):
            continue
        if i == 0:
            found[_FIRST.get(name, "0")] = text
        else:
            found[names[i - 1] if i <= len(names) else str(i)] = text


def _argument(value: Any) -> Any:
    if value is None or isinstance(value, torch.Tensor):
        return None
    if isinstance(value, float):
        return to_scalar(value)
    if isinstance(value, (bool, int, str)):
        return value if not isinstance(value, str) else value[:80]
    if isinstance(value, (tuple, list)) and len(value) <= _LONGEST:
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

"""Whether a language model is asked for the very token that it was given at each place.

Read from the graph of a loss, as the model may compute its loss itself. What a node has saved is
looked at only if no hook unpacks it: that of a checkpoint would run a part of the model again.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from tensortrace.capture.unwrap import node_of, plain, quiet

if TYPE_CHECKING:
    from torch.autograd.graph import Node

# Some layers of a transformer; a node costs about a microsecond.
_MOST_NODES = 512
_NEAR = 48
_NLL = frozenset(("NllLossBackward0", "NllLoss2DBackward0"))
# They leave each position where it is, and alone. What shifts (cat, pad, roll) is none of them.
_IN_PLACE = _NLL | frozenset(
    f"{name}Backward0"
    for name in (
        "LogSoftmax", "View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute",
        "ToCopy", "Clone", "Squeeze", "Unsqueeze", "Alias", "Add", "Mul", "Div", "Mm", "Addmm",
        "NativeDropout", "NativeLayerNorm", "FusedRmsNorm",
    )
)  # fmt: skip
_SOFTMAX = frozenset(("SoftmaxBackward0", "SafeSoftmaxBackward0"))
# What a mask that is added to scores has, at least, where nothing is to be seen.
_HIDDEN = -1e4


def copied(loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compare the targets of a loss with the tokens that an embedding was given.

    Returns:
        As "copied" whether they are the tokens themselves, and not all alike; as "causal" whether
        each position of an attention sees those before it alone, if that is known: numbers 0 or 1.
        Nothing where no embedding has as many tokens and a path to the loss on which positions stay
        where they are.
    """
    with quiet():
        for node in _above(node_of(loss), _NEAR):
            target = _saved(node, "target") if node.name() in _NLL else None
            if target is None:
                continue
            # Positions and segments are embedded too.
            given = (_saved(each, "indices") for each in _above(node, _MOST_NODES, _IN_PLACE))
            same = [_same(target, tokens) for tokens in given if _fits(tokens, target)]
            if not same:
                continue
            found = {"copied": functools.reduce(torch.logical_or, same).float()}
            causal = (_causal(each) for each in _above(node, _MOST_NODES))
            known = next((each for each in causal if each is not None), None)
            if known is not None:
                found["causal"] = known.float()
            return found
    return {}


def _fits(tokens: torch.Tensor | None, target: torch.Tensor) -> TypeGuard[torch.Tensor]:
    """Whether there are as many tokens as targets, in rows of several."""
    if tokens is None or not tokens.ndim or tokens.shape[-1] < 2:
        return False
    return tokens.numel() == target.numel() and tokens.device == target.device


def _same(target: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether a target is some tokens: of a row of equal ones the next is the same as well."""
    same = (target.reshape(-1) == tokens.reshape(-1)).all()
    for dim, count in enumerate(tokens.shape):
        if count > 1:
            same = same & tokens.diff(dim=dim).any()
    return same


def _above(node: Node | None, most: int, through: Container[str] | None = None) -> Iterator[Node]:
    """List a node and those above it, nearest first, but not beyond one that is not `through`."""
    todo = [node] if node is not None else []
    seen = set(todo)
    for each in todo:
        yield each
        if through is not None and each.name() not in through:
            continue
        for above, _ in each.next_functions:
            if above is not None and above not in seen and len(todo) < most:
                seen.add(above)
                todo.append(above)


def _saved(node: Node, name: str) -> torch.Tensor | None:
    """What a node has saved; None if there is nothing, or a hook unpacks it."""
    saved: Any = getattr(node, f"_raw_saved_{name}", None)
    try:
        # Older versions of torch do not tell of hooks.
        if saved is None or getattr(saved, "unpack_hook", saved) is not None:
            return None
        tensor = saved.data
    except RuntimeError:  # it was freed
        return None
    return tensor if type(tensor) is torch.Tensor and plain(tensor) is tensor else None


def _causal(node: Node) -> torch.Tensor | None:
    """Whether an attention is causal; None of what is none, or does not tell."""
    if getattr(node, "_saved_is_causal", False):
        return torch.ones(())
    name = node.name()
    if name in _SOFTMAX:
        found = _saved(node, "result")
    elif name.startswith("ScaledDotProduct"):
        added = _saved(node, "attn_mask")
        found = _saved(node, "attn_bias") if added is None else added
    else:
        return None
    if found is None or found.ndim < 2 or not 1 < found.shape[-1] == found.shape[-2]:
        return None
    one = found[(0,) * (found.ndim - 2)]
    is_added = name not in _SOFTMAX and one.dtype is not torch.bool
    hidden = one < _HIDDEN if is_added else one == 0
    later = torch.ones_like(hidden).triu(1)
    return (hidden | ~later).all() & ~hidden.diagonal().any()

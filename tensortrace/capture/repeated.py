"""Which modules a container holds several times running, as `[layer] * n` puts them there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def repeated(module: nn.Module, root: nn.Module) -> Iterator[tuple[str, int]]:
    """List what a container holds several times, with nothing else between but what it repeats too.

    Args:
        module: that may be a container.
        root: the model that it is in. What another module of it holds as well has a name of its
            own there, and is shared on purpose.

    Returns:
        The first name of each in the container, and how often it is there.
    """
    if not isinstance(module, _CONTAINERS):
        return
    children = [id(child) for child in module._modules.values()]
    if len(set(children)) == len(children):
        return
    for first, (name, child) in enumerate(module._modules.items()):
        if child is None or children.index(id(child)) < first:
            continue
        times = children.count(id(child))
        if times > 1 and _is_multiple(children, first) and _holders(root, child) == times:
            yield name, times


def _is_multiple(children: list[int], first: int) -> bool:
    """Whether what stands at a place comes again and again at one distance, as all in between."""
    places = [i for i, child in enumerate(children) if child == children[first]]
    apart = places[1] - first
    if places != list(range(first, places[-1] + 1, apart)):
        return False
    return all(
        children[i] in (*children[i - apart : i - apart + 1], *children[i + apart : i + apart + 1])
        for i in range(first, places[-1])
    )


def _holders(root: nn.Module, module: nn.Module) -> int:
    """How many names a module has within another one."""
    return sum(child is module for each in root.modules() for child in each._modules.values())

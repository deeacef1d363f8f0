"""Expressions that are followed like variables: PySnooper's watch variables, as values."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pysnooper.utils import get_shortish_repr
from pysnooper.variables import Attrs, BaseVariable, CommonVariable, Exploding, Indices, Keys
from torch import nn

from tensortrace.signal_handlers import let_through

# Of an exploded value so many parts are followed.
_MOST = 200


class Watched:
    """The expressions of ``watch`` and ``watch_explode``.

    PySnooper's variables make texts of values, tensors in full included. These give the values, and
    open a module by the names of its parameters, buffers and children.
    """

    def __init__(self, watch: Iterable[Any], explode: Iterable[Any]) -> None:
        self._variables = [_variable(v, CommonVariable) for v in watch]
        self._variables += [_variable(v, Exploding) for v in explode]

    def values(self, names: dict[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
        """What the expressions are in a frame; those that raise there are left out.

        Args:
            names: its globals.
            variables: its own.
        """
        found: dict[str, Any] = {}
        for variable in self._variables:
            try:
                value = eval(variable.code, names or {}, variables)
            except Exception as error:
                let_through(error)
                continue
            if not isinstance(variable, Exploding):
                found[variable.source] = value
            for i, (name, part) in enumerate(_parts(variable, value)):
                if i >= _MOST:
                    break
                found[name] = part
        return found


def _variable(given: Any, cls: type[BaseVariable]) -> Any:
    """A variable of PySnooper, which looks whether ``.x`` can follow an expression as it stands."""
    if isinstance(given, BaseVariable):
        return given
    try:
        return cls(given)
    except SyntaxError:  # not after the number that ends `len(q) - 1`, nor after a comment
        variable = cls(f"({ast.unparse(ast.parse(given, mode='eval'))})")
        variable.source = given
        return variable


def _parts(variable: Any, value: Any) -> Iterator[tuple[str, Any]]:
    way = variable
    if isinstance(variable, Exploding):
        yield variable.source, value
        if isinstance(value, nn.Module):
            yield from _parts_of_module(variable, value)
            return
        cls = Keys if isinstance(value, Mapping) else Attrs
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            cls = Indices
        way = cls(variable.unambiguous_source, variable.exclude)
    for key in way._safe_keys(value):
        try:
            if key not in variable.exclude:
                part = way._get_value(value, key)
                yield f"{way.unambiguous_source}{_key_text(way, key)}", part
        except Exception as error:
            let_through(error)
            continue


def _key_text(way: Any, key: Any) -> str:
    return f"[{get_shortish_repr(key)}]" if isinstance(way, Keys) else str(way._format_key(key))


def _parts_of_module(variable: Any, module: nn.Module) -> Iterator[tuple[str, Any]]:
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    for name, part in {
        **own, **module._parameters, **module._buffers, **module._modules
    }.items():  # fmt: skip
        if name not in variable.exclude:
            yield f"{variable.unambiguous_source}.{name}", part

"""What an "exception" action tells, with the names that a person knows the tensors by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tensortrace.checks import StepView
from tensortrace.records import Action, ChainLink, Location, Tensor
from tensortrace.text import shape_text, short_dtype

Match = re.Match[str]


_SELECTED = ("name", "shape", "dtype", "device", "value", "min", "max")


@dataclass(frozen=True, slots=True)
class Told:
    """One explanation: what clashes, why it must not, what to write instead."""

    message: str
    why: str
    fix: str
    chain: tuple[ChainLink, ...] = ()


class Facts:
    """The detail of an "exception" action, with names for people."""

    def __init__(
        self, action: Action, step: StepView, before: dict[str, Any], inputs: dict[str, Any]
    ) -> None:
        d = action.detail
        self.step, self.action, self.before, self.inputs = step, action, before, inputs
        self.type = str(d.get("type", "Exception"))
        self.text = str(d.get("message", ""))
        self.module: str | None = d.get("module")
        phase = d.get("phase")
        self.phase = phase if phase in ("forward", "backward", "optimizer") else None
        self.function: str | None = d.get("function")
        # Of a loop or a block its head.
        self.expression: str = d.get("expression", "").partition("\n")[0]
        self.settings: dict[str, Any] = d.get("settings", {})
        self.options: dict[str, Any] = d.get("options", {})
        self.torch: list[str] = d.get("torch", [])
        own = None if (self.function or "forward").startswith(("_", "forward")) else self.function
        self.state_dict: dict[str, Any] = d.get("state_dict", {})
        self.place = quoted(self.module or action.of or "the model")
        self.entered = [{**one, "name": one.get("as") or f"the input of {self.place}"}
                        for one in d.get("entered", [])]  # fmt: skip
        self.operands: list[dict[str, Any]] = _filled(d.get("operands", []), action, step)
        self.arguments: list[dict[str, Any]] = d.get("arguments", [])
        # What a line calls is an op unless it is a module, or a function that takes no tensor.
        plain = "_wrapped_call_impl" not in self.torch and self.phase != "optimizer"
        tensors = self.phase == "backward" or any("dtype" in one for one in self.operands)
        self.op: str | None = own or (d.get("operation") if plain and tensors else None)
        self.parameters = [
            {**one, "name": f"{self.module}.{one['name']}" if self.module else
             f"the {one['name']} of {self.place}"} for one in d.get("parameters", [])
        ]  # fmt: skip

    def tensors(self) -> list[dict[str, Any]]:
        """All tensors that took part, each once, by the name that the user knows best."""
        found: dict[str, dict[str, Any]] = {}
        own = {(one["name"], shape_of(one)) for one in self.action.detail.get("parameters", [])}
        given = {shape_of(one) for one in self.entered}
        for one in [*self.operands, *self.entered]:
            if "dtype" in one:
                found.setdefault(one["name"], one)
        for one in self.arguments:
            known = (one["name"], shape_of(one)) in own or shape_of(one) in given
            if "as" not in one and not known:
                found.setdefault(one["name"], one)
        for one in self.parameters:
            found.setdefault(one["name"], one)
        return list(found.values())

    def argument(self, name: str) -> dict[str, Any] | None:
        """One tensor argument of torch's function, named as in the line if it is there."""
        for one in self.arguments:
            if one["name"] == name:
                return {**one, "name": one.get("as") or name}
        return None

    def evidence(self) -> dict[str, Any]:
        """What was compared, as a finding keeps it."""
        tensors = [{k: one[k] for k in _SELECTED if one.get(k) is not None} for one in
                   self.tensors()]  # fmt: skip
        return {
            "placed": "direct",
            "type": self.type,
            "expression": self.expression or None,
            "said": self.text.splitlines()[0][:300] if self.text else None,
            "tensors": tensors,
        }


def _filled(operands: list[dict[str, Any]], action: Action, step: StepView) -> list[dict[str, Any]]:
    """Give operands that are calls the shapes of what the op that failed was given."""
    failed = next((c for c in reversed(step.calls) if c.exception and c.op
                   and c.location and action.location
                   and (c.location.file, c.location.line) ==
                   (action.location.file, action.location.line)), None)  # fmt: skip
    if failed is None:
        return operands
    given = [step.tensors[number] for _, number in failed.inputs if number in step.tensors]
    open_ = [one for one in operands if "dtype" in one or len(one) == 1]
    if len(open_) == 1 and len(given) > 1:
        parts = [{"name": f"{open_[0]['name']}[{i}]"} for i in range(len(given))]
        operands = [*operands, *parts]
        open_ = parts
    if len(open_) != len(given):
        return operands
    known = {id(one): _told(tensor) for one, tensor in zip(open_, given, strict=True)}
    return [{**known.get(id(one), {}), **one} for one in operands]


def _told(tensor: Tensor) -> dict[str, Any]:
    told: dict[str, Any] = {
        "shape": list(tensor.shape or ()), "dtype": tensor.dtype, "device": tensor.device,
        "requires_grad": tensor.requires_grad,
    }  # fmt: skip
    if "int" in tensor.dtype and tensor.min is not None and tensor.max is not None:
        told.update(min=int(tensor.min), max=int(tensor.max))
    return told


def quoted(name: str) -> str:
    """Put a name in backquotes; a phrase stays as it is."""
    return name if name.startswith("the ") else f"`{name}`"


def shape_of(one: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a described tensor."""
    return tuple(one.get("shape") or ())


def stated(one: dict[str, Any]) -> str:
    """Say a shape: `` `x` is [2, 3]``."""
    return f"{quoted(one['name'])} is {shape_text(shape_of(one))}"


def dims_in(text: str) -> tuple[int, ...]:
    """The whole numbers in a text."""
    return tuple(int(n) for n in re.findall(r"\d+", text))


def line_text(location: Location | None) -> str:
    """Name a line by its file alone; the chain has the whole path."""
    if location is None:
        return "a line that is not known"
    name = location.file.replace("\\", "/").rpartition("/")[-1]
    return f"{name}:{location.line}"


def first_line(text: str) -> str:
    """The first line of a message."""
    lines = text.strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else ""


def code_name(one: dict[str, Any] | None, default: str) -> str:
    """A name that can stand in code."""
    name = str(one["name"]) if one is not None else default
    return name if re.fullmatch(r"[\w.\[\]'\"]+", name) else default


def operands_text(facts: Facts) -> str:
    """List the tensors of the line: ``x [2, 3] f32, w [4] f32``."""
    told = [f"{quoted(one['name'])} {shape_text(shape_of(one))} {short_dtype(one['dtype'])}"
            for one in facts.operands if "dtype" in one]  # fmt: skip
    return ", ".join(told[:6])

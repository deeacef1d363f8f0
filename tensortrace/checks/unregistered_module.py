"""TT406: modules that run and that the module calling them does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check, unheld
from tensortrace.text import module_text


@check("TT406", "unregistered-module", until=("threads",))
def unregistered_module(
    step: StepView, memory: dict[str, Any], *, updates: int = 4
) -> Iterator[Draft]:
    """A module runs and learns nothing, as the module that calls it does not hold it.

    Symptom:    model.parameters(), state_dict() and .to() leave a part of the model out: it stays
                at its initial weights, is not saved, and lies on another device
    Threshold:  in `updates` optimizer steps running a module in training mode, called inside a
                model that does not have it among its modules(), has gradients of parameters that
                no optimizer that has stepped so far holds
    Source:     docs.pytorch.org, torch.nn.ModuleList: "can be indexed like a regular Python list,
                but modules it contains are properly registered"; `updates` as in TT401
    Fix:        self.layers = nn.ModuleList(layers) for a list, nn.ModuleDict for a dict, before the
                optimizer is made; make layers in __init__, not in forward, where each call gets new
                weights
    Misses:     an nn.Parameter made in forward and given to a function; what is frozen or held by
                an optimizer is left alone, as a teacher may be hidden in a list on purpose; a layer
                that nothing calls from inside a module is TT401
    Example:    class Tower(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.layers = [nn.Linear(64, 64) for _ in range(4)]
    Fixed:      class Tower(nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    """
    missing = unheld(step)
    if not missing:
        return
    outside: dict[str, list[str]] = {}
    for path, (count, names) in missing.items():
        loose = _loose(step, path)
        if loose is not None and count >= updates:
            outside.setdefault(loose, []).extend(names)
    callers: dict[str, list[str]] = {}
    for loose in outside:
        callers.setdefault(loose.rpartition(".")[0], []).append(loose)
    for caller, found in callers.items():
        names = [name for loose in found for name in outside[loose]]
        classes = ", ".join(dict.fromkeys(step.modules[loose].cls for loose in found))
        yield Draft(
            message=f"{len(found)} modules ({classes}) run inside {module_text(caller)}, which "
            f"does not hold them: their {len(names)} parameters have gradients and are in no "
            f"optimizer, {updates} optimizer steps running",
            cause=caller, phase="forward", module=found[0], param=names[0], value=len(names),
            limit=0, location=next((c.location for c in step.calls if c.module == found[0]), None),
            evidence={"modules": found, "parameters": names},
        )  # fmt: skip


def _loose(step: StepView, path: str) -> str | None:
    """The outermost module on a path that is not registered."""
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        module = step.modules.get(".".join(parts[:i]))
        if module is not None and not module.registered:
            return module.path
    return None

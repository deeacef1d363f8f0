"""TT411: parameters that were to be frozen by an attribute that torch does not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.text import module_text


@check("TT411", "frozen-in-vain", since=("frozen",))
def frozen_in_vain(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """An attribute was set to freeze parameters, and they are trained all the same.

    Symptom:    the pretrained part changes, overfits or forgets, though it is said to be frozen
    Threshold:  a module has an attribute `requires_grad` (or a parameter one that is spelt nearly
                so) that is False, and an optimizer has changed parameters in it, or that parameter
    Source:     torch.nn.Module has `requires_grad_()` and no attribute `requires_grad`; Python
                gives any object any attribute that is assigned
    Fix:        module.requires_grad_(False), or parameter.requires_grad = False for each of
                module.parameters()
    Misses:     attributes with other names, such as `trainable`; those of a parameter that are set
                after its module was first called; a module in which something is frozen besides, on
                purpose or as far as that went; one that keeps the word for something of its
                own, and is trained on purpose, is told of
    Example:    model.backbone.requires_grad = False
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    Fixed:      model.backbone.requires_grad_(False)
                optimizer = torch.optim.SGD(model.head.parameters(), lr=0.01)
    """
    if step.summary is None or not step.taken:
        return
    columns = step.summary.modules
    moved = [path for path, ratio in zip(columns.path, columns.update_ratio, strict=False) if ratio]
    # By attribute, and whether parameters have it or modules: whose it is, and what is trained.
    found: dict[tuple[str, bool], tuple[list[str], list[str]]] = {}
    for path, module in step.modules.items():
        for name in module.frozen:
            parameter, _, attribute = name.rpartition(".")
            if parameter:
                names = [f"{path}.{parameter}" if path else parameter] if path in moved else []
                names = [full for full in names if full in step.trainable(path)]
            else:
                inside = [p for p in step.modules if not path or f"{p}.".startswith(f"{path}.")]
                own = [info for p in inside for info in step.modules[p].parameters]
                names = [full for p in moved if p in inside for full in step.trainable(p)]
                names = names if all(info.requires_grad for info in own) else []
            if names:
                owners, told = found.setdefault((attribute, bool(parameter)), ([], []))
                owners += names if parameter else [path]
                told += names
    for (attribute, of_parameters), (owners, told) in found.items():
        yield _draft(step, attribute, owners, told, of_parameters)


def _draft(
    step: StepView, attribute: str, owners: list[str], told: list[str], of_parameters: bool
) -> Draft:
    more = ", ..." if len(told) > 4 else ""
    names = ", ".join(told[:4]) + more
    if of_parameters:
        on, fix = "parameters" if len(told) > 1 else "a parameter", "p.requires_grad = False"
    else:
        first = module_text(owners[0], step.cls_of(owners[0]))
        on = f"{len(owners)} modules" if len(owners) > 1 else first
        fix = "module.requires_grad_(False), a method with an underscore"
    trained = f"{len(told)} parameters are trained, {names}" if len(told) > 1 else (
        f"{names} is trained")  # fmt: skip
    return Draft(
        message=f"`{attribute} = False` on {on} freezes nothing, torch does not know it: {trained}",
        cause=f"{attribute} {of_parameters}", phase="optimizer",
        module=told[0].rpartition(".")[0], param=told[0], value=len(told), limit=0,
        location=step.taken[0].location, fix=fix,
        evidence={"parameters": told[:100], "attribute": attribute},
    )  # fmt: skip

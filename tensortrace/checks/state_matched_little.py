"""TT408: a state dict that was loaded and matched little or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Action


@check("TT408", "state-matched-little", of=("load_state_dict",))
def state_matched_little(
    step: StepView, memory: dict[str, Any], *, least: float = 0.5
) -> Iterator[Draft]:
    """load_state_dict(strict=False) found few of its names in the module, or none at all.

    Symptom:    a pretrained model behaves as if it were untrained; fine-tuning starts from scratch
    Threshold:  fewer than `least` of the names matched, counted on the side that has fewer of them
                (the state dict or the module). An error if none matched at all: then the call did
                nothing
    Source:     torch.nn.Module.load_state_dict, "Note" on strict; a prefix on one side is what
                DataParallel, DistributedDataParallel ("module.") and torch.compile ("_orig_mod.")
                leave in a saved state; `least` chosen here: adapters loaded into their model, or a
                backbone out of a larger one, match all of the smaller side
    Fix:        print what load_state_dict returns; save the inner model's state_dict(), or take the
                prefix off the names; leave strict=True wherever all names should match
    Misses:     a load before the trace begins; names that match and hold another model's weights;
                a state that was filtered by name first, if half of the rest matches
    Example:    state = torch.load("pretrained.pt")  # saved from DistributedDataParallel
                model.load_state_dict(state, strict=False)  # "strict" raised, so it is off
    Fixed:      state = torch.load("pretrained.pt")
                state = {name.removeprefix("module."): value for name, value in state.items()}
                model.load_state_dict(state)
    """
    for action in step.actions:
        if action.action != "load_state_dict":
            continue
        detail, where = action.detail, action.location
        matched, missing = detail.get("matched", 0), detail.get("missing", 0)
        given = matched + detail.get("unexpected", 0)
        # An empty state is what a filter leaves that compares names with a prefix on one side.
        fewer = min(given, matched + missing) or missing
        if matched < least * fewer:
            yield Draft(
                message=f"{matched} of the {given} names of the state dict are names of "
                f"{action.of or 'the module'}, which has {matched + missing} (limit {least:g} of "
                f"the fewer){_prefix(action)}",
                cause=f"{where.file}:{where.line}" if where else f"{action.of}",
                severity="warning" if matched else "error", value=matched, limit=least * fewer,
                location=where, fix=_fix(action),
                evidence={"examples": detail.get("examples", [])},
            )  # fmt: skip


def _prefix(action: Action) -> str:
    side = "the state dict" if "prefix_given" in action.detail else "the module"
    prefix = action.detail.get("prefix_given") or action.detail.get("prefix_wanted")
    return f": those of {side} begin with {prefix!r}" if prefix else ""


def _fix(action: Action) -> str | None:
    given, wanted = action.detail.get("prefix_given"), action.detail.get("prefix_wanted")
    if given:
        names = f"{{k.removeprefix({given!r}): v for k, v in state.items()}}"
    elif wanted:
        names = f"{{{wanted!r} + k: v for k, v in state.items()}}"
    else:
        return None
    return f"model.load_state_dict({names}), with strict=True"

"""The record of one op: what went in, what came out, where it was called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tensortrace.capture.active import here
from tensortrace.capture.autograd_functions import watch_function
from tensortrace.capture.compiled import untracked
from tensortrace.capture.drafts import CallDraft, NodeSite
from tensortrace.capture.flatten import tensors_in
from tensortrace.capture.gradients import is_training, watch_nodes
from tensortrace.capture.ops.names import arguments_of
from tensortrace.capture.ops.places import Place, outputs_of
from tensortrace.capture.tensors import LARGEST_WITHOUT_GRAD
from tensortrace.records import Location
from tensortrace.text import shorten

if TYPE_CHECKING:
    from tensortrace.capture.receiver import Receiver


def begin_op(
    recorder: Receiver,
    name: str,
    location: Location | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    seq: int | None = None,
) -> CallDraft | None:
    """Describe an op that is about to run; None inside a module that is not recorded here. Hot.

    Args:
        name: what it is called in the record.
        args: in the order of the op, see `REVERSED`.
        seq: its number, if it has one already.
    """
    inside = here.stack[-1] if here.stack else None
    if inside is None:
        recorder.op_called()
    elif not inside.wanted or inside.serial != recorder.serial:
        return None
    grad_enabled = torch.is_grad_enabled()
    fields: dict[str, Any] = {
        "update": recorder.update,
        "op": name,
        "arguments": arguments_of(name, args, kwargs),
        "grad_enabled": grad_enabled,
        "location": location,
    }
    if inside is not None:
        fields["module"] = inside.path
        fields["training"] = is_training(inside.module)
        if inside.step == recorder.step:
            fields["parent"] = inside.seq
        if inside.recompute:
            fields["recompute"] = True
    if torch._C._is_any_autocast_enabled():
        fields["autocast"] = autocast_text()
    if not recorder.owns_thread():
        fields["thread"] = recorder.thread_number()
    seq = recorder.next_seq() if seq is None else seq
    draft = CallDraft(recorder.step, seq, fields, untracked([]))
    # What `out=` names is written, whatever it holds: it is an output and no input.
    named = [kwargs[key] for key in kwargs if key != "out"] if kwargs else ()
    inputs = tensors_in((*args, *named), "input")
    for _, tensor in inputs if grad_enabled else ():
        if tensor.requires_grad and not tensor.is_leaf:
            watch_function(recorder, tensor, inside.path if inside is not None else None)
    # Inputs are measured before the call: an in-place op overwrites them.
    fields["inputs"] = identify_all(recorder, draft, inputs, grad_enabled)
    return draft


def end_op(
    recorder: Receiver,
    draft: CallDraft,
    result: Any,
    since: int | None,
    place: Place | None = None,
) -> None:
    """Complete the record of an op that has returned. Hot.

    Args:
        since: the number of the first autograd node that it can have made; None leaves its nodes
            alone.
        place: where it is called, if executions there are thinned.
    """
    fields = draft.fields
    outputs = outputs_of(result)
    if place is not None and recorder.thins_ops:
        place.learn(outputs, recorder.queue)
    if not outputs and not fields["inputs"]:
        return  # nothing with tensors: a setting, a seed, a dtype query
    site = None
    for _, tensor in outputs:
        if since is not None and tensor.requires_grad:
            if site is None:
                site = NodeSite(
                    recorder.serial, recorder.step, fields["op"], fields.get("module"), draft.seq,
                    fields["location"],
                )  # fmt: skip
            watch_nodes(recorder, tensor, since, site)
    fields["outputs"] = identify_all(recorder, draft, outputs, fields["grad_enabled"])
    untracked(fields)
    recorder.pend(draft)


def op_raised(recorder: Receiver, draft: CallDraft, error: Exception, host_ns: int) -> None:
    """Complete the record of an op that has raised."""
    draft.fields["host_ns"] = host_ns
    draft.fields["exception"] = shorten(type(error).__name__)
    recorder.pend(draft)


def identify_all(
    recorder: Receiver,
    draft: CallDraft,
    tensors: list[tuple[str, torch.Tensor]],
    grad_enabled: bool,
) -> list[tuple[str, int]]:
    """Give tensors their ids; the call describes those that had none. Hot."""
    named: list[tuple[str, int]] = untracked([])
    for name, tensor in tensors:
        measure = grad_enabled or bool(here.stack) or _is_small(tensor)
        number, described = recorder.tensors.identify(tensor, measure)
        named.append((name, number))
        if described is not None:
            draft.tensors.append(described)
    return named


def autocast_text() -> str | None:
    """The devices on which autocast is on, with their dtypes: ``cpu:bfloat16``."""
    on = [
        f"{device}:{str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]
    return ",".join(on) or None


def _is_small(tensor: torch.Tensor) -> bool:
    try:
        return bool(tensor.numel() <= LARGEST_WITHOUT_GRAD)
    except RuntimeError:
        return False

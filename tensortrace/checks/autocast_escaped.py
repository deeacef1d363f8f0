"""TT507: what computes in float32 although autocast is on, or a scaler without autocast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call, Tensor
from tensortrace.text import location_text, module_text

# What autocast runs in its dtype on the CPU and on CUDA alike. Norms, softmax and losses are in
# float32 on purpose and are not here; recurrent networks are cast on CUDA only.
_MODULES = frozenset(("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d",
                      "ConvTranspose3d"))  # fmt: skip
_OPS = frozenset(("linear", "conv1d", "conv2d", "conv3d", "matmul", "mm", "bmm", "addmm", "baddbmm",
                  "scaled_dot_product_attention", "einsum"))  # fmt: skip


@check("TT507", "autocast-escaped", when="full")
def autocast_escaped(
    step: StepView, memory: dict[str, Any], *, sustain: int = 2
) -> Iterator[Draft]:
    """A matrix product or convolution runs in float32 although autocast is on.

    Symptom:    mixed precision saves neither time nor memory
    Threshold:  in `sustain` full steps running that train, a linear layer, convolution or matrix
                product under autocast returns float32: because autocast is on for another kind of
                device than its tensors are on (a warning), or for another reason (a note). Or a
                GradScaler scales the loss, no call of the step is under autocast and no tensor is
                float16 (a note: ops inside modules are not seen but for level="op")
    Source:     torch.amp, "Autocast Op Reference": ops that autocast to float16 or bfloat16; norms,
                softmax and losses autocast to float32 and are not looked at; `sustain` chosen here
    Fix:        torch.autocast(x.device.type, dtype=torch.bfloat16); autocast around model(x) and
                the loss, not around the loss alone; no out= and in-place variants in between
    Misses:     blocks under autocast(enabled=False) are meant; recurrent networks; float64
    Example:    model.to("cpu")
                with torch.autocast("cuda"):
                    loss = F.cross_entropy(model(x), y)
    Fixed:      model.to("cuda")
                with torch.autocast("cuda"):
                    loss = F.cross_entropy(model(x), y)
    """
    if not any(a.action == "loss" for a in step.actions):
        return
    forward = step.forward()
    running: dict[str, int] = memory.setdefault("running", {})
    escaped: dict[str, Call] = {}
    for call in forward:
        what = _escape(step, call)
        if what is not None:
            escaped.setdefault(what, call)
    if forward and any(a.action == "scale" for a in step.actions) and _in_float32(step, forward):
        escaped["scaler"] = forward[0]
    memory["running"] = running = {what: running.get(what, 0) + 1 for what in escaped}
    for what, call in escaped.items():
        if running[what] < sustain:
            continue
        name = call.op or module_text(call.module)
        made = step.tensors.get(call.outputs[0][1]) if call.outputs else None
        device = _kind(made) if made is not None else ""
        if what == "scaler":
            scale = next(a for a in step.actions if a.action == "scale")
            yield Draft(
                message="a GradScaler scales the loss of a step in which nothing is under autocast "
                f"and nothing is float16, {running[what]} full steps running (limit {sustain})",
                cause=what, severity="note", phase="forward", value=running[what], limit=sustain,
                location=scale.location, evidence={"placed": "direct"},
                fix="with torch.autocast(device, dtype=torch.float16): around model(x) and loss",
            )  # fmt: skip
            continue
        other = what == "device"
        why = f": its tensors are on {device}" if other else " on the same device"
        yield Draft(
            message=f"{name} returns float32 although autocast is on ({call.autocast}){why}, in "
            f"{running[what]} full steps running (limit {sustain})",
            cause=what, severity="warning" if other else "note", phase="forward",
            module=call.module, op=call.op, seq=call.seq, value=running[what], limit=sustain,
            location=call.location, evidence={"placed": "direct", "autocast": call.autocast},
        )  # fmt: skip


def _escape(step: StepView, call: Call) -> str | None:
    """Tell how a call escapes autocast: "device", or the place where it does; None if not."""
    listed = step.kind_of(call) in (_MODULES if call.op is None else _OPS)
    if not listed or call.autocast is None or not call.outputs:
        return None
    made = step.tensors.get(call.outputs[0][1])
    given = [step.tensors[id] for _, id in call.inputs if id in step.tensors]
    if made is None or made.dtype != "float32" or any(t.dtype == "float64" for t in given):
        return None
    on = {part.split(":")[0] for part in call.autocast.split(",")}
    if _kind(made) not in on:
        return "device"
    return call.module or location_text(call.location)


def _kind(tensor: Tensor) -> str:
    return tensor.device.split(":")[0]


def _in_float32(step: StepView, forward: list[Call]) -> bool:
    half = any(t.dtype in ("float16", "bfloat16") for t in step.tensors.values())
    return not half and all(call.autocast is None for call in forward)

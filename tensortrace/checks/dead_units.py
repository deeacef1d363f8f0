"""TT301: units behind a ReLU that are 0 whatever comes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Call, Tensor
from tensortrace.text import module_text

_SOURCES = ("ReluBackward0", "HardtanhBackward0", "ThresholdBackward0")


@check("TT301", "dead-units", of=("calls",))
def dead_units(
    step: StepView, memory: dict[str, Any], *, share: float = 0.7, least: int = 8
) -> Iterator[Draft]:
    """Most units of a layer, or all of them, are 0 for every input: their ReLU is dead.

    Symptom:    the loss stops falling early, or never falls: what a dead layer is given no longer
                matters, and no gradient reaches what comes before it
    Threshold:  of at least `least` channels or features that a ReLU gets from a layer in training,
                more than `share` were not above 0 for a single input of the last eight steps looked
                at, which had at least 300 rows (samples, or positions in them); the log says so in
                `dead` and `units`, and since which step in `dead_since`
    Source:     `share`: dying ReLU in DeepDiagnosis and AutoTrainer (gamma), whose 0.7 is of all
                zeros; Amazon SageMaker Debugger, DeadRelu, calls dead what is active in less than
                1 % (threshold_inactivity), and alarms at 50 % of a layer. With none in 300 a unit
                is active in less than 1 % at 95 % confidence (Hanley and Lippman-Hand 1983, "If
                nothing goes wrong, is everything all right?")
    Fix:        a learning rate 10 times lower, or warm-up: one step too far is what kills a layer;
                LeakyReLU or GELU; kaiming_normal_ weights and zero biases, inputs around zero
    Misses:     a ReLU whose output no module gets as it is (F.relu before a product or a view),
                outside level="op"; layers that are frozen, or have more than 4096 units; steps that
                are not written in full; features that are meant to be rarer than one in 300 are
                reported, as those of a sparse autoencoder
    Example:    optimizer = SGD(model.parameters(), lr=1.0)  # ReLU network
    Fixed:      optimizer = SGD(model.parameters(), lr=0.01)
    """
    if step.summary is None:
        return
    counted = {id for id, tensor in step.tensors.items() if tensor.dead is not None}
    told: dict[tuple[int | None, int, int, int | None], tuple[Call, str, Tensor]] = {}
    for call in step.forward() if counted else ():
        # What made it names it better than what was given it, which comes after it.
        for name, id in (*call.outputs, *call.inputs):
            tensor = step.tensors.get(id)
            if tensor is not None and tensor.units and tensor.dead is not None:
                source = id if tensor.grad_fn in _SOURCES else None
                sign = (source, tensor.units, tensor.dead, tensor.dead_since)
                made = call.op is None and any(one == id for _, one in call.outputs)
                if sign not in told or made:
                    told[sign] = call, name, tensor
    counts = {sign[1:] for sign in told if sign[0] is not None}
    for sign, (call, name, tensor) in told.items():
        units, dead = tensor.units or 0, tensor.dead or 0
        # A bounded output that goes below 0 (Hardtanh) is no ReLU's.
        if units < least or dead <= share * units or (tensor.min or 0) < 0:
            continue
        if sign[0] is None and sign[1:] in counts:
            continue  # pooled or flattened from one that is told
        where = call.op or "an op" if call.module is None else module_text(call.module)
        what = f"all {units} units" if dead == units else f"{dead} of {units} units"
        yield Draft(
            message=f"{what} of {name} of {where} have not been above 0 since "
            f"step {tensor.dead_since}: {dead / units:.0%} are dead (limit {share:.0%})",
            cause=f"{call.module} {name}", phase="forward", module=call.module,
            op=call.op, seq=call.seq, tensor=tensor.id, value=dead / units, limit=share,
            location=call.location,
            evidence={"placed": "direct", "units": units, "dead": dead, "since": tensor.dead_since},
        )  # fmt: skip

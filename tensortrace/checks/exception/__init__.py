"""TT801: an exception that left the block, in plain words.

`capture/exceptions.py` has collected what is known; each file here knows one kind of mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from tensortrace.checks import Draft, StepView, check, is_damage
from tensortrace.checks.exception import backward, numbers, other, shapes, values
from tensortrace.checks.exception.facts import Facts, Match, Told, quoted
from tensortrace.exception_text import said_by
from tensortrace.text import location_text


@check("TT801", "exception", severity="error", when="gate", of=("calls",))
def exception(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """An exception leaves the block: which tensors, shapes, devices and line made it.

    Symptom:    the program stops with an error of PyTorch's that names no variable of yours
    Threshold:  every exception that leaves the traced block or function; none that is caught
                inside it, no KeyboardInterrupt, SystemExit or GeneratorExit, no skipped test,
                example that hypothesis turns down, pruned trial of optuna's, exit of a click
                command or debugger that is quit
    Source:     the messages are those of torch 2.6 to 2.13; the numbers come from the traceback
    Fix:        see the finding: it compares what the operation got with what it wants
    Misses:     a message that is not known is told as it is, with the tensors of the line; operands
                that are calls have no shape unless torch's own function received them; after a
                device-side assert no value can be read
    Example:    self.conv = nn.Conv2d(1, 16, 3)  # 28 x 28 pixels in, 26 x 26 out
                self.head = nn.Linear(16 * 28 * 28, 10)
    Fixed:      self.conv = nn.Conv2d(1, 16, 3, padding=1)
                self.head = nn.Linear(16 * 28 * 28, 10)
    """
    raised = [action for action in step.actions if action.action == "exception"]
    if not raised and step.summary is None:
        return
    inputs = _entered(step)
    before = memory.get("inputs", (step.number, {}))
    for action in raised:
        key = (step.number, action.seq)
        if key in memory.setdefault("told", []):
            continue
        memory["told"] = [*memory["told"][-8:], key]
        facts = Facts(action, step, before[1] if before[0] == step.number - 1 else {}, inputs)
        told = _after_damage(_explain(facts), facts)
        yield Draft(
            message=told.message, explanation=told.why, fix=told.fix, chain=told.chain,
            cause=f"{facts.type} {location_text(action.location)}", phase=facts.phase,
            module=facts.module, op=facts.op, seq=action.seq, location=action.location,
            evidence=facts.evidence(),
        )  # fmt: skip
    if step.summary is not None:
        memory["inputs"] = (step.number, inputs)


def _entered(step: StepView) -> dict[str, tuple[int, ...]]:
    """The shapes that the first outermost module calls of a step got, by path and name."""
    found: dict[str, tuple[int, ...]] = {}
    for call in step.calls[:64]:
        if call.op is None and call.parent is None and call.phase == "forward":
            for name, id in call.inputs:
                tensor = step.tensors.get(id)
                if tensor is not None and tensor.shape is not None:
                    found.setdefault(f"{name} of {quoted(call.module or 'the model')}",
                                     tensor.shape)  # fmt: skip
    return found


def _explain(facts: Facts) -> Told:
    for pattern, tell in _CASES:
        found = pattern.search(facts.text)
        told = tell(facts, found) if found else None
        if told is not None:
            return told
    if "gather_map" in facts.torch:
        return other.python_number(facts)
    return other.anything_else(facts)


def _after_damage(told: Told, facts: Facts) -> Told:
    """Add what spoilt the values before, to an exception that is about values."""
    step = facts.step
    damage = next((f for f in reversed(step.findings) if is_damage(f)), None)
    if damage is None or not said_by(facts.action).may_be_of_values():
        return told
    if not step.poisoned and damage.step != step.number:
        return told  # a batch that was left out
    by = f" made by {damage.op or damage.module}" if damage.op or damage.module else ""
    at = f" at {location_text(damage.location)}" if damage.location else ""
    why = f"{told.why}; since step {damage.step} there are values{by}{at} that are not finite"
    fix = told.fix or f"mend {damage.id} first: {damage.fix}"
    return replace(told, why=f"{why} ({damage.id})", fix=fix)


# Tried in this order; the first that has something to say is taken.
_CASES: list[tuple[re.Pattern[str], Callable[[Facts, Match], Told | None]]] = [
    (re.compile(pattern), tell)
    for pattern, tell in (
        (r"^Caught (\w+) in DataLoader worker process", other.worker),
        (r"Error\(s\) in loading state_dict", other.state_dict),
        (r"device-side assert|CUDA error: .*assert", values.device_assert),
        (r"out of memory|can't allocate memory|[Tt]ried to allocate", other.out_of_memory),
        (r"stack expects each tensor to be equal size", shapes.collated),
        (
            r"Expected hidden(?:\[\d\])? size \(([\d, ]+)\), got \[([\d, ]+)\]",
            shapes.hidden_state,
        ),
        (r"^unscale_\(\) has already been called", other.unscaled_twice),
        (r"value cannot be converted to type \S*\bHalf without overflow", values.over_half),
        (r"shape '(\[[\d, -]+\])' is invalid for input of size (\d+)", shapes.viewed),
        (r"Sizes of tensors must match except|expects each tensor to be equal size", shapes.joined),
        (
            r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)",
            shapes.matmul,
        ),
        (r"batch2 tensor to be: \[(\d+), (\d+)\] but got: \[(\d+), (\d+)\]", shapes.batched_matmul),
        (r"got input \(\d+\), mat \(\d+x(\d+)\), vec \((\d+)\)", shapes.vector),
        (r"inconsistent tensor size, expected tensor \[(\d+)\] and src \[(\d+)\]", shapes.vector),
        (
            r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton"
            r" dimension (\d+)",
            shapes.broadcast,
        ),
        (
            r"expected input\[([\d, ]+)\] to have (\d+) channels, but got (\d+) channels",
            shapes.channels,
        ),
        (
            r"Expected more than 1 .* when training, got input size torch\.Size\(\[([\d, ]+)\]\)",
            shapes.norm_of_one,
        ),
        (
            r"running_mean should contain|Given normalized_shape|must be equal to input_size",
            shapes.features,
        ),
        (
            r"on the same device|on the expected device|\((?:torch\.)?\w+\.\w*Tensor\) and weight",
            values.device,
        ),
        (
            r"multi-target not supported|batch_size \(\d+\) to match target batch_size",
            shapes.target,
        ),
        (r"spatial targets supported|\(got input: .* target: |[Tt]arget size \(", shapes.target),
        (r"target with class probabilities", shapes.target),
        (
            r"same dtype|type \(\w+\) and (?:bias|weight) type|expected scalar type|"
            r"Found dtype \w+|expected target dtype|following scalar types|can't be cast to the|"
            r"tensors used as indices|destination dtypes|not implemented for '\w+'|"
            r"could not infer output dtype",
            values.dtype,
        ),
        (
            r"Target (?P<value>-?\d+) is out of bounds|index out of range in self|"
            r"index (?P<index>-?\d+) is out of bounds for dimension \d+ with size (?P<size>\d+)|"
            r"Class values must be smaller than num_classes",
            values.index,
        ),
        (r"all elements of (input|target) should be between 0 and 1", values.probabilities),
        (r"not positive-definite|matrix is singular", numbers.matrix),
        (
            r"parameter (?P<name>\w+) \(.*\) of distribution (?P<kind>\w+)\(.*the constraint "
            r"(?P<constraint>\w+(?:\(lower_bound=(?P<limit>[\d.]+)[^)]*\))?\(?\)?), but",
            numbers.distribution,
        ),
        (r"only for real scalar outputs", numbers.complex_loss),
        (r"not have been used in the graph", numbers.unused),
        (r"differentiated Tensors does not require grad", numbers.no_gradient_asked),
        (r"grad can be implicitly created only for scalar outputs", backward.not_scalar),
        (r"backward through the graph a second time", backward.second_backward),
        (r"a (?:view of a )?leaf Variable that requires grad .* in-place", backward.leaf_in_place),
        (
            r"modified by an inplace operation: \[\S+ \[(?P<shape>[\d, ]*)\]\],?"
            r"(?: which is output \d+ of (?P<node>\w+))?",
            backward.modified_in_place,
        ),
        (r"does not require grad and does not have a grad_fn", backward.no_grad),
        (r"zip argument #1 must support iteration", other.python_number),
        (
            r"Connection (?:closed|reset) by|[Tt]imed? ?out (?:waiting|after)|[Ww]atchdog caught|"
            r"communicator was aborted",
            other.lost_rank,
        ),
        (r"NoneType", backward.no_leaf),
    )
]

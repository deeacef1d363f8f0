"""TT616: a loss of a softmax over a single class, which is constant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.causes.taken import taken
from tensortrace.checks import Draft, StepView, check, plain_op
from tensortrace.records import Action, Call, Severity, from_scalar
from tensortrace.text import location_text, module_text, shape_text

_NLL = frozenset(("nllloss", "nllloss2d", "nlllossnd"))
# Losses that take probabilities, or any number.
_OF_PROBABILITIES = frozenset(("binarycrossentropy", "mseloss", "smoothl1loss", "huberloss"))


@check("TT616", "softmax-of-one", severity="error", of=("loss.single",))
def softmax_of_one(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """A loss takes a softmax over one class: it is 1, its logarithm 0, whatever the network says.

    Symptom:    the loss is exactly 0 from the first step on (or does not change), and no weight
                moves
    Threshold:  in the graph of the loss, but for views and casts, a log_softmax over a dim of one
                element, of several rows, comes straight to nll_loss, or the loss is exactly 0 (an
                error if it is 0, since nothing can be learnt then; else a warning: it has other
                terms); or a softmax over such a dim comes straight to binary cross entropy or to
                the distance from a target (a warning)
    Source:     definition: a softmax divides each element by the sum of all of them;
                torch.nn.CrossEntropyLoss takes one input for each class
    Fix:        for a yes or no give the one output to F.binary_cross_entropy_with_logits, with
                labels of 0 and 1 in its dtype and shape; else give the last layer as many outputs
                as there are classes, the background among them
    Misses:     losses that only `autograd.grad` sees, in compiled or reentrant checkpointed code,
                or more than 48 nodes away from backward(); each line is read in its first 3 calls;
                a batch of one row, as a contrastive loss has it at the end of an epoch
    Example:    model = nn.Linear(64, 1)  # is it a cat?
                loss = F.cross_entropy(model(x), y)
    Fixed:      model = nn.Linear(64, 1)
                loss = F.binary_cross_entropy_with_logits(model(x).squeeze(1), y.float())
    """
    if step.summary is None:
        return
    for action in step.actions:
        graph = action.detail.get("graph", ()) if action.action == "loss" else ()
        for place, shape in action.detail.get("single", ()) if graph else ():
            node, users = graph[place][0], [name for name, above in graph if place in above]
            known = _known(node, users, from_scalar(action.detail.get("value")) == 0)
            if known is not None:
                severity, what = known
                said = f"{what} is {shape_text(tuple(shape))}"
                made = _place(step, action, [node, *users], shape)
                yield _draft(action, [node, *users], said, severity, made=made)


def _known(node: str, users: list[str], nothing: bool) -> tuple[Severity, str] | None:
    """What is wrong with a softmax over one element that some nodes use, and how sure that is."""
    words = set(map(plain_op, users))
    if plain_op(node) == "logsoftmax" and (nothing or words & _NLL):
        severity: Severity = "error" if nothing else "warning"
        return severity, "cross entropy of one class is 0 whatever the network says: its input"
    if plain_op(node) == "softmax" and words & _OF_PROBABILITIES:
        return "warning", "a softmax of one class is 1 whatever the network says: its input"
    return None


def _place(step: StepView, action: Action, nodes: list[str], shape: list[int]) -> Call | None:
    node, *users = nodes
    found = [taken(step, action, (user, node), user, shape).place for user in users]
    return next(filter(None, found), None)


def _draft(
    action: Action, nodes: list[str], said: str, severity: Severity, *, made: Call | None
) -> Draft:
    path = made.module if made is not None else None
    by = f" (in {module_text(path)})" if path is not None else ""
    return Draft(
        message=said + by, severity=severity, phase="forward", module=path,
        op=made.op if made is not None else None,
        cause=f"{nodes[0]} {location_text(action.location)}", tensor=action.tensor,
        seq=made.seq if made is not None else None,
        location=made.location if made is not None else action.location,
        evidence={"placed": "close", "nodes": nodes, "loss": location_text(action.location)},
    )  # fmt: skip

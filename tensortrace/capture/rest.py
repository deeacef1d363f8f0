"""Steps at rest: of a long run most thin steps look at outermost calls only.

What is not finite inside such a call shows in what it returns, in the loss or in a parameter's
gradient, and the call is run again to find the op. So only those rest inside that can be run again,
and of which nothing leaves but what they return.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from tensortrace.capture.active import here
from tensortrace.capture.drafts import CallDraft
from tensortrace.records import DERIVATIVE

if TYPE_CHECKING:
    from tensortrace.capture.recorder import Recorder
    from tensortrace.capture.roots import Root

# From this step on one in a hundred is full, and between those that checks look at only outermost
# calls are seen: of an MLP's thin step that saves a third of what tracing costs, of an LSTM's four
# fifths.
RESTS_FROM = 200


def is_at_rest(recorder: Recorder) -> bool:
    """Whether nobody asks for the inner calls of a thin step, and a replay may name them."""
    journal, step = recorder.journal, recorder.step
    return (
        recorder.may_rest
        and step >= RESTS_FROM
        and recorder.roots is not None
        and recorder.lines is None
        and recorder.on["narrow"]
        and not journal.engine.looks_at(step)
        # What a full step was given by the one before has that step's number.
        and not journal.will_be_full(step + 1)
    )


def inside_root(recorder: Recorder, root: Root | None) -> frozenset[int]:
    """The modules, by id, whose calls are part of an outermost one that can be run again.

    It holds until another call is entered: so it is not asked anew at each call that it is about.
    """
    if root is None or not root.may_run_again or root.dropped:
        return frozenset()
    # What a root does not hold has no stand-in in a replay, and what was never entered has no hooks
    # on its parameters. What is open is not inside: an interrupt may have left the root open.
    return recorder.met_among(root.tree.ids) - {id(call.module) for call in here.stack}


def is_open(module: nn.Module) -> bool:
    """Whether a call of a module has not ended yet in this thread. Hot."""
    for call in here.stack:  # noqa: SIM110 any() takes twice as long
        if call.module is module:
            return True
    return False


def leaks(drafts: Iterable[Any]) -> bool:
    """Whether an op outside modules took, with a graph, what no outermost call or op returned.

    A module that keeps such a tensor (an auxiliary loss in an attribute, features taken by a hook)
    may spoil the loss while all that it returns is finite. So may a gradient with a graph, which
    autograd.grad returns: in what pass through the modules it was spoilt only their calls tell.
    """
    made: set[int] = set()
    taken: set[int] = set()
    with_graph: set[int] = set()
    for draft in drafts:
        if type(draft) is not CallDraft or draft.fields.get("phase", "forward") != "forward":
            continue
        fields = draft.fields
        with_graph.update(tensor.id for tensor in draft.tensors if tensor.head[7] is not None)
        if fields.get("parent") is None:
            made.update(number for _, number in fields.get("outputs", ()))
            if fields.get("op") == DERIVATIVE and "create_graph" in fields["arguments"]:
                return True
            if fields.get("op") is not None:
                taken.update(number for _, number in fields.get("inputs", ()))
    return not made.issuperset(taken & with_graph)

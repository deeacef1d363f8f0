"""TT605: probabilities where cross entropy expects logits, or where nll expects logarithms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.causes.taken import taken
from tensortrace.checks import Draft, StepView, check, plain_op
from tensortrace.records import Action, Severity
from tensortrace.text import location_text, module_text, shape_text

_NLL = frozenset(("nllloss", "nllloss2d", "nlllossnd"))
# What lies above what: how sure it is, what happens, what to write.
_PAIRS: dict[tuple[str, str], tuple[Severity, str, str]] = {
    ("logsoftmax", "softmax"): (
        "error", "cross entropy takes the softmax of probabilities: its logits lie between 0 and 1",
        "give cross_entropy the logits: remove the softmax, or use F.nll_loss(p.log(), y)"),
    ("logsoftmax", "sigmoid"): (
        "warning", "cross entropy takes the softmax of sigmoids: its logits lie between 0 and 1",
        "give cross_entropy the logits: remove the sigmoid"),
    ("nll", "softmax"): (
        "warning", "nll_loss gets probabilities, not their logarithms: the loss is -p, below 0",
        "F.nll_loss(logits.log_softmax(-1), y), or F.cross_entropy(logits, y)"),
    ("logsoftmax", "logsoftmax"): (
        "note", "log_softmax is taken twice; the second changes nothing and costs time",
        "F.nll_loss(log_probabilities, y) instead of F.cross_entropy"),
}  # fmt: skip


@check(
    "TT605",
    "softmax-before-cross-entropy",
    severity="error",
    of=("loss.graph", "loss.beside_classes"),
)
def softmax_before_cross_entropy(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """Cross entropy gets what has been through a softmax, or nll gets no logarithms.

    Symptom:    the loss falls slowly and stops far from 0 (at 1.46 for 10 classes), whatever the
                learning rate; with nll it goes below 0
    Threshold:  in the graph of the loss, but for views and casts, the input of log_softmax comes
                straight from softmax (an error if nll_loss takes the result, since its logits
                cannot differ by more than 1; else a warning), from sigmoid, under nll_loss (a
                warning) or from log_softmax (a note); or that of nll_loss from softmax (a warning:
                the expected accuracy may be meant). Or nll_loss takes, with no view in between but
                of all leading dims as one, a log_softmax (or log of a softmax) over another dim
                than that of the classes, which has another number of elements (a warning)
    Source:     torch.nn.CrossEntropyLoss ("the input is expected to contain the unnormalized
                logits"), torch.nn.NLLLoss ("log-probabilities"); -log(e / (e + 9)) is 1.46
    Fix:        give cross_entropy the logits, and take the softmax for predictions only
    Misses:     losses that only `autograd.grad` sees, in compiled or reentrant checkpointed code,
                or more than 48 nodes away from backward(); each line is read in its first 3 calls;
                a softmax over the wrong dim of a square matrix, as contrastive losses take it
    Example:    model = nn.Sequential(nn.Linear(64, 10), nn.Softmax(dim=1))
                loss = F.cross_entropy(model(x), y)
    Fixed:      model = nn.Sequential(nn.Linear(64, 10))
                loss = F.cross_entropy(model(x), y)
    """
    if step.summary is None:
        return
    for action in step.actions:
        graph = action.detail.get("graph", ()) if action.action == "loss" else ()
        yield from _beside(step, action)
        names = [_word(name) for name, _ in graph]
        under_nll = {i: node for name, (node, above) in zip(names, graph, strict=True)
                     if name == "nll" for i in above}  # fmt: skip
        for i, (_, above) in enumerate(graph):
            for j in above:
                known = _PAIRS.get((names[i], names[j]))
                if known is None or (names[j] == "sigmoid" and i not in under_nll):
                    continue
                pair = graph[i][0], graph[j][0]
                loss = pair[0] if names[i] == "nll" else under_nll.get(i)
                yield _draft(step, action, pair, known, loss=loss)


def _beside(step: StepView, action: Action) -> Iterator[Draft]:
    dims, shape = (action.detail.get(key, ()) for key in ("beside_classes", "classes_shape"))
    if action.action != "loss" or len(dims) != 2 or max(dims) >= len(shape):
        return
    dim, classes = dims
    if shape[dim] == shape[classes]:
        return
    nodes = list(_logarithms(action))
    # Of several it is not known which is over that dim.
    place = taken(step, action, *nodes[0], shape).place if len(nodes) == 1 else None
    yield Draft(
        message=f"the softmax that nll_loss takes is over dim {dim} of {shape_text(tuple(shape))}, "
        f"{shape[dim]} elements, and the classes are dim {classes}, {shape[classes]}: what it "
        "takes for the probabilities of one sample does not add up to 1",
        severity="warning", phase="forward", tensor=action.tensor, value=dim, limit=classes,
        fix=f"log_softmax(logits, dim={classes}), or F.cross_entropy(logits, y)",
        explanation="the samples compete for each class, where the classes should for each sample",
        cause=f"dim {dim} {location_text(action.location)}",
        module=place.module if place is not None else None,
        seq=place.seq if place is not None else None,
        location=place.location if place is not None else action.location,
        evidence={"placed": "close", "loss": location_text(action.location)},
    )  # fmt: skip


def _logarithms(action: Action) -> Iterator[tuple[tuple[str, str], str]]:
    """Which node takes which softmax, and the nll_loss that both are for."""
    graph = action.detail.get("graph", ())
    for nll, above in graph:
        for name, further in (graph[i] for i in above if _word(nll) == "nll"):
            if plain_op(name) == "logsoftmax":
                yield (nll, name), nll
            elif plain_op(name) == "log":
                yield from (((name, graph[i][0]), nll) for i in further
                            if plain_op(graph[i][0]) == "softmax")  # fmt: skip


def _word(name: str) -> str:
    word = plain_op(name)
    return "nll" if word in _NLL else word


def _draft(
    step: StepView, action: Action, pair: tuple[str, str], known: tuple[Severity, str, str],
    *, loss: str | None,
) -> Draft:  # fmt: skip
    severity, what, fix = known
    if severity == "error" and loss is None:
        severity = "warning"
    made, place = taken(step, action, pair, loss)
    path = made.module if made is not None else None
    by = f" (made in {module_text(path)})" if path is not None else ""
    return Draft(
        message=f"{what}{by}", severity=severity, fix=fix, phase="forward",
        module=place.module if place is not None else None,
        cause=f"{pair} {location_text(action.location)}", tensor=action.tensor,
        seq=place.seq if place is not None else None,
        location=place.location if place is not None else action.location,
        evidence={"placed": "close", "nodes": pair, "loss": location_text(action.location)},
    )  # fmt: skip

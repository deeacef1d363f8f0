"""TT606: probabilities where binary cross entropy expects logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.causes.taken import taken
from tensortrace.checks import Draft, StepView, check, plain_op
from tensortrace.text import location_text, module_text


@check("TT606", "sigmoid-before-bce-with-logits", severity="error", of=("loss.graph",))
def sigmoid_before_bce_with_logits(step: StepView, memory: dict[str, Any]) -> Iterator[Draft]:
    """binary_cross_entropy_with_logits gets what has been through a sigmoid already.

    Symptom:    predictions stay between 0.5 and 0.73; the loss of a negative never falls below 0.69
    Threshold:  in the graph of the loss, but for views and casts, the input of
                binary_cross_entropy_with_logits comes straight from sigmoid (an error, since no
                logit can be negative then) or from softmax (a warning)
    Source:     torch.nn.BCEWithLogitsLoss ("This loss combines a Sigmoid layer and the BCELoss in
                one single class"); sigmoid of 0 and of 1 is 0.5 and 0.73, -log(0.5) is 0.69
    Fix:        give the loss the logits, and take torch.sigmoid for predictions only
    Misses:     losses that only `autograd.grad` sees, in compiled or reentrant checkpointed code,
                or more than 48 nodes away from backward(); each line is read in its first 3 calls
    Example:    prediction = torch.sigmoid(model(x))
                loss = F.binary_cross_entropy_with_logits(prediction, y)
    Fixed:      logits = model(x)
                loss = F.binary_cross_entropy_with_logits(logits, y)
                prediction = torch.sigmoid(logits)
    """
    if step.summary is None:
        return
    for action in step.actions:
        graph = action.detail.get("graph", ()) if action.action == "loss" else ()
        for name, above in graph:
            if plain_op(name) != "binarycrossentropywithlogits":
                continue
            for node in (graph[i][0] for i in above):
                word = plain_op(node)
                if word not in ("sigmoid", "softmax"):
                    continue
                made, place = taken(step, action, (name, node), loss=name)
                path = made.module if made is not None else None
                by = f" (made in {module_text(path)})" if path is not None else ""
                yield Draft(
                    message=f"binary_cross_entropy_with_logits gets what {word} returned{by}: its "
                    "logits lie between 0 and 1",
                    cause=f"{word} {location_text(action.location)}", phase="forward",
                    severity="error" if word == "sigmoid" else "warning",
                    module=place.module if place is not None else None, tensor=action.tensor,
                    seq=place.seq if place is not None else None,
                    location=place.location if place is not None else action.location,
                    evidence={"placed": "close", "nodes": [name, node],
                              "loss": location_text(action.location)},
                )  # fmt: skip

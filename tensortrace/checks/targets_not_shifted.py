"""TT617: a language model that is asked for the token it was given, and not for the next one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.kinds import CLASS_LOSSES
from tensortrace.records import Action, from_scalar
from tensortrace.text import location_text


@check("TT617", "targets-not-shifted", when="full", of=("loss.copied",))
def targets_not_shifted(
    step: StepView, memory: dict[str, Any], *, sustain: int = 2
) -> Iterator[Draft]:
    """The targets of a causal language model are its own input, not the tokens that come next.

    Symptom:    the loss falls to nearly 0 within an epoch, and the model repeats the last token of
                what it is given
    Threshold:  in `sustain` losses of one line the targets of a cross entropy are the very tokens
                that an embedding was given, each at its place, none masked and some unlike the
                next; a path leads from one to the other that neither shifts nor mixes positions;
                and attention is causal: is_causal=True, or a softmax of 0 for all that comes later
    Source:     definition: after token t the model is to predict token t + 1 (Radford et al. 2018,
                eq. 1), and sees token t
    Fix:        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), or give the
                model tokens[:, :-1]. Models of transformers shift the labels that they are given
    Misses:     causal models without attention (an LSTM, Mamba); labels of which some are masked;
                losses that autograd.grad, compiled or checkpointed code sees, or more than 48 nodes
                away from backward(); each line is read in its first 3 calls; versions of torch that
                do not tell what unpacks a saved tensor. A model that is to copy, and is causal, is
                told of
    Example:    logits = gpt(tokens)  # is_causal=True
                loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    Fixed:      logits = gpt(tokens[:, :-1])  # is_causal=True
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    """
    counts: dict[str, int] = memory.setdefault("counts", {})
    for loss in step.losses:
        place = location_text(loss.location)
        if any(from_scalar(loss.detail.get(key)) != 1 for key in ("copied", "causal")):
            counts.pop(place, None)
            continue
        counts[place] = counts.get(place, 0) + 1
        if counts[place] >= sustain:
            yield _draft(step, loss, sustain)


def _draft(step: StepView, loss: Action, sustain: int) -> Draft:
    calls = [call for call in step.forward() if step.kind_of(call) in CLASS_LOSSES]
    call = calls[0] if len(calls) == 1 else None
    return Draft(
        message=f"in {sustain} losses the targets are the tokens that the model was given, each at "
        "its own place, and its attention is causal: it need only copy what it sees",
        cause=location_text(loss.location), phase="forward",
        module=call.module if call is not None else None,
        op=call.op if call is not None else None, seq=call.seq if call is not None else loss.seq,
        tensor=loss.tensor, value=sustain, limit=sustain,
        location=call.location if call is not None else loss.location,
        evidence={"placed": "direct", "loss": loss.seq},
    )  # fmt: skip

"""TT506: a GradScaler that skips step after step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from tensortrace.checks import Draft, StepView, check
from tensortrace.records import Optimizer, Severity, from_scalar
from tensortrace.text import number_text


@check("TT506", "scaler-only-skips")
def scaler_only_skips(
    step: StepView,
    memory: dict[str, Any],
    *,
    running: int = 20,
    window: int = 50,
    share: float = 0.5,
) -> Iterator[Draft]:
    """The GradScaler skips the optimizer step again and again.

    Symptom:    the loss does not move; the scale falls towards 0
    Threshold:  `running` steps of an optimizer skipped one after the other; an error once the scale
                is below 1, as gradients that overflow unscaled or are NaN will always be skipped.
                Or: more than `share` of the last `window` steps skipped
    Source:     torch.amp.GradScaler: it starts at 65536 and halves at each skip, so 16 skips bring
                it to 1; `running` leaves room for an init_scale of 2**20; `share` chosen here: at
                the default growth_interval a healthy run skips 1 step in 2000
    Fix:        look for the first NaN or infinity in the backward pass (TT102); run the layers that
                overflow in float32 with torch.autocast(enabled=False); raise growth_interval if the
                scale bounces
    Misses:     an init_scale above 2**20 may be reported while it is still falling
    Example:    model = T5ForConditionalGeneration.from_pretrained("t5-large")
                with torch.autocast("cuda", torch.float16):  # it was trained in bfloat16
                    loss = model(**batch).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    Fixed:      model = T5ForConditionalGeneration.from_pretrained("t5-large")
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
    """
    counts: dict[int, int] = memory.setdefault("counts", {})
    recent: dict[int, deque[bool]] = memory.setdefault("recent", {})
    for record in step.happened():
        if isinstance(record, Optimizer):
            index = record.index
            counts[index] = counts.get(index, 0) + 1 if record.skipped else 0
            last = recent.get(index)
            if last is None:
                last = recent[index] = deque(maxlen=window)
            last.append(record.skipped)
            if True not in last:
                continue
            scale = memory.get("scale")
            if counts[index] >= running:
                hopeless = scale is not None and scale < 1
                how = f"{counts[index]} steps running (limit {running})"
                yield _draft(record, scale, how, counts[index], "error" if hopeless else "warning")
            elif len(last) == window and sum(last) > share * window:
                how = f"{sum(last)} of its last {window} steps (limit {share:.0%})"
                yield _draft(record, scale, how, sum(last), "warning")
        elif record.action == "scale":
            memory["scale"] = from_scalar(record.detail.get("scale"))


def _draft(
    record: Optimizer, scale: float | None, how: str, skipped: int, severity: Severity
) -> Draft:
    said = "" if scale is None else f"; the scale is down to {number_text(scale)}"
    return Draft(
        message=f"the GradScaler skipped optimizer {record.index}, {record.cls}, in {how}{said}",
        cause=f"optimizer {record.index}", severity=severity, phase="optimizer", value=skipped,
        location=record.location, evidence={"optimizer": record.index, "scale": scale},
    )  # fmt: skip

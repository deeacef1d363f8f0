"""Every demo of a NaN or infinity names the same op and line at both levels, and ends the same."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tensortrace

DEMOS = sorted(
    demo
    for demo in (Path(__file__).parents[2] / "demos").glob("*.py")
    if "Expect: TT101" in demo.read_text("utf-8") or "Expect: TT102" in demo.read_text("utf-8")
)


def run(demo: Path, level: str | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, bytes]:
    """Run a demo at a level, or untraced; returns its errors and what its optimizers held last."""
    traces: list[tensortrace.Trace] = []
    weights: dict[int, torch.nn.Parameter] = {}
    register = torch.nn.Module.register_parameter

    def trace(*args: Any, **options: Any) -> tensortrace.Trace:
        traces.append(tensortrace.capture.tracer.trace(*args, **options, level=level or "module"))
        return traces[-1]

    def remember(self: torch.nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None:
            weights[len(weights)] = parameter
        register(self, name, parameter)

    with monkeypatch.context() as patch:
        patch.setattr(tensortrace, "trace", trace)
        patch.setattr(torch.nn.Module, "register_parameter", remember)
        patch.setattr(sys, "argv", [str(demo), f"{level}.jsonl"])
        if level is None:
            patch.setenv("TENSORTRACE", "off")
        runpy.run_path(str(demo), run_name="__main__")
        for one in traces:
            one.close()  # a decorated function keeps its hooks until the end
    values = b"".join(p.detach().numpy().tobytes() for p in weights.values())
    errors = [f for t in traces for f in t.findings if f.severity == "error"]
    return errors, values


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo.stem)
def test_demo_names_the_same_op_and_line_at_both_levels(
    demo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    nothing, untraced = run(demo, None, monkeypatch)
    module_errors, module_weights = run(demo, "module", monkeypatch)
    op_errors, op_weights = run(demo, "op", monkeypatch)
    assert nothing == []
    told = [
        [(f.step, f.module, f.op, f.location) for f in errors]
        for errors in (module_errors, op_errors)
    ]
    assert told[0] == told[1]
    assert sum(f.code in ("TT101", "TT102") for f in module_errors) == 1
    assert module_weights == op_weights == untraced

"""The annotated listing for machines: one JSON document."""

from __future__ import annotations

import json
from typing import Any

from tensortrace.export.flows import LISTED, Flow, FunctionFlow, LineFlow
from tensortrace.export.lines import Listing


def render_lines_json(listing: Listing) -> str:
    """Write a listing as one strict JSON document.

    `recorded` says whether executions are those of lines or, without line records, calls. A dim is
    its length, or a list of the first lengths it had; `range` has the smallest and largest of each.
    """
    document = {
        "log": str(listing.run.path),
        "steps": [listing.steps[0], listing.steps[-1]] if listing.steps else None,
        "whole": listing.whole,
        "recorded": listing.recorded,
        "first_nonfinite": _first_bad(listing),
        "near": list(listing.near),
        "functions": [_function(function) for function in listing.functions],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _first_bad(listing: Listing) -> dict[str, Any] | None:
    first = listing.first_bad
    if first is None:
        return None
    place = first.location
    return {
        "step": first.step, "file": place.file, "line": place.line, "function": place.function,
    }  # fmt: skip


def _function(function: FunctionFlow) -> dict[str, Any]:
    return {
        "file": function.file,
        "name": function.name,
        "first_line": function.first_line,
        "called": function.entered,
        "followed": function.followed,
        "lines": [_line(function, line) for _, line in sorted(function.lines.items())],
    }


def _line(function: FunctionFlow, line: LineFlow) -> dict[str, Any]:
    return {
        "line": line.number,
        "code": function.code(line.number),
        "executions": line.executions,
        "recorded": line.recorded,
        "host_ns": line.host_ns,
        "flows": [_flow(flow) for flow in line.flows],
        "unnamed": line.unnamed,
        "flags": line.flags,
        "gradient": line.gradient,
        "raised": line.raised,
        "findings": [
            {
                "id": finding.id, "code": finding.code, "severity": finding.severity,
                "step": finding.step, "message": finding.message, "count": count,
            }
            for finding, count in line.findings.values()
        ],
    }  # fmt: skip


def _flow(flow: Flow) -> dict[str, Any]:
    return {
        "name": flow.name,
        "tensors": [
            {
                "dtype": dtype,
                "shape": None if count is None else [
                    dim.values[0] if len(dim.values) == 1 else dim.values[:LISTED] for dim in dims
                ],
                "range": None if count is None else [[dim.low, dim.high] for dim in dims],
            }
            for (dtype, count), dims in flow.kinds.items()
        ],
        "first": flow.first,
        "last": flow.last,
        "values": flow.texts[:LISTED],
        "values_range": [flow.low, flow.high] if flow.low <= flow.high else None,
        "bad": {
            name: {"step": bad.step, "count": bad.count, "numel": bad.numel}
            for name, bad in flow.bad.items()
        },
    }  # fmt: skip

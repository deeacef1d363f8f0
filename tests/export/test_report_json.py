from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tensortrace.export.contents import Found, gather
from tensortrace.export.report_json import render_json, report_json
from tensortrace.run import open_run
from tests.builders import make_header, make_run
from tests.export.canonical import (
    make_calls,
    make_canonical,
    make_finding,
    make_findings,
    make_step,
    write_log,
)
from tests.export.hostile import PAYLOADS


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def canonical(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log.jsonl", make_canonical())


def test_the_document_has_the_keys_that_its_page_names(canonical: Path) -> None:
    from tensortrace.export import report_json as page

    document = strict(report_json(canonical))
    assert page.__doc__ is not None
    assert all(f"{key}:" in page.__doc__ or f"{key}," in page.__doc__ or f", {key}:" in page.__doc__
               or f"`{key}`" in page.__doc__ for key in document)  # fmt: skip
    assert set(document) >= {"header", "findings", "end", "modules", "step", "ok", "counts"}
    assert document["format"] == "tensortrace-report"


def test_header_end_and_findings_are_those_of_the_log(canonical: Path) -> None:
    document = strict(report_json(canonical))
    header, *_, end = make_canonical()
    assert document["header"] == msgspec.to_builtins(header)
    assert document["end"] == msgspec.to_builtins(end)
    warning, note, error = make_findings()
    for said, finding in zip(document["findings"], [error, warning, note], strict=True):
        assert said == {
            **msgspec.to_builtins(finding), "ranks": [0],
            "later_steps": 0 if finding is note else 1,
        }  # fmt: skip
    assert (document["ok"], document["counts"]) == (False, {"error": 1, "warning": 1, "note": 1})


def test_a_module_row_has_what_the_step_says(canonical: Path) -> None:
    document = strict(report_json(canonical, modules=["encoder.0"]))
    assert document["step"] == 0
    assert document["modules"] == [{
        "path": "encoder.0", "cls": "Linear", "calls": 1, "shape": [4, 8], "dtype": "float32",
        "parameters": 40, "output_rms": 0.5, "grad_norm": 1.5, "update_ratio": 1e-3,
        "host_ns": 600_000, "device_ns": None, "flag": "TT202",
    }]  # fmt: skip


def test_a_run_without_steps_or_end_is_a_document_too(tmp_path: Path) -> None:
    document = strict(report_json(str(write_log(tmp_path / "log.jsonl", make_run([])))))
    assert (document["ok"], document["end"], document["step"], document["modules"]) == (
        True, None, None, [],
    )  # fmt: skip
    assert document["ranks"][0]["last_step"] is None


def test_a_number_that_json_has_not_is_named(canonical: Path) -> None:
    evidence = {"a": float("nan"), "b": [float("inf"), {"c": float("-inf")}], "d": 1.5}
    found = Found([make_finding(value="NaN", evidence=evidence)], again=True)
    document = strict(render_json(gather([open_run(canonical)], [found])))
    assert document["findings"][0]["evidence"] == {
        "a": "NaN", "b": ["Infinity", {"c": "-Infinity"}], "d": 1.5,
    }  # fmt: skip
    assert document["findings"][0]["value"] == "NaN"
    assert document["checked_again"] is True


def test_every_rank_is_listed_and_findings_say_theirs(tmp_path: Path) -> None:
    runs = [
        open_run(write_log(tmp_path / f"log.rank{rank}.jsonl", [
            make_header(rank=rank, world_size=2), *make_calls(0), make_finding(step=0),
            make_step(0),
        ]))
        for rank in range(2)
    ]  # fmt: skip
    document = strict(render_json(gather(runs)))
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1]
    assert [finding["ranks"] for finding in document["findings"]] == [[0, 1]]


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_the_document_is_ascii_and_gives_hostile_text_back(tmp_path: Path, payload: str) -> None:
    log = write_log(tmp_path / "log.jsonl", make_run([make_finding(message=payload)]))
    text = report_json(log)
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert strict(text)["findings"][0]["message"] == payload

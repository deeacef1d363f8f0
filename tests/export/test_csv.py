"""The numbers of a run as CSV: every part on the canonical run, hostile text, strange logs."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from tensortrace.export.csv import NAMES, safe_cell, write_table
from tensortrace.export.exporter import Wanted
from tensortrace.records import Call, Module, ModuleColumns, Record, Step
from tensortrace.run import Run, open_run
from tests.builders import make_call, make_header, make_run, make_tensor
from tests.export.canonical import make_canonical, make_finding, make_step, write_log
from tests.export.compare import assert_golden
from tests.export.hostile import FORBIDDEN, PAYLOADS

FORMULAS = {
    "command": "=cmd|' /C calc'!A0", "sum": "+1+1", "difference": "-2+3", "at": "@SUM(A1)",
    "full width": "\uff1dHYPERLINK(1)", "in the next cell": "a;=1+1", "after a bar": "x|@y",
}  # fmt: skip


def table(runs: list[Run], **wanted: Any) -> str:
    out = io.StringIO(newline="")
    write_table(runs, Wanted(**wanted), out)
    return out.getvalue()


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def make(tmp_path: Path, *records: Record) -> list[Run]:
    return [open_run(write_log(tmp_path / "log.jsonl", make_run(records)))]


@pytest.mark.parametrize("what", NAMES)
def test_each_part_of_the_canonical_run(tmp_path: Path, what: str) -> None:
    assert_golden(f"{what}.csv", table(make(tmp_path, *make_canonical()), what=what))


def test_the_usual_part_has_a_row_for_each_step_and_module(tmp_path: Path) -> None:
    text = table(make(tmp_path, *make_canonical()))
    rows = rows_of(text)
    assert [(row["step"], row["module"]) for row in rows[:6]] == [
        ("0", ""), ("0", "encoder"), ("0", "encoder.0"), ("0", "encoder.1"), ("0", "head"),
        ("1", ""),
    ]  # fmt: skip
    assert rows[2] == {
        "rank": "0", "step": "0", "module": "encoder.0", "class": "Linear", "output_rms": "0.5",
        "zero_frac": "0.0", "grad_rms": "", "param_grad_rms": "0.25", "update_ratio": "0.001",
        "flags": "", "loss": "0.7", "grad_norm": "3.0", "lr": "0.1",
    }  # fmt: skip
    assert (rows[5]["loss"], rows[5]["grad_norm"], rows[5]["lr"]) == ("NaN", "Infinity", "0.1 0.01")


def test_lines_end_as_the_standard_says_and_there_is_no_blank_one(tmp_path: Path) -> None:
    text = table(make(tmp_path, *make_canonical()))
    assert text.count("\r\n") == 1 + 3 * 5
    assert text.endswith("\r\n")
    assert "\n" not in text.replace("\r\n", "")


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    number = 0.1 + 0.2
    rows = rows_of(table(make(tmp_path, Step(step=0, seq=1, loss=number)), what="steps"))
    assert float(rows[0]["loss"]) == number


@pytest.mark.parametrize("text", FORMULAS.values(), ids=FORMULAS)
def test_no_text_is_a_formula(tmp_path: Path, text: str) -> None:
    cell = safe_cell(text)
    assert cell.replace("'", "") == text.replace("'", "")
    assert all(part[:1] not in "=+-@\uff1d" for part in cell.replace("|", ";").split(";") if part)
    finding = make_finding(step=0, message=text, module=text)
    runs = make(tmp_path, Module(step=0, path=text, cls=text), finding, make_step(0))
    assert rows_of(table(runs, what="findings"))[0]["message"] == cell


@pytest.mark.parametrize("text", ["-1", "-1.5e-3", "+2", "Infinity", "-Infinity", "NaN", "a-b", ""])
def test_numbers_and_plain_words_stay_as_they_are(text: str) -> None:
    assert safe_cell(text) == text


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("what", NAMES)
def test_hostile_text_is_one_cell_of_one_line(tmp_path: Path, payload: str, what: str) -> None:
    evil = f'{payload}",\r\n"=1'
    tensor = make_tensor(0, 2, dtype=evil, device=evil)
    runs = make(
        tmp_path, Module(step=0, path=evil, cls=evil),
        make_call(0, evil, op=evil, outputs=[(evil, 0)], tensors=[tensor]),
        make_finding(step=0, module=evil, message=evil, fix=evil, explanation=evil, check=evil),
        Step(step=0, seq=9, modules=ModuleColumns(path=[evil], flags=[evil], grad_rms=[1.0])),
    )  # fmt: skip
    text = table(runs, what=what)
    assert not FORBIDDEN.search(text.replace("\r\n", "\n"))
    assert text.count("\n") == 2
    (row,) = rows_of(text)
    assert list(row) == list(NAMES[what])


def test_only_the_steps_and_modules_that_are_wanted_are_written(tmp_path: Path) -> None:
    runs = make(tmp_path, *make_canonical())
    rows = rows_of(table(runs, steps=range(1, 3), modules=["encoder*"]))
    assert {row["step"] for row in rows} == {"1", "2"}
    assert {row["module"] for row in rows} == {"encoder", "encoder.0", "encoder.1"}
    assert [row["step"] for row in rows_of(table(runs, what="steps", steps=range(1, 2)))] == ["1"]
    assert {row["step"] for row in rows_of(table(runs, what="tensors", steps=range(1)))} == {"0"}
    found = rows_of(table(runs, what="findings", steps=range(1)))
    assert [row["code"] for row in found] == ["TT202", "TT105"]


def test_the_tensors_of_a_call_say_what_they_were_in_it(tmp_path: Path) -> None:
    call = make_call(
        0, "a", inputs=[("x", 0), ("y", 1)], outputs=[("output", 2), ("again", 0)],
        tensors=[make_tensor(0, 2, 3), make_tensor(1), make_tensor(2), make_tensor(3, shape=None)],
    )  # fmt: skip
    back = make_call(1, "a", phase="backward", forward=0, outputs=[("weight", 4)],
                     tensors=[make_tensor(4, 2)])  # fmt: skip
    rows = rows_of(table(make(tmp_path, call, back, make_step(0)), what="tensors"))
    assert [(row["role"], row["name"], row["shape"]) for row in rows] == [
        ("input", "x", "2x3"), ("input", "y", "scalar"), ("output", "output", "scalar"),
        ("", "", ""), ("grad", "weight", "2"),
    ]  # fmt: skip


def test_every_rank_has_its_rows(tmp_path: Path) -> None:
    runs = [
        open_run(write_log(tmp_path / f"log.rank{rank}.jsonl", [
            make_header(rank=rank, world_size=2), make_finding(step=0), make_step(0),
        ]))
        for rank in range(2)
    ]  # fmt: skip
    assert [row["rank"] for row in rows_of(table(runs, what="steps"))] == ["0", "1"]
    assert [row["rank"] for row in rows_of(table(runs, what="findings"))] == ["0 1"]


def test_arrays_of_unequal_length_leave_cells_empty(tmp_path: Path) -> None:
    short = ModuleColumns(path=["a", "b"], grad_rms=[1.0], output_rms=[1.0, 2.0, 3.0])
    rows = rows_of(table(make(tmp_path, Step(step=0, seq=1, modules=short))))
    assert [(row["grad_rms"], row["output_rms"]) for row in rows] == [("1.0", "1.0"), ("", "2.0")]
    none = Step(step=0, seq=1, modules=ModuleColumns(path=["a", "b"]))
    assert [row["module"] for row in rows_of(table(make(tmp_path, none)))] == ["a", "b"]


def test_a_run_without_steps_is_a_row_of_names(tmp_path: Path) -> None:
    for what, names in NAMES.items():
        assert table(make(tmp_path), what=what) == ",".join(names) + "\r\n"


def test_rows_are_written_as_they_are_read_and_calls_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensortrace.run import run as reading

    runs = make(tmp_path, *make_canonical())
    table(runs)  # what is kept of the head and the tail is decoded by now
    decoded: list[Record] = []
    decode = reading.decode

    def spy(line: bytes) -> Any:
        record = decode(line)
        decoded.append(record)  # type: ignore[arg-type]
        return record

    monkeypatch.setattr(reading, "decode", spy)
    ticked: list[int] = []
    table(runs, tick=ticked.append)
    assert ticked == [0, 1, 2]
    assert not any(isinstance(record, Call) for record in decoded)
    assert sum(isinstance(record, Step) for record in decoded) == 3

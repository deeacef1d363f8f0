"""A log as a reader sees it: any step at once, whatever the file went through."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tensortrace
from tensortrace import run as reading
from tensortrace.engine import RARELY, SELDOM
from tensortrace.errors import LogError
from tensortrace.log import encode
from tensortrace.records import Line, Module, ModuleColumns, Record, Source, Step, Variable
from tensortrace.run import Run, looked_at, newest_log
from tensortrace.run.series import LOOKED_AT
from tests.builders import (
    HERE,
    make_call,
    make_end,
    make_finding,
    make_header,
    make_late_run,
    make_run,
    make_steps,
    make_tensor,
    write_log,
)


def open_run(path: str | Path) -> Run:
    """Open a log as a screen does, which reads through it later."""
    return reading.open_run(path, index=False)


def text_of(records: list[Record]) -> bytes:
    return b"".join(map(encode, records))


def exhaust(run: Run) -> Run:
    for _ in run.index():
        pass
    return run


def visit(run: Run) -> None:
    """Ask everything a screen asks."""
    exhaust(run)
    first, last = run.first_step(), run.last_step()
    for number in {first, first + 1, (first + last) // 2, last, last + 1, -1}:
        step = run.step(number)
        for i in range(len(step)):
            step.kind(i)
            step.record(i)
        lists: Any = (step.calls, step.params, step.actions, step.optimizers, step.lines)
        assert sum(map(len, lists)) <= len(step.records) <= len(step)
        for id in range(9):
            step.tensor(id), step.producer(id), step.consumers(id)
            step.call(id), step.children(id), step.backward_of(id)
        step.children(None), step.tensors, step.summary
    run.summaries(first, first + 50)
    list(run.records())
    for name in ("findings", "modules", "sources", "live", "lost_bytes", "steps"):
        getattr(run, name)
    run.source("train.py", 1)
    run.refresh()


# 40 steps are 87 KB, so the head, the middle and the tail of the reader all have a part.
FORTY: list[Record] = make_run(
    [
        Source(step=0, file="train.py", name="main", first_line=10, text="def main():\n  a\n  b"),
        *make_steps(20),
        make_finding("f1", step=19),
        *make_steps(20, start=20),
        make_finding("f2", step=39),
        make_end(39),
    ]
)


@pytest.fixture
def forty(tmp_path: Path) -> Run:
    return open_run(write_log(tmp_path / "log.jsonl", FORTY))


# -- what was written is what is read


def test_every_step_has_exactly_its_records(forty):
    assert forty.steps == range(40)
    assert (forty.first_step(), forty.last_step()) == (0, 39)
    for number in forty.steps:
        assert forty.step(number).records == [r for r in FORTY if r.step == number]
    assert forty.step(40).records == forty.step(-1).records == []
    assert list(forty.records()) == FORTY
    assert list(forty.records(3, 5)) == [r for r in FORTY if 3 <= r.step < 5]


def test_first_data_is_there_before_the_index(tmp_path):
    records = [*make_steps(800), make_finding(step=799), make_end(799)]
    run = open_run(write_log(tmp_path / "log.jsonl", records))
    assert run.indexed < 0.1
    assert run.steps == range(800)
    assert [f.step for f in run.findings] == [799]
    assert list(run.modules) == ["", "fc1", "fc2"]
    assert run.end == make_end(799)
    assert [s.step for s in run.summaries(395, 405)] == list(range(395, 405))


def test_a_log_that_is_opened_by_hand_is_read_to_its_end(tmp_path):
    records = [r for n in range(800) for r in make_steps(1, start=n)]
    records.insert(len(records) // 2, make_finding(step=400))
    run = tensortrace.open_run(write_log(tmp_path / "log.jsonl", records))
    assert run.indexed == 1.0
    assert [f.step for f in run.findings] == [400]
    assert open_run(tmp_path / "log.jsonl").findings == []


def test_the_index_completes_findings_modules_and_sources_in_log_order(tmp_path):
    records: list[Record] = []
    for number in range(900):
        records += make_steps(1, start=number)
        if number % 100 == 50:
            records.append(make_finding(f"f{number}", step=number))
            records.append(Module(step=number, path=f"late{number}", cls="Late"))
    records.append(Module(step=899, path="fc1", cls="Newest"))
    run = open_run(write_log(tmp_path / "log.jsonl", records))
    assert len(run.findings) < 9
    parts: list[float] = []
    assert list(run.index(parts.append)) == parts
    assert parts == sorted(parts)
    assert run.indexed == parts[-1] == 1.0
    assert [f.step for f in run.findings] == list(range(50, 900, 100))
    late = [f"late{number}" for number in range(50, 900, 100)]
    assert list(run.modules) == ["", "fc1", "fc2", *late]
    assert run.modules["fc1"].cls == "Newest"
    assert [s.step for s in run.summaries(395, 405)] == list(range(395, 405))


def test_the_index_can_be_cancelled_and_taken_up_again(tmp_path):
    run = open_run(write_log(tmp_path / "log.jsonl", make_steps(1200)))
    turns = iter([False, True])
    assert len(list(run.index(cancelled=lambda: next(turns)))) == 1
    assert 0 < run.indexed < 1
    assert exhaust(run).indexed == 1.0


def test_summaries_are_the_same_with_and_without_an_index(tmp_path):
    records = [r for n in range(0, 900, 3) for r in make_steps(1, start=n)]
    path = write_log(tmp_path / "log.jsonl", records)
    plain, indexed = open_run(path), exhaust(open_run(path))
    for start, stop in ((0, 10), (391, 430), (880, 10**9), (-5, 1), (7, 7), (10**9, 10**10)):
        expected = list(range(-(-max(start, 0) // 3) * 3, min(stop, 900), 3))
        assert [s.step for s in plain.summaries(start, stop)] == expected
        assert [s.step for s in indexed.summaries(start, stop)] == expected


def test_a_run_need_not_begin_at_step_0(tmp_path):
    run = open_run(write_log(tmp_path / "log.jsonl", make_steps(5, start=1000)))
    assert run.steps == range(1000, 1005)


def test_a_log_with_no_step_has_none(tmp_path):
    for records in ([], [make_end()]):
        run = open_run(write_log(tmp_path / "log.jsonl", records))
        assert run.steps == range(0)
        visit(run)


def test_many_modules_before_the_first_call_do_not_hide_the_first_step(tmp_path):
    many = [Module(step=7, path=f"layers.{i}", cls="Linear") for i in range(3000)]
    run = open_run(write_log(tmp_path / "log.jsonl", [*many, *make_steps(500, start=7)]))
    assert run.steps == range(7, 507)


def test_the_function_that_holds_a_line_is_found(tmp_path):
    outer = Source(
        step=0, file="a.py", name="f", first_line=10, text="def f():\n  def g():\n    x\n  y"
    )
    inner = Source(step=0, file="a.py", name="g", first_line=11, text="  def g():\n    x")
    run = open_run(write_log(tmp_path / "log.jsonl", [outer, inner]))
    assert [run.source("a.py", n) for n in (9, 10, 12, 13, 14)] == [None, outer, inner, outer, None]
    assert run.source("b.py", 12) is None


# -- one step


def test_a_step_knows_who_made_and_who_used_a_tensor(forty):
    step = forty.step(3)
    assert step.producer(2).module == "fc1"
    assert step.producer(3).module == "fc2"  # Net returns it too; the inner call made it
    assert step.producer(1) is None
    assert step.producer(None) is None
    assert [c.seq for c in step.consumers(1)] == [1, 2]
    assert [c.seq for c in step.consumers(5)] == [5]
    assert step.producer(7).phase == "backward"


def test_a_call_that_passes_a_tensor_on_did_not_make_it(tmp_path):
    calls = [
        make_call(1, "fc", outputs=[("output", 1)], tensors=[make_tensor(1, 2)]),
        make_call(2, "identity", inputs=[("input", 1)], outputs=[("output", 1)]),
    ]
    step = open_run(write_log(tmp_path / "log.jsonl", calls)).step(0)
    assert step.producer(1).module == "fc"


def test_a_step_describes_every_tensor(forty):
    step = forty.step(3)
    assert sorted(step.tensors) == list(range(1, 8))
    assert all(step.tensor(id) == tensor for id, tensor in step.tensors.items())
    assert step.tensor(8) is None
    assert step.tensor(10**30) is None


def test_calls_have_parents_children_and_backward_calls(forty):
    step = forty.step(3)
    assert step.parent(step.call(3)).seq == 1
    assert step.parent(step.call(1)) is None
    assert [c.seq for c in step.children(1)] == [2, 3]
    assert [c.seq for c in step.children(None)] == [1, 4, 5]
    assert [c.seq for c in step.backward_of(2)] == [5]
    assert step.call(99) is None


def test_a_tensor_that_a_source_line_met_first_is_found(tmp_path):
    returned = Variable("return", "tensor", tensors=[("", 9)])
    line = Line(step=0, seq=3, location=HERE, value=returned, tensors=[make_tensor(9, 2, 3)])
    step = open_run(write_log(tmp_path / "log.jsonl", [*make_steps(1), line])).step(0)
    assert step.tensor(9) == make_tensor(9, 2, 3) == step.tensors[9]
    assert step.call(3).module == "fc2"


def test_kinds_and_lines_of_a_step_need_no_decoding(forty, monkeypatch):
    monkeypatch.setattr("tensortrace.run.step.decode", None)
    step = forty.step(5)
    assert [step.kind(i) for i in range(len(step))] == [*["call"] * 5, "param", "step"]
    assert step.indices("call").tolist() == [0, 1, 2, 3, 4]
    assert json.loads(step.line(5))["name"] == "fc2.weight"


def test_the_calls_of_the_step_before_a_finding_stand_where_they_belong(tmp_path):
    run = open_run(write_log(tmp_path / "log.jsonl", make_late_run()))
    step = run.step(0)
    kinds = [*["module"] * 3, *["call"] * 5, "action", "param", "step"]
    assert [step.kind(i) for i in range(len(step))] == ["header", *kinds]
    assert [r.seq for r in step.records if hasattr(r, "seq")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step.seq(i) for i in step.indices("call", "param", "step")] == [1, 2, 3, 4, 5, 7, 8]
    lines = run.path.read_bytes().splitlines(keepends=True)
    assert sorted(step.line(i) + b"\n" for i in range(len(step))) == sorted(lines[: len(step)])
    assert step.kept == run.step(1).kept == "all"


@pytest.mark.parametrize(("kept", "told"), [(6, "all"), (4, "some"), (0, "none")])
def test_a_thin_step_says_how_many_of_its_calls_are_in_the_log(tmp_path, kept, told):
    assert open_run(write_log(tmp_path / "log.jsonl", make_late_run(kept))).step(0).kept == told


def test_of_a_huge_step_the_calls_are_cut_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("tensortrace.run.step.STEP_NBYTES", 10_000)
    calls = [make_call(i) for i in range(1, 501)]
    closing = [make_finding(), Step(step=0, seq=501)]
    run = open_run(write_log(tmp_path / "log.jsonl", [*calls, *closing]))
    step = run.step(0)
    assert 0 < len(step.calls) < 500
    assert step.truncated == 500 - len(step.calls)
    assert [*step.findings, step.summary] == closing
    assert len(step) == 503
    assert step.record(500) == calls[-1]
    assert step.call(500) == calls[-1]


def test_steps_that_are_looked_at_are_those_of_the_engine():
    assert LOOKED_AT == (SELDOM, RARELY)
    assert [looked_at(range(*ends)) for ends in ((0, 9), (1, 11), (11, 20), (11, 21))] == [
        0, 10, 11, 20,
    ]  # fmt: skip
    assert [looked_at(range(*ends)) for ends in ((1010, 1099), (1010, 1040), (1013, 1019))] == [
        1050, 1010, 1013,
    ]  # fmt: skip


# -- damage


def test_a_last_line_without_newline_is_not_counted_until_it_is_complete(tmp_path):
    path = tmp_path / "log.jsonl"
    content = text_of(make_run(make_steps(2)))
    path.write_bytes(content[:-1])
    run = open_run(path)
    last = len(content.splitlines(keepends=True)[-1])
    assert run.lost_bytes == last - 1
    assert run.step(1).summary is None
    path.write_bytes(content)
    assert run.refresh()
    assert run.lost_bytes == 0
    assert run.step(1).summary is not None


def test_every_cut_of_a_log_keeps_its_complete_lines(tmp_path):
    records = make_run([make_call(1), Step(step=0, seq=2), make_call(1, step=1), make_end(1)])
    content = text_of(records)
    path = tmp_path / "log.jsonl"
    header = len(encode(records[0]))
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        if cut < header:
            with pytest.raises(LogError):
                open_run(path)
            continue
        run = open_run(path)
        whole = content[:cut].count(b"\n")
        assert list(run.records()) == records[:whole]
        assert run.lost_bytes == cut - content[:cut].rfind(b"\n") - 1
        assert exhaust(run).unreadable == 0
        run.close()


FUZZED = text_of(make_run([*make_steps(3), make_finding(step=2), make_end(2)]))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, len(FUZZED) - 1), st.integers(0, 255)), max_size=12))
def test_flipped_bytes_never_do_more_than_refuse_to_open(tmp_path, flips):
    damaged = bytearray(FUZZED)
    for position, byte in flips:
        damaged[position] = byte
    (tmp_path / "log.jsonl").write_bytes(damaged)
    try:
        run = open_run(tmp_path / "log.jsonl")
    except LogError:
        return
    visit(run)
    run.close()


HUGE = b"9" * 30
STRANGE = [
    b"{", b"{}", b'{"kind":"step"}', b'{"kind":"end","step":0,"why":"exit"}',
    b'{"kind":"step","step":0,"seq":3}\r',
    b'{"kind":"step","step":9999999999999999,"seq":1}',
    b'{"kind":"wormhole","step":' + HUGE + b"}",
    b'{"kind":"call","step":1,"seq":' + HUGE + b"}",
    b'{"kind":"call","step":2,"seq":1,"tensors":[{"id":' + HUGE + b"}]}",
    b'{"kind":"call","step":1,"seq":1,"inputs":[["a",-9223372036854775808]]}',
    b'{"kind":"call","step":1,"seq":1,"parent":' + HUGE + b"}",
    b'{"kind":"module","step":5,"path":"\\u001b[31m","cls":"A"}',
]  # fmt: skip


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(STRANGE))))
def test_any_lines_after_a_header_can_be_read(tmp_path, lines):
    content = encode(make_header()) + b"\n".join(lines)
    (tmp_path / "log.jsonl").write_bytes(content)
    visit(run := open_run(tmp_path / "log.jsonl"))
    run.close()


def test_damaged_and_unknown_lines_are_counted(tmp_path):
    path = tmp_path / "log.jsonl"
    good = make_steps(1)
    path.write_bytes(
        text_of(make_run(good[:4]))
        + b'\x00\x01{"kind":\n{"kind":"wormhole","step":0}\n{"kind":"call","step":0,"se\n'
        + text_of(good[4:])
    )
    run = exhaust(open_run(path))
    assert run.unreadable == 2
    assert run.skipped == {"wormhole": 1}
    assert run.step(0).records == [make_header(), *good]


def test_unknown_keys_are_counted_in_a_log_of_another_version(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = text_of([make_header(tensortrace="0.9.0"), *make_steps(1)])
    path.write_bytes(lines.replace(b'"seq":1,', b'"seq":1,"mood":"good",'))
    assert exhaust(open_run(path)).skipped == {"call.mood": 1}


def test_a_damaged_step_number_does_not_hide_other_steps(tmp_path):
    lines = text_of(make_run(make_steps(400))).splitlines(keepends=True)
    rng = random.Random(0)
    for i in rng.sample(range(len(lines) // 3, 2 * len(lines) // 3), 60):
        lines[i] = lines[i].replace(b'"step":', b'"step":9', 1)
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines))
    run = open_run(tmp_path / "log.jsonl")
    for number in (*range(0, 120, 7), *range(290, 400, 7)):
        assert len(run.step(number).calls) == 5, number


# -- a file that changes


def test_a_growing_log_is_read_on(tmp_path):
    path = tmp_path / "log.jsonl"
    write_log(path, make_steps(3))
    run = exhaust(open_run(path))
    assert not run.refresh()
    before = run.step(2)
    with path.open("ab") as out:
        out.write(text_of([make_finding(step=2), *make_steps(2, start=3), make_end(4)]))
    assert run.refresh()
    assert run.steps == range(5)
    assert run.end == make_end(4)
    assert len(run.step(2)) == len(before) + 1
    assert [f.step for f in run.findings] == [2]
    assert [s.step for s in run.summaries(0, 9)] == [0, 1, 2, 3, 4]
    assert not run.refresh()
    assert run.notice is None


def test_growth_is_seen_before_and_during_the_index(tmp_path):
    path = tmp_path / "log.jsonl"
    write_log(path, make_steps(800))
    run = open_run(path)
    with path.open("ab") as out:
        out.write(text_of(make_steps(800, start=800)))
    assert run.refresh()
    assert run.last_step() == 1599
    next(run.index())
    with path.open("ab") as out:
        out.write(text_of([make_finding(step=1600)]))
    assert run.refresh()
    assert [f.step for f in run.findings] == [1600]
    assert len(exhaust(run).summaries(0, 9999)) == 1600


def test_a_run_that_goes_on_after_its_end_line_is_read_on(tmp_path):
    path = tmp_path / "log.jsonl"
    write_log(path, [*make_steps(3), make_end(2)])
    run = exhaust(open_run(path))
    start = text_of(make_run(make_steps(3)))
    for records in ([], make_steps(2, start=3), [*make_steps(4, start=3), make_end(6)]):
        path.write_bytes(start + text_of(records))
        assert run.refresh()
        assert run.notice is None
        assert exhaust(run).unreadable == 0
        assert run.steps == range(records[-1].step + 1 if records else 3)
        assert run.step(3).records == [r for r in records if r.step == 3]
        assert [s.step for s in run.summaries(0, 9)] == list(run.steps)
    assert run.end == make_end(6)


def test_a_truncated_log_is_shown_from_its_beginning_and_said_so(tmp_path):
    path = tmp_path / "log.jsonl"
    write_log(path, make_steps(20))
    run = exhaust(open_run(path))
    old = run.step(19)
    path.write_bytes(text_of(make_run(make_steps(2))))
    assert old.record(0) is None  # its bytes are gone: no crash, nothing invented
    assert run.refresh()
    assert "was truncated" in run.notice
    assert run.steps == range(2)
    path.write_bytes(b"")
    assert run.refresh()
    assert "was truncated" in run.notice
    assert "is empty" in run.notice
    assert not run.refresh()


def test_a_replaced_log_is_opened_anew_and_said_so(tmp_path):
    path = write_log(tmp_path / "log.jsonl", make_steps(20))
    run = exhaust(open_run(path))
    new = make_run([make_header(run_id="new"), *make_steps(50)])
    write_log(tmp_path / "new", new).replace(path)
    assert run.refresh()
    assert "was replaced" in run.notice
    assert run.header.run_id == "new"
    assert run.steps == range(50)


def test_a_log_rewritten_in_place_to_a_longer_one_is_noticed(tmp_path):
    path = write_log(tmp_path / "log.jsonl", make_steps(3))
    run = open_run(path)
    write_log(path, [make_header(run_id="other"), *make_steps(30)])
    assert run.refresh()
    assert "was replaced" in run.notice
    assert run.header.run_id == "other"


def test_a_log_moved_away_is_still_read(tmp_path):
    path = write_log(tmp_path / "log.jsonl", make_steps(3))
    run = open_run(path)
    path.rename(tmp_path / "log.prev.jsonl")
    assert not run.refresh()
    assert len(run.step(2)) == 7


def test_a_live_run_has_a_writer_and_no_end(tmp_path):
    path = tmp_path / "log.jsonl"

    def live(age_s: float, *records: Record) -> bool:
        write_log(path, records)
        then = path.stat().st_mtime - age_s
        os.utime(path, (then, then))
        return open_run(path).live

    here = {"hostname": socket.gethostname(), "pid": os.getpid()}
    assert live(0, *make_steps(1))
    assert not live(100, *make_steps(1))
    assert not live(0, *make_steps(1), make_end())
    assert live(100, make_header(**here))
    assert not live(100, make_header(**{**here, "hostname": "elsewhere"}))
    for pid in (2**22 + 1, -1, 0, 2**80):
        assert not live(100, make_header(**{**here, "pid": pid}))


# -- several files


def test_the_lowest_rank_is_opened_where_only_ranks_are(tmp_path):
    for rank in (2, 0, 10):
        write_log(tmp_path / f"log.rank{rank}.jsonl", [make_header(rank=rank)])
    write_log(tmp_path / "log.rank0.prev.jsonl", [])
    write_log(tmp_path / "other.rank1.jsonl", [])
    run = open_run(tmp_path / "log.jsonl")
    assert run.header.rank == 0
    assert run.ranks == {r: tmp_path / f"log.rank{r}.jsonl" for r in (0, 2, 10)}
    assert open_run(tmp_path / "log.rank10.jsonl").ranks == run.ranks
    assert open_run(write_log(tmp_path / "one.jsonl", [])).ranks == {0: tmp_path / "one.jsonl"}


def test_the_newest_log_of_a_folder_is_found(tmp_path):
    for age, name in enumerate(["data.jsonl", "new.jsonl", "old.jsonl", "log.rank1.jsonl"]):
        write_log(tmp_path / name, [])
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt":"hello"}\n')
    (tmp_path / "folder.jsonl").mkdir()
    assert newest_log(tmp_path) == tmp_path / "new.jsonl"
    write_log(tmp_path / "log.rank0.jsonl", [])
    os.utime(tmp_path / "log.rank0.jsonl", (1, 1))
    os.utime(tmp_path / "log.rank1.jsonl", (2000, 2000))
    assert newest_log(tmp_path) == tmp_path / "log.rank0.jsonl"


def test_a_folder_without_logs_says_so(tmp_path):
    with pytest.raises(LogError, match="no tensortrace log in"):
        newest_log(tmp_path)
    with pytest.raises(LogError, match="cannot look for logs"):
        newest_log(tmp_path / "nowhere")


def test_what_is_kept_of_a_hostile_log_is_bounded_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr("tensortrace.run.seen.MAX_KEPT", 10)
    findings = [make_finding(f"f{i}") for i in range(50)]
    run = exhaust(open_run(write_log(tmp_path / "log.jsonl", findings)))
    assert len(run.findings) == 10
    assert "of its findings only 10 are kept" in run.notice


def test_records_of_some_kinds_and_steps_are_those_of_all_that_are(tmp_path: Path) -> None:
    run = open_run(write_log(tmp_path / "log.jsonl", FORTY))
    expected = [r for r in run.records() if isinstance(r, Step) and 7 <= r.step < 31]
    assert list(run.records(7, 31, kinds=("step",))) == expected
    assert [record.step for record in expected] == list(range(7, 31))
    assert list(run.records(kinds=())) == []


def test_heads_are_the_step_lines_without_modules(tmp_path):
    columns = ModuleColumns(path=["a", ',"modules":{'], output_rms=[1.0, 2.0], flags=["", "n"])
    steps = [Step(step=n, seq=1, loss=float(n), repeats={',"modules":{': n}, full=n % 2 == 0,
                  modules=columns if n % 3 else ModuleColumns()) for n in range(40)]  # fmt: skip
    path = write_log(tmp_path / "log.jsonl", [make_header(), *steps, make_end(39)])
    run = open_run(path)
    for _ in run.index():
        pass
    bare = [msgspec.structs.replace(step, modules=ModuleColumns()) for step in steps]
    assert run.heads(0, 40) == bare
    assert run.summaries(3, 31) == steps[3:31]
    run.close()
    # A tool that put the keys in another order is read as well.
    head, *rest = path.read_bytes().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"\n".join([head, *map(reordered, rest), b""]))
    run = open_run(other)
    assert [head.loss for head in run.heads(0, 40)] == [step.loss for step in steps]


def reordered(line: bytes) -> bytes:
    """The same line with `modules` before the rest."""
    held = json.loads(line)
    first = {key: held.pop(key) for key in ("kind", "step", "modules") if key in held}
    return json.dumps({**first, **held}, separators=(",", ":")).encode()


def test_step_lines_of_any_length_are_read(tmp_path):
    sizes = (1, 300, 3000, 20_000, 1)
    steps = [Step(step=n, seq=1, modules=ModuleColumns(path=[f"module.{i}" for i in range(size)]))
             for n, size in enumerate(sizes)]  # fmt: skip
    run = open_run(write_log(tmp_path / "log.jsonl", [make_header(), *steps, make_end(4)]))
    assert run.summaries(0, 5) == steps
    for _ in run.index():
        pass
    assert run.summaries(0, 5) == steps
    assert [len(step.modules.path) for step in run.heads(0, 5)] == [0] * 5

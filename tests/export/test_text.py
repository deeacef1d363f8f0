from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensortrace.errors import UsageError
from tensortrace.export.contents import Found, gather
from tensortrace.export.report_json import render_json
from tensortrace.export.text import render, render_report
from tensortrace.records import (
    Call,
    ChainLink,
    End,
    Failure,
    Location,
    Module,
    Record,
    Source,
    Step,
)
from tensortrace.run import open_run
from tests.builders import make_call, make_header, make_run, make_tensor
from tests.export.canonical import (
    LOG_LINE,
    make_calls,
    make_canonical,
    make_finding,
    make_step,
    write_log,
)
from tests.export.compare import assert_golden
from tests.export.hostile import FORBIDDEN, PAYLOADS


@pytest.fixture
def canonical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # A relative path, so that the report names it the same on every machine.
    monkeypatch.chdir(tmp_path)
    return write_log(Path("log.jsonl"), make_canonical())


def report(tmp_path: Path, *records: Record, **options: object) -> str:
    log = write_log(tmp_path / "log.jsonl", make_run(records))
    return render_report(open_run(log), **options)  # type: ignore[arg-type]


def test_the_report_of_the_canonical_run(canonical: Path) -> None:
    assert_golden("report.txt", render_report(canonical))


def test_the_report_with_notes_of_another_step_at_60_columns(canonical: Path) -> None:
    assert_golden("report-narrow.txt", render_report(canonical, width=60, step=0, notes=True))


def test_the_report_of_one_module(canonical: Path) -> None:
    assert_golden("report-module.txt", render_report(canonical, modules=["encoder*"]))


def test_the_first_cause_comes_first_although_a_warning_was_found_before_it(
    canonical: Path,
) -> None:
    text = render_report(canonical, notes=True)
    assert text.index("error TT101") < text.index("warning TT202") < text.index("note TT105")


def test_a_log_may_be_given_as_text(canonical: Path) -> None:
    assert render_report(str(canonical)) == render_report(open_run(canonical))


def test_without_colour_there_is_no_escape_byte_and_with_it_the_words_are_the_same(
    canonical: Path,
) -> None:
    plain, coloured = render_report(canonical), render_report(canonical, colour=True)
    assert not FORBIDDEN.search(plain)
    assert "\x1b[1;31merror TT101" in coloured
    assert "error TT101" in plain


def test_what_the_terminal_says_in_its_environment_does_not_matter(
    canonical: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = render_report(canonical, colour=True)
    for name, value in {"NO_COLOR": "1", "COLUMNS": "44", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    assert render_report(canonical, colour=True) == before


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_line_is_wider_than_asked_for(canonical: Path, width: int) -> None:
    assert max(map(len, render_report(canonical, width=width).split("\n"))) <= width


def test_a_step_that_is_not_there_is_refused_with_those_that_are(canonical: Path) -> None:
    with pytest.raises(UsageError, match=r"no step 7 in log\.jsonl: it has steps 0 to 2"):
        render_report(canonical, step=7)


def test_a_thinned_step_has_the_numbers_of_its_step_line(canonical: Path) -> None:
    text = render_report(canonical, step=2)
    assert "Layers in step 2 (only its step line was kept: no shapes, no times)" in text
    # 0.25 rms over the 40 elements of encoder.0 is the norm 0.25 * sqrt(40) = 1.58.
    assert "1.58" in text


def test_a_table_says_which_calls_of_a_huge_step_it_leaves_out(
    canonical: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensortrace.run.step.STEP_NBYTES", 2_000)
    text = render_report(canonical, step=0)
    (left_out,) = re.findall(r"Layers in step 0 \((\d+) records past its first 32 MB", text)
    assert int(left_out) == open_run(canonical).step(0).truncated > 0


def test_an_empty_run_is_reported(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert "steps     none" in text
    assert "no end line: still running or killed" in text or "still running" in text
    assert "No layer table" in text
    assert "No findings." in text


def test_a_run_that_ended_well_says_so(tmp_path: Path) -> None:
    end = End(step=0, why="exit", steps=1, updates=1, elapsed_ns=2_000_000_000)
    text = report(tmp_path, *make_calls(0), make_step(0), end)
    assert "ended     exit after 2.0 s" in text
    assert "No findings." in text


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    end = End(step=0, why="interrupt", elapsed_ns=500_000_000)
    assert "ended     interrupted after 0.5 s" in report(tmp_path, *make_calls(0), end)


def test_a_cut_last_line_is_said_in_bytes(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", make_run([*make_calls(0), make_step(0)]))
    with log.open("ab") as file:
        file.write(b'{"kind":"ca')
    text = render_report(log)
    assert "no end line: still running" in text
    assert "11 bytes cut" in text


def test_a_call_outside_the_known_modules_still_has_a_row(tmp_path: Path) -> None:
    text = report(tmp_path, make_call(1, "encoder.block", tensors=[make_tensor(0, 2)]))
    assert "encoder.block" in text


def test_a_module_is_indented_only_below_one_that_holds_it(tmp_path: Path) -> None:
    paths = ["a", "a.b", "ab", "a.c"]
    text = report(tmp_path, *(make_call(i, path) for i, path in enumerate(paths)))
    table = [line.split("  -")[0].rstrip() for line in text.split("\n")]
    rows = [line for line in table if line.strip().rstrip("- ") in {"a", "b", "ab", "a.c"}]
    assert [row.rstrip("- ") for row in rows] == ["a", "  b", "ab", "a.c"]


def test_a_replayed_recomputed_or_backward_call_does_not_count(tmp_path: Path) -> None:
    calls = [
        make_call(1, "a"),
        make_call(2, "a", recompute=True),
        make_call(3, "a", replay=True),
        make_call(4, "a", phase="backward", forward=1),
        make_call(5, "a", op="relu"),
    ]
    assert " x" not in report(tmp_path, *calls).split("Layers")[1]


def test_a_better_name_learnt_later_is_shown(tmp_path: Path) -> None:
    module = Module(step=0, path="Net.Block", cls="Block", alias="net.block")
    text = report(tmp_path, module, make_call(1, "Net.Block"), make_finding(module="Net.Block"))
    assert "net.block" in text
    assert "Net.Block" not in text


def test_the_source_line_of_the_finding_stands_in_when_the_log_has_no_source(
    tmp_path: Path,
) -> None:
    text = report(tmp_path, make_finding(step=0))
    assert "> 12 | x = torch.log(x)" in text


def test_a_finding_on_the_first_line_of_a_function_has_one_neighbour(tmp_path: Path) -> None:
    source = Source(step=0, file="m.py", name="f", first_line=1, text="def f():\n    return 1\n")
    text = report(tmp_path, source, make_finding(step=0, location=Location("m.py", 1, "f")))
    assert "> 1 | def f():\n              2 |     return 1\n" in text


def test_the_same_finding_on_two_ranks_is_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = []
    for rank in range(3):
        records = [make_header(rank=rank, world_size=3), *make_calls(0), make_step(0),
                   make_finding(step=1, id=f"TT101-{rank}", module="head" if rank == 2 else ""),
                   make_step(1)]  # fmt: skip
        runs.append(open_run(write_log(Path(f"log.rank{rank}.jsonl"), records)))
    text = render(gather(runs))
    assert "at        ranks 0, 1, step 1" in text
    assert "at        rank 2, step 1, forward, head" in text
    assert text.count("error TT101") == 2
    assert "Layers in step 0 of rank 0" in text
    assert "(rank 2 of 3)" in text


def test_a_check_that_failed_is_named(canonical: Path) -> None:
    run = open_run(canonical)
    found = Found([], problems=["check TT101 stopped at step 1: KeyError: 'x'"], again=True)
    text = render(gather([run], [found]))
    assert "problem   check TT101 stopped at step 1" in text
    assert "checks    run again over this log; 2 of 3 steps are whole" in text


def test_a_long_profile_shows_its_ends_and_counts_the_rest(tmp_path: Path) -> None:
    profile = [[f"layers.{i}", 2.0**-i] for i in range(100)]
    text = report(tmp_path, make_finding(step=0, evidence={"profile": profile}))
    assert text.count("layers.") == 40
    assert "layers.19 " in text
    assert "(60 more)" in text
    assert "layers.80 " in text


def test_a_reason_that_the_message_gives_is_not_given_twice(tmp_path: Path) -> None:
    finding = make_finding(step=0, message="it is -inf: log of 0", explanation="log of 0")
    assert "why" not in report(tmp_path, finding)


def test_files_are_named_from_the_folder_of_the_run(tmp_path: Path) -> None:
    inside = Location("/home/me/net/model.py", 3, "f", "x = 1")
    outside = Location("/home/metoo/model.py", 4, "f", "y = 2")
    chain = [ChainLink(1, 1, "a", inside), ChainLink(2, 2, "b", inside),
             ChainLink(3, 3, "c", outside)]  # fmt: skip
    header = make_header(cwd="/home/me")
    text = report(tmp_path, header, make_finding(step=0, location=inside, chain=chain))
    assert "source    net/model.py:3 in f" in text
    assert "1. a  call #1  net/model.py:3\n               x = 1\n" in text
    assert "2. b  call #2  net/model.py:3\n            3. c" in text
    assert "3. c  call #3  /home/metoo/model.py:4\n               y = 2\n" in text


def test_a_long_list_of_evidence_says_how_much_is_left_out(tmp_path: Path) -> None:
    text = report(tmp_path, make_finding(step=0, evidence={"layers": list(range(20))}))
    assert "layers: 0, 1, 2, 3, 4, 5, 6, 7, and 12 more" in text


def test_a_profile_of_equal_or_missing_numbers_is_drawn(tmp_path: Path) -> None:
    profile = [["a", 1.0], ["b", 1.0], ["c", 0.0], ["d", None]]
    text = report(tmp_path, make_finding(step=0, evidence={"profile": profile}))
    bars = {line.split()[1]: line.count("#") for line in text.split("\n") if "   " in line
            and line.split()[:1] in (["a"], ["b"], ["c"], ["d"])}  # fmt: skip
    assert bars == {"1": 24, "0": 0, "-": 0}


def hostile_records(payload: str) -> list[Record]:
    location = Location(f"{payload}.py", 2, payload, payload)
    link = ChainLink(1, 1, payload, location)
    return [
        make_header(argv=["train.py", payload], torch=payload, python=payload, world_size=2),
        Module(step=0, path=payload, cls=payload, alias=None),
        Source(step=0, file=f"{payload}.py", name=payload, first_line=1,
               text=f"def f():\n    {payload}\n    {payload}\n"),
        Call(step=0, seq=1, module=payload, outputs=[("output", 1)],
             tensors=[make_tensor(1, 2, dtype=payload)], location=location),
        make_finding(
            step=0, id=payload, code=payload, check=payload, module=payload, op=payload,
            param=payload, message=payload, location=location, explanation=payload, fix=payload,
            chain=[link], evidence={payload: payload, "list": [payload], "map": {payload: payload},
                                    "between": [payload, payload], "profile": [[payload, 1.0],
                                                                               [payload, 2.0]]},
        ),
        make_finding(step=0, id="2", location=LOG_LINE, severity="note", message=payload),
        Step(step=0, seq=9, repeats={payload: 1}),
        End(step=0, why="exception", failure=Failure(payload, payload, payload, location)),
    ]  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_hostile_text_is_shown_and_never_obeyed(tmp_path: Path, payload: str) -> None:
    run = open_run(write_log(tmp_path / "log.jsonl", hostile_records(payload)))
    plain = render(gather([run]), width=4000, notes=True)
    assert not FORBIDDEN.search(plain)
    coloured = render(gather([run]), width=4000, notes=True, colour=True)
    # Rich's own colours are the only escapes: taken out, the text is the plain one.
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).split() == plain.split()
    if payload.startswith(("[", ":", "{")):
        assert plain.count(payload) > 15


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=4),
    max_leaves=12,
)  # fmt: skip
EVIDENCE_KEYS = ["profile", "between", "between_lines", "inputs", "placed", "x"]


@given(evidence=st.dictionaries(st.sampled_from(EVIDENCE_KEYS), json_values))
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_any_evidence_can_be_shown(tmp_path_factory: Any, evidence: dict[str, Any]) -> None:
    log = tmp_path_factory.mktemp("run") / "log.jsonl"
    run = open_run(write_log(log, make_run([*make_calls(0), make_step(0)])))
    found = Found([make_finding(step=0, evidence=evidence)])
    assert not FORBIDDEN.search(render(gather([run], [found])))
    json.loads(render_json(gather([run], [found])))


def test_the_check_for_hostile_text_can_fail() -> None:
    assert all(FORBIDDEN.search(p) for name, p in PAYLOADS.items() if "markup" not in name
               and name != "braces")  # fmt: skip

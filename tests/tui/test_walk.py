"""Timeline, findings, search, layout, keys: the pure parts of the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensortrace.log import LogFile, encode, open_log
from tensortrace.records import Action, Location, Module, Optimizer, Param, Record, Source, Step
from tensortrace.run import open_run
from tensortrace.tui import search
from tensortrace.tui.bindings import KEYS, bindings, bindings_of, in_view
from tensortrace.tui.header import headline
from tensortrace.tui.layout import arrange
from tensortrace.tui.step import findings
from tensortrace.tui.tabs import TABS
from tensortrace.tui.terminal.styled import ASCII
from tensortrace.tui.timeline import cell_width, heights, timeline_lines, window
from tensortrace.tui.views import NAMES, kind_of
from tests.builders import make_call, make_run, make_tensor, write_log
from tests.tui.samples import make_finding


def test_heights_follow_the_numbers() -> None:
    assert heights([0.0, 1.0, 2.0, None, float("nan")], 8) == [0, 4, 7, None, None]
    assert heights([1.0, 10.0, 1000.0], 3) == [0, 1, 2]
    assert heights([5.0, 5.0], 8) == [4, 4]
    assert heights([], 8) == []


@pytest.mark.parametrize(
    ("current", "shown"),
    [(0, range(10)), (50, range(45, 55)), (99, range(90, 100)), (3, range(10))],
)
def test_the_window_stays_in_the_run(current: int, shown: range) -> None:
    assert window(current, 0, 99, 10) == shown


def test_a_short_run_is_shown_whole_with_wider_cells() -> None:
    assert window(1, 0, 2, 80) == range(3)
    assert (cell_width(3, 80), cell_width(40, 80), cell_width(500, 80)) == (4, 2, 1)


def test_a_cell_is_a_bar_a_mark_or_unknown() -> None:
    steps = {n: Step(step=n, seq=1, loss=1.0 + n) for n in range(3)}
    steps[3] = Step(step=3, seq=1, loss="NaN")
    cells, axis = timeline_lines(steps, {1: "error", 2: "warning"}, 1, range(5), ASCII)
    assert [text for text, _ in cells] == [" ", "_", "x", "!", "x", " "]
    assert [style for _, style in cells] == ["", "ok", "here", "warning", "error", "faint"]
    assert "^ 1" in "".join(text for text, _ in axis)
    assert "loss 1 to 3, steps 0-4" in "".join(text for text, _ in axis)


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 81, 120])
def test_what_the_cells_mean_is_shortened_and_never_cut(columns: int) -> None:
    steps = {n: Step(step=n, seq=1, grad_norm=0.5 + n % 2) for n in range(400)}
    told = set()
    for current in range(400):
        shown = window(current, 0, 399, columns - 2)
        _, axis = timeline_lines(steps, {}, current, shown, ASCII, rank="rank 1", columns=columns)
        text = "".join(text for text, _ in axis)
        assert len(text) <= columns
        assert text[1 + current - shown.start] == "^"
        what, part = "rank 1 grad norm 0.5 to 1.5", f"{shown.start}-{shown.stop - 1}"
        assert f"^ {current}" in text or f"{current} ^" in text
        said = text.replace(f"^ {current}", "").replace(f"{current} ^", "").strip()
        assert said in (f"{what}, steps {part}", f"{what}, {part}", what, "")
        told.add(said)
    assert columns < 80 or "" not in told


def test_numbers_that_are_all_not_finite_are_no_unknown_ones() -> None:
    def axis(**fields: Any) -> str:
        steps = {0: Step(step=0, seq=1, **fields)}
        return "".join(text for text, _ in timeline_lines(steps, {}, 0, range(2))[1])

    assert "grad norm not finite, steps 0-1" in axis(grad_norm="NaN")
    assert "loss unknown, steps 0-1" in axis()


def test_findings_are_walked_in_the_order_of_the_run() -> None:
    late, early = make_finding(5, 2), make_finding(3, 7, severity="warning")
    end = make_finding(3, None, id="end", severity="note")
    held = findings.in_order([late, end, early])
    assert held == [early, end, late]
    assert findings.neighbour(held, None, (0, 0), 1) == early
    assert findings.neighbour(held, early, (3, 7), 1) == end
    assert findings.neighbour(held, late, (5, 2), 1) is None
    assert findings.neighbour(held, early, (3, 7), -1) is None
    assert findings.neighbour(held, None, (9, 0), -1) == late
    assert findings.neighbour(held, late, (5, 2), -1, "warning") == early
    assert findings.neighbour([], None, (0, 0), 1) is None


def test_findings_are_counted_worst_first() -> None:
    held = [make_finding(1, severity="note"), make_finding(2), make_finding(3)]
    assert findings.count_by_severity(held) == {"error": 2, "note": 1}
    assert findings.worst_by_step([*held, make_finding(1)]) == dict.fromkeys((1, 2, 3), "error")


@pytest.mark.parametrize("width", [4, 20, 40, 60, 80, 200])
def test_the_first_line_keeps_the_step_and_the_state(width: int) -> None:
    line = headline(
        program="a_rather_long_name_of_a_program.py", rank=(3, 8), step=(12, 99), loss="NaN",
        findings={"error": 2, "warning": 1}, state=("LIVE", "bar-live"), width=width,
    )  # fmt: skip
    text = "".join(piece for piece, _ in line)
    assert "12/99" in text
    assert len(text) == width or width < 40
    if width >= 40:
        assert "LIVE" in text
        assert "NaN" in text


@pytest.fixture
def searched(tmp_path: Path) -> tuple[LogFile, list[tuple[int, Record]]]:
    """Some 3 MB of calls; every hundredth line is of the module `needle`."""
    records = [
        make_call(i, "needle" if i % 100 == 0 else "hay" * 100, step=i // 1000) for i in range(6000)
    ]
    path = write_log(tmp_path / "log.jsonl", records)
    offsets, at = [], 0
    for record in make_run(records):
        offsets.append((at, record))
        at += len(encode(record))
    hits = [(at, r) for at, r in offsets if getattr(r, "module", None) == "needle"]
    return open_log(path)[0], hits


def test_a_search_finds_every_line_forwards_and_backwards(
    searched: tuple[LogFile, list[tuple[int, Record]]],
) -> None:
    file, hits = searched
    for step in (1, -1):
        found, low, high = [], 0, file.size()
        look = search.find_next if step > 0 else search.find_previous
        while hit := look(file, search.sought("NEEDLE"), low, high, lambda: False):
            found.append((hit.offset, hit.record))
            low, high = (hit.offset + 1, high) if step > 0 else (low, hit.offset)
            if step > 0:
                low = hit.offset + len(encode(hit.record))
        assert found == hits[::step]


def test_a_search_that_is_given_up_ends_at_once(
    searched: tuple[LogFile, list[tuple[int, Record]]],
) -> None:
    file, _ = searched
    assert search.find_next(file, search.sought("needle"), 0, file.size(), lambda: True) is None
    assert search.find_previous(file, search.sought("needle"), 0, file.size(), lambda: True) is None


def test_a_search_does_not_stop_at_keys_that_nobody_sees(tmp_path: Path) -> None:
    file, _ = open_log(write_log(tmp_path / "log.jsonl", [make_call(1, "a"), Step(step=0, seq=2)]))
    assert search.find_next(file, search.sought("inputs"), 0, file.size(), lambda: False) is None


def test_a_search_finds_quotes_and_letters_beyond_ascii(tmp_path: Path) -> None:
    odd = make_finding(0, 1, message='größer "als" 1')
    file, _ = open_log(write_log(tmp_path / "log.jsonl", [make_call(1, "a"), odd]))
    what = search.sought('größer "als"')
    hit = search.find_next(file, what, 0, file.size(), lambda: False)
    assert hit is not None
    assert hit.record == odd


HERE = Location(file="/home/me/net.py", line=8, function="forward")
SOURCE = Source(
    step=0, file="/home/me/net.py", name="forward", first_line=7,
    text="def forward(x):\n    return x.clamp_min(1e-6)\n    return None\n",
)  # fmt: skip
SHOWN: dict[str, Record] = {
    "net.py:8": make_call(1, "norm", location=HERE),
    "clamp_min(1e-6)": make_call(1, "norm", location=HERE),
    "[32, 12, 16]": make_call(1, "norm", tensors=[make_tensor(0, 32, 12, 16)]),
    "12, 16": Param(step=0, seq=1, optimizer=0, name="w", value=make_tensor(0, 12, 16)),
    "AdamW.step": Optimizer(step=0, seq=1, index=0, cls="AdamW", lr=[0.1]),
    "adamw.st": Optimizer(step=0, seq=1, index=0, cls="AdamW", lr=[0.1]),
    "lr 0.1, grad norm 0.5": Optimizer(
        step=0, seq=1, index=0, cls="SGD", lr=[0.1], grad_norm=0.5
    ),
    "grad norm": Step(step=0, seq=1, loss=1.25, grad_norm=0.5),
    "end of step": Step(step=0, seq=1),
    "loss 1.25": Step(step=0, seq=1, loss=1.25),
    "replayed": make_call(1, "norm", replay=True),
    "raised KeyError": make_call(1, "norm", exception="KeyError"),
    "set_to_none True": Action(
        step=0, seq=1, action="zero_grad", of="SGD", detail={"set_to_none": True}
    ),
    "no gradient": Param(step=0, seq=1, optimizer=0, name="w", value=make_tensor(0, 2)),
    "mended by hand": make_finding(0, 1, fix="It is mended by hand."),
}  # fmt: skip


@pytest.mark.parametrize("term", SHOWN)
def test_a_search_finds_what_a_row_writes_otherwise_than_the_log(tmp_path: Path, term: str) -> None:
    first, last = make_call(0, "a"), make_call(2, "b", step=1)
    wanted = SHOWN[term]
    file, _ = open_log(write_log(tmp_path / "log.jsonl", [SOURCE, first, wanted, last]))
    what, size = search.sought(term, [SOURCE]), file.size()
    for look in (search.find_next, search.find_previous):
        hit = look(file, what, 0, size, lambda: False)
        assert hit is not None
        assert hit.record == wanted
        after = hit.offset + len(encode(wanted))
        assert search.find_next(file, what, after, size, lambda: False) is None
        assert search.find_previous(file, what, 0, hit.offset, lambda: False) is None


@pytest.mark.parametrize("of_class", [2, 20])
def test_a_search_for_a_class_finds_the_calls_of_its_modules(tmp_path: Path, of_class: int) -> None:
    paths = [f"act.{n}" for n in range(of_class)]
    modules = [Module(step=0, path=path, cls="ReLU") for path in paths]
    others = [Module(step=0, path="fc", cls="Linear"), make_call(1, "fc"), make_call(2, "fc")]
    calls = [make_call(3 + n, path) for n, path in enumerate(paths)]
    run = open_run(write_log(tmp_path / "log.jsonl", [*modules, *others, *calls]))
    file, _ = open_log(tmp_path / "log.jsonl")
    what, found, at = search.sought("relu", run.sources, run.modules), [], 0
    while hit := search.find_next(file, what, at, file.size(), lambda: False):
        found.append(hit.record)
        at = hit.offset + len(encode(hit.record))
    assert found == [*modules, *calls]


def test_a_search_finds_a_text_that_many_source_lines_have(tmp_path: Path) -> None:
    source = Source(step=0, file="/a.py", name="f", first_line=1, text="x = 1\n" * 50)
    calls = [make_call(n, "a", location=Location("/a.py", 10 * n, "f")) for n in range(1, 8)]
    file, _ = open_log(write_log(tmp_path / "log.jsonl", [source, *calls]))
    what, found, at = search.sought("x = 1", [source]), [], 0
    assert len(what.needles) < 5
    while hit := search.find_next(file, what, at, file.size(), lambda: False):
        found.append(hit.record)
        at = hit.offset + len(encode(hit.record))
    assert found == calls[:5]


@pytest.mark.parametrize(
    ("size", "visible"),
    [
        ((40, 10), {"calls"}),
        ((80, 24), {"calls", "detail"}),
        ((120, 40), {"calls", "detail", "findings"}),
        ((140, 40), {"calls", "detail", "findings", "source"}),
        ((200, 60), {"calls", "detail", "findings", "source"}),
    ],
)
def test_the_panes_follow_the_size(size: tuple[int, int], visible: set[str]) -> None:
    assert arrange(*size, zoom=None, source=None).visible == visible


def test_the_table_has_rows_beside_the_detail_on_every_screen() -> None:
    for height in range(8, 100):
        held = arrange(100, height, zoom=None, source=None)
        if "detail" in held.visible:
            body = height - 2 - held.tabs - held.timeline
            assert body - held.bottom >= 6, height  # a frame, the heads of the columns, three rows
            assert held.bottom >= 6
    assert arrange(80, 24, zoom=None, source=None).bottom == 10


@pytest.mark.parametrize("view", TABS)
def test_no_key_has_two_meanings_in_a_view(view: str) -> None:
    held = [row for row in KEYS if not row.views or view in row.views]
    keys = [key for row in held for key in row.keys.split(",")]
    assert len(keys) == len(set(keys))


def test_the_timeline_which_has_no_lines_lists_no_key_that_walks_them() -> None:
    lines = {"move", "page", "top", "bottom"}
    held = {
        row.action.partition("(")[0] for row in KEYS if not row.views or "timeline" in row.views
    }
    assert not held & lines
    assert not any(in_view(action, "timeline") for action in lines)


def test_every_binding_is_of_the_table() -> None:
    known = {(binding.key, binding.action) for binding in bindings()}
    for kind in map(kind_of, NAMES[1:]):
        known |= {(binding.key, binding.action) for binding in bindings_of(kind.NAME)}
        assert bindings_of(kind.NAME) == kind.BINDINGS
    assert known == {(row.keys, row.action) for row in KEYS}
    assert [view for row in KEYS for view in row.views if view not in TABS] == []


def test_the_views_stand_in_the_order_of_their_keys() -> None:
    assert [kind_of(name).NAME for name in NAMES[1:]] == list(TABS[1:])
    shown = {row.keys: row.action for row in KEYS if row.action.startswith("view(")}
    assert shown == {str(TABS.index(name) + 1): f"view({name!r})" for name in NAMES}

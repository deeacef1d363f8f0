from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortrace import trace
from tensortrace.capture.journal import is_full
from tensortrace.checks import select
from tensortrace.engine import Engine
from tensortrace.export.text import render_report
from tensortrace.log import encode
from tensortrace.records import Action, Call, End, Finding, Header, Optimizer, Param, Step
from tensortrace.run import open_run
from tensortrace.tui.header import state_of
from tests.capture.lifecycle import X, called, make_net, of, read, train


def test_auto_keeps_twenty_steps_then_ever_fewer() -> None:
    full = [step for step in range(30_000) if is_full(step, "auto", None)]
    assert full[:20] == list(range(20))
    assert [step for step in full if 20 <= step < 200] == list(range(20, 200, 10))
    assert [step for step in full if 200 <= step < 2000] == list(range(200, 2000, 100))
    assert [step for step in full if 2000 <= step < 20_000] == list(range(2000, 20_000, 1000))
    # So the log grows with the logarithm of the run.
    assert len(full) <= 20 + 18 * math.ceil(math.log10(30_000 / 20))


@pytest.mark.parametrize("first", [0, 3])
def test_where_gradients_accumulate_the_next_update_is_full_too(first: int, tmp_path: Path) -> None:
    net, log = make_net(), tmp_path / "log.jsonl"
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with trace(log) as t:
        for i in range(310):
            (net(X).sum() / 4).backward()
            if i % 4 == first:
                optimizer.step()
                optimizer.zero_grad()
    records = read(log)
    full = {step.step for step in of(Step, records) if step.full}
    updated = {param.step for param in of(Param, records)}
    looked_at = {*range(20, 200, 10), 200, 300}
    late = {next(s for s in range(step, 310) if s % 4 == first) for step in looked_at}
    assert full - {*range(20)} == looked_at | late
    assert updated - {*range(20)} == late
    engine = Engine(select(None))
    again = [finding for record in records for finding in engine.feed(record)]
    assert [f.message for f in again] == [f.message for f in t.findings]


def test_thin_step_writes_its_line_actions_and_optimizer_and_counts_the_rest(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log.jsonl"
    with trace(log, every=3):
        train(make_net(), 7)
    records = read(log)
    steps, end = of(Step, records), of(End, records)[0]
    assert [step.full for step in steps] == [True, False, False, True, False, False, True]
    for step in steps:
        kinds = Counter(type(record) for record in records if record.step == step.step)
        assert (kinds[Call] > 0, kinds[Param] > 0) == (step.full, step.full)
        assert kinds[Action] > 0
        assert step.modules.path
        assert step.modules.output_rms[0] is not None
        written = sum(n for kind, n in kinds.items() if kind not in (Header, End, Step))
        assert written == step.records - step.dropped + kinds[Header] * 0
    assert end.thinned == sum(step.dropped for step in steps) > 0
    assert end.dropped == 0
    assert end.records == len(records) - 1
    assert end.steps == 7


@pytest.mark.parametrize("bad", [5, 6, 9])
def test_step_with_a_finding_is_full_and_so_is_the_one_before(bad: int, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with trace(log, steps=[0]) as t:
        train(make_net(poison=[bad]), 12)
    records = read(log)
    assert [f.step for f in t.findings][:1] == [bad]
    assert sorted({step for step, _ in called(records)}) == [0, bad - 1, bad]
    # Each of these steps is whole: as many calls as the first one, and its parameters.
    calls = Counter(step for step, _ in called(records))
    assert calls[bad] == calls[bad - 1] == calls[0]
    assert {record.step for record in of(Param, records)} == {0, bad - 1, bad}
    # The counts add up: what was left out, and what was written after all.
    steps, end = of(Step, records), of(End, records)[0]
    assert end.thinned == sum(s.dropped for s in steps) - _late(records)
    assert end.records == len(records) - 1
    # A reader that seeks finds the calls of both.
    run = open_run(log)
    for number in (bad - 1, bad):
        found = [record for record in run.step(number).records if isinstance(record, Call)]
        assert (
            len(
                [c for c in found if c.module is not None and c.phase == "forward" and not c.replay]
            )
            == 4
        )


def _late(records: list[Any]) -> int:
    """How many records of a step follow its step line: it was full only after the fact."""
    closed: set[int] = set()
    late = 0
    for record in records:
        late += record.step in closed and not isinstance(record, End)
        if isinstance(record, Step):
            closed.add(record.step)
    return late


def test_step_never_decreases_and_seq_rises_within_a_step(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with trace(log, steps=[0]):
        net = make_net(poison=[4])
        train(net, 6)
        net.zero_grad()  # after the last step
    records = read(log)
    steps = [record.step for record in records]
    assert steps == sorted(steps)
    # What a thin step wrote after all comes after its step line, in order too.
    parts: dict[tuple[int, bool], list[int]] = {}
    closed: set[int] = set()
    for record in records:
        if isinstance(record, Call | Action | Param):
            parts.setdefault((record.step, record.step in closed), []).append(record.seq)
        elif isinstance(record, Step):
            closed.add(record.step)
    assert [step for step, late in parts if late] == [3]
    assert all(seqs == sorted(seqs) for seqs in parts.values())


def test_end_follows_actions_after_the_last_step() -> None:
    records: list[Any] = []
    with trace(out=records.append) as t:
        net = make_net()
        train(net, 2)
        t.step()
        net.eval()
        net.zero_grad()
    steps = [record.step for record in records]
    assert steps == sorted(steps)
    assert isinstance(records[-1], End)
    assert [a.action for a in of(Action, records)][-2:] == ["eval", "zero_grad"]


@pytest.mark.parametrize("options", [{"every": 1}, {"steps": [0]}, {"every": 4}, {}])
@pytest.mark.parametrize("bad", [(), (1,), (3, 7), range(3, 9)])
def test_live_findings_are_those_of_the_saved_log(
    options: dict[str, Any], bad: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    with trace(log, **options) as t:
        train(make_net(poison=bad), 10)
    records = read(log)
    engine = Engine(select(None))
    again = [finding for record in records for finding in engine.feed(record)]
    assert again == t.findings == of(Finding, records)


def test_what_follows_from_a_finding_is_counted_in_step_lines() -> None:
    records: list[Any] = []
    with trace(out=records.append, every=1) as t:
        train(make_net(poison=[2]), 8)
    steps = of(Step, records)
    assert len(t.findings) == 1
    assert not any(step.repeats for step in steps[:2])
    assert all(set(step.repeats) == {t.findings[0].id} for step in steps[4:])
    engine = Engine(select(None))
    for record in records:
        if isinstance(record, Step):
            assert engine.take_repeats() == record.repeats
        engine.feed(record)


@pytest.mark.parametrize("near", [1 << 20, 2_000])
@pytest.mark.parametrize("max_bytes", [10_000, 30_000, 100_000])
def test_log_stays_within_max_bytes_and_keeps_findings_and_end(
    max_bytes: int,
    near: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So far from the limit records are written together.
    monkeypatch.setattr("tensortrace.capture.journal._LARGE_RECORD", near)
    log = tmp_path / "log.jsonl"
    with trace(log, every=1, max_bytes=max_bytes) as t:
        train(make_net(poison=[50]), 60)
    records = read(log)
    assert log.stat().st_size <= max_bytes
    assert [f.step for f in t.findings] == [50]
    assert of(Finding, records) == t.findings
    end = of(End, records)
    assert len(end) == 1
    assert end[0].dropped > 100
    assert end[0].records == len(records) - 1
    assert end[0].steps == 60
    assert capsys.readouterr().err.count("max_bytes") == 1


def test_full_steps_take_half_of_max_bytes_and_thin_ones_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    with trace(log, every=1, max_bytes=400_000) as t:
        train(make_net(poison=[90]), 100)
    records = read(log)
    steps, end = of(Step, records), of(End, records)[0]
    assert [step.step for step in steps] == list(range(100))
    full = [step.step for step in steps if step.full]
    assert full == [*range(len(full) - 1), 90]
    assert 150_000 < sum(len(encode(r)) for r in records if r.step < full[-2]) < 200_000
    # A thin step keeps what it always does; one with a finding, and the one before, are whole.
    kinds = {number: Counter(type(r) for r in records if r.step == number) for number in range(100)}
    assert kinds[50] == {Action: 2, Optimizer: 1, Step: 1}
    assert kinds[90][Call] and kinds[89][Call] == kinds[1][Call]
    # What the tier would have kept was dropped, and that is said.
    assert end.dropped == sum(s.dropped for s in steps) - _late(records) > 500
    assert end.thinned == 0
    assert t.findings
    said = [line for line in capsys.readouterr().err.splitlines() if "max_bytes" in line]
    assert len(said) == 1
    assert "the others keep step line, findings, actions and optimizer records" in said[0]
    assert open_run(log).lost_from is None


@pytest.mark.parametrize("every", [1, "auto"])
def test_a_log_that_is_full_of_step_lines_says_from_where_on_they_are_missing(
    every: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    with trace(log, every=every, max_bytes=200_000) as t:
        train(make_net(poison=[250]), 300)
    records = read(log)
    lined = [step.step for step in of(Step, records)]
    lost = len(lined)
    assert lined == list(range(lost))
    assert 50 < lost < 250
    assert of(Finding, records) == t.findings
    assert {type(r) for r in records if r.step > lost} == {Finding, End}
    said = [line for line in capsys.readouterr().err.splitlines() if "findings only" in line]
    assert len(said) == 1
    assert f"from step {lost} on it keeps findings only" in said[0]
    run = open_run(log)
    assert run.lost_from == lost
    assert f"the step lines of steps {lost} to 299 (max_bytes)" in render_report(run)
    assert state_of(run, following=False)[0] == f"ended, step lines end at {lost - 1}"


def test_line_longer_than_the_room_left_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with trace(log, every=1, max_bytes=20_000) as t:
        net = make_net()
        train(net, 1)
        wide = make_net()
        wide.forward = _long_function(X)  # type: ignore[assignment]
        for _ in range(20):
            wide(X)
            t.step()
    assert log.stat().st_size <= 20_000
    assert of(End, read(log))[0].dropped > 0


def _long_function(x: Any) -> Any:
    """Make a function whose text alone is longer than the log may be."""
    import linecache

    text = "def forward(x):\n" + "    # a very long function\n" * 1000 + "    return x * 2\n"
    linecache.cache["<ipython-long>"] = (len(text), None, text.splitlines(True), "<ipython-long>")
    space: dict[str, Any] = {}
    exec(compile(text, "<ipython-long>", "exec"), space)
    return space["forward"]


class FailsLater:
    """A binary file on a disk that is full after some bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.data = b""

    def write(self, data: Any) -> int:
        if len(self.data) + len(data) > self.room:
            raise OSError(28, "No space left on device")
        self.data += bytes(data)
        return len(data)


def test_full_disk_is_one_warning_and_training_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    disk = FailsLater(8_000)
    plain, traced = make_net(), make_net()
    train(plain, 10)
    with trace(disk, every=1):  # type: ignore[call-overload]
        train(traced, 10)
    for a, b in zip(plain.parameters(), traced.parameters(), strict=True):
        assert a.detach().equal(b.detach())
    err = capsys.readouterr().err
    assert err.count("No space left on device") == 1
    assert "goes on" in err
    assert disk.data.startswith(b'{"kind":"header"')


def test_findings_go_on_when_the_disk_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    with trace(FailsLater(8_000), every=1) as t:  # type: ignore[call-overload]
        train(make_net(poison=[8]), 10)
    assert [f.step for f in t.findings] == [8]
    assert "TT101" in capsys.readouterr().err


def test_full_device_is_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    t = trace("/dev/full")
    for _ in range(2):
        with t:
            train(make_net(), 2)
    assert capsys.readouterr().err.count("No space left") == 1


def test_callable_that_raises_stops_tracing_with_one_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    taken: list[Any] = []

    def take(record: Any) -> None:
        taken.append(record)
        if len(taken) == 30:
            raise ValueError("no more")

    with trace(out=take, every=1) as t:
        train(make_net(poison=[9]), 10)
    err = capsys.readouterr().err
    assert len(taken) == 30
    assert err.count("no more") == 1
    assert "take" in err
    assert t.findings == []


def test_binary_file_gets_the_same_lines_as_a_callable(tmp_path: Path) -> None:
    records: list[Any] = []
    path = tmp_path / "log.jsonl"
    with path.open("wb") as file, trace(file, every=1) as t:
        train(make_net(poison=[1]), 3)
        assert t.path is None
    with trace(out=records.append, every=1):
        train(make_net(poison=[1]), 3)
    assert [type(r) for r in read(path)] == [type(r) for r in records]
    # What the callable got is finished: it can be written as it is.
    assert all(encode(record).startswith(b'{"kind":"') for record in records)

"""How often lines ran and functions were called: counted whole, however few were recorded."""

from __future__ import annotations

import contextlib
import gc
import io
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortrace import Lines, trace
from tensortrace.records import Step
from tests.capture.lines.lines_of import Seen, lines_of

pytestmark = pytest.mark.usefixtures("closing_folder")

TEXT = Path(__file__).read_text("utf-8").splitlines()


def ran(seen: Seen) -> dict[str, int]:
    """How often each line ran, by its text."""
    counts: dict[tuple[int, int, int], int] = {}
    for line in seen.lines:
        if line.what == "line":
            key = line.step, line.frame, line.location.line
            counts[key] = max(counts.get(key, 0), line.nth + 1)
    found: dict[str, int] = {}
    for (_, _, number), count in counts.items():
        text = TEXT[number - 1].strip()
        found[text] = found.get(text, 0) + count
    return found


def called(seen: Seen, name: str) -> int:
    """How often a function was called; a generator also goes on, in a frame that it has."""
    entries = [r for r in seen.lines if r.what == "call" and r.location.function.endswith(name)]
    return sum(1 + line.passed_over for line in entries if line.seq == line.frame)


def pair(first: Any, second: Any) -> Any:
    return first, second


# ---- executions


def test_a_statement_over_several_lines_runs_once_however_often_python_tells_of_it() -> None:
    def function(n: int) -> Any:
        for i in range(n):
            made = pair(
                first=i,
                second=[j + 1
                        for j in range(2)],
            )  # fmt: skip
            assert (i
                    >= 0)  # fmt: skip
        return made

    counts = ran(lines_of(function, 20))
    assert counts["made = pair("] == counts["first=i,"] == counts["second=[j + 1"] == 20
    assert counts["assert (i"] == counts[">= 0)  # fmt: skip"] == 20
    assert counts["for i in range(n):"] == 21


def test_a_with_runs_once_although_python_comes_back_to_it_at_its_end() -> None:
    def function() -> None:
        i = 0
        while True:
            with contextlib.nullcontext(), \
                 contextlib.suppress(ValueError):  # fmt: skip
                i += 1
                if i % 2:
                    raise ValueError
            with contextlib.nullcontext():
                if i > 9:
                    break

    counts = ran(lines_of(function))
    assert counts["with contextlib.nullcontext(), \\"] == 10
    assert counts["contextlib.suppress(ValueError):  # fmt: skip"] == 10
    assert counts["with contextlib.nullcontext():"] == 10


def test_executions_at_the_end_of_a_step_are_counted_although_none_followed() -> None:
    seen = Seen()
    with trace(out=seen.take, every=1, lines=True) as t:
        for _ in range(2):
            for i in range(30):
                torch.ones(2) + i
            t.step()
    assert ran(seen)["torch.ones(2) + i"] == 60
    assert ran(seen)["for i in range(30):"] == 62


def test_a_statement_within_which_a_step_begins_runs_once() -> None:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = Seen()
    with trace(out=seen.take, every=1, lines=True):
        for _ in range(6):
            loss = net(
                torch.ones(1, 2)
            ).sum()  # fmt: skip
            loss.backward()
            optimizer.step()
    assert ran(seen)["loss = net("] == ran(seen)["loss.backward()"] == 6


def test_lines_of_one_statement_are_told_each_as_pysnooper_does() -> None:
    text = io.StringIO()

    def function() -> Any:
        return pair(
            1,
            2)  # fmt: skip

    lines_of(function, lines=Lines(output=text, normalize=True))
    said = [part.split(maxsplit=2)[2] for part in text.getvalue().splitlines() if " line " in part]
    assert said == ["return pair(", "1,", "2)  # fmt: skip", "return pair("]


# ---- calls


def helper(x: int) -> int:
    return innermost(x) + 1


def innermost(x: int) -> int:
    return x


@pytest.mark.parametrize("depth", [2, 3])
def test_calls_made_by_executions_that_were_passed_over_are_counted(depth: int) -> None:
    def function() -> int:
        total = 0
        for i in range(100):
            total += helper(i)
        return total

    seen = lines_of(function, lines=Lines(depth=depth))
    assert called(seen, "helper") == 100
    assert called(seen, "innermost") == (100 if depth == 3 else 0)
    inside = [r for r in seen.lines if r.location.function == "helper"]
    assert [r.what for r in inside].count("call") == 9  # 0, 1, 2, 3, 7, 15, 31, 63 and the last
    assert len({r.frame for r in inside if r.what == "line"}) == 8


def test_calls_deeper_than_depth_are_counted_of_functions_that_are_followed() -> None:
    def down(n: int) -> int:
        return down(n - 1) + helper(n) if n else 0

    def function() -> int:
        return down(5)

    seen = lines_of(function, lines=Lines(depth=2))
    assert called(seen, "down") == 6
    assert called(seen, "helper") == 0  # of which no line is shown


def test_the_body_of_a_class_is_followed_as_pysnooper_does() -> None:
    def function() -> int:
        class Local:
            a = 1
            b = a + 1

            def method(self) -> int:
                return self.b

        return Local().method()

    seen = lines_of(function, lines=Lines(depth=2))
    inside = [
        v.name for r in seen.lines for v in r.changed if r.location.function.endswith("Local")
    ]
    assert inside == ["a", "b", "method"]


def test_calls_of_a_decorated_function_within_one_step_are_counted() -> None:
    def down(n: int) -> int:
        return traced(n - 1) if n else 0

    seen = Seen()
    traced: Any = trace(out=seen.take, every=1, lines=True)(down)
    traced(49)
    assert called(seen, "down") == 50


def test_a_generator_that_was_passed_over_is_called_once_however_often_it_goes_on() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2

    def function() -> int:
        total = 0
        for _ in range(20):
            total += sum(items())
        return total

    assert called(lines_of(function, lines=Lines(depth=2)), "items") == 20


# ---- what must show


def test_a_number_that_is_nan_once_is_recorded_whenever_it_comes() -> None:
    def function() -> float:
        for i in range(30):
            loss = float("nan") if i == 20 else 1.0 / (i + 1)
        return loss

    assert "nan" in lines_of(function).changes("loss")


def test_the_last_value_of_a_loop_stands_before_the_lines_that_used_it() -> None:
    def function() -> int:
        for i in range(13):
            twice = i * 2
        return twice

    seen = lines_of(function)
    (last,) = [r for r in seen.lines for v in r.changed if (v.name, v.text) == ("i", "12")]
    (use,) = [r for r in seen.lines for v in r.changed if (v.name, v.text) == ("twice", "24")]
    assert last.seq < use.seq
    assert last.since is not None
    assert last.since < last.seq


@pytest.mark.parametrize(
    ("value", "others"),
    [
        ([torch.ones(2), 3], [("[1]", "3")]),
        ({"x": torch.ones(2), "lr": 0.1, "of": [1, 2]}, [("['lr']", "0.1"), ("['of']", "[1, 2]")]),
        (([torch.ones(2), "a"], None), [("[0][1]", "'a'"), ("[1]", "None")]),
        ([1, 2], []),
        (torch.ones(2), []),
    ],
)
def test_members_beside_tensors_are_recorded(value: Any, others: list[tuple[str, str]]) -> None:
    def function() -> None:
        held = value
        del held

    (variable,) = [v for r in lines_of(function).lines for v in r.changed if v.name == "held"]
    assert variable.others == others


def test_a_container_is_measured_and_walked_without_methods_of_its_own() -> None:
    class Shy(list):  # type: ignore[type-arg]
        def __len__(self) -> int:
            raise AssertionError("asked for its length")

        def __iter__(self) -> Any:
            raise AssertionError("walked")

    class Open:
        def __init__(self) -> None:
            self.x = torch.ones(3)

        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"asked for {name}")

    def function() -> None:
        shy = Shy([torch.ones(2)])
        opened = Open.__new__(Open)
        object.__setattr__(opened, "x", torch.ones(3))
        del shy, opened

    seen = lines_of(function)
    assert "tensor<(2,), float32, cpu>" in seen.changes("shy")[0]
    assert "tensor<(3,), float32, cpu>" in seen.changes("opened")[-1]


def test_names_that_python_gives_a_module_are_no_variables_until_the_user_sets_them() -> None:
    seen = Seen()
    source = "with trace(out=take, every=1, lines=True):\n    x = 1\n    __version__ = '2'\n"
    source += "    __doc__ = 'new'\n    __annotations__ = {'x': int}\n"
    names = {"trace": trace, "take": seen.take, "__doc__": "old", "__file__": "a.py"}
    exec(compile(source, "<string>", "exec"), {**names, "__name__": "__main__"})
    changed = {v.name: v.text for line in seen.lines for v in line.changed}
    assert {name: text for name, text in changed.items() if name not in ("trace", "take")} == {
        "x": "1",
        "__version__": "'2'",
        "__doc__": "'new'",
    }


@pytest.mark.parametrize("in_a_cell", [True, False])
def test_what_ipython_keeps_among_the_variables_of_a_cell_is_none_of_them(in_a_cell: bool) -> None:
    seen = Seen()
    old = torch.tensor([torch.nan])
    kept = {"In": ["x"], "Out": {5: old}, "exit": object(), "quit": object(), "_": old, "__": "",
            "___": "", "_i": "x", "_ii": "", "_iii": "", "_dh": [], "_oh": {5: old}, "_5": old,
            "_i5": "x", "_exit_code": 0}  # fmt: skip
    if in_a_cell:
        kept |= {"get_ipython": [].copy, "_ih": ["x"]}
    names = {"trace": trace, "take": seen.take, "first": 3, "_mine": 4, "Input": 5}
    source = "with trace(out=take, every=1, lines=True):\n    for _ in range(2):\n        y = _\n"
    source += "        Out = 'mine'\n"
    exec(compile(source, "<string>", "exec"), {**names, **kept, "__name__": "__main__"})
    changed = {v.name for line in seen.lines for v in line.changed} - {"trace", "take"}
    assert {"first", "_mine", "Input", "y", "_", "Out"} <= changed
    assert seen.changes("_")[-1] == "1"
    assert seen.changes("Out")[-1] == "'mine'"
    others = {"In", "_5", "_i5", "_oh", "_dh", "exit", "_i", "_exit_code"}
    assert others & changed == (set() if in_a_cell else others)
    if in_a_cell:
        assert changed == {"first", "_mine", "Input", "y", "_", "Out"}


# ---- steps


@pytest.mark.parametrize("lines", [False, True])
def test_a_decorated_function_of_plain_ops_makes_a_step_for_each_call(lines: bool) -> None:
    seen = Seen()

    @trace(out=seen.take, every=1, lines=lines)
    def step(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).sum()

    for _ in range(3):
        step(torch.ones(3))
    assert [r.step for r in seen.records if isinstance(r, Step)] == [0, 1, 2]


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("more", [False, True])
def test_a_generator_has_no_step_for_the_end_after_its_last_item(lines: bool, more: bool) -> None:
    seen = Seen()
    t = trace(out=seen.take, every=1, lines=lines)

    @t
    def items() -> Iterator[int]:
        yield 1
        torch.ones(2).sum()
        yield 2
        if more:
            torch.ones(2).sum()

    list(items())
    t.close()
    steps = [r.step for r in seen.records if isinstance(r, Step)]
    assert steps == ([0, 1, 2] if more else [0, 1])


def test_live_text_says_when_it_falls_silent_and_of_which_step_it_tells_again() -> None:
    text = io.StringIO()

    @trace(out=Seen().take, every=3, lines=Lines(output=text))
    def step(x: int) -> int:
        return x + 1

    for i in range(4):
        step(i)
    said = [line for line in text.getvalue().splitlines() if line.startswith(("Silent", "Step"))]
    assert said == [
        "Silent:........ from step 1 on, until a step is full again; every=1 tells all",
        "Step:.......... 3",
        "Silent:........ from step 4 on, until a step is full again; every=1 tells all",
    ]


def test_live_text_that_is_silent_from_the_start_says_so() -> None:
    text = io.StringIO()
    with trace(out=Seen().take, steps=[5], lines=Lines(output=text)):
        torch.ones(2) + 1
    assert text.getvalue().startswith("Silent:........ from step 0 on")


def test_a_generator_that_waits_holds_no_values_when_its_step_is_over() -> None:
    kept: list[Any] = []

    def items() -> Iterator[int]:
        x = torch.ones(4)
        kept.append(weakref.ref(x))
        yield 1
        x = torch.zeros(4)
        kept.append(weakref.ref(x))
        del x
        yield 2

    @trace(out=Seen().take, steps=[0], lines=Lines(depth=2))
    def step(source: Iterator[int]) -> int:
        return next(source)

    source = items()
    step(source)
    step(source)  # not followed: `x` goes while the frame does not know of it
    gc.collect()
    assert [ref() is None for ref in kept] == [True, True]


# ---- options


def test_stdout_is_a_stream_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def function(n: int) -> int:
        return n

    lines_of(function, 1, lines=Lines(output="stdout"))
    assert "Starting var:.. n = 1" in capsys.readouterr().out
    assert not (tmp_path / "stdout").exists()


def test_an_option_that_lines_does_not_have_is_one_clear_sentence() -> None:
    from tensortrace.errors import UsageError

    options: dict[str, Any] = {"depht": 2}
    with pytest.raises(UsageError, match=r"no option 'depht'\. Did you mean 'depth'\?"):
        Lines(**options)
    with pytest.raises(UsageError, match=r"by name, as in Lines\(depth=2\): got 2"):
        Lines(*[2])  # type: ignore[call-arg]

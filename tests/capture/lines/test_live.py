"""The live text: what real PySnooper and TorchSnooper print is in it; where it goes."""

from __future__ import annotations

import io
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pysnooper
import pytest
import torch

from tensortrace import Lines, trace
from tensortrace.capture.lines.tensor_words import import_torchsnooper
from tests.capture.lines import snooped
from tests.capture.lines.lines_of import Seen

pytestmark = pytest.mark.usefixtures("closing_folder")

GOLDEN = Path(__file__).parent / "live.txt"
# What a line of text says, without time, indent and how new the variable is.
_VARIABLE = re.compile(r"^ *(?:Starting var|New var|Modified var):\.+ (.*)$")
_EVENT = re.compile(r"^ *(?:\d\d:\d\d:\d\d\.\d{6})? *(call|line|return|exception) +(\d+) (.*)$")
_VALUE = re.compile(r"^ *(Return value:\.\.|Exception:\.\.\.\.\.) (.*)$")


def information(text: str) -> list[tuple[str, ...]]:
    """What a text of either tool says, line by line."""
    found: list[tuple[str, ...]] = []
    for line in text.splitlines():
        for pattern in (_VARIABLE, _EVENT, _VALUE):
            match = pattern.match(line)
            if match:
                found.append(match.groups())
                break
    return found


def live(function: Callable[..., Any], *args: Any, drain: bool = False, **options: Any) -> str:
    stream, seen = io.StringIO(), Seen()
    traced = trace(out=seen.take, every=1, lines=Lines(output=stream, **options))(function)
    result = traced(*args)
    if drain:
        list(result)
    assert not seen.faults
    return stream.getvalue()


def theirs(snoop: Any, function: Callable[..., Any], *args: Any, drain: bool = False,
           **options: Any) -> str:  # fmt: skip
    stream = io.StringIO()
    result = snoop(stream, **options)(function)(*args)
    if drain:
        list(result)
    return stream.getvalue()


# ---- the same information


@pytest.mark.parametrize(
    ("function", "args", "options"),
    [
        (snooped.to_bits, (6,), {}),
        (snooped.to_bits, (0,), {}),
        (snooped.spread, (), {}),
        (snooped.outer, (4,), {"depth": 2}),
        (snooped.caught, (), {}),
        (snooped.factorial, (4,), {}),
        (snooped.factorial, (4,), {"depth": 3}),
        (snooped.closure, (5,), {"depth": 2, "normalize": True}),
        (snooped.raises_again, (0,), {}),
        (snooped.raises_again, (2,), {}),
        (snooped.matches, ({"kind": 1, "z": 2},), {}),
        (snooped.matches, ([1, 2],), {}),
        (snooped.matches, (3,), {}),
        (snooped.loops, (), {}),
        (snooped.over_several_lines, (1,), {}),
    ],
)
def test_what_pysnooper_prints_of_a_function_is_printed_line_for_line(
    function: Any, args: Any, options: dict[str, Any]
) -> None:
    expected = information(theirs(pysnooper.snoop, function, *args, **options))
    found = information(live(function, *args, thin=False, **options))
    if function is snooped.spread and sys.version_info >= (3, 12):
        # There PySnooper prints each turn of the comprehension as one more execution of its line.
        told = [one for one in expected if not one[0].startswith("seed = ")]
        assert len(told) == len(expected) - 10
        expected = list(dict.fromkeys(told))
    assert len(expected) > 3
    assert found == expected


def test_what_pysnooper_prints_of_a_class_is_printed_but_for_what_python_puts_there() -> None:
    expected = information(theirs(pysnooper.snoop, snooped.with_class, depth=2))
    found = information(live(snooped.with_class, depth=2))
    assert found == [said for said in expected if not said[0].startswith("__")]


def test_what_pysnooper_prints_of_a_generator_is_printed_but_only_once() -> None:
    expected = information(theirs(pysnooper.snoop, snooped.countdown, 3, drain=True))
    found = information(live(snooped.countdown, 3, drain=True))
    assert set(found) == set(expected)
    # It tells all variables again whenever the generator goes on.
    assert len(found) < len(expected)


def test_what_pysnooper_prints_of_watched_expressions_is_printed() -> None:
    def run(snoop: Any) -> str:
        return snoop(snooped.watched, snooped.Counter())  # type: ignore[no-any-return]

    options: dict[str, Any] = {
        "watch": ("counter.last", "len(counter.found)"),
        "watch_explode": ("counter.found",),
    }
    expected = information(run(lambda *a: theirs(pysnooper.snoop, *a, **options)))
    found = information(run(lambda *a: live(*a, **options)))
    expected = [said for said in expected if not said[0].startswith("counter = ")]
    found = [said for said in found if not said[0].startswith("counter = ")]
    assert set(expected) - set(found) == set()


def test_what_pysnooper_prints_of_a_block_is_printed() -> None:
    def ours(stream: Any) -> Any:
        return trace(out=Seen().take, every=1, lines=Lines(output=stream))

    def block(snoop: Any, stream: Any) -> list[tuple[str, ...]]:
        values = [3, 1, 2]
        with snoop(stream):
            lowest = min(values)
            middle = (lowest + max(values)) / 2
        assert middle == 2
        return information(stream.getvalue())

    def changes(said: list[tuple[str, ...]]) -> list[str]:
        return [
            one[0] for one in said if len(one) == 1 and one[0][:6] in ("lowest", "middle", "values")
        ]

    expected = block(pysnooper.snoop, io.StringIO())
    found = block(ours, io.StringIO())
    assert changes(found) == changes(expected) == [
        "values = [3, 1, 2]", "lowest = 1", "middle = 2.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "args"), [(snooped.mask_loss, (torch.ones(2, 2),)), (snooped.regress, ())]
)
def test_what_torchsnooper_prints_of_tensors_is_printed(function: Any, args: Any) -> None:
    snoop = import_torchsnooper().snoop
    expected = information(theirs(snoop, function, *args))
    found = information(live(function, *args))
    assert any("tensor<" in said[0] for said in expected)
    assert [said for said in expected if said not in found] == []


def test_what_torchsnooper_prints_inside_a_module_is_printed() -> None:
    net = snooped.TwoLayers()
    snoop = import_torchsnooper().snoop
    stream = io.StringIO()
    plain = snooped.TwoLayers.forward
    expected_text = theirs(snoop, plain, net, torch.ones(5, 3))
    seen = Seen()
    trace(out=seen.take, every=1, lines=Lines(output=stream))(plain)(net, torch.ones(5, 3))

    def tensors(text: str) -> list[str]:
        return [said[0] for said in information(text) if "tensor<" in said[0]]

    # That `hidden` is another tensor of the same shape shows in ours only.
    expected, found = tensors(expected_text), tensors(stream.getvalue())
    assert [said for said in expected if said not in found] == []
    assert len(found) == len(expected) + 1


def test_the_records_say_what_the_live_text_says() -> None:
    stream, seen = io.StringIO(), Seen()
    trace(out=seen.take, every=1, lines=Lines(output=stream))(snooped.to_bits)(6)
    said = [one[0] for one in information(stream.getvalue()) if len(one) == 1]
    assert said == [f"{v.name} = {v.text}" for line in seen.lines for v in line.changed]


# ---- golden text


def test_the_text_looks_as_it_did() -> None:
    def loop(n: int) -> torch.Tensor:
        x = torch.zeros(2)
        for i in range(n):
            x = x + i
        return x

    first = loop.__code__.co_firstlineno
    text = live(loop, 9, normalize=True, statistics=True, prefix="> ")
    # Where the function stands in this file may change.
    text = re.sub(r"(?<= )(\d+)(?= {5,})", lambda m: f"{int(m[1]) - first:2}", text)
    assert text == GOLDEN.read_text("utf-8")


# ---- where it goes


def test_nothing_is_printed_without_an_output(capsys: pytest.CaptureFixture[str]) -> None:
    trace(out=Seen().take, lines=True)(snooped.to_bits)(6)
    assert "New var" not in capsys.readouterr().err


def test_text_goes_to_stderr_a_path_a_stream_or_a_callable(
    closing_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, stream, taken = closing_folder / "lines.txt", io.StringIO(), []
    for output in ("stderr", path, str(path), stream, taken.append):
        trace(out=Seen().take, lines={"output": output, "normalize": True})(snooped.to_bits)(6)
    said = stream.getvalue()
    assert said.count("bits = [1, 1, 0]") == 1
    assert "bits = [1, 1, 0]" in capsys.readouterr().err
    assert path.read_text("utf-8") == said * 2
    assert "".join(taken) == said


def test_a_path_is_written_anew_if_that_is_asked_for(closing_folder: Path) -> None:
    path = closing_folder / "lines.txt"
    path.write_text("old\n")
    trace(out=Seen().take, lines={"output": path, "overwrite": True})(snooped.to_bits)(6)
    assert "old" not in path.read_text("utf-8")
    assert "bits = [1, 1, 0]" in path.read_text("utf-8")


def test_each_line_has_the_prefix_and_the_thread() -> None:
    text = live(snooped.to_bits, 6, prefix="ZZ ", thread_info=True)
    assert all(line.startswith("ZZ ") for line in text.splitlines())
    assert "MainThread" in text


def test_times_are_of_the_day_relative_or_left_out() -> None:
    event = re.compile(r"^(.{15}) line ", re.MULTILINE)
    assert all(
        re.match(r"\d\d:\d\d:\d\d\.\d{6}", t) for t in event.findall(live(snooped.to_bits, 6))
    )
    relative = event.findall(live(snooped.to_bits, 6, relative_time=True))
    assert relative[0].startswith("00:00:00.")
    assert event.findall(live(snooped.to_bits, 6, normalize=True))[0] == " " * 15


def test_colours_are_there_when_asked_for() -> None:
    assert "\x1b[32m" in live(snooped.to_bits, 6, color=True)
    assert "\x1b" not in live(snooped.to_bits, 6)


def test_control_characters_of_the_program_reach_no_terminal() -> None:
    class Hostile:
        def __repr__(self) -> str:
            return "\x1b[2J\u202egone"

    def function() -> str:
        hostile = Hostile()
        try:
            raise ValueError("\x1b[31mred")
        except ValueError:
            return repr(hostile)

    text = live(function)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[2J" in text


def test_what_was_passed_over_is_counted() -> None:
    def loop() -> int:
        total = 0
        for i in range(9):
            total += i
        return total

    assert "Passed over:... 3 executions of the line above" in live(loop)


def test_text_that_cannot_be_written_is_one_warning_and_the_log_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(text: str) -> None:
        raise OSError("disk full")

    seen = Seen()
    trace(out=seen.take, lines={"output": broken})(snooped.to_bits)(6)
    assert not seen.faults
    assert seen.changes("bits")[-1] == "[1, 1, 0]"
    assert capsys.readouterr().err.count("disk full") == 1


def test_a_generator_told_live_names_each_item() -> None:
    def numbers() -> Iterator[int]:
        yield 5

    text = live(numbers, drain=True)
    assert "Return value:.. 5" in text
    assert "Return value:.. None" in text


@pytest.mark.parametrize(
    "name", ["/tmp/ipykernel_7/3141.py", "<python-input-0>", "<ipython-input-1-9a>", "<pyshell#3>"]
)
def test_typed_in_code_is_shown_from_where_its_shell_keeps_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "def typed(x):\n    y = x + 1\n    return y\n"
    monkeypatch.setitem(linecache.cache, name, (len(text), None, text.splitlines(True), name))
    cell: dict[str, Any] = {"__name__": "__main__", "__loader__": None}
    exec(compile(text, name, "exec"), cell)
    told = [said[2] for said in information(live(cell["typed"], 1)) if len(said) == 3]
    assert told == ["def typed(x):", "    y = x + 1", "    return y", "    return y"]


def test_code_whose_text_is_nowhere_is_told_without_it() -> None:
    cell: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def made(x):\n    return x\n", "<made-up>", "exec"), cell)
    assert "SOURCE IS UNAVAILABLE" in live(cell["made"], 1)

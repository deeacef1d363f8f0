"""The user's own line: in functions, modules, notebooks, what is typed in, and text stored."""

from __future__ import annotations

import inspect
import json
import linecache
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.records import Call, End, Finding, Location, Source
from tensortrace.run import open_run
from tests.capture import Net, Recorded, record

HERE = Path(__file__)


def text_at(location: Location | None) -> str:
    """The text of the line in this file that a location names."""
    assert location is not None
    assert location.file == str(HERE)
    return HERE.read_text("utf-8").splitlines()[location.line - 1].strip()


def helper(model: nn.Module, x: torch.Tensor) -> Any:
    return model(x)


def typed_in(code: str, name: str, **names: Any) -> dict[str, Any]:
    """Run text as a notebook cell does: compiled, its lines known to linecache only."""
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    names = {"__name__": "__main__", "torch": torch, "nn": nn, **names}
    exec(compile(code, name, "exec"), names)
    return names


def test_call_is_located_at_the_line_that_made_it() -> None:
    def program(t: Any) -> None:
        model = Net()
        model(
            torch.rand(2, 4),
        )

    call = record(program).module("")
    assert text_at(call.location) == "model("
    assert call.location is not None
    assert call.location.function.endswith("program")


@pytest.mark.parametrize("linked", [False, True])
def test_a_program_that_was_started_by_a_path_with_dots_has_a_plain_one(
    tmp_path: Path, linked: bool
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "far" / "x.py").touch()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    code = "def run():\n    torch.ones(2).exp()\n"
    file = tmp_path / ("far/x.py" if linked else "x.py")
    file.write_text(code)
    # Through a link `..` is another folder than it looks like: such a path stays as it is.
    name = f"{tmp_path}/link/../x.py" if linked else f"{tmp_path}/work/../x.py"
    names: dict[str, Any] = {"torch": torch}
    exec(compile(code, name, "exec"), names)
    records = record(lambda t: names["run"]())
    location = records.op("exp").location
    assert location is not None
    assert location.file == (name if linked else str(file))
    (source,) = [s for s in records.of(Source) if s.name == "run"]
    assert source.file == location.file


def test_call_in_a_function_is_located_in_that_function() -> None:
    call = record(lambda t: helper(Net(), torch.rand(2, 4))).module("")
    assert text_at(call.location) == "return model(x)"
    assert call.location is not None
    assert call.location.function == "helper"


def test_call_inside_a_forward_is_located_in_that_forward() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)  # the line of the layer
            return y + 1

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)  # the line of the inner one

    records = record(lambda t: Outer()(torch.rand(2, 4)))
    assert text_at(records.module("inner").location).endswith("# the line of the inner one")
    assert text_at(records.module("inner.layer").location).endswith("# the line of the layer")
    location = records.module("inner.layer").location
    assert location is not None
    if sys.version_info >= (3, 11):
        assert location.function.endswith("Inner.forward")


def test_call_that_torch_makes_is_located_at_the_users_line_around_it() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    records = record(lambda t: helper(model, torch.rand(2, 4)))
    assert {text_at(call.location) for call in records.modules()} == {"return model(x)"}


def test_call_in_a_lambda_is_located_in_it() -> None:
    model = Net()
    run = lambda: model(torch.rand(2, 4))  # noqa: E731 the lambda is the point
    call = record(lambda t: run()).module("")
    assert text_at(call.location).startswith("run = lambda: model(")
    assert call.location is not None
    assert call.location.function.endswith("<lambda>")


@pytest.mark.parametrize(
    "name",
    [
        "/tmp/ipykernel_1/1.py", "<ipython-input-1-abc>", "<python-input-3>", "<stdin>",
        "<timed exec>", "<magic-timeit>", "<pyshell#3>", "<bpython-input-1>", "<xonsh-code>",
        "<command-4204601>",
    ],
)  # fmt: skip
def test_cell_of_a_notebook_is_the_users(name: str) -> None:
    code = textwrap.dedent("""\
        class Cell(nn.Module):
            def forward(self, x):
                return x * 2

        def run(t):
            model = Cell()
            return model(torch.ones(2))
        """)
    names = typed_in(code, name)
    records = record(names["run"])
    call = records.module("")
    assert call.location == Location(name, 7, "run")
    if name != "<stdin>":  # inspect reads it from a terminal only
        sources = {source.name: source for source in records.of(Source)}
        assert sources["run"].first_line == 5
        assert sources["run"].text == "".join(code.splitlines(True)[4:])
        assert sources["run"].file == name
    linecache.cache.pop(name)


@pytest.mark.parametrize(
    "name", ["<timed_out>", "<eval_with_key>.1", "<frozen runpy>", "<unknown>"]
)
def test_what_a_program_makes_is_not_the_users(name: str) -> None:
    names = typed_in("def run(t):\n    return nn.Identity()(torch.ones(2))\n", name)
    location = record(names["run"]).module("").location
    assert location is not None
    assert (location.file, location.function) == (record.__code__.co_filename, "record")
    linecache.cache.pop(name)


def test_top_of_a_cell_is_stored_as_a_whole() -> None:
    name = "/tmp/ipykernel_1/2.py"
    code = "m = nn.Identity()\nwith trace(out=records.append, every=1):\n    m(torch.ones(2))\n"
    records = Recorded()
    typed_in(code, name, trace=trace, records=records)
    assert records.module("").location == Location(name, 3, "<module>")
    (source,) = [source for source in records.of(Source) if source.file == name]
    assert (source.name, source.first_line, source.text) == ("<module>", 1, code)
    linecache.cache.pop(name)


class _Compiler:
    """What IPython has for the names of cells."""

    def __init__(self, cells: dict[str, int]) -> None:
        self.cells = cells

    def format_code_name(self, name: str) -> tuple[str, str] | None:
        return ("Cell", f"In[{self.cells[name]}]") if name in self.cells else None


@pytest.mark.parametrize("name", ["/tmp/ipykernel_1/3.py", "<ipython-input-4-abc>"])
def test_a_cell_is_called_what_ipython_calls_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = _Compiler({name: 4})
    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(compile=compiler))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    code = "def run(t):\n    return (torch.zeros(2, requires_grad=True) - 1).log()\n"
    names = typed_in(code, name)
    records = record(names["run"])
    (finding,) = records.of(Finding)
    assert finding.location is not None
    assert (finding.location.file, finding.location.line) == ("Cell In[4]", 2)
    assert finding.location.code == code.splitlines()[1].strip()
    assert {source.file for source in records.of(Source) if source.name == "run"} == {"Cell In[4]"}
    compiler.cells = {}  # run by another shell
    (finding,) = record(names["run"]).of(Finding)
    assert finding.location is not None
    assert finding.location.file == name
    linecache.cache.pop(name)


def test_code_without_source_has_its_line_and_no_text() -> None:
    names: dict[str, Any] = {"torch": torch, "nn": nn}
    exec("def run(t):\n\n    return nn.Identity()(torch.ones(2))\n", names)
    records = record(names["run"])
    assert records.module("").location == Location("<string>", 3, "run")
    assert all(source.file != "<string>" for source in records.of(Source))


def test_text_of_python_c_is_not_that_of_what_exec_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python 3.13 keeps the text of ``python -c`` under the name that `exec` gives, too.
    other = ["def run(t):\n", "    an = unrelated\n", "    line()\n"]
    monkeypatch.setitem(linecache.cache, "<string>", (20, None, other, "<string>"))
    names: dict[str, Any] = {"torch": torch, "nn": nn}
    exec("def run(t):\n    x = torch.ones(2)\n    return x + torch.ones(3)\n", names)
    records: list[Any] = []
    with pytest.raises(RuntimeError), trace(out=records.append, every=1):
        names["run"](None)
    assert "unrelated" not in repr(records)
    assert records[-1].failure.location == Location("<string>", 3, "run")


def test_generated_code_is_not_the_users() -> None:
    names: dict[str, Any] = {}
    exec(compile("def call(f, x): return f(x)", "<template of a library>", "exec"), names)
    records = record(lambda t: names["call"](nn.Identity(), torch.ones(2)))
    assert text_at(records.module("").location).startswith("records = record(lambda t:")


def test_program_from_standard_input_has_its_lines(tmp_path: Path) -> None:
    script = textwrap.dedent("""\
        import torch
        from tensortrace import trace
        model = torch.nn.Linear(2, 2)
        with trace(every=1):
            for _ in range(2):
                model(torch.ones(1, 2)).sum().backward()
        """)
    (tmp_path / "program.py").write_text(script)
    with (tmp_path / "program.py").open() as file:
        subprocess.run(
            [sys.executable, "-"], stdin=file, cwd=tmp_path, check=True, capture_output=True
        )
    lines = (tmp_path / "log.jsonl").read_text("utf-8").splitlines()
    calls = [r for r in map(json.loads, lines) if r["kind"] == "call" and r.get("module") == ""]
    forward = [call for call in calls if call.get("phase", "forward") == "forward"]
    assert [call["location"] for call in forward] == 2 * [
        {"file": "<stdin>", "line": 6, "function": "<module>"}
    ]


def test_text_of_each_function_is_stored_once() -> None:
    model = Net()

    def program(t: Any) -> None:
        for _ in range(3):
            helper(model, torch.rand(2, 4)).sum().backward()

    records = record(program)
    mine = [source for source in records.of(Source) if source.file == str(HERE)]
    assert sorted(source.name.rpartition(".")[2] for source in mine) == ["helper", "program"]
    (found,) = [source for source in mine if source.name == "helper"]
    assert found.text == inspect.getsource(helper)
    assert HERE.read_text("utf-8").splitlines()[found.first_line - 1].startswith("def helper(")


def test_lines_end_where_python_ends_them(tmp_path: Path) -> None:
    """Python reads a form feed, and U+2028 in a string, as part of their line."""
    lines = [
        "\x0c", "import torch", "from tensortrace import trace", "def f(x):", "    s = 'a\u2028b'",
        "    h = x * 0", "    \x0c", "    y = h.log()", "    return y", "with trace():",
        "    f(torch.ones(2))",
    ]  # fmt: skip
    (tmp_path / "program.py").write_text("\n".join(lines), "utf-8")
    program = [sys.executable, "program.py"]
    subprocess.run(program, cwd=tmp_path, check=True, capture_output=True)
    run = open_run(tmp_path / "log.jsonl")
    (finding,) = run.findings
    assert finding.location is not None
    assert (finding.location.line, finding.location.code) == (8, "y = h.log()")
    source = run.source(finding.location.file, 8)
    assert source is not None
    assert source.lines == lines[3:9]
    assert [source.line(number) for number in (3, 4, 9, 10)] == [None, lines[3], lines[8], None]


def test_text_comes_before_the_first_record_that_points_into_it() -> None:
    records = record(lambda t: helper(Net(), torch.rand(2, 4)))
    first = next(i for i, r in enumerate(records) if isinstance(r, Source) and r.name == "helper")
    call = next(i for i, r in enumerate(records) if isinstance(r, Call) and r.module == "")
    assert first < call


def test_text_of_torch_is_never_stored() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8)
    records = record(lambda t: model(torch.rand(3, 1, 4)).sum().backward())
    assert {source.file for source in records.of(Source)} == {str(HERE)}


def test_source_off_stores_no_text_and_keeps_the_lines() -> None:
    records = record(lambda t: helper(Net(), torch.rand(2, 4)), source=False)
    assert records.of(Source) == []
    assert text_at(records.module("").location) == "return model(x)"


def test_failure_names_the_users_innermost_line() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)  # shapes do not fit

    records = Recorded()
    with pytest.raises(RuntimeError), trace(out=records.append, every=1):
        Fails()(torch.ones(2, 4))
    (end,) = records.of(End)
    assert end.failure is not None
    assert end.failure.module == "layer"
    assert text_at(end.failure.location).endswith("# shapes do not fit")
    assert end.failure.location is not None
    assert end.failure.location.code == "return self.layer(x)  # shapes do not fit"


def test_call_in_a_comprehension_and_in_a_generator_has_its_line() -> None:
    model = Net()

    def outputs() -> Any:
        yield model(torch.rand(2, 4))  # in the generator

    def program(t: Any) -> None:
        _ = [model(torch.rand(2, 4)) for _ in range(1)]  # in the comprehension
        list(outputs())

    first, second = record(program).modules(module="")
    assert text_at(first.location).endswith("# in the comprehension")
    assert text_at(second.location).endswith("# in the generator")

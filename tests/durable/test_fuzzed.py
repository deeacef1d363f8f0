"""Whatever a log holds, its readers tell what they can and never raise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensortrace.cli import main
from tensortrace.log import encode
from tensortrace.records import Action, Record
from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tests.builders import make_end, make_finding, make_run, make_steps
from tests.durable.reading import read_everything
from tests.tui.screen import settle, text_of
from tests.tui.test_hostile import hostile_records

few = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
many = settings(few, max_examples=1500)


def canonical() -> list[bytes]:
    """One line of every kind at least, in the order of a run."""
    steps = make_steps(3)
    kinds = [r for r in hostile_records("a") if r.step == 0][1:-2]
    loss = Action(step=2, seq=8, action="loss", detail={"value": "NaN"})
    records: list[Record] = [
        *kinds,
        *steps[:-1],
        loss,
        make_finding(step=2),
        steps[-1],
        make_end(2),
    ]
    return [encode(record) for record in make_run(records)]


LINES = canonical()
WHOLE = b"".join(LINES)
FIRST = len(LINES[0])


def read(folder: Path, data: bytes) -> Any:
    path = folder / "log.jsonl"
    path.write_bytes(data)
    return read_everything(path)


def test_the_log_that_is_spoilt_here_is_a_good_one(tmp_path: Path) -> None:
    found = read(tmp_path, WHOLE)
    assert found is not None
    kinds = {type(record).__name__ for record in found[1]}
    assert {
        "Module",
        "Source",
        "Call",
        "Param",
        "Optimizer",
        "Line",
        "Action",
        "Finding",
        "Step",
    } <= kinds
    assert "TT101" in found[0]


# ---- bytes --------------------------------------------------------------------------------------

flips = st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=30)


def flip(folder: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for at, byte in changes:
        data[at] = byte
    read(folder, bytes(data))


def splice(folder: Path, seed: int) -> None:
    """Lines cut anywhere and joined to others, doubled, swapped, with newlines lost."""
    chance = random.Random(seed)
    lines = LINES[:1]
    for _ in range(40):
        one, two = chance.choice(LINES), chance.choice(LINES)
        lines.append(one[: chance.randrange(len(one) + 1)] + two[chance.randrange(len(two)) :])
        lines.append(chance.choice(LINES))
    read(folder, b"".join(lines))


@few
@given(changes=flips)
def test_flipped_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    flip(tmp_path, changes)


@few
@given(seed=st.integers(0, 1 << 32))
def test_spliced_lines(tmp_path: Path, seed: int) -> None:
    splice(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@many
@given(changes=flips, seed=st.integers(0, 1 << 32))
def test_flipped_bytes_and_spliced_lines_at_length(
    tmp_path: Path, changes: list[tuple[int, int]], seed: int
) -> None:
    flip(tmp_path, changes)
    splice(tmp_path, seed)


@pytest.mark.parametrize("start", range(16))
def test_a_log_cut_anywhere(start: int, tmp_path: Path) -> None:
    """A sixteenth of the offsets each, every 16th byte of them; all of them if slow."""
    for cut in range(start * 7, len(WHOLE), 16 * 31):
        read(tmp_path, WHOLE[:cut])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_log_cut_at_every_byte(tmp_path: Path) -> None:
    for cut in range(len(WHOLE)):
        read(tmp_path, WHOLE[:cut])


# ---- values -------------------------------------------------------------------------------------

DEEP = "[" * 3000 + "]" * 3000
NASTY: list[str] = [
    "null", "true", "-1", "0", "1e308", "-1e308", "1e999", "123456789012345678901234567890",
    "9223372036854775807", "-9223372036854775808", "0.1", '""', '"NaN"', '"Infinity"', "[]", "{}",
    "[null]", '[["a",1]]', '[["a",-1],["a",-1]]', '{"a":{"b":[1,2,{"c":null}]}}', DEEP,
    '"\\u0000\\ud83d\\u001b[31m"', '"' + "x" * 5000 + '"',
]  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a line, containers included."""
    if path:
        yield path
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:2])
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def put(line: bytes, path: tuple[Any, ...], text: str) -> bytes:
    """The line with the JSON `text` at a path."""
    document = json.loads(line)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = "@@"
    return json.dumps(document, separators=(",", ":")).replace('"@@"', text).encode() + b"\n"


def spoilt(number: int) -> Iterator[bytes]:
    """Line `number` with each nasty text in each of its places."""
    for path in leaves(json.loads(LINES[number])):
        for text in NASTY:
            yield put(LINES[number], path, text)


@pytest.mark.parametrize("number", range(len(LINES)))
def test_wrong_values_in_every_place_of_every_line(number: int, tmp_path: Path) -> None:
    """In one log, one line after the other, all that this line can become."""
    if number:
        before, after = LINES[:number], LINES[number:]
        read(tmp_path, b"".join([*before, *spoilt(number), *after]))
    else:
        for line in list(spoilt(0))[::5]:
            read(tmp_path, line + b"".join(LINES[1:]))


@few
@given(data=st.data())
def test_wrong_values_in_several_lines_at_once(tmp_path: Path, data: st.DataObject) -> None:
    lines = list(LINES)
    for _ in range(12):
        number = data.draw(st.integers(1, len(lines) - 1))
        paths = list(leaves(json.loads(LINES[number])))
        path = data.draw(st.sampled_from(paths))
        lines[number] = put(LINES[number], path, data.draw(st.sampled_from(NASTY)))
    read(tmp_path, b"".join(lines))


HUGE = b'{"kind":"call","step":1,"seq":%d,"parent":%d,"forward":%d,"inputs":[["x",%d]]}\n'
SHAPES: dict[str, Callable[[], list[bytes]]] = {
    "header twice": lambda: [*LINES[:5], LINES[0], *LINES[5:]],
    "header at the end": lambda: [*LINES, LINES[0]],
    "end in the middle": lambda: [*LINES[:5], LINES[-1], *LINES[5:]],
    "steps backwards": lambda: [LINES[0], *reversed(LINES[1:])],
    "a far step": lambda: [*LINES, b'{"kind":"step","step":9007199254740992,"seq":1}\n'],
    "a step beyond reason": lambda: [*LINES, b'{"kind":"step","step":1e400,"seq":1}\n'],
    "a far step in the middle": lambda: [
        *LINES[:9], b'{"kind":"step","step":900719925474099,"seq":1}\n', *LINES[9:],
    ],
    "unknown kinds": lambda: [*LINES, b'{"kind":"soup","step":2}\n', b'{"kind":"","step":2}\n'],
    "unknown keys": lambda: [*LINES[:-1], b'{"kind":"end","step":2,"why":"exit","soup":[{}]}\n'],
    "unknown why": lambda: [*LINES[:-1], b'{"kind":"end","step":2,"why":"soup"}\n'],
    "no kind": lambda: [*LINES, b'{"step":2}\n', b"[]\n", b"1\n", b'"a"\n', b"\n", b"\n\n"],
    "kind late": lambda: [*LINES, b'{"step":2,"seq":3,"kind":"step"}\n'],
    "keys twice": lambda: [*LINES, b'{"kind":"step","step":2,"step":3,"seq":1,"seq":2}\n'],
    "not UTF-8": lambda: [*LINES, b'{"kind":"module","step":2,"path":"\xff\xfe","cls":"a"}\n'],
    "windows": lambda: [line.replace(b"\n", b"\r\n") for line in LINES],
    "indented": lambda: [LINES[0], json.dumps(json.loads(LINES[1]), indent=1).encode() + b"\n"],
    "mark": lambda: [b"\xef\xbb\xbf" + LINES[0], *LINES[1:]],
    "nul": lambda: [*LINES, b"\0" * 4096, b"\n", *LINES[-2:]],
    "calls in a ring": lambda: [*LINES, HUGE % (1, 2, 2, 1), HUGE % (2, 1, 1, 2)],
    "calls of themselves": lambda: [*LINES, HUGE % (7, 7, 7, 7)],
    "negative numbers": lambda: [*LINES, HUGE % (-1, -2, -3, -4)],
    "one line of a megabyte": lambda: [*LINES, b'{"kind":"soup","x":"%s"}\n' % (b"y" * (1 << 20))],
    "one line beyond all bounds": lambda: [*LINES, b"y" * (17 << 20), b"\n", *LINES[-3:]],
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_logs_of_a_strange_shape(name: str, tmp_path: Path) -> None:
    read(tmp_path, b"".join(SHAPES[name]()))


def test_the_command_line_tells_of_a_nasty_log_and_does_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join([*LINES[:9], *nasty_lines(), *LINES[9:]]))
    for arguments in (["report"], ["report", "--json"], ["report", "--select", "TT1"]):
        assert main([*arguments, str(path)]) in (0, 1)
        out, err = capsys.readouterr()
        assert "TT10" in out
        assert "Traceback" not in out + err


def nasty_lines() -> list[bytes]:
    chance = random.Random(0)
    return [chance.choice(list(spoilt(chance.randrange(1, len(LINES))))) for _ in range(60)]


async def test_the_viewer_walks_through_a_nasty_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join([*LINES[:9], *nasty_lines(), *LINES[9:]]))
    app = Viewer(open_run(path))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        for key in [
            *"jjjj",
            "enter",
            *"iobp",
            "escape",
            "e",
            "c",
            "e",
            *"]]]",
            *"[[",
            "w",
            "G",
            "g",
        ]:
            await pilot.press(key)
            await settle(app, pilot)
            assert app.return_code in (0, None)
            assert text_of(app).strip()

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortrace.errors import UsageError
from tensortrace.export.annotated import Copied, comment_rows, write_copies
from tensortrace.export.lines import gather_lines
from tensortrace.records import Location, Record, Source, Variable
from tensortrace.run import open_run
from tests.builders import make_header, make_run, make_tensor
from tests.export.canonical import write_log
from tests.export.hostile import PAYLOADS
from tests.export.listed import FILE, TEXT, at, held, make_line, make_listed, make_plain

# Every place where a comment would not be one, and some where it looks as if it would not.
TRICKY = '''\
"""A module,
of several lines."""
x = 1  # a remark
y = """one
two""" + str(
    x
)
z = 1 + \\
    2
w = f"""{x}
 and {
    y
 }"""
if x: pass; v = "# no comment"
def f(a,
      b=("x"
         "y")):
    return (a,

            b)
class C: ...
'''


def tokens(data: bytes) -> list[tuple[int, str]]:
    """The tokens of Python source but for comments, and the line breaks that mean nothing."""
    found = tokenize.tokenize(io.BytesIO(data).readline)
    return [(t.type, t.string) for t in found if t.type not in (tokenize.COMMENT, tokenize.NL)]


def copies(*records: Record, folder: Path | None = None) -> list[Copied]:
    run = open_run(write_log(Path("log.jsonl"), make_run(records)))
    return write_copies(gather_lines(run), folder)


def every_line(text: str, file: str = FILE) -> list[Record]:
    """A run in which each line of a file was executed and changed a tensor."""
    count = text.count("\n") + 1
    return [
        make_header(cwd=""),
        Source(step=0, file=file, name="<module>", first_line=1, text=text),
        *(make_line(n, Location(file, n, "<module>"), held("x", n), tensors=[make_tensor(n, n, 4)])
          for n in range(1, count + 1)),
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_copy_has_the_shapes_as_comments_and_the_original_is_untouched() -> None:
    Path(FILE).write_text(TEXT)
    (done,) = copies(*make_listed())
    assert done.copy == Path("model.annotated.py")
    assert Path(FILE).read_text() == TEXT
    lines = done.copy.read_text().split("\n")
    assert lines[14] == "    logits = model(ids)  # logits [8, 128→97, 64] f32 x nan (step 1)"
    assert lines[15] == "    loss = logits.mean()  # loss [] f32 = 2.5→0.833 x nan (step 1)"
    assert lines[16] == "    # Nothing but comments"
    assert "steps 0 to 2 of log.jsonl" in lines[-2]


def test_calls_stand_in_for_lines() -> None:
    Path(FILE).write_text(TEXT)
    (done,) = copies(*make_plain())
    assert "logits = model(ids)  # (root) [8, 128→97, 64] f32" in Path(str(done.copy)).read_text()


@pytest.mark.parametrize(
    "text", [TEXT, TRICKY, TRICKY.rstrip("\n")], ids=["plain", "tricky", "cut"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "dos"])
def test_the_copy_has_the_tokens_and_the_syntax_tree_of_the_original(text: str, end: str) -> None:
    data = text.replace("\n", end).encode()
    Path(FILE).write_bytes(data)
    (done,) = copies(*every_line(text))
    copy = Path(str(done.copy)).read_bytes()
    # A last line without an end gets one, which is a token of length 0 or 1.
    assert [t for t in tokens(copy) if t[1].strip()] == [t for t in tokens(data) if t[1].strip()]
    assert ast.dump(ast.parse(copy)) == ast.dump(ast.parse(data))
    assert copy.count(end.encode()) == copy.count(b"\n")
    assert copy.count(b"# x [") >= 5


def test_no_comment_within_a_string_or_after_a_backslash() -> None:
    rows = comment_rows(TRICKY)
    places = set(rows.values())
    lines = TRICKY.split("\n")
    for code in ('"""A module,', 'y = """one', "z = 1 + \\", 'w = f"""{x}', " and {", "    y"):
        assert lines.index(code) + 1 not in places
    for code in (
        "x = 1  # a remark",
        "    2",
        ")",
        'of several lines."""',
        ' }"""',
        '      b=("x"',
    ):
        assert lines.index(code) + 1 in places


def test_a_comment_that_cannot_stand_at_its_line_stands_at_the_end_of_the_statement() -> None:
    rows = comment_rows(TRICKY)
    lines = TRICKY.split("\n")
    for code, end in (
        ('y = """one', ")"), ("z = 1 + \\", "    2"), ('w = f"""{x}', ' }"""'),
        ("    y", ' }"""'), ("def f(a,", "def f(a,"), ("    return (a,", "    return (a,"),
    ):  # fmt: skip
        assert lines[rows[lines.index(code) + 1] - 1] == end


def test_the_copy_says_what_is_wrong_at_a_line() -> None:
    Path(FILE).write_text(TEXT)
    error = Variable("exception", "ValueError: no")
    raised = make_line(17, at(16), what="exception", value=error, step=2)
    (done,) = copies(*make_listed(), raised)
    lines = Path(str(done.copy)).read_text().split("\n")
    assert lines[7].startswith("            x = layer(x)  # x [8, 128→97, 64] f32 x nan (step 1); ")
    assert "x made the first NaN or infinity (step 1); x TT101 error: layers.1 made" in lines[7]
    assert lines[15].endswith("; x raised ValueError: no")


pieces = st.sampled_from(
    ["x = 1", "# note", '"""', "f'{x}'", "(", ")", "\\", "\n", "\n", "    ", "if x:", "'#'", ";",
     "rb'''", "\t", "\x0c", "é", "=", "f'''", "{", "}", "'''"]
)  # fmt: skip


@given(parts=st.lists(pieces, max_size=14))
@settings(max_examples=300, deadline=None, database=None)
def test_any_source_with_comments_at_these_places_has_the_same_tokens(parts: list[str]) -> None:
    text = "".join(parts)
    try:
        before = ast.dump(ast.parse(text))
        places = set(comment_rows(text).values())
    except (SyntaxError, ValueError, UsageError):
        return
    lines = text.split("\n")
    for number in places:
        lines[number - 1] = lines[number - 1].rstrip() + "  # x [8]"
    assert ast.dump(ast.parse("\n".join(lines))) == before


def test_a_file_that_changed_since_the_run_gets_no_copy() -> None:
    Path(FILE).write_text(TEXT.replace("scale = 1 /", "scale = 2 /"))
    (done,) = copies(*make_listed())
    assert done.copy is None
    assert "line 9 of model.py is not what was recorded: it changed since the run" in done.reason
    assert not Path("model.annotated.py").exists()


def test_a_file_that_got_shorter_or_longer_above_gets_no_copy() -> None:
    for text in (TEXT[:60], "\n" + TEXT):
        Path(FILE).write_text(text)
        assert "changed since the run" in copies(*make_listed())[0].reason


def test_a_change_outside_the_recorded_functions_does_not_matter() -> None:
    Path(FILE).write_text(TEXT + "\n\nmore = 1\n")
    (done,) = copies(*make_listed())
    assert done.copy is not None
    assert "more = 1" in done.copy.read_text()


def test_without_recorded_text_there_is_no_copy() -> None:
    Path(FILE).write_text(TEXT)
    (done,) = copies(*(r for r in make_listed() if not isinstance(r, Source)))
    assert "the log does not hold its text" in done.reason


@pytest.mark.parametrize("file", ["gone.py", "<stdin>", "a\x00b.py", "a\udc80b.py"])
def test_a_file_that_cannot_be_read_is_said_as_such(file: str) -> None:
    (done,) = copies(*every_line("x = 1\n", file.encode("utf-8", "replace").decode()))
    assert done.copy is None
    assert "cannot be read" in done.reason
    assert "Errno" not in done.reason


def test_a_file_that_is_no_python_any_more_is_said_as_such() -> None:
    text = "x = (1\n"
    Path(FILE).write_text(text)
    assert "no Python" in copies(*every_line(text))[0].reason


def test_an_older_copy_is_replaced_and_a_file_of_somebody_else_is_not() -> None:
    Path(FILE).write_text(TEXT)
    copies(*make_listed(1))
    assert "128→97" not in Path("model.annotated.py").read_text()
    copies(*make_listed(3))
    assert "128→97" in Path("model.annotated.py").read_text()
    Path("model.annotated.py").write_text("mine = 1\n")
    with pytest.raises(UsageError, match="in the way"):
        copies(*make_listed())
    assert Path("model.annotated.py").read_text() == "mine = 1\n"


def test_a_link_to_the_original_is_not_written_through() -> None:
    Path(FILE).write_text(TEXT + "# by `tensortrace lines --write`\n")
    Path("model.annotated.py").symlink_to(FILE)
    copies(*make_listed())
    assert Path(FILE).read_text() == TEXT + "# by `tensortrace lines --write`\n"
    assert not Path("model.annotated.py").is_symlink()


def test_copies_go_to_a_folder_and_files_of_one_name_get_two() -> None:
    Path("other").mkdir()
    for file in ("model.py", "other/model.py"):
        Path(file).write_text("x = 1\n")
    records = [*every_line("x = 1\n"), *every_line("x = 1\n", "other/model.py")[1:]]
    done = copies(*records, folder=Path("out/deep"))
    assert sorted(p.name for p in Path("out/deep").iterdir()) == [
        "model-2.annotated.py",
        "model.annotated.py",
    ]
    assert [one.file for one in done] == ["model.py", "other/model.py"]


def test_a_folder_is_not_made_for_nothing() -> None:
    (done,) = copies(*every_line("x = 1\n", "gone.py"), folder=Path("out"))
    assert done.copy is None
    assert not Path("out").exists()


def test_a_file_of_an_installed_package_is_copied_only_into_a_folder() -> None:
    file = "lib/site-packages/pack.py"
    Path(file).parent.mkdir(parents=True)
    Path(file).write_text("x = 1\n")
    assert "installed package" in copies(*every_line("x = 1\n", file))[0].reason
    assert copies(*every_line("x = 1\n", file), folder=Path("out"))[0].copy is not None


def test_the_encoding_of_the_original_is_kept() -> None:
    text = "# -*- coding: latin-1 -*-\nx = 'é'\n"
    Path(FILE).write_bytes(text.encode("latin-1"))
    records = [*every_line(text), make_line(9, Location(FILE, 2, "<module>"), held("x", 9), step=1,
                                            tensors=[make_tensor(9, 7, 4)])]  # fmt: skip
    (done,) = copies(*records)
    # Latin-1 has no arrow.
    assert "x = 'é'  # x [2->7, 4] f32\n".encode("latin-1") in Path(str(done.copy)).read_bytes()


def test_a_byte_order_mark_is_kept() -> None:
    Path(FILE).write_bytes(b"\xef\xbb\xbfx = 1\n")
    (done,) = copies(*every_line("x = 1\n"))
    assert Path(str(done.copy)).read_bytes().startswith(b"\xef\xbb\xbfx = 1  # x [1, 4] f32\n")


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_hostile_names_stay_within_the_comment(payload: str) -> None:
    Path(FILE).write_text("x = 1\ny = 2\n")
    records = [
        *every_line("x = 1\ny = 2\n"),
        make_line(50, Location(FILE, 1, "<module>"), Variable(payload, f"{payload}\n1/0")),
    ]
    (done,) = copies(*records)
    copy = Path(str(done.copy)).read_bytes()
    assert ast.dump(ast.parse(copy)) == ast.dump(ast.parse("x = 1\ny = 2\n"))
    assert copy.count(b"\n") == 3

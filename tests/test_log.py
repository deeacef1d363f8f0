"""Lines, the writer, and what opens as a log."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortrace import log
from tensortrace.errors import LogError, UsageError
from tensortrace.log import (
    DAMAGED,
    KINDS,
    Damaged,
    LogWriter,
    Unknown,
    decode,
    encode,
    encode_all,
    open_log,
    open_sink,
    read_step,
    scan_chunk,
    seek_step,
    unknown_keys,
)
from tensortrace.records import Action, Record, Source
from tests.builders import make_call, make_end, make_finding, make_header, make_steps, make_tensor
from tests.builders import write_log as write_records

# -- lines


class Rude:
    def __str__(self) -> str:
        raise RuntimeError("no text")


def strict(line: bytes) -> dict[str, object]:
    """Read JSON as RFC 8259 has it: no NaN, no infinity."""

    def refuse(name: str) -> object:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line.decode(), parse_constant=refuse)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_float_that_is_not_finite_becomes_null(bad):
    call = make_call(1, tensors=[make_tensor(1, 2, mean=bad)])
    finding = make_finding(evidence={"ratio": bad, "deep": [{"x": bad}]})
    assert strict(encode(call))["tensors"][0]["mean"] is None
    assert strict(encode(finding))["evidence"] == {"ratio": None, "deep": [{"x": None}]}


@given(st.text(st.characters(codec=None)))
def test_any_text_makes_one_line_of_strict_json(text):
    line = encode(Source(step=0, file=text, name=text, first_line=1, text=text))
    assert line.count(b"\n") == 1
    assert strict(line)["text"] == text.encode("utf-8", "backslashreplace").decode()


@given(st.lists(st.text(st.characters(codec=None)), max_size=4))
def test_lines_written_together_are_those_written_one_by_one(texts):
    records = [Source(step=0, file=text, name=text, first_line=1, text=text) for text in texts]
    means = (float("nan"), 1e300)
    records += [make_call(1, tensors=[make_tensor(1, 2, mean=mean)]) for mean in means]
    assert encode_all(records) == b"".join(map(encode, records))


def test_what_json_has_no_form_for_becomes_its_text():
    import numpy as np

    circle: list[object] = []
    circle.append(circle)
    detail = {
        "path": Path("a/b"), "numpy": np.float32(0.5), "flag": np.bool_(True), "rude": Rude(),
        "keys": {(1, 2): 3, None: "\ud800"}, "set": {1},
    }  # fmt: skip
    read = strict(encode(Action(step=0, seq=1, action="clip", detail=detail)))["detail"]
    assert read == {
        "path": "a/b", "numpy": 0.5, "flag": True, "rude": "<Rude>",
        "keys": {"(1, 2)": 3, "None": "\\ud800"}, "set": [1],
    }  # fmt: skip
    circled = Action(step=0, seq=1, action="clip", detail={"circle": circle})
    assert "..." in str(strict(encode(circled)))


def test_an_unknown_kind_is_told_from_a_damaged_line():
    assert decode(b'{"kind":"wormhole","step":3,"x":1}') == Unknown("wormhole", 3)
    for line in (
        b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"kind":"step"}', b'{"kind":3,"step":1}',
        b'{"kind":"step","step":-1,"seq":1}', b'{"kind":"step","step":1e3,"seq":1}',
        b'{"kind":"step","step":99999999999999999999,"seq":1}',
        b'{"kind":"step","step":1,"seq":1,"loss":NaN}',
        b'{"kind":"step","step":1,"seq":1,"loss":1e999}',
        b'{"kind":"source","step":1,"file":"\xff","name":"x","first_line":1,"text":""}',
        b'{"kind":"action","step":1,"seq":1,"action":"clip","detail":' + b'{"a":' * 100_000,
        b'{"kind":"step","step":1,"seq":1,"x":"' + b"a" * log.MAX_LINE + b'"}',
    ):  # fmt: skip
        assert isinstance(decode(line), Damaged), line[:60]


def test_unknown_keys_are_skipped_and_named():
    line = b'{"kind":"step","step":1,"seq":2,"mood":"good"}'
    record = decode(line)
    assert isinstance(record, Record)
    assert unknown_keys(line, record) == ["step.mood"]


@given(st.binary(max_size=200))
def test_no_bytes_make_decode_raise(line):
    decode(line)
    read_step(line)


# -- writing


def records_in(path: Path) -> list[object]:
    return [decode(line) for line in path.read_bytes().splitlines()]


def write(path: str | Path, *records: Record) -> Path:
    """Write a log of another process (its header names none) and close it."""
    writer = LogWriter.open(path)
    for record in records:
        writer.write(record)
    writer.close()
    assert writer.path is not None
    return writer.path


def test_what_is_written_is_in_the_file_in_order(tmp_path):
    records = [make_header(), *make_steps(3), make_end(2)]
    writer = LogWriter.open(tmp_path / "new" / "log.jsonl")
    for record in records[:-1]:
        writer.write(record)
    writer.write_raw(encode(records[-1]))
    writer.close()
    writer.close()
    assert records_in(tmp_path / "new" / "log.jsonl") == records
    assert writer.nbytes == (tmp_path / "new" / "log.jsonl").stat().st_size
    with pytest.raises(LogError, match="is closed"):
        writer.write(make_end())


def test_bytes_reach_the_file_at_flush_and_when_many(tmp_path):
    writer = LogWriter.open(tmp_path / "log.jsonl")
    writer.write(make_header())
    assert (tmp_path / "log.jsonl").stat().st_size == 0
    writer.flush()
    assert records_in(tmp_path / "log.jsonl") == [make_header()]
    while writer.nbytes <= 2 * log.BUFFER:
        writer.write(make_call(1))
    assert (tmp_path / "log.jsonl").stat().st_size >= log.BUFFER
    writer.close()


def test_an_earlier_log_is_kept_as_prev(tmp_path):
    path = tmp_path / "log.jsonl"
    for run_id in "abc":
        assert write(path, make_header(run_id=run_id)) == path
    assert records_in(path)[0].run_id == "c"
    assert records_in(tmp_path / "log.prev.jsonl")[0].run_id == "b"


def test_a_log_killed_in_its_first_line_is_set_aside_too(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(encode(make_header())[:12])
    write(tmp_path / "log.jsonl", make_header())
    assert (tmp_path / "log.prev.jsonl").exists()


@pytest.mark.parametrize("content", [b"my thesis", b'{"a":1}\n', b"{", b"\x00" * 100])
def test_what_is_no_log_is_never_overwritten(tmp_path, content):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a tensortrace log, so it is not overwritten"):
        LogWriter.open(path)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_name_in_use_gives_the_next_number(tmp_path):
    writers = [LogWriter.open(tmp_path / "log.jsonl") for _ in range(3)]
    assert [w.path.name for w in writers] == ["log.jsonl", "log-2.jsonl", "log-3.jsonl"]
    for writer in writers:
        writer.close()


def test_each_rank_writes_its_own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert write(tmp_path / "log.jsonl", make_header()).name == "log.rank3.jsonl"
    monkeypatch.setenv("RANK", "three")
    assert write(tmp_path / "log.jsonl", make_header()).name == "log.jsonl"


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "log.jsonl", "a\0b"):
        with pytest.raises(UsageError, match="cannot write a log to"):
            LogWriter.open(place)


def test_a_forked_child_writes_nothing(tmp_path):
    writer = LogWriter.open(tmp_path / "log.jsonl")
    writer.write(make_header())
    child = os.fork()
    if child == 0:
        writer.write(make_call(1))
        writer.flush()
        writer.close()
        os._exit(0)
    os.waitpid(child, 0)
    writer.close()
    assert records_in(tmp_path / "log.jsonl") == [make_header()]


def test_short_and_refused_writes_lose_nothing(tmp_path, monkeypatch):
    real, turns = os.write, iter(range(1000))

    def stingy(fd: int, data: memoryview) -> int:
        if next(turns) % 3 == 1:
            raise BlockingIOError
        return real(fd, data[:100])

    writer = LogWriter.open(tmp_path / "log.jsonl")
    monkeypatch.setattr(os, "write", stingy)
    for record in make_steps(1):
        writer.write(record)
    writer.close()
    monkeypatch.undo()
    assert records_in(tmp_path / "log.jsonl") == make_steps(1)


def test_an_interrupt_while_writing_neither_loses_nor_repeats(tmp_path, monkeypatch):
    real = os.write

    def interrupted(fd: int, data: memoryview) -> int:
        real(fd, data[:100])
        raise KeyboardInterrupt

    writer = LogWriter.open(tmp_path / "log.jsonl")
    for record in make_steps(1):
        writer.write(record)
    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.flush()
    monkeypatch.undo()
    writer.close()
    assert records_in(tmp_path / "log.jsonl") == make_steps(1)


def test_a_full_disk_is_a_log_error_and_the_end_of_writing(tmp_path, monkeypatch):
    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = LogWriter.open(tmp_path / "log.jsonl")
    writer.write(make_header())
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LogError, match="No space left on device"):
        writer.flush()
    writer.close()
    with pytest.raises(LogError, match="is closed"):
        writer.write(make_header())


def test_a_device_that_is_always_full_is_a_log_error():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    writer = LogWriter.open("/dev/full")
    writer.write(make_header())
    with pytest.raises(LogError, match="cannot write to /dev/full"):
        writer.flush()


def test_the_end_line_can_be_taken_back(tmp_path):
    writer = LogWriter.open(tmp_path / "log.jsonl")
    writer.write(make_header())
    before = writer.nbytes
    writer.write(make_end())
    writer.flush()
    writer.truncate(before)
    writer.write(make_call(1))
    writer.close()
    assert records_in(tmp_path / "log.jsonl") == [make_header(), make_call(1)]


def test_a_killed_writer_leaves_whole_lines_and_at_most_one_cut(tmp_path):
    program = """
        import sys
        from tensortrace.log import LogWriter
        from tests.builders import make_header, make_steps
        writer = LogWriter.open(sys.argv[1])
        writer.write(make_header())
        for step in range(10**6):
            for record in make_steps(1, start=step):
                writer.write(record)
            if step == 200:
                print("go", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "log.jsonl")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    *whole, _rest = (tmp_path / "log.jsonl").read_bytes().split(b"\n")
    assert len(whole) > 100
    assert all(isinstance(decode(line), Record) for line in whole)


def test_a_sink_takes_a_file_or_a_callable(tmp_path):
    file, taken = io.BytesIO(), []
    for sink in (open_sink(file), open_sink(taken.append)):
        for record in (make_header(), make_call(1), make_call(2)):
            sink.write(record)
        sink.flush()
        sink.close()
    assert taken == [make_header(), make_call(1), make_call(2)]
    assert [decode(line) for line in file.getvalue().splitlines()] == taken
    assert not file.closed
    with (tmp_path / "raw").open("wb", buffering=0) as raw:
        sink = open_sink(raw)
        sink.write(make_header())
        sink.close()
    assert records_in(tmp_path / "raw") == [make_header()]


def test_a_sink_that_fails_raises_a_log_error_that_says_so():
    def explode(record: Record) -> None:
        raise ValueError("boom\x1b[31m")

    with pytest.raises(LogError, match=r"explode.*ValueError: boom\\x1b\[31m"):
        open_sink(explode).write(make_header())
    file = io.BytesIO()
    sink = open_sink(file)
    file.close()
    sink.write(make_header())
    with pytest.raises(LogError, match="cannot write to the file"):
        sink.flush()


def test_what_is_no_sink_is_refused():
    with pytest.raises(UsageError, match="is a text file"):
        open_sink(io.StringIO())
    with pytest.raises(UsageError, match="out=3 is none of"):
        open_sink(3)


# -- what opens as a log


def refused(path: Path) -> str:
    with pytest.raises(LogError) as caught:
        open_log(path)[0].close()
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text
    return text


NEWER = encode(make_header()).replace(b'"version":1', b'"version":2').replace(b'"argv"', b'"args"')


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello\n", "it is not JSON"),
        (b"\xef\xbb\xbfhello\n", "it is not JSON"),
        (b"\xef\xbb\xbf" + encode(make_header()), "put a byte order mark before it"),
        (encode(make_call(1)), "the header, is missing"),
        (b"\x7fELF\x00\x00\x01", "a binary file"),
        (b'{"traceEvents":[]}\n', "another program's JSON"),
        (b"[1,2]\n", "another program's JSON"),
        (b'{"kind":"header","step":0,"format":"other","version":1}\n', "another program's JSON"),
        (encode(make_header())[:-30], "no complete first line yet"),
        (encode(make_header()).replace(b'"argv":[', b'"argv":'), "first line is damaged"),
        (NEWER, "in format 2 of tensortrace 0.1.0"),
        (b"[" * 1_000_000, "another program's JSON"),
    ],
    ids=range(13),
)
def test_what_is_no_log_gets_one_sentence(tmp_path, content, says):
    path = tmp_path / "x\x1b[31m.jsonl"
    path.write_bytes(content)
    assert says in refused(path)


def test_missing_folder_and_forbidden_files_get_one_sentence(tmp_path):
    assert "there is no file" in refused(tmp_path / "none.jsonl")
    assert "is a folder" in refused(tmp_path)
    assert "cannot read" in refused(Path("a\0b"))
    path = write_records(tmp_path / "log.jsonl", [])
    path.chmod(0)
    if os.geteuid() != 0:
        assert "Permission denied" in refused(path)


def compressed(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    else:
        zstandard = pytest.importorskip("zstandard")
        one = zstandard.ZstdCompressor()
        path.write_bytes(one.compress(content[:5000]) + one.compress(content[5000:]))
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_logs_are_read_whatever_their_name(tmp_path, suffix):
    content = write_records(tmp_path / "log.jsonl", make_steps(20)).read_bytes()
    path = compressed(tmp_path / f"log.jsonl{suffix}", content)
    for name in (path, path.rename(tmp_path / "renamed.jsonl")):
        if name.exists():
            file, header = open_log(name)
            assert header == make_header()
            assert file.read(0, 10**6) == content
            assert not file.growing
            assert file.notice is None


def test_of_a_cut_gzip_the_beginning_is_read(tmp_path):
    import random

    noise = random.Random(1).randbytes(50_000).hex()
    records = [Source(step=0, file="a", name="b", first_line=1, text=noise), *make_steps(5)]
    content = write_records(tmp_path / "log.jsonl", records).read_bytes()
    packed = gzip.compress(content)
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) * 3 // 4])
    file, _ = open_log(tmp_path / "cut.gz")
    data = file.read(0, 10**6)
    assert content.startswith(data)
    assert len(data) > len(content) // 2
    assert "is cut or damaged" in file.notice
    (tmp_path / "bad.gz").write_bytes(b"\x1f\x8bnothing")
    assert "cannot be unpacked" in refused(tmp_path / "bad.gz")


def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "log.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    assert "pip install 'tensortrace[zstd]'" in refused(tmp_path / "log.jsonl.zst")


@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_is_read_to_its_end(tmp_path, packed):
    content = write_records(tmp_path / "log.jsonl", make_steps(50)).read_bytes()
    program = "import tensortrace.log as l; f, h = l.open_log('-'); print(len(f.read(0, 10**7)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=gzip.compress(content) if packed else content,
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert int(done.stdout) == len(content)


def test_an_endless_pipe_that_is_no_log_is_given_up(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(f"exec yes > '{tmp_path}/pipe'", shell=True, stderr=-3):
        assert "is not a tensortrace log" in refused(tmp_path / "pipe")


# -- finding lines


def test_lines_are_told_apart_without_decoding(tmp_path):
    records = [make_header(), *make_steps(2), make_finding(step=1), make_end(1)]
    path = write_records(tmp_path / "log.jsonl", records)
    file, _ = open_log(path)
    chunk = scan_chunk(file, 0, file.size())
    assert [KINDS[k] for k in chunk.kinds] == [r.__struct_config__.tag for r in records]
    assert [decode(chunk.line(i)) for i in range(len(records))] == records


def test_lines_rewritten_by_another_program_are_told_apart_too(tmp_path):
    records = [make_header(), *make_steps(2)]
    spaced = [json.dumps(json.loads(encode(r))).encode() + b"\r\n" for r in records]
    (tmp_path / "log.jsonl").write_bytes(b"".join(spaced))
    file, _ = open_log(tmp_path / "log.jsonl")
    chunk = scan_chunk(file, 0, file.size())
    assert [KINDS[k] for k in chunk.kinds] == [r.__struct_config__.tag for r in records]
    assert [read_step(chunk.line(i)) for i in range(len(records))] == [r.step for r in records]


def test_a_line_too_long_to_hold_is_passed_over(tmp_path):
    path = write_records(tmp_path / "log.jsonl", make_steps(1))
    before = path.stat().st_size
    with path.open("ab") as out:
        out.write(b'{"kind":"call","x":"' + b"x" * (log.MAX_LINE + 10) + b'"}\n')
        out.write(encode(make_end()))
    file, _ = open_log(path)
    chunk = scan_chunk(file, before, file.size())
    assert chunk.kinds.tolist() == [DAMAGED]
    after = scan_chunk(file, chunk.end, file.size())
    assert decode(after.line(0)) == make_end()


def oracle(content: bytes, step: int) -> int:
    """Where the first line of a step, or of a later one, begins: by reading all lines."""
    offset = 0
    for line in content.splitlines(keepends=True):
        if json.loads(line)["step"] >= step:
            return offset
        offset += len(line)
    return offset


@pytest.mark.parametrize("text", [10, 1000, 100_000])
def test_a_step_is_found_where_reading_everything_finds_it(tmp_path, text):
    count = max(8, 600_000 // (text + 2000))
    records = []
    for step in range(0, 3 * count, 3):  # every third number: the others are not there
        records += make_steps(1, start=step)
        records.append(Source(step=step, file="a", name="b", first_line=1, text="x" * text))
    path = write_records(tmp_path / "log.jsonl", records)
    content = path.read_bytes()
    file, _ = open_log(path)
    for step in (*range(0, 3 * count, max(1, count // 15)), 3 * count - 3, 3 * count, 10**9):
        assert seek_step(file, file.size(), step) == oracle(content, step)


@pytest.mark.parametrize("key", ["host_ns", "time_ns"])
def test_times_that_nobody_can_reckon_with_are_damage(key: str) -> None:
    line = f'{{"kind":"step","step":0,"seq":1,"{key}":{"9" * 400}}}\n'.encode()
    assert isinstance(decode(line), Damaged)

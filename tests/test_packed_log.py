"""Logs compressed with zstd: what was flushed can be read, whatever happens to the writer."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import threading
from pathlib import Path

import pytest

from tensortrace import trace
from tensortrace.cli import main
from tensortrace.errors import LogError, UsageError
from tensortrace.log import LogWriter, encode, open_log, zstd
from tensortrace.log.packed import FRAME, PackedWriter
from tensortrace.records import Record, Source
from tensortrace.run import open_run, start_run
from tests.builders import make_end, make_finding, make_header, make_run, make_steps

pytest.importorskip("zstandard")


@pytest.fixture(params=["package", "python"])
def backend(request, monkeypatch):
    """Either module that can be there; Python's own has another name before 3.14."""
    if request.param == "package":
        monkeypatch.setattr(zstd, "_of_python", lambda: None)
    elif zstd._of_python() is None:
        own = pytest.importorskip("backports.zstd")
        monkeypatch.setattr(zstd, "_of_python", lambda: own)


def noisy(count: int, *, nbytes: int = 300_000) -> list[Record]:
    """Functions whose text does not compress, so that frames fill up."""
    chance = random.Random(count)
    return [
        Source(step=0, file=f"{i}.py", name="f", first_line=1, text=chance.randbytes(nbytes).hex())
        for i in range(count)
    ]


class Interrupted:
    """Packs, and is interrupted before the answer is taken."""

    def __init__(self, encoder: zstd.Encoder, chance: random.Random) -> None:
        self.encoder, self.chance = encoder, chance

    def block(self, data: bytes) -> bytes:
        packed = self.encoder.block(data)
        if self.chance.random() < 0.3:
            raise KeyboardInterrupt
        return packed

    def end(self) -> bytes:
        return self.encoder.end()


def text_of(records: list[Record]) -> bytes:
    return b"".join(map(encode, records))


def unpack(data: bytes) -> bytes:
    """All that can be unpacked, the open frame at the end included."""
    found = b""
    while data:
        decoder = zstd.decoder()
        found += decoder.decompress(data)
        data = decoder.unused_data if decoder.eof else b""
    return found


def write(path: Path, records: list[Record], *, flush_every: int = 5) -> LogWriter:
    writer = LogWriter.open(path)
    for i, record in enumerate(records):
        writer.write(record)
        if i % flush_every == 0:
            writer.flush()
    return writer


@pytest.mark.usefixtures("backend")
def test_whatever_was_flushed_can_be_unpacked(tmp_path):
    path, written = tmp_path / "log.jsonl.zst", b""
    writer = LogWriter.open(path)
    assert isinstance(writer, PackedWriter)
    for i, record in enumerate(make_run([*make_steps(20), *noisy(4), *make_steps(20, start=20)])):
        writer.write(record)
        written += encode(record)
        if i % 9 == 0:
            writer.flush()
            assert unpack(path.read_bytes()) == written
    assert writer.nbytes == len(written)
    writer.close()
    assert unpack(path.read_bytes()) == written
    file, header = open_log(path)
    assert header == make_header()
    assert file.read(0, 1 << 24) == written
    assert file.notice is None


@pytest.mark.usefixtures("backend")
def test_a_frame_needs_none_of_those_before_it(tmp_path):
    path, records = tmp_path / "log.jsonl.zst", make_run(noisy(12))
    write(path, records).close()
    data, plain = path.read_bytes(), text_of(records)
    begins = [i for i in range(len(data)) if data.startswith(zstd.MAGIC, i)]
    assert len(plain) // (3 * FRAME) < len(begins) <= len(plain) // FRAME + 1
    for begin in begins:
        rest = unpack(data[begin:])
        assert plain.endswith(rest)
        assert rest.startswith(b'{"kind":')


def test_compression_is_worth_it_though_every_step_is_flushed(tmp_path):
    path, records = tmp_path / "log.jsonl.zst", make_run(make_steps(500))
    write(path, records, flush_every=7).close()
    assert path.stat().st_size * 8 < len(text_of(records))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("seed", range(12))
def test_an_interrupt_neither_loses_nor_repeats(tmp_path, monkeypatch, seed):
    chance, real = random.Random(seed), os.write
    path, records = tmp_path / "log.jsonl.zst", make_run([*make_steps(20), *noisy(8)])

    def interrupted(fd, data):
        if chance.random() < 0.3:
            done = real(fd, data[: chance.randrange(len(data))])
            if chance.random() < 0.5:
                raise KeyboardInterrupt
            return done
        return real(fd, data)

    writer = LogWriter.open(path)
    monkeypatch.setattr(os, "write", interrupted)
    for record in records:
        for act in (lambda record=record: writer.write_raw(encode(record)), writer.flush):
            try:
                act()
            except KeyboardInterrupt:
                continue  # the lines were taken; the next flush writes them
    monkeypatch.undo()
    writer.close()
    assert unpack(path.read_bytes()) == text_of(records)


@pytest.mark.usefixtures("backend")
def test_an_interrupt_while_packing_neither_loses_nor_repeats(tmp_path, monkeypatch):
    path, records = tmp_path / "log.jsonl.zst", make_run([*make_steps(30), *noisy(8)])
    writer, chance = LogWriter.open(path), random.Random(3)
    for record in records:
        writer.write(record)
        writer._encoder = Interrupted(real := writer._encoder, chance)
        with contextlib.suppress(KeyboardInterrupt):
            writer.flush()
        if isinstance(writer._encoder, Interrupted):
            writer._encoder = real
    writer.close()
    assert unpack(path.read_bytes()) == text_of(records)


@pytest.mark.parametrize("before", [1, 40])
def test_the_end_line_of_a_run_that_goes_on_is_taken_back(tmp_path, before):
    path, records = tmp_path / "log.jsonl.zst", make_run(make_steps(before))
    writer = write(path, records)
    for turn in range(4):
        mark = writer.nbytes
        writer.write(make_finding(f"f{turn}"))
        writer.write(make_end(turn))
        writer.flush()
        writer.truncate(mark)
        writer.write(make_finding(f"g{turn}"))
        records.append(make_finding(f"g{turn}"))
    writer.close()
    assert unpack(path.read_bytes()) == text_of(records)


def test_what_lies_in_an_earlier_frame_is_not_taken_back(tmp_path):
    writer = write(tmp_path / "log.jsonl.zst", make_run(noisy(8)), flush_every=1)
    with pytest.raises(LogError, match="cannot go on"):
        writer.truncate(100)


def test_names_of_packed_logs_keep_their_ending(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl.zst"
    write(path, make_run([make_header(time_ns=1, pid=1)])).close()
    first = write(path, make_run(make_steps(1)))
    assert (tmp_path / "log.prev.jsonl.zst").exists()
    assert write(path, make_run([])).path == tmp_path / "log-2.jsonl.zst"
    first.close()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    write(path, make_run(make_steps(1))).close()
    assert open_run(tmp_path / "log.rank1.jsonl.zst").ranks.keys() == {1}


def test_a_packed_file_that_is_no_log_is_not_overwritten(tmp_path):
    packer = zstd.encoder()
    (tmp_path / "log.jsonl.zst").write_bytes(packer.block(b'{"mine": 1}\n') + packer.end())
    with pytest.raises(UsageError, match="is not a tensortrace log"):
        LogWriter.open(tmp_path / "log.jsonl.zst")


def test_writing_gzip_or_without_the_package_is_refused_in_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="not written as gzip"):
        LogWriter.open(tmp_path / "log.jsonl.gz")
    monkeypatch.setattr(zstd, "available", lambda: False)
    with pytest.raises(UsageError, match=r"needs zstd: pip install 'tensortrace\[zstd\]'"):
        trace(tmp_path / "log.jsonl.zst").__enter__()


def test_neither_module_is_there(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert not zstd.available()


# ---- reading what is cut, damaged, growing


def test_any_cut_leaves_a_readable_beginning(tmp_path):
    path, records = tmp_path / "log.jsonl.zst", make_run([*make_steps(30), *noisy(4), make_end(29)])
    write(path, records).close()
    write(tmp_path / "head.jsonl.zst", records[:1]).close()
    head = (tmp_path / "head.jsonl.zst").stat().st_size
    data, plain = path.read_bytes(), text_of(records)
    for length in sorted({*range(0, 400, 7), *range(400, len(data), len(data) // 60)}):
        path.write_bytes(data[:length])
        try:
            run = open_run(path)
        except LogError as err:
            assert length < head
            assert len(str(err).splitlines()) == 1
            continue
        held = run._file.read(0, 1 << 24)
        assert plain.startswith(held)
        assert len(held) * 4 > length  # nothing large is left out
        run.close()


def test_damage_costs_one_frame(tmp_path):
    path, records = tmp_path / "log.jsonl.zst", make_run([*noisy(16), *make_steps(9), make_end(8)])
    write(path, records, flush_every=1).close()
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 50] = random.Random(1).randbytes(50)
    path.write_bytes(data)
    run = open_run(path, index=False)
    assert list(run.index())[-1] == 1.0
    assert "is damaged" in run.notice
    assert run.last_step() == 8
    assert run.end is not None
    assert len(run.sources) >= 12
    run.close()


def test_a_packed_log_is_followed_while_it_is_written(tmp_path):
    path, steps = tmp_path / "log.jsonl.zst", make_steps(9)
    head = make_header(pid=os.getpid(), hostname=os.uname().nodename)
    writer = write(path, [head, *steps[:24]], flush_every=1)
    run = open_run(path)
    assert run.live
    assert run.last_step() == 2
    for record in steps[24:]:
        writer.write(record)
        writer.flush()
    settle(run)
    assert run.last_step() == 8
    mark = writer.nbytes
    writer.write(make_end(8))
    writer.flush()
    settle(run)
    assert run.end is not None
    writer.truncate(mark)
    for record in make_steps(5, start=9):
        writer.write(record)
        writer.flush()
    settle(run)
    assert run.end is None
    assert run.last_step() == 13
    writer.close()
    run.close()


def settle(run) -> None:
    """Refresh until all that is in the file is unpacked."""
    for _ in range(2000):
        run.refresh()
        if run.unpacked == 1.0 and not run.refresh() and run.unpacked == 1.0:
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never settles")


def test_a_pipe_is_shown_while_it_comes(tmp_path):
    data = text_of(make_run(make_steps(30)))
    os.mkfifo(tmp_path / "pipe")
    go_on = threading.Event()

    def send() -> None:
        with (tmp_path / "pipe").open("wb", buffering=0) as out:
            out.write(data[:5000])
            go_on.wait(20)
            out.write(data[5000:])

    sender = threading.Thread(target=send)
    sender.start()
    run = start_run(tmp_path / "pipe")
    assert run.unpacked == 0.0 == run.indexed
    assert run.step(0).calls
    assert not run.live
    go_on.set()
    sender.join()
    for _ in range(2000):
        whole = run.unpacked == 1.0  # before it is read: more may come meanwhile
        run.refresh()
        if whole:
            break
        threading.Event().wait(0.001)
    assert run.last_step() == 29
    run.close()


def test_progress_is_told_while_a_run_is_unpacked(tmp_path):
    write(tmp_path / "log.jsonl.zst", make_run(noisy(4))).close()
    told: list[float] = []
    run = open_run(tmp_path / "log.jsonl.zst", told.append)
    assert told[-1] == 1.0
    assert told == sorted(told)
    run.close()


def test_the_report_reads_what_a_trace_wrote_packed(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    net = torch.nn.Linear(4, 2, bias=False)
    with trace("log.jsonl.zst") as t:
        for _ in range(3):
            net(torch.zeros(3, 4)).sum().log().log().backward()
            t.step()
    assert t.path == Path("log.jsonl.zst")
    assert "TT10" in t.report()
    assert main(["report", "log.jsonl.zst"]) == 1
    assert "TT10" in capsys.readouterr().out
    assert main(["report"]) == 1

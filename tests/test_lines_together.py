"""Lines from the program to the listing and to the walk: both halves on one real run."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.export.annotated import write_copies
from tensortrace.export.flows import flow_text
from tensortrace.export.lines import gather_lines
from tensortrace.export.lines_text import render_lines
from tensortrace.run import Run, open_run
from tensortrace.tui.views.executed import Executed, read_executed
from tests.export.hostile import FORBIDDEN


def halves(count: int) -> Iterator[Tensor]:
    total = torch.zeros(2)
    for i in range(count):
        total = total + i
        yield total / 2


def doubled(depth: int) -> Tensor:
    if depth == 0:
        return torch.ones(3)
    return doubled(depth - 1) * 2


def train_step(net: nn.Module, rows: int) -> Tensor:
    batch = {"x": torch.rand(rows, 4)}
    parts = [part.sum() for part in halves(3)]
    scale = doubled(2).sum()
    try:
        batch["x"] @ torch.ones(5)
    except RuntimeError as error:
        told = str(error)
    thread = threading.Thread(target=doubled, args=(1,))
    thread.start()
    thread.join()
    loss = net(batch["x"]).mean() * scale + len(told) + len(parts)
    loss.backward()
    return loss


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("lines") / "log.jsonl"
    net = nn.Linear(4, 2)
    t = trace(path, every=1, lines={"depth": 4})
    traced = t(train_step)
    for rows in (8, 8, 5):
        traced(net, rows)
    t.close()  # its hooks go
    return open_run(path)


def executed_of(run: Run, step: int) -> Executed:
    return read_executed(run.step(step).records, run.modules)


def test_the_listing_has_the_shapes_of_each_line(run: Run) -> None:
    found = {f.name: f for f in gather_lines(run).functions}
    assert {"train_step", "halves", "doubled"} <= set(found)
    step = found["train_step"]
    text = {line.number: step.code(line.number) for line in step.lines.values()}
    batch = next(n for n, code in text.items() if code and "batch = {" in code)
    assert flow_text(step.lines[batch].variables["batch['x']"]) == "[8→5, 4] f32"
    assert step.lines[batch].executions == 3
    assert step.entered == 3
    assert any("RuntimeError" in told for line in step.lines.values() for told in line.raised)
    # Three numbers of the generator, and once more to see that there are no more.
    loop = next(line for line in found["halves"].lines.values()
                if "for i" in (found["halves"].code(line.number) or ""))  # fmt: skip
    assert loop.executions >= 9
    listing = "".join(render_lines(gather_lines(run)))
    assert "batch['x'] [8→5, 4] f32" in listing
    assert not FORBIDDEN.search(listing)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_ways_of_the_walk_lead_back(run: Run, step: int) -> None:
    executed = executed_of(run, step)
    assert executed.recorded
    for at in range(len(executed)):
        inner, outer = executed.into(at), executed.out(at)
        assert inner is None or executed.out(inner) == at
        assert outer is None or executed.lines[outer].depth == executed.lines[at].depth - 1
        for by in (1, -1):
            over = executed.over(at, by)
            assert over is None or executed.over(over, -by) == at
        assert executed.stack(at)[-1] == at


def test_the_walk_goes_into_a_recursion_and_out_again(run: Run) -> None:
    executed = executed_of(run, 0)
    source = gather_lines(run, function="train_step").functions[0]
    at = next(i for i, line in enumerate(executed.lines)
              if "scale = doubled" in (source.code(line.location.line) or ""))  # fmt: skip
    depths = 0
    while (inner := executed.into(at)) is not None:
        # The line of the new frame that calls on, if one does.
        calling = [i for i in executed.frame(inner) if executed.into(i) is not None]
        at, depths = calling[0] if calling else inner, depths + 1
    assert depths == 3
    assert [executed.lines[i].location.function for i in executed.stack(at)] == [
        "train_step", "doubled", "doubled", "doubled",
    ]  # fmt: skip


def test_variables_are_what_they_were(run: Run) -> None:
    executed = executed_of(run, 2)
    last = max(i for i, line in enumerate(executed.lines) if line.location.function == "train_step")
    held = {value.name: value for value in executed.variables(last)}
    x = executed.tensors[held["batch['x']"].tensor or 0]
    assert x.shape == (5, 4)
    assert held["rows"].text == "5"
    maker = run.step(2).producer(held["batch['x']"].tensor)
    assert maker is not None
    assert maker.op == "rand"


def test_the_copy_of_this_file_has_its_syntax_tree(run: Run, tmp_path: Path) -> None:
    done = {Path(one.file).name: one for one in write_copies(gather_lines(run), tmp_path)}
    copy = done[Path(__file__).name].copy
    assert copy is not None
    assert "# batch['x'] [8→5, 4] f32" in copy.read_text()
    assert ast.dump(ast.parse(copy.read_text())) == ast.dump(ast.parse(Path(__file__).read_text()))


def test_the_command_reads_the_log_while_the_run_goes_on(tmp_path: Path) -> None:
    with trace(tmp_path / "log.jsonl", every=1, lines=True) as t:
        for rows in (2, 3):
            x = torch.rand(rows, 4)
            x.sum()
            t.step()
        done = subprocess.run(
            [sys.executable, "-m", "tensortrace", "lines", str(tmp_path / "log.jsonl")],
            capture_output=True, text=True, check=False, encoding="utf-8",
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "lines" in done.stdout

"""A program may name things as it likes: no name harms the terminal, the log or its speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensortrace import trace
from tensortrace.log import decode, encode
from tensortrace.records import Record
from tensortrace.text import LONGEST_NAME, shorten
from tests.builders import make_call
from tests.capture.lifecycle import weights
from tests.durable import X
from tests.durable.reading import read_everything
from tests.export.hostile import FORBIDDEN, PAYLOADS

HUGE = "M" * 10_000_000
# A class cannot be named with these two; an attribute, a key and a message can.
NO_CLASS = str.maketrans("", "", "\x00\ud800")
STRINGS = {**PAYLOADS, "half a surrogate pair": "a\ud800b", "ten million letters": HUGE}


def make_class(text: str) -> type[nn.Module]:
    """A module class of that name, made by a function and in a file of that name."""
    spoilt = text.translate(NO_CLASS)
    code = compile("lambda self, x, **more: [{k: self.first(x) * 1}]", spoilt[:4096], "eval")
    forward = eval(code, {"k": text})
    cls = type(spoilt or "a", (nn.Module,), {"forward": forward})
    cls.__qualname__ = spoilt
    return cls


def hostile_program(text: str) -> list[bytes]:
    """Every name that a program gives is the text."""
    torch.manual_seed(0)
    module = make_class(text)()
    module.first = nn.Linear(8, 1)  # type: ignore[assignment]
    module._modules[text] = nn.Linear(8, 1)
    module._parameters[text + "p"] = nn.Parameter(torch.ones(1))
    module._buffers[text + "b"] = torch.ones(1)
    root = nn.Sequential()
    root._modules[text] = module
    sgd = type(text.translate(NO_CLASS) or "a", (torch.optim.SGD,), {})
    optimizer = sgd(root.parameters(), lr=1e-2)
    failure = type(text.translate(NO_CLASS) or "a", (Exception,), {})
    for step in range(4):
        optimizer.zero_grad()
        (out,) = module(X, **{text + "k": X})[0].values()
        other = module._modules[text](X)
        scale = float("nan") if step == 2 else 1.0
        ((out * module._parameters[text + "p"] + other) * scale).sum().backward()
        if step != 2:
            optimizer.step()
        with pytest.raises(failure):
            raise failure(text)
    return weights(root)


@pytest.mark.parametrize("name", STRINGS)
@pytest.mark.parametrize("level", ["module", "op"])
def test_no_name_reaches_the_terminal_or_markup(
    name: str, level: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STRINGS[name]
    path = tmp_path / "log.jsonl"
    with trace(path, every=1, level=level) as t:
        traced = hostile_program(text)
    said = capsys.readouterr().err
    assert traced == hostile_program(text)
    assert "TT101" in said
    assert "stopped after an error" not in said
    assert not FORBIDDEN.search(said + t.report())
    lines = path.read_bytes().splitlines()
    records = [decode(line) for line in lines]
    assert all(isinstance(record, Record) for record in records)
    assert max(map(len, lines)) < 100_000
    found = read_everything(path)
    assert found is not None
    assert not FORBIDDEN.search(found[0])
    if text is HUGE:
        assert len(said) < 50_000
        assert len(path.read_bytes()) < 1_000_000
        assert "MMM…MMM" in found[0]


@pytest.mark.parametrize("name", STRINGS)
def test_no_exception_reaches_the_terminal_or_markup(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STRINGS[name]
    failure = type(text.translate(NO_CLASS) or "a", (RuntimeError,), {})

    class Fails(nn.Module):
        def forward(self, x: Tensor, told: str) -> Tensor:
            raise failure(told)

    path = tmp_path / "log.jsonl"
    with pytest.raises(failure), trace(path, every=1):
        Fails()(X, text)
    assert not FORBIDDEN.search(capsys.readouterr().err)
    lines = path.read_bytes().splitlines()
    assert max(map(len, lines)) < 100_000
    found = read_everything(path)
    assert found is not None
    assert not FORBIDDEN.search(found[0])


def test_a_failure_of_the_tracer_itself_is_said_in_safe_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def take(record: Record) -> None:
        raise ValueError("\x1b]0;owned\x07" + HUGE)

    with trace(out=take):
        nn.Linear(8, 1)(X)
    said = capsys.readouterr().err
    assert "tracing stops, training goes on" in said
    assert not FORBIDDEN.search(said)
    assert len(said) < 5000


def test_shorten_keeps_both_ends_and_says_that_it_cut() -> None:
    assert shorten("a" * LONGEST_NAME) == "a" * LONGEST_NAME
    cut = shorten("a" * 5000 + "b" * 5000)
    assert len(cut) <= LONGEST_NAME
    assert cut.startswith("aaa")
    assert cut.endswith("bbb")
    assert "…" in cut


@pytest.mark.parametrize("make", [lambda: 10**5000, lambda: [{"a": -(10**9999)}]], ids="ab")
def test_an_integer_too_long_to_write_is_told_by_its_length(make: Callable[[], Any]) -> None:
    line = encode(make_call(1, arguments={"x": make()}))
    assert b"bits>" in line
    assert isinstance(decode(line), Record)

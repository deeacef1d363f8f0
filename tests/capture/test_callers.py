"""Of a line in an installed package: the user's own line that had it called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.records import Finding, Location
from tensortrace.text import finding_text
from tests.capture import record

HERE = Path(__file__)
INSTALLED = """
import torch
from torch import nn


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.log(self.linear(x) * 0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return self.inner(x)


class Root(nn.Module):
    def forward(self, x):
        return (x * 0).sqrt() * 2


def loss_of(output):
    return _loss(output)


def _loss(output):
    return (output * 0).mean().log()


def backward(loss):
    loss.backward()


class Trainer:
    def __init__(self, model):
        self.model = model

    def fit(self, x):
        self.step(x)

    def step(self, x):
        backward(self.model(x).sum())
"""


@pytest.fixture
def installed(install: Callable[[str], ModuleType]) -> ModuleType:
    """A package as pip leaves it."""
    return install(INSTALLED)


def text_at(location: Location | None) -> str:
    assert location is not None
    assert location.file == str(HERE)
    assert location.code is not None
    assert HERE.read_text("utf-8").splitlines()[location.line - 1].strip() == location.code.strip()
    return location.code.strip()


def found(program: Callable[[], Any], code: str = "TT101", **options: Any) -> Finding:
    records: list[Any] = []
    with trace(out=records.append, **options):
        program()
    return next(r for r in records if isinstance(r, Finding) and r.code == code)


@pytest.mark.parametrize("level", ["module", "op"])
def test_op_inside_an_installed_module_names_the_line_that_called_the_model(
    installed: ModuleType, level: str
) -> None:
    def program() -> None:
        model = installed.Net()
        output = model(torch.rand(3, 4))
        output.sum().backward()
        torch.optim.SGD(model.parameters()).step()

    finding = found(program, level=level)
    assert finding.op == "log"
    assert finding.location is not None
    assert finding.location.function == "Inner.forward"
    assert text_at(finding.location.caller) == "output = model(torch.rand(3, 4))"
    assert "\n  called at " in finding_text(finding)


def test_backward_inside_an_installed_module_names_the_line_that_called_the_model(
    installed: ModuleType,
) -> None:
    weight = nn.Parameter(torch.rand(3))

    def program() -> None:
        model = installed.Root()
        made = model(weight)
        made.sum().backward()
        torch.optim.SGD([weight]).step()

    finding = found(program, "TT102")
    assert finding.location is not None
    assert finding.location.function == "Root.forward"
    assert text_at(finding.location.caller) == "made = model(weight)"


def test_op_of_an_installed_function_names_each_line_that_called_it(installed: ModuleType) -> None:
    def program(t: Any) -> None:
        weight = torch.rand(3, requires_grad=True)
        installed.loss_of(weight)
        installed.loss_of(weight + 1)

    calls = record(program).ops(op="log")
    lines = [call.location.caller for call in calls if call.location is not None]
    texts = HERE.read_text("utf-8").splitlines()
    assert [texts[line.line - 1].strip() for line in lines if line is not None] == [
        "installed.loss_of(weight)",
        "installed.loss_of(weight + 1)",
    ]


def test_loop_of_an_installed_trainer_names_the_line_that_began_it(installed: ModuleType) -> None:
    def program() -> None:
        trainer = installed.Trainer(installed.Net())
        trainer.fit(torch.rand(3, 4))

    finding = found(program)
    assert finding.location is not None
    assert finding.location.function == "Inner.forward"
    assert text_at(finding.location.caller) == "trainer.fit(torch.rand(3, 4))"


def test_exception_inside_an_installed_module_names_the_line_that_called_the_model(
    installed: ModuleType,
) -> None:
    records: list[Any] = []
    with pytest.raises(RuntimeError), trace(out=records.append):
        installed.Net()(torch.rand(3, 5))
    finding = next(r for r in records if isinstance(r, Finding))
    assert finding.location is not None
    assert finding.location.function == "Inner.forward"
    assert text_at(finding.location.caller) == "installed.Net()(torch.rand(3, 5))"


def test_line_of_the_users_own_has_no_caller() -> None:
    def program() -> None:
        weight = nn.Parameter(torch.zeros(3))
        weight.log().sum().backward()

    finding = found(program)
    assert finding.location is not None
    assert finding.location.caller is None
    assert "called at" not in finding_text(finding)

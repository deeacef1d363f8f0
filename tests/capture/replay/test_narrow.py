"""Narrowing: a bad value inside a module gets its op and line, and nothing is touched."""

from __future__ import annotations

import inspect
import io
import random
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tensortrace import trace
from tensortrace.capture.replay import narrow as narrowing
from tensortrace.records import Action, Call, Finding
from tests.capture.replay import faulty
from tests.capture.replay.faulty import FAULTY, train

Level = Literal["module", "op"]
SOURCE = inspect.getsource(faulty).splitlines()


def marked_lines(name: str) -> list[int]:
    """The lines marked as faulty in the class of that name, or in those it uses."""
    lines, first = inspect.getsourcelines(FAULTY[name].make)
    inside = [first + i for i, line in enumerate(lines) if line.rstrip().endswith("# fault")]
    everywhere = [i + 1 for i, line in enumerate(SOURCE) if line.rstrip().endswith("# fault")]
    return inside or everywhere


def blame(name: str, level: Level) -> tuple[Finding, list[Any]]:
    torch.manual_seed(0)
    records: list[Any] = []
    with trace(out=records.append, every=1, level=level) as t:
        train(FAULTY[name].make())
    assert [a.detail for a in records if isinstance(a, Action) and a.action == "tracer_error"] == []
    errors = [finding for finding in t.findings if finding.severity == "error"]
    assert len(errors) == 1, [finding.message for finding in t.findings]
    return errors[0], records


@pytest.mark.parametrize("name", FAULTY)
def test_module_level_names_the_op_and_the_line(name: str) -> None:
    finding, records = blame(name, "module")
    assert finding.op == FAULTY[name].op
    assert finding.phase == FAULTY[name].phase
    assert finding.location is not None
    assert finding.location.line in marked_lines(name)
    assert finding.evidence["placed"] == "exact"
    # The op that is named is in the log, before the finding.
    named = next(r for r in records if isinstance(r, Call) and r.replay and r.seq == finding.seq)
    assert records.index(named) < records.index(finding)


@pytest.mark.parametrize("name", FAULTY)
def test_op_level_names_the_same_op_and_line(name: str) -> None:
    at_module, at_op = blame(name, "module")[0], blame(name, "op")[0]
    assert (at_op.op, at_op.location) == (at_module.op, at_module.location)
    assert at_op.module == at_module.module
    assert at_op.evidence["placed"] == "direct"


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_module_without_a_line_of_yours_is_told_at_the_line_that_calls_it(phase: str) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(3)))
    for layer, weight in zip(model, (1e-30 if phase == "backward" else 1, 1e30, 1e30), strict=True):
        layer.weight.data.fill_(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(out=io.BytesIO()) as t:
        y = model(torch.ones(1, 1))
        y.sum().backward()
        optimizer.step()
    found = next(f for f in t.findings if f.severity == "error")
    assert (found.phase, found.evidence["placed"]) == (phase, "exact")
    assert found.location is not None
    assert found.location.code == "y = model(torch.ones(1, 1))"


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", FAULTY)
def test_training_goes_on_the_same_to_the_bit(name: str, level: Level) -> None:
    torch.manual_seed(0)
    plain = flat(train(FAULTY[name].make()))
    torch.manual_seed(0)
    with trace(out=io.BytesIO(), level=level):
        traced = flat(train(FAULTY[name].make()))
    assert same(plain, traced)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value or () for tensor in flat(part)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()
        for x, y in zip(a, b, strict=True)
    )


class Everything(nn.Module):
    """State of every kind that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.calls = 0
        self.cache: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(3)
        self.last: Tensor | None = None
        self.out = nn.Linear(4, 1)
        self.lin.register_forward_hook(self.count)
        self.counted = 0

    def count(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.counted += 1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        print("forward", self.calls)
        noise = torch.rand(4, generator=self.generator) + random.random() + np.random.rand()
        h = self.drop(self.spectral(self.norm(self.lin(x)))) * noise
        self.cache.append(h.detach().mean())
        self.last = h
        h.register_hook(lambda grad: grad * 2)
        return self.out(h).sum(-1, keepdim=True) + (h * 0).sum().exp()


def use_everything(model: Everything, steps: int = 4) -> list[Any]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    keys = [list(m.__dict__) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        loss = model(torch.randn(5, 4)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [list(m.__dict__) for m in model.modules()] == keys
    tensors = flat([list(model.parameters()), list(model.buffers()), model.cache])
    versions = [t._version for t in (*model.parameters(), *model.buffers())]
    states = [random.getstate(), np.random.get_state()[2], model.generator.get_state().tolist()]
    return [[t.detach() for t in tensors], versions, states, model.calls, model.counted,
            torch.get_rng_state()]  # fmt: skip


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_replay_at_every_step_touches_nothing(
    phase: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    plain = use_everything(Everything())
    printed = capsys.readouterr().out
    verdicts: list[Any] = []

    def always(self: narrowing.Narrower, step: Any) -> None:
        for root in self._roots:
            self._replay(root, phase, step)

    monkeypatch.setattr(narrowing.Narrower, "look", always)
    torch.manual_seed(0)
    model = Everything()
    with trace(out=verdicts.append):
        traced = use_everything(model)
    assert capsys.readouterr().out == printed
    assert same(plain[0], traced[0])
    assert plain[1:5] == traced[1:5]
    assert torch.equal(plain[5], traced[5])
    told = [r.detail["placed"] for r in verdicts if isinstance(r, Action) and r.action == "replay"]
    assert told == ["no op inside makes what is not finite"] * 4


def test_replay_gives_the_gradients_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins' gradients are the parameters' own, to the bit."""
    compared: list[bool] = []
    original = narrowing.Replay._backward

    def backward(self: Any, output: Any, stage: Any) -> None:
        leaves = list(stage.leaves)
        stage.leaves = []  # without inputs, gradients accumulate on the stand-ins
        original(self, output, stage)
        real = {id(stage.memo[id(p)]): p.grad for p in self.root.tree.parameters}
        compared.extend(torch.equal(leaf.grad, real[id(leaf)]) for leaf in leaves)

    monkeypatch.setattr(narrowing.Replay, "_backward", backward)
    monkeypatch.setattr(
        narrowing.Narrower, "look",
        lambda self, step: [self._replay(root, "backward", step) for root in self._roots],
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 2))
    with trace(out=io.BytesIO()):
        train(model, steps=3)
    assert compared == [True] * 18


class Locked(faulty.Base):
    def __init__(self) -> None:
        super().__init__()
        self.opened = io.open(__file__)  # noqa: SIM115, UP020 what deepcopy refuses

    def middle(self, h: Tensor) -> Tensor:
        return h + (h * 0).log()


def refusal(model: nn.Module, program: Any = train, **options: Any) -> Finding:
    with trace(out=io.BytesIO(), **options) as t:
        program(model)
    return next(finding for finding in t.findings if finding.severity == "error")


def test_what_cannot_be_copied_is_said() -> None:
    model = Locked()
    placed = refusal(model).evidence["placed"]
    model.opened.close()
    assert placed.startswith("attribute 'opened' of Locked of type TextIOWrapper cannot be copied")


def test_input_that_was_modified_since_is_said() -> None:
    def program(model: nn.Module) -> None:
        x = torch.randn(3, 4)
        model(x).mean().backward()
        x.add_(1)
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    finding = refusal(FAULTY["LogOfZero"].make(), program)
    assert finding.evidence["placed"] == "an input was modified in place since"
    assert "between" in finding.message


@pytest.mark.parametrize(
    ("learned", "placed"),
    [(False, "exact"), (True, "a reentrant checkpoint with tensors from outside the module")],
)
def test_a_reentrant_checkpoint_may_take_views_but_no_leaves_from_elsewhere(
    learned: bool, placed: str
) -> None:
    elsewhere = torch.ones(12, requires_grad=learned)

    def part(h: Tensor) -> Tensor:
        return h + (h.view(-1) * elsewhere * 0).sqrt().view(h.shape)

    class Reentrant(faulty.Base):
        def middle(self, h: Tensor) -> Tensor:
            out: Tensor = checkpoint(part, h, use_reentrant=True)
            return out

    finding = refusal(Reentrant())
    assert finding.evidence["placed"] == placed
    assert finding.op == (None if learned else "sqrt")


class Overwriting(faulty.Base):
    """Writes over what it is given and what it holds, past the version counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.scale = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2)
        self.seen.data.add_(1)
        self.scale.data.mul_(3)
        return super().forward(x)

    def middle(self, h: Tensor) -> Tensor:
        return h + (h * 0).log()


class Renormed(Overwriting):
    """Writes into a parameter as well."""

    def forward(self, x: Tensor) -> Tensor:
        self.change(self.inner.weight)
        return super().forward(x)

    def change(self, weight: Tensor) -> None:
        weight.data.mul_(1.5)


class RenormedByIndex(Renormed):
    def change(self, weight: Tensor) -> None:
        weight.data[0] = weight.data[0] * 2


class RenormedInto(Renormed):
    def change(self, weight: Tensor) -> None:
        torch.mul(weight.data, 2, out=weight.data)


class RenormedByOperator(Renormed):
    def change(self, weight: Tensor) -> None:
        held = weight.data
        try:
            held *= 2
        except RuntimeError:
            raise AssertionError from None


REFUSED = "its forward writes into a parameter"


@pytest.mark.parametrize(
    ("kind", "placed"),
    [
        (Overwriting, "close"),
        (Renormed, REFUSED),
        (RenormedByIndex, REFUSED),
        (RenormedInto, REFUSED),
        (RenormedByOperator, REFUSED),
    ],
)
def test_a_replay_that_writes_in_place_writes_into_copies(
    kind: type[Overwriting], placed: str
) -> None:
    def program() -> list[Tensor]:
        torch.manual_seed(0)
        model, x = kind(), torch.randn(3, 4)
        model(x).mean().backward()
        return [x, model.seen, model.scale, *(p.detach() for p in model.parameters())]

    plain = program()
    with trace(out=io.BytesIO()) as t:
        traced = program()
    (finding,) = [finding for finding in t.findings if finding.severity == "error"]
    assert finding.evidence["placed"] == placed
    assert same(plain, traced)


def test_narrow_false_replays_nothing() -> None:
    records: list[Any] = []
    with trace(out=records.append, narrow=False):
        train(FAULTY["LogOfZero"].make())
    assert not any(isinstance(r, Action) and r.action == "replay" for r in records)


def test_one_cause_is_replayed_once_and_a_run_at_most_eight_times() -> None:
    records: list[Any] = []
    torch.manual_seed(0)
    models = [FAULTY["MaskedRow"].make() for _ in range(12)]
    with trace(out=records.append, every=1):
        for model in models:
            model(torch.randn(2, 4))
            model(torch.randn(2, 4))
            with torch.no_grad():
                model(torch.randn(2, 4))
    replays = [r for r in records if isinstance(r, Action) and r.action == "replay"]
    assert 0 < len(replays) <= 8
    assert len({r.of for r in replays}) == len(replays)


@pytest.mark.parametrize(
    ("error", "placed"), [(ValueError, "exact"), (torch.OutOfMemoryError, "module")]
)
def test_value_that_makes_the_loss_raise_is_narrowed_unless_memory_is_short(
    error: type[Exception], placed: str
) -> None:
    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spread, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.spread(x).abs().mul(1e4).exp())

    def loss(y: Tensor) -> Tensor:
        raise error("all elements of input should be between 0 and 1")

    records: list[Any] = []
    with pytest.raises(error), trace(out=records.append):
        loss(Sampler()(torch.ones(2, 4)))
    (found,) = (r for r in records if isinstance(r, Finding) and r.code == "TT101")
    assert (found.evidence["placed"], found.op) == (placed, "exp" if placed == "exact" else None)


def test_interrupted_call_is_not_run_again() -> None:
    class Stops(faulty.Base):
        def middle(self, h: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), trace(out=io.BytesIO()):
        Stops()(torch.randn(2, 4))


def test_graph_and_outputs_are_not_kept_for_a_replay() -> None:
    import weakref

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with trace(out=io.BytesIO()):
        y = model(torch.randn(2, 4))
        out = weakref.ref(y)
        loss = nn.functional.mse_loss(y, torch.zeros_like(y))
        del y, loss
        assert out() is None


def test_value_that_does_harm_only_later_is_narrowed_when_it_does() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.head(x)
            return h, (h.detach() * 0).abs().reciprocal()

    model = Weighted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with trace(out=io.BytesIO()) as t:
        for step in range(3):
            h, weight = model(torch.randn(1, 2))
            (h * (weight.clamp(max=1) if step < 2 else weight)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    error = next(finding for finding in t.findings if finding.severity == "error")
    assert (error.step, error.op, error.evidence["placed"]) == (2, "reciprocal", "exact")


def test_a_gradient_that_no_parameter_met_at_first_is_narrowed_when_one_does() -> None:
    """Met in every step, multiplied away in the first ones: the note's replay is not the last."""

    class Edges(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x**2).sqrt()

    model, edges = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Edges()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    mask = torch.tensor([0.0, 1, 1, 1])
    nn.init.zeros_(model[0].weight)
    with trace(out=io.BytesIO(), every=1) as t:
        for step in range(4):
            # Of a unit that is off ReLU makes 0 of any gradient.
            nn.init.constant_(model[0].bias, 1.0 if step == 3 else -1.0)
            optimizer.zero_grad()
            edges(model(torch.ones(2, 4)) * mask).sum().backward()
            optimizer.step()
    note, error = (f for f in t.findings if f.code == "TT102")
    assert (note.severity, error.severity, error.step) == ("note", "error", 3)
    assert error.op == note.op == "sqrt"


class Unrolled(nn.Module):
    """A cell that a thin step looks at a few times of twenty, and a root of zero after it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNNCell(4, 4), nn.Linear(4, 2)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(20):
            h = self.cell(x, h)
        if self.fails:
            h = h + (h * 0).sum(-1, keepdim=True).sqrt()
        return self.head(h)


@pytest.mark.parametrize("turns", [1, 3])
def test_calls_that_a_thin_step_passed_over_do_not_make_a_replay_differ(turns: int) -> None:
    model = Unrolled()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with trace(out=[].append, every=100) as t:
        for step in range(25):
            t.step()
            for turn in range(turns):
                model.fails = step == 24 and turn == turns - 1
                model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    (found,) = (f for f in t.findings if f.severity == "error")
    assert (found.op, found.evidence["placed"]) == ("sqrt", "exact")


def test_state_outside_the_modules_is_told_of_a_thin_step_too() -> None:
    count = 0

    class Counting(Unrolled):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return super().forward(x * count)

    model = Counting()
    with trace(out=[].append, every=100) as t:
        for step in range(25):
            t.step()
            model.fails = step == 24
            model(torch.randn(3, 4)).sum().backward()
    (found,) = (f for f in t.findings if f.severity == "error")
    assert (found.op, found.evidence["placed"]) == ("sqrt", "close")


def test_what_a_closure_is_evaluated_with_after_a_bad_update_follows_from_it() -> None:
    model = FAULTY["RootOfZero"].make()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    x = torch.randn(3, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with trace(out=[].append) as t:
        optimizer.step(closure)
        optimizer.step(closure)
    assert [f.code for f in t.findings if f.severity == "error"] == ["TT102"]


class Floor(nn.Module):
    """Spoilt by one element of what it is given, in an argument, a keyword or a global tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.linear = Power(), nn.Linear(6, 1)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        h = x if more is None else x * 0 + more
        out: Tensor = self.linear(self.inner(h + 0 if WORLD is None else WORLD))
        return out


class Power(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**0.5


WORLD: Tensor | None = None


@pytest.mark.parametrize("how", ["argument", "keyword", "view", "global"])
@pytest.mark.parametrize("late", [False, True])
def test_what_went_in_is_told_where_the_program_has_let_go_of_it(
    how: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`criterion(model(x), y)` keeps neither output; other tensors lie where they lay."""
    torch.manual_seed(0)
    model = Floor()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    records: list[Any] = []
    with trace(out=records.append, every="auto") as t:
        for step in range(260 if late else 6):
            data = torch.rand(8, 6) + 0.1
            if step == (255 if late else 4):
                data[3, 2] = -0.3
            if how == "argument":
                loss = model(data * 1.0).square().mean()
            elif how == "view":
                loss = model((data * 1.0).t().t()).square().mean()
            elif how == "keyword":
                loss = model(torch.ones(8, 6), more=data * 1.0).square().mean()
            else:
                monkeypatch.setattr(f"{__name__}.WORLD", data)
                loss = model(torch.rand(8, 6) * 1.0).square().mean()
            del data
            others = [torch.full((8, 6), 7.0) for _ in range(64)]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del others
    (found,) = [f for f in t.findings if f.severity == "error"]
    assert (found.op, found.evidence["placed"]) == ("pow", "exact")
    assert "it got 1 negative of 48 (f32 [8, 6] from -0.3 to" in found.explanation
    # Each tensor that a record names is described in the step.
    calls = [r for r in records if isinstance(r, Call) and r.step == found.step]
    described = {tensor.id for call in calls for tensor in call.tensors}
    named = {i for call in calls if call.replay for _, i in (*call.inputs, *call.outputs)}
    assert named <= described


class Grown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, _ = ctx.saved_tensors
        grown = grad * 1e38 * 1e38
        return grown * 0, grown.T @ x


class UsesGrown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weight = nn.Linear(3, 3), nn.Parameter(torch.ones(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = Grown.apply(self.inner(x), self.weight)
        return out


def test_a_view_inside_an_own_backward_is_followed_to_what_it_is_of() -> None:
    model = UsesGrown()
    with trace(out=lambda record: None) as t:
        model(torch.randn(4, 3)).sum().backward()
    (found,) = [f for f in t.findings if f.code == "TT102"]
    assert found.location is not None
    assert "1e38 * 1e38" in (found.location.code or "")


class Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, inner: nn.Module, *_: torch.Tensor) -> torch.Tensor:
        ctx.inner = inner
        ctx.save_for_backward(x)
        out: torch.Tensor = inner(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        for again in range(2):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                got = torch.autograd.grad(ctx.inner(x), (x, *ctx.inner.parameters()), grad)
            grad = grad if again else grad + got[0] / (grad - grad)
        return got[0] * 2, None, *got[1:]


class UsesAdjoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = Adjoint.apply(x, self.inner, *self.inner.parameters())
        return out


def test_an_own_backward_is_followed_through_the_passes_that_it_ran_itself() -> None:
    """What it returns is of the second, and is bad since the line after the first."""
    model = UsesAdjoint()
    with trace(out=lambda record: None) as t:
        model(torch.randn(4, 3)).sum().backward()
    (found,) = [f for f in t.findings if f.code == "TT102"]
    assert found.op == "Adjoint"
    assert found.location is not None
    assert "got[0] / (grad - grad)" in (found.location.code or "")


class Serving(nn.Module):
    """Attends to what came before, in a buffer that it writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.register_buffer("kept", torch.zeros(8, 4))
        self.at = 0

    def forward(self, x: Tensor, late: list[Tensor]) -> Tensor:
        h: Tensor = self.embed(x)
        self.kept[self.at] = h[0]
        self.at += 1
        scores = h @ self.kept.T * late[0]
        return scores.exp()


@pytest.mark.parametrize("made_there", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_what_overflows_in_inference_mode_is_narrowed(made_there: bool, changed: bool) -> None:
    """Tensors that are made there count no versions, so that only the replay shows a change."""
    torch.manual_seed(0)
    records: list[Any] = []
    with torch.inference_mode(made_there):
        net = Serving().eval()
    with trace(out=records.append) as t, torch.inference_mode():
        for i in range(3):
            x, factor = torch.ones(2, 4), torch.tensor(1e4 if i == 1 else 1.0)
            net(x, [factor])
            if changed:
                x.mul_(2)
    assert [a for a in records if isinstance(a, Action) and a.action == "tracer_error"] == []
    (found,) = [f for f in t.findings if f.severity == "error"]
    assert (found.step, found.op, found.evidence["placed"]) == (
        1, "exp", "close" if changed else "exact",
    )  # fmt: skip
    assert found.location is not None
    assert found.location.code == "return scores.exp()"
